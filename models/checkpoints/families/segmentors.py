"""mmsegmentation's configurations: what its runners keep beside the weights.

Runners of mmcv (0.x) write `meta` with `config`, `CLASSES` and `PALETTE`; those of mmengine (1.x)
write `cfg` and `dataset_meta`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.checkpoints.containers import Container
from models.checkpoints.families.configuration import read_configuration
from models.errors import CheckpointError
from models.tasks.labels import as_label

SEGMENTOR = "EncoderDecoder"
TABLES = ("backbone", "neck", "decode_head", "test_cfg")
# (longer, shorter) side that images are resized to fit in, of most configurations.
SCALE = (2048, 512)
# The longer side that stands for an unlimited one, in multiples of the shorter side.
MAX_ASPECT = 8
RESIZING = ("Resize", "ResizeShortestEdge")
# Steps of a test pipeline that would change an image's size in ways that are not supported.
REFUSED = ("ResizeToMultiple", "Pad", "CenterCrop", "RandomCrop", "Rerange")


class Table:
    """A table of a configuration.

    A table with a `type` is whole: what it leaves out has the default of that type's code. What any
    other leaves out is assumed.
    """

    def __init__(self, name: str, values: Any, assumed: dict[str, Any]) -> None:
        """
        Args:
            values: the table; anything else counts as an empty one.
            assumed: extended by the defaults that were used, as `NAME.KEY`.
        """
        self.name = name
        self.values: Mapping[str, Any] = values if isinstance(values, Mapping) else {}
        self.assumed = assumed

    @property
    def type(self) -> str:
        """The class that the table describes, without its package's prefix; may be empty."""
        return str(self.values.get("type", "")).rpartition(".")[2]

    def find(self, key: str) -> Any:
        """A value, None where there is none."""
        return self.values.get(key)

    def get(self, key: str, default: Any) -> Any:
        """A value, or else the default."""
        if self.values.get(key) is not None:
            return self.values[key]
        if "type" not in self.values:
            self.assumed[f"{self.name}.{key}"] = default
        return default

    def require(self, key: str, plausible: str, default: Any = None) -> Any:
        """A value; the default if the table is whole.

        Raises:
            CheckpointError: there is none.
        """
        if (value := self.values.get(key)) is not None:
            return value
        if default is None or "type" not in self.values:
            raise CheckpointError(
                f"the file does not say {self.name}.{key}, and its shapes do not determine it; set "
                f"arguments = {{{self.name} = {{{key} = ...}}}}: {plausible}"
            )
        return default

    def only(self, key: str, *supported: Any) -> None:
        """Refuse a value other than those supported; no value is fine.

        Raises:
            CheckpointError: another value.
        """
        value = self.values.get(key)
        if isinstance(value, Mapping) and "type" in value:
            value = value["type"]
        if value is not None and value not in supported:
            raise CheckpointError(
                f"{self.name}.{key} is {value!r}; supported: {', '.join(map(repr, supported))}"
            )

    def only_eps(self, key: str, supported: float) -> None:
        """Refuse a norm's table with another epsilon; none is its code's default.

        Raises:
            CheckpointError: another epsilon.
        """
        norm = self.values.get(key)
        if isinstance(norm, Mapping) and norm.get("eps", supported) != supported:
            raise CheckpointError(f"{self.name}.{key}.eps is {norm['eps']}; supported: {supported}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmentor:
    """A configuration in the words of 0.x.

    Attributes:
        backbone, neck, decode_head, test_cfg: its tables.
        scale: pixels that an image is resized to fit in, (longer, shorter) or (width, height).
        keep_ratio: whether it keeps its aspect ratio.
        mean, std: of pixels within 0..1; None where it is not said.
        labels, palette: the classes' names and colours, where it says them.
        assumed: filled while the tables are read.
    """

    backbone: Table
    neck: Table
    decode_head: Table
    test_cfg: Table
    scale: tuple[int, int] | None = None
    keep_ratio: bool = True
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    labels: Sequence[str] = ()
    palette: Any = None
    assumed: dict[str, Any] = field(default_factory=dict)


def read_segmentor(container: Container, arguments: Mapping[str, Any]) -> Segmentor:
    """The configuration of a file; tables among the arguments replace its own.

    Raises:
        CheckpointError: it asks for something that is not supported.
    """
    meta = container.beside.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    config = read_configuration(str(meta.get("config") or meta.get("cfg") or ""))
    model = config.get("model")
    tables = {**(model if isinstance(model, Mapping) else {})}
    if (kind := tables.get("type", SEGMENTOR)) != SEGMENTOR:
        raise CheckpointError(f"the model is a {kind}; supported: {SEGMENTOR}")
    tables |= {n: arguments[n] for n in TABLES if isinstance(arguments.get(n), Mapping)}
    data = meta.get("dataset_meta")
    data = data if isinstance(data, Mapping) else {}
    labels = data.get("classes") or meta.get("CLASSES")
    norm = _normalization(config)
    scale, keep_ratio = _scale(config)
    assumed: dict[str, Any] = _single_view(config)
    return Segmentor(
        **{name: Table(name, tables.get(name), assumed) for name in TABLES},
        scale=scale,
        keep_ratio=keep_ratio,
        mean=_triple(norm.get("mean")),
        std=_triple(norm.get("std")),
        labels=[as_label(name) for name in labels] if isinstance(labels, list) else (),
        palette=data.get("palette") or meta.get("PALETTE"),
        assumed=assumed,
    )


def _steps(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The test pipeline's steps, those of a `MultiScaleFlipAug` after itself."""
    places = (("test_pipeline",), ("data", "test", "pipeline"),
              ("test_dataloader", "dataset", "pipeline"))  # fmt: skip
    for place in places:
        steps: Any = config
        for name in place:
            steps = steps.get(name) if isinstance(steps, Mapping) else None
        if isinstance(steps, Sequence) and not isinstance(steps, str):
            for step in steps:
                if isinstance(step, Mapping):
                    yield step
                    inner = step.get("transforms")
                    if isinstance(inner, Sequence):
                        yield from (each for each in inner if isinstance(each, Mapping))
            return


def _single_view(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is assumed where the test pipeline averages several scales or flips: neither."""
    assumed: dict[str, Any] = {}
    for step in _steps(config):
        ratios = step.get("img_ratios")
        if isinstance(ratios, Sequence) and list(ratios) != [1.0]:
            assumed["img_ratios"] = [1.0]
        if str(step.get("type", "")).endswith("MultiScaleFlipAug") and step.get("flip"):
            assumed["flip"] = False
    return assumed


def _normalization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table with `mean` and `std`; empty if there is none.

    Raises:
        CheckpointError: the network takes its channels in OpenCV's order, or images are padded.
    """
    model = config.get("model")
    candidates: list[Any] = [
        model.get("data_preprocessor") if isinstance(model, Mapping) else None,
        config.get("data_preprocessor"),
        config.get("img_norm_cfg"),
        *(step for step in _steps(config) if step.get("type") == "Normalize"),
    ]
    table = next((c for c in candidates if isinstance(c, Mapping) and c.get("mean")), {})
    padded = table.get("test_cfg")
    if isinstance(padded, Mapping) and (padded.get("size") or padded.get("size_divisor")):
        raise CheckpointError("data_preprocessor.test_cfg pads images, which is not supported")
    if table.get("to_rgb") is False or table.get("bgr_to_rgb") is False:
        raise CheckpointError("the configuration has images in BGR; only RGB is supported")
    return table


def _triple(values: Any) -> tuple[float, ...] | None:
    """Three numbers of 0..255 as those of 0..1."""
    if not isinstance(values, Sequence) or len(values) != 3:
        return None
    return tuple(float(value) / 255 for value in values)


def _scale(config: Mapping[str, Any]) -> tuple[tuple[int, int] | None, bool]:
    """`Segmentor.scale` and `Segmentor.keep_ratio` of the test pipeline.

    Raises:
        CheckpointError: it resizes in a way that is not supported.
    """
    scale, keep_ratio = None, True
    for step in _steps(config):
        kind = str(step.get("type", "")).rpartition(".")[2]
        if kind in REFUSED:
            raise CheckpointError(f"the configuration's test pipeline has {kind}, not supported")
        if kind == "ResizeShortestEdge":
            longest = step.get("max_size")
            scale = (longest or MAX_ASPECT * step["scale"], step["scale"])
            continue
        given = step.get("img_scale", step.get("scale"))
        if isinstance(given, Sequence) and given and isinstance(given[0], Sequence):
            given = given[0]
        if isinstance(given, Sequence) and len(given) == 2 and all(given):
            scale = (int(given[0]), int(given[1]))
        if kind == "Resize":
            keep_ratio = bool(step.get("keep_ratio", "scale" not in step))
    if scale is None or not keep_ratio:
        return scale, keep_ratio
    shorter, longer = sorted(scale)
    return (min(longer, MAX_ASPECT * shorter), shorter), True

"""The catalog: trunks, and the models that use them, from TOML files."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from models.catalog_content import check_type, is_url, read_content, without_secrets
from models.errors import CatalogError, ModelNotFoundError
from models.tasks.table import tasks

BUILT_IN = Path(__file__).with_name("catalogs")
DEVICE_KINDS = frozenset({"cpu", "cuda"})
Dimensions = tuple[int, ...]
# How servers name the versions of a trunk while one replaces another.
VERSION = re.compile(r" #\d+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkEntry:
    """A backbone. Settings that are None follow the server's defaults."""

    name: str
    # Where its bytes come from, see `models/checkpoints/sources.py`.
    source: str
    # Where a missing file can be downloaded.
    origin: str = ""
    # `timm`, `open_clip` or `sentence`.
    library: str = "timm"
    # timm's or open_clip's name, if the checkpoint does not say.
    architecture: str | None = None
    # open_clip's name of the weights.
    pretrained: str | None = None
    # `image` or `text`. The towers of a CLIP are two trunks of one source.
    tower: str = "image"
    # The source of a text tower's `tokenizer.json`.
    tokenizer: str | None = None
    # What else the checkpoint does not say, such as `num_heads`.
    arguments: Mapping[str, Any] = field(default_factory=dict)
    # Settings that override those of the checkpoint's own transform.
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    channels_last: bool | None = None
    # What passes compute in, see `models/trunks/devices.py`. The key `dtype` is its other name.
    precision: str | None = None
    # The largest error over the largest value, compared with eager float32.
    tolerance: float | None = None
    # A folder of images that int8 is calibrated on, relative to the catalog.
    calibration: str | None = None
    # What runs its passes, see `models/trunks/engines`.
    engine: str | None = None
    # How images are resized: `exact`, `fast` or `gpu`.
    transform: str | None = None
    # Images in a pass: a number, or one by kind of device (`{cpu = 4}`).
    max_batch_size: int | Mapping[str, int] | None = None
    max_queue_delay_ms: float | None = None

    def batch_cap(self, device: str) -> int | None:
        """The most images in a pass on a kind of device (`cpu`, `cuda`); None: the default."""
        cap = self.max_batch_size
        return cap.get(device) if isinstance(cap, Mapping) else cap


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """What a request names: a head on a trunk, with labels.

    Args:
        text: the trunk that reads texts.
        templates: sentences that labels are put into, see `models/inputs/prompts.py`.
        join: how towers that were not trained together are brought to one space: `classes`, see
            `models/trunks/conse.py`.
        head: the head's kind, or `file:PATH`; None: what suits the task and the checkpoint.
        labels: see `models/tasks/labels.py`.
        dimensions: the numbers of first dimensions that its embeddings were trained to be cut to.
    """

    name: str
    trunk: str
    task: str
    text: str | None = None
    templates: str | list[str] | None = None
    join: str | None = None
    head: str | None = None
    labels: str | list[str] | None = None
    dimensions: Dimensions = ()
    description: str = ""
    licence: str = "unknown"
    parameters: str = ""
    paper: str = ""

    @property
    def trunks(self) -> tuple[str, ...]:
        """The names of the trunks that it uses."""
        return (self.trunk,) if self.text in (None, self.trunk) else (self.trunk, str(self.text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """All entries of a catalog.

    Args:
        path: the file that it was read from, which relative paths are relative to. Of a folder, one
            in it; of a URL, what relative paths cannot be relative to.
        trunks: entries by name.
        models: entries by name.
        defaults: the model that serves a task by default, by the task's name.
        startup: the models that are loaded when a server starts.
        location: what `load_catalog` was called with.
    """

    path: Path
    trunks: Mapping[str, TrunkEntry]
    models: Mapping[str, ModelEntry]
    defaults: Mapping[str, str]
    startup: tuple[str, ...]
    location: str = ""

    def model(self, name: str) -> ModelEntry:
        """The entry of that name.

        Raises:
            ModelNotFoundError: no such model; the message names some that exist.
        """
        try:
            return self.models[name]
        except KeyError:
            some = ", ".join(sorted(islice(self.models, 10)))  # of maybe a hundred thousand
            raise ModelNotFoundError(f"no model {name!r} in the catalog; it has {some}") from None

    def trunk(self, name: str) -> TrunkEntry:
        """The entry of the trunk of that name.

        Raises:
            CatalogError: no such trunk; the message names those that exist.
        """
        if name not in self.trunks:
            trunks = ", ".join(self.trunks)
            raise CatalogError(f"no trunk {name!r} in the catalog; it has {trunks}")
        return self.trunks[name]

    def default_model(self, task: str) -> ModelEntry:
        """The model that serves `task` if a request does not name one.

        Raises:
            ModelNotFoundError: the catalog has no model for the task.
        """
        if task not in self.defaults:
            raise ModelNotFoundError(f"the catalog has no model for the task {task!r}")
        return self.models[self.defaults[task]]


def load_catalog(location: str | Path) -> Catalog:
    """Read a catalog.

    Args:
        location: the name of a built-in catalog (`demo`, `hub`, `published`); the path of a TOML
            file, or of a folder of them; or the URL of one: `https:`, `http:`, or an object store's
            (`s3:`, `gs:`, ...) if fsspec's package for it is installed.

    Raises:
        CatalogError: it cannot be read, has an unknown key, or refers to a missing entry.
    """
    path = Path(location)
    if path.suffix != ".toml" and (BUILT_IN / f"{location}.toml").is_file():
        path = BUILT_IN / f"{location}.toml"
    elif not is_url(location) and not path.exists():
        built_in = ", ".join(sorted(item.stem for item in BUILT_IN.glob("*.toml")))
        raise CatalogError(
            f"catalog {location}: no such file or built-in catalog; built-in: {built_in}"
        )
    where = without_secrets(location) if is_url(location) else str(path)
    catalog = _parse(where, read_content(location if is_url(location) else path))
    if is_url(location):
        _check_absolute(where, catalog)
    return replace(
        catalog, path=path / "catalog.toml" if path.is_dir() else path, location=str(location)
    )


def _check_absolute(where: str, catalog: Catalog) -> None:
    """
    Raises:
        CatalogError: a catalog from a URL has a relative path.
    """
    named = [(t.name, path) for t in catalog.trunks.values() for path in (t.source, t.tokenizer)]
    named += [(model.name, model.head) for model in catalog.models.values()]
    paths = [(name, path[5:]) for name, path in named if path and path.startswith("file:")]
    paths += [(t.name, t.calibration) for t in catalog.trunks.values() if t.calibration]
    for name, path in paths:
        if not Path(path).is_absolute():
            raise CatalogError(
                f"catalog {where}: {name}: {path} is relative; a catalog from a URL has no folder, "
                "so files need absolute paths, or an https: source"
            )


def _parse(where: str, content: dict[str, Any]) -> Catalog:
    trunks = {n: _trunk(where, n, table) for n, table in content.get("trunks", {}).items()}
    models = {n: _entry(ModelEntry, where, n, t) for n, t in content.get("models", {}).items()}
    for model in models.values():
        for trunk in model.trunks:
            if trunk not in trunks:
                raise CatalogError(f"catalog {where}: {model.name}: no trunk {trunk!r}")
        if model.task == "zero-shot" and model.text is None:
            raise CatalogError(f"catalog {where}: {model.name}: zero-shot needs text = 'TRUNK'")
        if not all(type(count) is int and count > 0 for count in model.dimensions):
            raise CatalogError(f"catalog {where}: {model.name}: dimensions are positive numbers")
        if model.task not in tasks():
            raise CatalogError(
                f"catalog {where}: {model.name}: no task {model.task!r}; "
                f"tasks: {', '.join(tasks())}"
            )
    first = {model.task: model.name for model in reversed(models.values())}
    if "zero-shot" in first:  # its towers embed images and texts
        first.setdefault("embed", first["zero-shot"])
    defaults = {**first, **content.get("defaults", {})}
    startup = tuple(content.get("startup", models))
    if missing := {*defaults.values(), *startup} - models.keys():
        raise CatalogError(f"catalog {where}: no model {', '.join(sorted(missing))}")
    if any(VERSION.search(name) for name in trunks):
        raise CatalogError(f"catalog {where}: names of trunks may not end with ' #NUMBER'")
    return Catalog(
        path=Path(where), trunks=trunks, models=models, defaults=defaults, startup=startup
    )


def _trunk(where: str, name: str, table: Mapping[str, Any]) -> TrunkEntry:
    """A trunk's entry, whose precision may also be given as `dtype`."""
    if "dtype" in table and "precision" in table:
        raise CatalogError(f"catalog {where}: {name}: precision and dtype are the same; set one")
    renamed = {"precision" if key == "dtype" else key: value for key, value in table.items()}
    entry = _entry(TrunkEntry, where, name, renamed)
    tolerance = entry.tolerance
    if tolerance is not None and not _is_positive(tolerance):
        raise CatalogError(f"catalog {where}: {name}: tolerance must be a number above 0")
    caps = entry.max_batch_size
    by_kind = caps if isinstance(caps, Mapping) else {"cpu": caps}
    if by_kind.keys() - DEVICE_KINDS or not all(
        cap is None or (type(cap) is int and cap > 0) for cap in by_kind.values()
    ):
        raise CatalogError(
            f"catalog {where}: {name}: max_batch_size must be a number above 0, or one by kind of "
            f"device ({', '.join(sorted(DEVICE_KINDS))})"
        )
    return entry


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


Entry = TypeVar("Entry", TrunkEntry, ModelEntry)


def _entry(entry_class: type[Entry], where: str, name: str, table: Mapping[str, Any]) -> Entry:
    known = {item.name for item in fields(entry_class)} - {"name"}
    required = {
        item.name
        for item in fields(entry_class)
        if item.default is MISSING and item.default_factory is MISSING
    } - {"name"}
    if unknown := table.keys() - known:
        raise CatalogError(
            f"catalog {where}: {name}: unknown {', '.join(sorted(unknown))}; "
            f"known are {', '.join(sorted(known))}"
        )
    if missing := required - table.keys():
        raise CatalogError(f"catalog {where}: {name}: {', '.join(sorted(missing))} is missing")
    for key, value in table.items():
        hint = get_type_hints(entry_class)[key]
        # TOML has lists where entries have tuples
        check_type(
            where,
            f"{name}.{key}",
            hint,
            tuple(value) if hint == Dimensions and isinstance(value, list) else value,
        )
    return entry_class(name=name, **table)

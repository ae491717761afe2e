"""Trunks: a backbone with its weights, which several models may share, and which runs in batches.

Shape suffixes: B batch, C channels, H W pixels, h w grid cells, T tokens, D embedding, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.catalog import TrunkEntry
from models.errors import EngineError, InputError
from models.inputs.images import DEFAULT_LIMITS, ImageLimits
from models.inputs.jpeg_file import JpegFile
from models.trunks.adapters import AdapterHooks
from models.trunks.devices import Placement
from models.trunks.engines.eager import Eager
from models.trunks.engines.registry import engine_class
from models.trunks.features import LAST_OUTPUT, BatchRequest, FeatureRequest, PassPlan
from models.trunks.jpeg_batch import JpegBatch
from models.trunks.output import TrunkOutput
from models.trunks.query_tokens import QueryBatch, QuerySet
from models.trunks.slot_bank import SlotBank
from models.trunks.weights import parameter_bytes, state_digest


class Trunk:
    """A backbone. Subclasses describe its pass (`create_pass`, `pass_inputs`, `output`) and its
    inputs (`prepare`, `collate`, `blank`). An engine runs the pass. Nothing outside a trunk reads
    its `network`, except reference outputs.

    Args:
        architecture: a name for people.
        preprocess: how inputs become tensors, a dataclass: a `Preprocess` for images. Equal digests
            mean equal tensors.

    Attributes:
        modality: what it takes: `image`, `text`, `video` or `latent`.
        has_tokens: False if a pass yields the pooled embedding alone.
        num_classes: classes of the checkpoint's own classifier; 0 if there is none.
        num_prefix_tokens: class and register tokens.
        blocks: blocks that heads can read and that query tokens pass through; empty for networks
            other than plain ViTs.
        layer_count: blocks or stages whose outputs heads can read.
        exponents: (G,) of a pooling by group generalized mean, or None.
        takes_gsd: whether features depend on the ground sample distance (Scale-MAE).
        has_dense: whether it can embed every patch (`FeatureRequest.dense`).
        digest: SHA-256 over the weights, which does not depend on the precision.
        feature_values: numbers in one input's last output, once a pass has run.
        adapters: the hooks that add low-rank adapters to its linear layers.
        classifiers: the weights of heads' linear classifiers by their number of features.
        identity: changes whenever a plan's pass may compute something else in float32.
        entry: its entry in the catalog that it was loaded from, if there is one.
        version: how often its entry was replaced before, while a registry served.
    """

    modality = "image"
    has_tokens = False
    num_classes = 0
    num_prefix_tokens = 0
    blocks: Sequence[Any] = ()
    layer_count = 0
    exponents: Tensor | None = None
    takes_gsd = False
    has_dense = False
    feature_values = 0
    entry: TrunkEntry | None = None
    version = 0

    def __init__(
        self, architecture: str, network: nn.Module, preprocess: Any, placement: Placement
    ) -> None:
        self.architecture = architecture
        self.preprocess = preprocess
        engine = engine_class(placement.engine)
        self.placement = engine.place(placement).for_network(network)
        self.digest = state_digest(network.state_dict())
        self.network: Any = self.placement.apply(network)
        self.identity = f"{architecture} {self.digest} {preprocess.digest}"
        self.engine = engine(self)
        self.adapters = AdapterHooks(self.network)
        self.classifiers: dict[int, SlotBank] = {}
        # no other engine runs the hooks
        self._adapter_engine = self.engine if engine is Eager else Eager(self)

    # -- a pass ----------------------------------------------------------------------------

    def forward(self, batch: Tensor, request: BatchRequest = LAST_OUTPUT) -> TrunkOutput:
        """Run the backbone on a batch.

        Args:
            batch: for images uint8 pixels (B, 3, H, W), or normalised float pixels; for texts
                token ids (B, T); for others as `collate` returns it.
            request: what the pass yields beyond the last output.
        """
        batch = batch.to(self.placement.device, non_blocking=True)
        plan, inputs, queries = self.pass_inputs(batch, request)
        engine = self._adapter_engine if request.adapters else self.engine
        with self.adapters.use(request.adapters, len(batch)):
            tensors = engine.run(plan, inputs)
        output = self.output(batch, tensors)
        if output.features.numel():
            self.feature_values = output.features[0].numel()
        if queries is None:
            return output
        return replace(output, queries=queries.split(tensors["queries"]))

    @property
    def splits_adapters(self) -> bool:
        """Whether the engine leaves rows with adapters to eager passes of their own."""
        return self._adapter_engine is not self.engine

    def build(self, request: BatchRequest) -> None:
        """Have the engine begin to build the pass for a request, before its first use."""
        batch = self.collate(self.samples(2)).to(self.placement.device)
        plan, inputs, _ = self.pass_inputs(batch, request)
        self.engine.prepare(plan, inputs)

    def pass_inputs(
        self, batch: Tensor, request: BatchRequest
    ) -> tuple[PassPlan, tuple[Tensor, ...], QueryBatch | None]:
        """The plan of a request's pass, its input tensors, and where query tokens are in them."""
        return request.plan, (batch,), None

    def create_pass(self, plan: PassPlan) -> nn.Module:
        """The module of a plan's pass: the batch in, named tensors out."""
        raise NotImplementedError

    def output(self, batch: Tensor, tensors: Mapping[str, Tensor]) -> TrunkOutput:
        """A pass's named tensors as the trunk's output."""
        raise NotImplementedError

    def width(self, *, pooled: bool) -> int | None:
        """The features of a token, or of `pool`; None where only a pass tells."""
        return None

    def pool(self, output: TrunkOutput) -> Tensor:
        """(B, D): the backbone's own pooled representation, before any classifier."""
        raise NotImplementedError(f"{self.architecture} has no embedding")

    def classify(self, output: TrunkOutput) -> Tensor:
        """(B, K) logits of the checkpoint's own classifier."""
        raise NotImplementedError(f"{self.architecture} has no classifier")

    def norm(self, layer_BTD: Tensor) -> Tensor:
        """A block's output after the final norm."""
        raise NotImplementedError(f"the blocks of {self.architecture} cannot be read")

    def summary(self, batch: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, bool]:
        """For a batch and the outputs of its pass the logits (B, K) of the own classifier and True,
        otherwise the last output (B, D) and False. Engines are compared by it."""
        output = self.output(batch, tensors)
        if self.num_classes and "features" in tensors:
            return self.classify(output), True
        return next(iter(tensors.values())).flatten(1), False

    # -- inputs ----------------------------------------------------------------------------

    def prepare(self, item: Any, limits: ImageLimits = DEFAULT_LIMITS) -> Tensor:
        """One decoded input as the tensor that `collate` takes.

        Raises:
            InputError: not an input of this trunk.
        """
        raise NotImplementedError

    def open_jpeg(self, data: bytes, limits: ImageLimits) -> JpegFile | None:
        """An encoded image that is decoded in its batch; None if it is to be decoded before.

        Raises:
            ImageTooLargeError, InputError: it is over a limit, or its header is damaged.
        """
        return None

    @property
    def min_side(self) -> int | None:
        """Pixels of the shorter side that `prepare` needs of an image; None if it needs all."""
        return None

    def batch(self, inputs: Sequence[Any], *, pin_memory: bool = False) -> Tensor | JpegBatch:
        """What `prepare` and `open_jpeg` returned, as a batch on the host."""
        return self.collate(inputs, pin_memory=pin_memory)

    def collate(self, inputs: Sequence[Tensor], *, pin_memory: bool = False) -> Tensor:
        """Prepared inputs as the batch that `forward` takes."""
        batch = torch.stack(list(inputs))
        return batch.pin_memory() if pin_memory else batch

    def blank(self) -> Tensor:
        """A prepared input without content, for warm-up and probes."""
        raise NotImplementedError

    def samples(self, count: int) -> list[Tensor]:
        """Prepared inputs with real content, for comparing engines."""
        raise NotImplementedError

    def calibration_inputs(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The placement's calibration set, prepared: images to calibrate on, and those held out.

        Raises:
            EngineError: the trunk takes no images.
        """
        raise EngineError(f"int8 is for models of images; {self.architecture} takes others")

    # -- what heads ask --------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes on the device: the weights, and room that is kept for heads."""
        banks = list(self.classifiers.values())
        return parameter_bytes(self.network) + sum(bank.spare_bytes for bank in banks)

    @property
    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels; (0, 0) for networks without patches."""
        return 0, 0

    def token_request(self, layers: Sequence[int]) -> FeatureRequest:
        """What the tokens of the last output, or those of some blocks, need of a pass.

        Raises:
            InputError: the trunk has no patch tokens, or no such blocks.
        """
        raise InputError(f"{self.architecture} has no patch tokens", field="output")

    def token_values(self, layers: Sequence[int]) -> int:
        """The most numbers in those tokens of one input, as far as it is known before a pass."""
        return self.feature_values * max(1, len(layers))

    def add_queries(self, raw_LTD: Tensor) -> QuerySet:
        """Store a head's query tokens (L, T, D), to be named in a `FeatureRequest`."""
        raise NotImplementedError(f"{self.architecture} takes no query tokens")

    def block_means(self, pixels: Tensor) -> list[Tensor]:
        """Every block's mean output (B, D) for normalised pixels, of a hierarchical network."""
        raise NotImplementedError(f"{self.architecture} has no means of blocks")

    def linear_classifier(self) -> tuple[Tensor, Tensor] | None:
        """Weight (K, D) and bias (K,) of the own classifier, if it is one linear layer over the
        pooled features; else None."""
        return None

    def attention_request(self) -> FeatureRequest | None:
        """What `class_attention` needs of a pass; None if the trunk has no class token to read."""
        return None

    def class_attention(self, output: TrunkOutput) -> Tensor:
        """(B, heads, h, w): the class token's attention to each patch, of several class tokens one
        after another. Together with the attention to other tokens each map sums to 1."""
        raise NotImplementedError(f"{self.architecture} has no class token's attention")

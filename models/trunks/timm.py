"""Trunks of timm's networks, and of networks with the same methods."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from timm.layers import PatchEmbed, to_2tuple
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import ConvPatchEmbed
from torch import Tensor, nn

from models.errors import InputError
from models.inputs.transforms import Preprocess
from models.networks.patchconvnet import PatchConvNet
from models.networks.vit import HybridPatches
from models.trunks.devices import Placement
from models.trunks.features import BatchRequest, FeatureRequest, PassPlan
from models.trunks.hooks import BlockHooks
from models.trunks.image import ImageTrunk
from models.trunks.image_tokens import check_layers
from models.trunks.output import TrunkOutput, by_number
from models.trunks.pixel_input import PixelInput
from models.trunks.pooling import ggem
from models.trunks.query_tokens import QueryBank, QueryBatch, QuerySet

# Patch embeddings by padded convolutions, which yield a cell for a part of a patch.
ROUND_UP = (ConvPatchEmbed, HybridPatches)


class TimmPass(nn.Module):
    """One pass: pixels (B, 3, H, W), then `QueryBatch.inputs`; named tensors out: `features`,
    `pixels`, `queries`, and what `Capture.tensors` lists."""

    def __init__(
        self, network: nn.Module, hooks: BlockHooks, plan: PassPlan, pixel_input: nn.Module
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.pixel_input = pixel_input
        self._hooks = hooks
        self._plan = plan

    def forward(self, pixels: Tensor, *query_inputs: Tensor) -> dict[str, Tensor]:
        plan = self._plan
        pixels = self.pixel_input(pixels)
        tensors = {"pixels": pixels} if plan.pixels else {}
        if plan.features:
            with self._hooks.capture(plan, query_inputs) as capture:
                tensors["features"] = self.network.forward_features(pixels)
            tensors |= capture.finish()
        return tensors


class TimmTrunk(ImageTrunk):
    """A timm network with its classifier still attached, if it has one."""

    has_tokens = True

    def __init__(
        self, architecture: str, network: nn.Module, preprocess: Preprocess, placement: Placement
    ) -> None:
        self._hooks = BlockHooks(network)
        super().__init__(architecture, network, preprocess, placement)
        self.blocks: Sequence[Any] = self._hooks.blocks
        self.layer_count = len(self._hooks.layers)
        self.num_classes = int(self.network.num_classes)
        self.num_prefix_tokens = int(getattr(self.network, "num_prefix_tokens", 0))
        self._bank = QueryBank(self.blocks)

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._bank.spare_bytes

    def create_pass(self, plan: PassPlan) -> nn.Module:
        pixel_input = PixelInput(self.preprocess, self.placement)
        return TimmPass(self.network, self._hooks, plan, pixel_input)

    def pass_inputs(
        self, batch: Tensor, request: BatchRequest
    ) -> tuple[PassPlan, tuple[Tensor, ...], QueryBatch | None]:
        height, width = batch.shape[-2:]
        if problem := size_problem(self.network, height, width):
            raise InputError(
                f"{self.architecture} does not take {height}x{width} pixels: {problem}",
                field="pixel_values",
            )
        if not request.queries:
            return request.plan, (batch,), None
        queries = QueryBatch(
            request.queries,
            len(batch),
            self.placement.device,
            max_padded=self.engine.max_padded_queries,
        )
        plan = replace(request.plan, query_groups=queries.whole)
        return plan, (batch, *queries.inputs(self._bank)), queries

    def output(self, batch: Tensor, tensors: Mapping[str, Tensor]) -> TrunkOutput:
        pixels = tensors.get("pixels")
        if (features := tensors.get("features")) is None:
            assert pixels is not None
            nothing = pixels.new_empty(len(batch), 0, 0)
            return TrunkOutput(nothing, 0, self._grid(batch), pixels=pixels)
        keys, values = by_number(tensors, "keys"), by_number(tensors, "values")
        return TrunkOutput(
            features,
            *self._layout(features, batch),
            layers=by_number(tensors, "layers"),
            attention=by_number(tensors, "attention"),
            cls_attention=by_number(tensors, "cls_attention"),
            keys_values=[(keys[number], values[number]) for number in sorted(keys)],
            pixels=pixels,
        )

    def _layout(self, features: Tensor, batch: Tensor) -> tuple[int, tuple[int, int], bool]:
        """Prefix tokens, grid, and whether channels are last."""
        if features.dim() == 4:
            channels_last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
            rows, columns = features.shape[1:3] if channels_last else features.shape[2:]
            return 0, (rows, columns), channels_last
        return self.num_prefix_tokens, self._grid(batch), False

    def norm(self, layer_BTD: Tensor) -> Tensor:
        normed: Tensor = self.network.norm(layer_BTD)
        return normed

    def width(self, *, pooled: bool) -> int | None:
        if not isinstance(self.network, VisionTransformer):
            return None
        pools_itself = type(self.network).forward_head is not VisionTransformer.forward_head
        return None if pooled and pools_itself else self.network.embed_dim

    def pool(self, output: TrunkOutput) -> Tensor:
        if self.exponents is not None:
            return ggem(output.patches_BTD, self.exponents)
        pooled: Tensor = self.network.forward_head(output.features, pre_logits=True)
        return pooled

    def classify(self, output: TrunkOutput) -> Tensor:
        logits: Tensor
        if self.exponents is not None:
            logits = self.network.head(self.pool(output).to(self.placement.dtype))
        else:
            logits = self.network.forward_head(output.features)
        return logits

    def token_request(self, layers: Sequence[int]) -> FeatureRequest:
        check_layers(self.architecture, self.layer_count, layers)
        return FeatureRequest(layers=frozenset(layers))

    def token_values(self, layers: Sequence[int]) -> int:
        # an early stage of a hierarchical network has up to 8 times the numbers of the last one
        largest = 8 if layers and hasattr(self.network, "stages") else 1
        return super().token_values(layers) * largest

    @property
    def patch_size(self) -> tuple[int, int]:
        layer = getattr(self.network, "patch_embed", getattr(self.network, "stem", None))
        rows, columns = to_2tuple(getattr(layer, "patch_size", (0, 0)))
        return rows, columns

    def add_queries(self, raw_LTD: Tensor) -> QuerySet:
        return self._bank.add(raw_LTD.to(self.placement.device, self.placement.dtype))

    def block_means(self, pixels: Tensor) -> list[Tensor]:
        if not hasattr(self.network, "block_means"):
            return super().block_means(pixels)
        means: list[Tensor] = self.network.block_means(pixels)
        return means

    def linear_classifier(self) -> tuple[Tensor, Tensor] | None:
        classifier = getattr(self.network, "get_classifier", lambda: None)()
        if not isinstance(classifier, nn.Linear) or classifier.bias is None:
            return None
        return classifier.weight, classifier.bias

    def attention_request(self) -> FeatureRequest | None:
        if not self.blocks or getattr(self.network, "cls_token", None) is None:
            return None
        return FeatureRequest(cls_attention=frozenset({len(self.blocks) - 1}))

    def class_attention(self, output: TrunkOutput) -> Tensor:
        maps = output.cls_attention[len(self.blocks) - 1][..., output.prefix :]
        return maps.reshape(*maps.shape[:2], *output.grid)

    def _grid(self, batch: Tensor) -> tuple[int, int]:
        height, width = batch.shape[-2:]
        rows, columns = self.patch_size
        rows, columns = rows or height, columns or width
        layer = getattr(self.network, "patch_embed", None)
        if isinstance(layer, ROUND_UP) or getattr(layer, "dynamic_img_pad", False):
            return -(-height // rows), -(-width // columns)
        return height // rows, width // columns


class PatchConvNetTrunk(TimmTrunk):
    """PatchConvNet, whose attention is that of its pooling (arXiv 2112.13692)."""

    network: PatchConvNet

    def attention_request(self) -> FeatureRequest | None:
        return FeatureRequest(pixels=True, features=False)

    def class_attention(self, output: TrunkOutput) -> Tensor:
        assert output.pixels is not None
        maps = self.network.last_attention(output.pixels)
        maps = maps[..., -output.grid[0] * output.grid[1] :].flatten(1, 2)
        return maps.reshape(*maps.shape[:2], *output.grid)


def size_problem(network: nn.Module, height: int, width: int) -> str | None:
    """Why a network does not take inputs of that size, or None. A network may have `check_size`,
    which says so; timm's patch embeddings take one size, unless they are not strict."""
    check: Callable[[int, int], str | None] | None = getattr(network, "check_size", None)
    if check is not None:
        return check(height, width)
    for layer in network.children():
        if isinstance(layer, PatchEmbed) and layer.strict_img_size and layer.img_size:
            rows, columns = layer.img_size
            if (height, width) != (rows, columns):
                return f"it takes {rows}x{columns} pixels alone"
    return None

"""A classifier trained on a frozen trunk's features: a linear probe, or a small MLP.

The features are the trunk's own pooled output; or the class tokens of several blocks, with or
without the mean of the last one's patch tokens, as in evaluations of self-supervised ViTs.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from models.checkpoints.checkpoint import HeadState
from models.checkpoints.strict import UNFIT
from models.errors import CheckpointError
from models.heads.ranking import Ranking
from models.heads.stacked import Part, StackedClassifier, classify_together, stacked
from models.trunks.base import Trunk
from models.trunks.features import NO_EXTRAS, FeatureRequest
from models.trunks.output import TrunkOutput
from models.trunks.transfers import index_tensor
from models.trunks.weights import state_digest

CLASSIFIER = "classifier."
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
}


class Linear(Ranking):
    """Settings:
        layers: blocks, counted from 0 or back from -1, whose class tokens are the features. None:
            the trunk's own pooling.
        mean: how the mean of the last block's patch tokens is added: `interleaved` with the class
            tokens (DINO, arXiv 2104.14294), `appended` to them, or `alone`, or `unnormed`: alone
            and without the final norm (iBOT, arXiv 2111.07832).
        last_blocks: of a hierarchical network, how many of its last blocks' means are the features
            (EsViT, arXiv 2106.09785).
        activations, norm_eps: see `create_classifier`.

    Tensors: `classifier.N...`, see `create_classifier`.
    """

    kind = "linear"
    needs_state = True
    is_main = True
    is_portable = True
    is_fittable = True

    def __init__(self, trunk: Trunk, labels: Sequence[str], state: HeadState) -> None:
        """
        Raises:
            CheckpointError: the trunk has no such blocks or features, or the number of labels is
                not that of the outputs.
        """
        super().__init__(labels)
        self.trunk = trunk
        classifier = create_classifier(state).to(trunk.placement.device)
        self.feature_count, outputs = first_size(classifier), last_size(classifier)
        if outputs != len(labels):
            raise CheckpointError(f"the head has {len(labels)} labels for {outputs} outputs")
        self._digest = state_digest(state.tensors) + json.dumps(state.settings, sort_keys=True)
        self.read_settings(state)
        self.network = stacked(classifier, trunk)

    @classmethod
    def create(cls, trunk: Trunk, labels: Sequence[str], state: HeadState | None) -> Self:
        assert state is not None
        head = cls(trunk, labels, state)
        head.check_width()
        return head

    @property
    def digests(self) -> list[str]:
        return [self._digest]

    @property
    def nbytes(self) -> int:
        network = self.network
        return network.nbytes if isinstance(network, StackedClassifier) else super().nbytes

    def read_settings(self, state: HeadState) -> None:
        depth = len(self.trunk.blocks)
        layers = [int(layer) for layer in state.settings.get("layers", ())]
        if layers:
            check_has_blocks(self.trunk)
        if wrong := [layer for layer in layers if not -depth <= layer < depth]:
            raise CheckpointError(f"the head reads block {wrong[0]}; the trunk has {depth}")
        self.layers = [layer % depth for layer in layers]
        self.mean = state.settings.get("mean")
        if self.mean not in (None, "interleaved", "appended", "alone", "unnormed"):
            raise CheckpointError(f"unknown setting mean = {self.mean!r} of a linear head")
        layer_request = FeatureRequest(layers=frozenset(self.layers))
        self.request = layer_request if self.layers else NO_EXTRAS
        self.last_blocks = int(state.settings.get("last_blocks", 0))
        if self.last_blocks:
            self.request = FeatureRequest(pixels=True, features=False)

    def check_width(self) -> None:
        """Raise CheckpointError if the trunk gives another number of features than are read."""
        width = self.trunk.width(pooled=not self.layers)
        if self.last_blocks or width is None:
            return
        parts = 1
        if self.layers and self.mean not in ("alone", "unnormed"):
            parts = len(self.layers) + (self.mean is not None)
        if self.feature_count != parts * width:
            raise CheckpointError(
                f"the head reads {self.feature_count} features; the trunk gives {parts * width}"
            )

    def features(self, output: TrunkOutput) -> Tensor:
        """(B, F) float32: the classifier's input."""
        if self.last_blocks:
            assert output.pixels is not None
            means = self.trunk.block_means(output.pixels)
            return torch.cat(means[-self.last_blocks :], -1).float()
        if not self.layers:
            return self.trunk.pool(output).float()
        if self.mean == "unnormed":
            return output.layers[self.layers[-1]][:, output.prefix :].float().mean(1)
        normed = [self.trunk.norm(output.layers[layer]) for layer in self.layers]
        class_tokens = torch.cat([layer[:, 0] for layer in normed], -1).float()
        if self.mean is None:
            return class_tokens
        mean = normed[-1][:, output.prefix :].float().mean(1)
        match self.mean:
            case "interleaved":
                return torch.stack([class_tokens, mean], -1).flatten(1)
            case "appended":
                return torch.cat([class_tokens, mean], -1)
        return mean

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        assert self.network is not None
        return {"logits": self.network(self.features(output))}

    @property
    def shared(self) -> Hashable:
        if self.last_blocks:  # read by a pass of their own
            return None
        return type(self), tuple(self.layers), self.mean

    @classmethod
    def forward_together(
        cls, heads: Sequence[Self], output: TrunkOutput, index: Sequence[Sequence[int]], best: int
    ) -> list[Part]:
        """One computation of the features, then the heads' classifiers."""
        features = heads[0].features(output)
        rows = index_tensor([row for rows in index for row in rows], features.device)
        parts = features[rows].split_with_sizes([len(rows) for rows in index])
        return classify_together(heads[0].trunk, [head.network for head in heads], parts, best)


def check_has_blocks(trunk: Trunk) -> None:
    """Raise CheckpointError unless heads can read the trunk's blocks."""
    if not trunk.blocks:
        raise CheckpointError(
            f"this head reads the blocks of a plain ViT; {trunk.architecture} is not one"
        )


def create_classifier(state: HeadState) -> nn.Sequential:
    """The layers of tensors `classifier.N.weight` and so on, in the order of N, float32 and frozen.

    Tensors with a `running_mean` are batch norms, all others linear layers. The settings
    `activations` (`gelu`, `relu` or `tanh` by N) stand between them; `norm_eps` is the batch
    norms' epsilon.

    Raises:
        CheckpointError: no classifier, or layers whose sizes do not match.
    """
    layers: dict[int, nn.Module] = {}
    for number, tensors in sorted(_by_number(state.tensors).items()):
        layers[number] = _layer(tensors, float(state.settings.get("norm_eps", 1e-5)))
    last = max(layers, default=-1)
    if not isinstance(layers.get(last), nn.Linear):
        raise CheckpointError("the head has no classifier")
    for place, name in state.settings.get("activations", {}).items():
        if name not in ACTIVATIONS or int(place) in layers or int(place) > last:
            raise CheckpointError(
                f"the head's activation {name!r} at {place} is unknown, or its place is taken"
            )
        layers[int(place)] = ACTIVATIONS[name]()
    _check_sizes(layers)
    ordered = [layers[number] for number in sorted(layers)]
    return nn.Sequential(*ordered).eval().requires_grad_(False)


def _by_number(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    by_number: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(CLASSIFIER):
            place, _, name = key.removeprefix(CLASSIFIER).partition(".")
            if not place.isdecimal():
                raise CheckpointError(f"{key}: a classifier's layers are numbered")
            by_number.setdefault(int(place), {})[name] = value.float()
    return by_number


def _layer(state: dict[str, Tensor], norm_eps: float) -> nn.Module:
    try:
        layer: nn.Module
        if "running_mean" in state:
            size = len(state["running_mean"])
            layer = nn.BatchNorm1d(size, norm_eps, affine="weight" in state)
            state = {"num_batches_tracked": torch.tensor(0), **state}
        else:
            outputs, inputs = state["weight"].shape
            layer = nn.Linear(inputs, outputs, bias="bias" in state)
        layer.load_state_dict(state)
    except UNFIT as error:
        raise CheckpointError(f"the head's classifier does not fit together: {error}") from error
    return layer


def _check_sizes(layers: Mapping[int, nn.Module]) -> None:
    size = None
    for number in sorted(layers):
        layer = layers[number]
        if isinstance(layer, nn.Linear | nn.BatchNorm1d):
            is_linear = isinstance(layer, nn.Linear)
            inputs = layer.in_features if is_linear else layer.num_features
            if size not in (None, inputs):
                raise CheckpointError(
                    f"layer {number} of the classifier takes {inputs}, not {size}"
                )
            size = layer.out_features if is_linear else inputs


def first_size(network: nn.Module) -> int:
    """Input features of a classifier."""
    return next(layer.in_features for layer in network.modules() if isinstance(layer, nn.Linear))


def last_size(network: nn.Module) -> int:
    """Classes of a classifier."""
    return [layer.out_features for layer in network.modules() if isinstance(layer, nn.Linear)][-1]

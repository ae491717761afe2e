"""A classifier trained on a frozen trunk's features: a linear probe, or a small MLP.

The features are the trunk's own pooled output; or, as DINO's evaluation has them (arXiv
2104.14294), the class tokens of several blocks, or that of the last interleaved with the mean of
its patch tokens.
"""

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from models.checkpoint import HeadState
from models.errors import CheckpointError
from models.heads.ranking import Ranking
from models.need import NOTHING, Need
from models.trunk import Trunk, TrunkOutput, state_digest

CLASSIFIER = "classifier."


class Linear(Ranking):
    """Settings: `layers`, the blocks (counted from 0, or back from -1) whose class tokens are
    taken, none for the trunk's pooling; `interleave_mean`.

    Tensors: `classifier.N...` as `create_classifier` reads them.
    """

    def __init__(self, trunk: Trunk, labels: Sequence[str], state: HeadState) -> None:
        """
        Raises:
            CheckpointError: the trunk has no such blocks or features, or the labels do not fit.
        """
        super().__init__(labels)
        self.trunk = trunk
        self.network = create_classifier(state.tensors).to(trunk.placement.device)
        outputs = last_size(self.network)
        if outputs != len(labels):
            raise CheckpointError(f"the head has {len(labels)} labels for {outputs} outputs")
        self.digest = state_digest(state.tensors) + json.dumps(state.settings, sort_keys=True)
        self.read_settings(state)

    def read_settings(self, state: HeadState) -> None:
        depth = len(self.trunk.blocks)
        self.layers = [int(layer) % max(1, depth) for layer in state.settings.get("layers", ())]
        self.interleave_mean = bool(state.settings.get("interleave_mean", False))
        if self.layers:
            check_has_blocks(self.trunk)

    def needs(self, rows: Sequence[int]) -> Need:
        return Need(layers=frozenset(self.layers)) if self.layers else NOTHING

    def features(self, output: TrunkOutput) -> Tensor:
        """(B, F) float32: what the classifier sees."""
        if not self.layers:
            return self.trunk.pool(output).float()
        class_tokens = torch.cat([output.layers[layer][:, 0] for layer in self.layers], -1).float()
        if not self.interleave_mean:
            return class_tokens
        patches = output.layers[self.layers[-1]][:, output.prefix :].float()
        return torch.stack([class_tokens, patches.mean(1)], -1).flatten(1)

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        assert self.network is not None
        return {"logits": self.network(self.features(output))}


def check_has_blocks(trunk: Trunk) -> None:
    """Raise CheckpointError unless heads can read the trunk's blocks."""
    if not trunk.blocks:
        raise CheckpointError(
            f"{trunk.architecture} is no plain ViT, whose blocks this head would have to read"
        )


def create_classifier(tensors: Mapping[str, Tensor]) -> nn.Sequential:
    """`classifier.N.weight` and so on as layers in the order of N: linear ones with a ReLU after
    each but the last, and batch norms (those with a `running_mean`). In float32, frozen.

    Raises:
        CheckpointError: there is none, or the layers do not fit one another.
    """
    by_number: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(CLASSIFIER):
            place, _, name = key.removeprefix(CLASSIFIER).partition(".")
            if not place.isdecimal():
                raise CheckpointError(f"{key} is no layer of a classifier")
            by_number.setdefault(int(place), {})[name] = value.float()
    if not by_number or "weight" not in by_number[max(by_number)]:
        raise CheckpointError("the head has no classifier")
    layers: list[nn.Module] = []
    size = None
    for number, state in sorted(by_number.items()):
        layer = _layer(state)
        inputs = state["weight"].shape[-1]
        if size not in (None, inputs):
            raise CheckpointError(f"layer {number} of the classifier takes {inputs}, not {size}")
        size = state["weight"].shape[0]
        layers.append(layer)
        if isinstance(layer, nn.Linear) and number != max(by_number):
            layers.append(nn.ReLU())
    return nn.Sequential(*layers).eval().requires_grad_(False)


def first_size(network: nn.Module) -> int:
    """Features that a classifier takes."""
    return next(layer.in_features for layer in network.modules() if isinstance(layer, nn.Linear))


def last_size(network: nn.Module) -> int:
    """Classes that it tells apart."""
    return [layer.out_features for layer in network.modules() if isinstance(layer, nn.Linear)][-1]


def _layer(state: dict[str, Tensor]) -> nn.Module:
    try:
        layer: nn.Module
        if "running_mean" in state:
            layer = nn.BatchNorm1d(len(state["running_mean"]))
            state = {"num_batches_tracked": torch.tensor(0), **state}
        else:
            outputs, inputs = state["weight"].shape
            layer = nn.Linear(inputs, outputs, bias="bias" in state)
        layer.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the head's classifier does not fit together: {error}") from error
    return layer

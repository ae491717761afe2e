"""Linear classifiers of many heads as one product.

The weights of all small classifiers of equally many features on a trunk are rows of one matrix. For
each row of a batch its classifier's rows are gathered, so that a batch takes equally many kernels
for two heads as for 64, however many classes each has.

Shape suffixes: B rows of a batch, C rows of the matrix, K classes, F features.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from models.heads.ranking import best_classes
from models.trunks.base import Trunk
from models.trunks.engines.base import Pass
from models.trunks.slot_bank import SlotBank, Slots
from models.trunks.transfers import index_tensor

# Classifiers of more weights stay apart, each with a product of its own. On a CPU all do: starting
# a product costs less than gathering. On a GPU the bound is for memory, per row of a batch, where
# classes are rounded up to a power of two.
MAX_STACKED = {"cpu": 0, "cuda": 2**19}
# As many of the best classes are recorded, or all; a row that needs more has kernels of its own.
RECORDED_BEST = 16
# Numbers of heads, and what they return for their rows, one head's after another's.
Part = tuple[Sequence[int], Mapping[str, Tensor]]


class StackedClassifier(nn.Module):
    """A linear layer whose weights are rows of its trunk's matrix."""

    def __init__(self, bank: SlotBank, slots: Slots, features: int) -> None:
        super().__init__()
        self.bank = bank
        self.slots = slots
        self.features = features

    @property
    def nbytes(self) -> int:
        """Bytes of its weights on the device."""
        return self.slots.nbytes

    def forward(self, features_BF: Tensor) -> Tensor:
        """(B, K) logits."""
        own = slice(self.slots.places.start, self.slots.places.stop)
        weight_CF, bias_C = self.bank.for_pass()
        return linear(features_BF, weight_CF[own], bias_C[own])


def stacked(classifier: nn.Sequential, trunk: Trunk) -> nn.Module:
    """A classifier among the others of its trunk, or unchanged if it has further layers or is
    large."""
    layer = classifier[0]
    if len(classifier) > 1 or not isinstance(layer, nn.Linear):
        return classifier
    features = layer.in_features
    padded = _next_power(layer.out_features) * features
    if padded > MAX_STACKED.get(layer.weight.device.type, 0):
        return classifier
    bank = trunk.classifiers.setdefault(features, SlotBank())
    bias_K = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
    return StackedClassifier(bank, bank.store(layer.weight, bias_K), features)


def classify_together(
    trunk: Trunk, classifiers: Sequence[nn.Module], parts: Sequence[Tensor], best: int
) -> list[Part]:
    """Run classifiers, each on its own rows.

    Args:
        parts: the features (B, F) of each classifier's rows.
        best: how many of the best classes are needed.

    Returns:
        `index` and `score` as `best_classes` returns them, at least `best` if there are so many
        classes; `logits` of classifiers that stay apart.
    """
    stacks: dict[Hashable, list[int]] = defaultdict(list)
    for number, classifier in enumerate(classifiers):
        is_stacked = isinstance(classifier, StackedClassifier)
        stacks[classifier.features if is_stacked else ("apart", number)].append(number)
    results: list[Part] = []
    for numbers in stacks.values():
        own = [classifiers[number] for number in numbers]
        if len(numbers) == 1:
            results.append((numbers, {"logits": own[0](parts[numbers[0]])}))
        else:
            rows = [parts[number] for number in numbers]
            results.append((numbers, _classify_stacked(trunk, own, rows, best)))
    return results


def _classify_stacked(
    trunk: Trunk, classifiers: Sequence[nn.Module], parts: Sequence[Tensor], best: int
) -> Mapping[str, Tensor]:
    bank, places = None, []
    for classifier, part in zip(classifiers, parts, strict=True):
        assert isinstance(classifier, StackedClassifier)
        bank, own = classifier.bank, classifier.slots.places
        places += [(own.start, len(own))] * len(part)
    assert bank is not None
    features_BF = torch.cat(list(parts))
    # A power of two, so that there are few programs of different sizes to record.
    classes = _next_power(max(count for _, count in places))
    count = min(max(best, RECORDED_BEST), classes)
    run: Pass = partial(rank_rows, classes=classes, count=count)
    if best <= RECORDED_BEST:
        key = "classify", features_BF.shape[1], classes
        run = trunk.engine.recorded(key, run, rows=(0, 1))
    return run(features_BF, index_tensor(places, features_BF.device), *bank.for_pass())


def rank_rows(
    features_BF: Tensor, places_B2: Tensor, weight_CF: Tensor, bias_C: Tensor,
    *, classes: int, count: int,
) -> dict[str, Tensor]:  # fmt: skip
    """The best classes of each row by its own classifier, see `best_classes`.

    Args:
        places_B2: for each row the first row of its classifier in the matrix, and its classes.
        classes: at least as many as any row has.
    """
    first_B1, classes_B1 = places_B2[:, :1], places_B2[:, 1:]
    numbers_K = torch.arange(classes, device=features_BF.device)
    # beyond a row's own classes are those of others, or the end of the matrix
    slots_BK = (first_B1 + numbers_K).clamp(max=len(weight_CF) - 1)
    logits_BK = torch.bmm(weight_CF[slots_BK], features_BF[:, :, None]).squeeze(2)
    logits_BK = logits_BK + bias_C[slots_BK]
    return best_classes(logits_BK.masked_fill(numbers_K >= classes_B1, -torch.inf), count)


def _next_power(number: int) -> int:
    """The least power of two that is not below it."""
    return 1 << (number - 1).bit_length()

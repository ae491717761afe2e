"""What every engine relies on: how built passes are kept, and how they are compared with eager."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from models.catalog import TrunkEntry
from models.errors import EngineError
from models.trunks.devices import Placement
from models.trunks.engines.comparison import compare, largest_error, run_both
from models.trunks.engines.eager import Eager
from models.trunks.features import PassPlan


class Doubled(nn.Module):
    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        return {"features": 2 * batch}


class Source:
    """What an engine needs of a trunk."""

    placement = Placement()
    identity = "doubled"
    entry: TrunkEntry | None = None
    is_classifier = False

    def create_pass(self, plan: PassPlan) -> nn.Module:
        return Doubled()

    def summary(self, batch: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, bool]:
        return tensors["features"], self.is_classifier

    def samples(self, count: int) -> Sequence[Tensor]:
        return [torch.ones(2)] * count

    def collate(self, inputs: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(inputs))

    def calibration_inputs(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return (), ()


def test_eager_keeps_one_module_for_inputs_of_all_sizes() -> None:
    engine = Eager(Source())
    batches = [torch.zeros(1, 3, size, size, dtype=torch.uint8) for size in range(16, 80, 16)]
    for batch in batches:
        assert engine.run(PassPlan(), (batch,))["features"].shape == batch.shape
    assert engine.get(PassPlan(), (batches[0],)) is engine.get(PassPlan(), (batches[1],))
    assert len(engine._passes) == 1


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_never_agree(wrong: float) -> None:
    expected = {"features": torch.arange(4.0)}
    actual = {"features": torch.tensor([0.0, 1.0, 2.0, wrong])}
    with pytest.raises(EngineError, match="features has values that are not finite"):
        largest_error(expected, actual)


def test_the_largest_error_is_relative_to_the_largest_value() -> None:
    expected = torch.arange(6.0)
    error = largest_error({"features": expected}, {"features": expected + 0.5})
    assert error == pytest.approx(0.1)


def test_classifiers_are_compared_by_their_best_class_and_other_outputs_by_cosine() -> None:
    def built(batch: Tensor) -> dict[str, Tensor]:
        return {"features": 2 * batch.flip(1)}

    batches = [(torch.tensor([[1.0, 0.0], [1.0, 1.0]]),), (torch.tensor([[0.0, 1.0]]),)]
    source = Source()
    agreement = compare(source, run_both(Doubled(), built, batches))
    assert (agreement.inputs, agreement.largest_error) == (3, 1)
    assert agreement.cosine == pytest.approx(1 / 3)
    source.is_classifier = True
    assert compare(source, run_both(Doubled(), built, batches)).to_json() == {
        "largest_error": 1,
        "inputs": 3,
        "top1_agreement": pytest.approx(1 / 3),
    }

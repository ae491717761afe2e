"""What every engine relies on: how built passes are kept, and how they are compared with eager."""

import pytest
import torch
from torch import Tensor, nn

from models.errors import EngineError
from models.trunks.devices import Placement
from models.trunks.engines.base import largest_error
from models.trunks.engines.eager import Eager
from models.trunks.features import PassPlan


class Doubled(nn.Module):
    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        return {"features": 2 * batch}


def test_eager_keeps_one_module_for_inputs_of_all_sizes() -> None:
    engine = Eager(lambda plan: Doubled(), Placement(), "doubled")
    batches = [torch.zeros(1, 3, size, size, dtype=torch.uint8) for size in range(16, 80, 16)]
    for batch in batches:
        assert engine.run(PassPlan(), (batch,))["features"].shape == batch.shape
    assert engine.get(PassPlan(), (batches[0],)) is engine.get(PassPlan(), (batches[1],))
    assert len(engine._passes) == 1


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_never_agree(wrong: float) -> None:
    def built(batch: Tensor) -> dict[str, Tensor]:
        return {"features": torch.where(batch > 2, wrong, 2 * batch)}

    with pytest.raises(EngineError, match="features has values that are not finite"):
        largest_error(Doubled(), built, (torch.arange(4.0),))


def test_the_largest_error_is_relative_to_the_largest_value() -> None:
    def built(batch: Tensor) -> dict[str, Tensor]:
        return {"features": 2 * batch + 0.5}

    assert largest_error(Doubled(), built, (torch.arange(6.0),)) == pytest.approx(0.05)

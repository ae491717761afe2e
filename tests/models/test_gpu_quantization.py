"""int8 and fp8 by torchao: what is quantised, how far it agrees, and where it is refused. How fast
they are needs a GPU: `python -m benchmarks.gpu --part quantised`."""

import warnings
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.errors import EngineError
from models.model import Model
from models.trunks.devices import Placement
from models.trunks.engines import gpu_quantization
from models.trunks.engines.auto import Auto
from models.trunks.engines.base import Pass, PassSource
from models.trunks.engines.built import PHOTOS, BuiltEngine
from models.trunks.engines.compile import Compile
from models.trunks.engines.eager import Eager
from models.trunks.features import LAST_OUTPUT, PassPlan, merge
from tests.models.test_fixtures import fixture

GPU = Placement(device=torch.device("cuda", 0), precision="int8")


@pytest.fixture
def torchao() -> None:
    """Not among the tests' packages: where it is, transformers imports it in every process."""
    if find_spec("torchao") is None:
        pytest.skip("torchao is not installed: pip install 'vitrail[gpu]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecations, as it is imported
        import torchao.quantization  # noqa: F401


@pytest.fixture(scope="module")
def vqt() -> Model:
    return fixture("vqt")[0]


class Quantized(BuiltEngine):
    """What `compile` runs on GPUs, not compiled."""

    name = "quantized"

    def __init__(self, source: PassSource) -> None:
        super().__init__(source)
        self.quantizer = gpu_quantization.Quantizer("int8")

    def build_pass(self, plan: PassPlan, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        return self.quantizer(module)


@pytest.mark.usefixtures("torchao")
def test_quantised_passes_agree_and_leave_the_network_as_it_is(vqt: Model) -> None:
    trunk = vqt.trunk
    before = trunk.placement, trunk.engine
    state = {name: tensor.clone() for name, tensor in trunk.network.state_dict().items()}
    queries = merge([(vqt.heads["classify"].request, range(3))])
    photos = trunk.collate(trunk.samples(3))
    try:
        trunk.placement = replace(trunk.placement, precision="int8")
        trunk.engine = engine = Quantized(trunk)
        trunk.build(LAST_OUTPUT)
        nbytes = engine.quantizer.nbytes
        assert 0.2 * trunk.nbytes < nbytes < 0.5 * trunk.nbytes
        first = engine.report().agreement
        assert first is not None
        assert first.inputs == 2 + PHOTOS
        trunk.build(queries)
        assert engine.quantizer.nbytes == nbytes  # the network is shared
        worst = engine.report().agreement
        assert worst is not None
        assert 1e-5 < worst.largest_error < 0.1
        found = trunk.forward(photos, queries)
    finally:
        trunk.placement, trunk.engine = before
    for name, tensor in trunk.network.state_dict().items():
        assert torch.equal(tensor, state[name])
    expected = trunk.forward(photos, queries)
    [own], [reference] = found.queries.values(), expected.queries.values()
    for one, other in ((found.features, expected.features), (own, reference)):
        assert one.dtype == torch.float32
        assert 1e-5 < float((one - other).abs().max() / other.abs().max()) < 0.1


def test_a_pass_that_cannot_be_quantised_is_not_run_in_float32_instead(vqt: Model) -> None:
    class Broken(Quantized):
        def build_pass(self, *arguments: Any) -> Pass:
            raise RuntimeError("no kernel")

    trunk = vqt.trunk
    before = trunk.placement, trunk.engine
    try:
        trunk.placement = replace(trunk.placement, precision="int8")
        trunk.engine = Broken(trunk)
        with pytest.raises(EngineError, match="no kernel"):
            trunk.build(LAST_OUTPUT)
    finally:
        trunk.placement, trunk.engine = before


def test_what_cannot_quantise_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="int8 on NVIDIA GPUs, not on cpu"):
        Compile.place(Placement(precision="int8"))
    with pytest.raises(EngineError, match="eager does not compute in int8"):
        Eager.place(GPU)
    with pytest.raises(EngineError, match="set engine = 'compile'"):
        Auto.place(GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(gpu_quantization, "find_spec", lambda name: name)
    assert Compile.place(GPU).dtype == torch.float32
    with pytest.raises(EngineError, match=r"fp8 needs .* capability 8\.9; this one has 8\.0"):
        Compile.place(replace(GPU, precision="fp8"))
    monkeypatch.setattr(gpu_quantization, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"int8 needs torchao: pip install 'vitrail\[gpu\]'"):
        Compile.place(GPU)


def test_int8_on_a_gpu_has_a_digest_of_its_own() -> None:
    keys = {GPU.precision_key, replace(GPU, precision="fp8").precision_key,
            Placement(precision="int8").precision_key}  # fmt: skip
    assert len(keys) == 3

"""Engines that build passes: buckets, padding by rows, and what runs eagerly instead. CUDA graphs
themselves need a GPU: `python -m benchmarks.gpu --part fixtures` runs them."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from models.catalog import TrunkEntry
from models.errors import CatalogError, EngineError
from models.model import Model
from models.trunks.devices import Placement, resolve_device, resolve_precision
from models.trunks.engines.base import Pass
from models.trunks.engines.bucketed_pass import BucketedPass, Program, row_inputs
from models.trunks.engines.buckets import bucket_of, buckets
from models.trunks.engines.built import BuiltEngine
from models.trunks.engines.compile import Compile
from models.trunks.engines.cuda_graph import CudaGraph, GraphCapture, graphed
from models.trunks.features import BatchRequest, FeatureRequest, PassPlan, merge
from tests.models.test_fixtures import fixture


class Bucketed(BuiltEngine):
    """Programs that run the module on their own inputs, as a graph does."""

    name = "bucketed"

    def build_pass(self, plan: PassPlan, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        self.sizes: list[int] = []

        def capture(own: tuple[Tensor, ...]) -> Program:
            self.sizes.append(len(own[0]))
            outputs = {name: tensor.clone() for name, tensor in module(*own).items()}

            @torch.inference_mode()
            def program() -> Mapping[str, Tensor]:
                for name, tensor in module(*own).items():
                    outputs[name].copy_(tensor)  # the same memory each time
                return outputs

            return program

        rows = row_inputs(plan)
        assert rows is not None
        return BucketedPass(capture, rows)


class Wrong(BuiltEngine):
    name = "wrong"

    def build_pass(self, plan: PassPlan, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        return lambda *tensors: {key: 1.001 * value for key, value in module(*tensors).items()}


class Broken(BuiltEngine):
    name = "broken"

    def build_pass(self, plan: PassPlan, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


class Failing(BuiltEngine):
    """Its passes raise `error` while there is one."""

    name = "failing"
    error: Exception | None = None

    def build_pass(self, plan: PassPlan, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        def run(*tensors: Tensor) -> Mapping[str, Tensor]:
            if self.error is not None:
                raise self.error
            outputs: Mapping[str, Tensor] = module(*tensors)
            return outputs

        return run


@pytest.fixture(scope="module")
def vqt() -> Model:
    return fixture("vqt")[0]


def with_engine(model: Model, engine: type[BuiltEngine]) -> BuiltEngine:
    trunk = model.trunk
    trunk.engine = made = engine(trunk)
    return made


def test_buckets_waste_little() -> None:
    assert buckets(32) == [1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32]
    assert buckets(70)[-3:] == [56, 64, 80]
    for size in range(1, 512):
        assert size <= bucket_of(size) == bucket_of(bucket_of(size))
        assert size < 4 or size >= 0.75 * bucket_of(size)


@pytest.mark.parametrize("queries", [False, True])
def test_padded_passes_have_the_outputs_of_plain_ones(vqt: Model, queries: bool) -> None:
    trunk, head = vqt.trunk, vqt.heads["classify"]
    eager = trunk.engine
    request = head.request if queries else FeatureRequest(layers=frozenset({0}))
    photos = torch.randint(256, (5, 3, *trunk.preprocess.input_size), dtype=torch.uint8)
    plans = [(size, merge([(request, range(size))])) for size in (2, 1, 5, 3, 5)]
    expected = [trunk.forward(photos[:size], plan) for size, plan in plans]
    try:
        engine = with_engine(vqt, Bucketed)
        trunk.build(merge([(request, range(2))]))
        kept = [trunk.forward(photos[:size], plan) for size, plan in plans]
        assert isinstance(engine, Bucketed)
        assert engine.report().name == "bucketed"
        assert engine.sizes == [2, 1, 6, 3]  # each bucket once
    finally:
        trunk.engine = eager
    for one, other in zip(expected, kept, strict=True):
        torch.testing.assert_close(one.features, other.features)
        if queries:
            [own], [padded] = one.queries.values(), other.queries.values()
            torch.testing.assert_close(own, padded)
        else:
            torch.testing.assert_close(one.layers[0], other.layers[0])


def test_a_bank_that_has_moved_is_captured_again() -> None:
    captured, alive = [], []

    def capture(own: tuple[Tensor, ...]) -> Program:
        captured.append(own)
        alive.append(len(run._buckets))
        return lambda: {"sum": own[0] + own[1]}

    run = BucketedPass(capture, rows=(0,))
    bank = torch.ones(2)
    rows = torch.arange(6.0).view(3, 2)
    torch.testing.assert_close(run(rows, bank)["sum"], rows + 1)
    bank.fill_(5)  # its contents may change where it is
    torch.testing.assert_close(run(rows, bank)["sum"], rows + 5)
    assert len(captured) == 1
    torch.testing.assert_close(run(rows, torch.zeros(2))["sum"], rows)
    assert len(captured) == 2
    assert len(run._buckets) == 1
    assert alive == [0, 1]  # the pool of graphs would end with the last one of them


def test_memory_that_runs_out_when_a_bank_has_moved_is_taken_from_the_old_programs() -> None:
    error: Exception | None = None

    def capture(own: tuple[Tensor, ...]) -> Program:
        if error is not None:
            raise error
        return lambda: {"sum": own[0] + own[1]}

    run = BucketedPass(capture, rows=(0,))
    bank = torch.ones(2)
    for size in (4, 2, 1):
        run(torch.ones(size, 2), bank)
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        run(torch.ones(3, 2), bank)  # a further size: the others are still of use
    assert len(run._buckets) == 3
    with pytest.raises(torch.OutOfMemoryError):
        run(torch.ones(4, 2), torch.zeros(2))
    assert [key[0] for key in run._buckets] == [1]
    error = None
    torch.testing.assert_close(run(torch.ones(2, 2), torch.zeros(2))["sum"], torch.ones(2, 2))


def test_graphs_after_the_last_one_has_gone_have_a_new_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Graph:
        def replay(self) -> None:
            pass

    pools, used = iter("ab"), []

    def captured(graph: Graph, pool: str, **options: str) -> AbstractContextManager[None]:
        used.append(pool)
        return nullcontext()

    stream = SimpleNamespace(use=nullcontext)
    monkeypatch.setattr("models.trunks.engines.cuda_graph.compute_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", captured)
    capture = GraphCapture(torch.device("cuda", 0))
    programs = [capture(dict, ()) for _ in range(2)]
    del programs[0]
    programs.append(capture(dict, ()))
    programs.clear()
    programs.append(capture(dict, ()))
    assert used == ["a", "a", "a", "b"]


@pytest.mark.parametrize(
    ("engine", "reason"), [(Wrong, "1.0e-03"), (Broken, "operation not permitted")]
)
def test_what_cannot_be_built_or_differs_runs_eagerly(
    vqt: Model, engine: type[BuiltEngine], reason: str
) -> None:
    trunk, eager = vqt.trunk, vqt.trunk.engine
    photos = torch.randint(256, (2, 3, *trunk.preprocess.input_size), dtype=torch.uint8)
    expected = trunk.forward(photos).features
    try:
        made = with_engine(vqt, engine)
        trunk.build(BatchRequest())
        assert torch.equal(trunk.forward(photos).features, expected)
        report = made.report()
        assert (report.name, report.agreement) == ("eager", None)
        assert reason in report.reason
        assert "and more" not in report.reason
    finally:
        trunk.engine = eager


def test_a_pass_that_fails_later_runs_eagerly_unless_memory_ran_out(vqt: Model) -> None:
    trunk, eager = vqt.trunk, vqt.trunk.engine
    photos = trunk.collate(trunk.samples(2))
    expected = trunk.forward(photos).features
    try:
        made = with_engine(vqt, Failing)
        assert isinstance(made, Failing)
        trunk.build(BatchRequest())
        made.error = torch.OutOfMemoryError("CUDA out of memory")
        with pytest.raises(torch.OutOfMemoryError):  # the lane halves its batch
            trunk.forward(photos)
        assert made.report().name == "failing"
        made.error = RuntimeError("too many programs\nand more")
        assert torch.equal(trunk.forward(photos).features, expected)
        report = made.report()
        assert (report.name, report.agreement) == ("eager", None)
        assert report.reason == "failing failed: too many programs"
        made.error = None
        assert torch.equal(trunk.forward(photos).features, expected)
        assert made.report().name == "eager"
    finally:
        trunk.engine = eager


def test_rows_with_different_numbers_of_query_tokens_are_not_padded() -> None:
    assert row_inputs(PassPlan(query_groups=(False, False))) is None
    with pytest.raises(EngineError, match="different numbers"):
        graphed(PassPlan(query_groups=(False,)), lambda *inputs: {}, None)  # type: ignore[arg-type]


def test_cuda_graphs_are_refused_on_a_cpu() -> None:
    with pytest.raises(EngineError, match="not on cpu"):
        CudaGraph.place(Placement())


def test_a_gpu_is_one_device_and_has_bfloat16_only_in_hardware(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    numbers = [resolve_device(name).index for name in ("auto", "cuda", "cuda:0", "cuda:1")]
    assert numbers == [0, 0, 0, 1]
    with pytest.raises(CatalogError, match=r"cuda:2.* torch sees 2 GPUs"):
        resolve_device("cuda:2")
    assert resolve_precision("auto", torch.device("cuda", 0)) == "float32"


def test_tf32_shows_in_the_digest_of_a_gpu_alone() -> None:
    gpu = Placement(device=torch.device("cuda"), tf32=True)
    assert gpu.precision_key == "tf32"
    assert replace(gpu, precision="bfloat16").precision_key == "bfloat16 tf32"
    assert Placement(tf32=True).precision_key == ""
    assert replace(gpu, tf32=False).precision_key == ""


def test_networks_of_convolutions_have_channels_last_on_gpus() -> None:
    gpu = Placement(device=torch.device("cuda"))
    convolutions = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(9)))
    assert gpu.for_network(convolutions).memory_format == torch.channels_last
    assert gpu.for_network(nn.Conv2d(1, 1, 1)).memory_format == torch.contiguous_format
    assert Placement().for_network(convolutions).memory_format == torch.contiguous_format
    rows = replace(gpu, channels_last=False).for_network(convolutions)
    assert rows.memory_format == torch.contiguous_format


@pytest.mark.parametrize(("cap", "rows"), [(None, 16), (4, 4), (1, 2), (64, 16)])
def test_passes_are_compiled_for_a_lanes_threads_and_no_more_rows_than_batches_have(
    vqt: Model, monkeypatch: pytest.MonkeyPatch, cap: int | None, rows: int
) -> None:
    calls: list[tuple[int, int]] = []

    def compile(module: Pass, *, fullgraph: bool, options: object) -> Pass:
        """Of torch before it could isolate programs."""

        def compiled(*tensors: Tensor) -> Mapping[str, Tensor]:
            calls.append((len(tensors[0]), torch.get_num_threads()))
            return module(*tensors)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    trunk = vqt.trunk
    entry = TrunkEntry(name="x", source="x", max_batch_size=cap)
    monkeypatch.setattr(trunk, "entry", entry)
    monkeypatch.setattr(trunk, "placement", replace(trunk.placement, threads=6, streams=2))
    monkeypatch.setattr(trunk, "engine", Compile(trunk))
    trunk.build(BatchRequest())
    trunk.forward(trunk.collate(trunk.samples(3)))
    assert trunk.engine.report().name == "compile", trunk.engine.report().reason
    assert [size for size, _ in calls] == [rows, 1, 2, 3]
    assert {threads for _, threads in calls} == {3}


@pytest.mark.nightly
def test_passes_are_compiled_whole_and_for_all_sizes_at_once(
    vqt: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the compiler's own front end; what it makes of the graphs takes minutes (nightly)."""
    trunk, eager = vqt.trunk, vqt.trunk.engine
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    queries = vqt.heads["classify"].request
    photos = trunk.collate(trunk.samples(3))

    def plan(size: int) -> BatchRequest:
        return merge([(queries, range(size))])

    expected = {size: trunk.forward(photos[:size], plan(size)).features for size in (3, 1)}
    threads = torch.get_num_threads()
    try:
        engine = with_engine(vqt, Compile)
        # two programs a pass, whatever other passes have
        with torch._dynamo.config.patch(recompile_limit=2):
            trunk.build(plan(2))
            trunk.build(BatchRequest())
            assert engine.report().name == "compile", engine.report().reason
            assert not engine.report().reason
            raw_LTD = trunk.network.pos_embed.new_zeros(
                len(trunk.blocks), 64, trunk.network.embed_dim
            )
            others = trunk.add_queries(raw_LTD)  # the bank grows
            torch.set_num_threads(1 + threads % 2)  # lanes have their own numbers of threads
            with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
                for size, features in expected.items():
                    found = trunk.forward(photos[:size], plan(size))
                    torch.testing.assert_close(found.features, features)
                    torch.testing.assert_close(trunk.forward(photos[:size]).features, features)
        programs = counters["stats"]["unique_graphs"]
        with ThreadPoolExecutor(1) as lane:
            found = lane.submit(torch.inference_mode()(trunk.forward), photos, plan(3)).result()
        torch.testing.assert_close(found.features, expected[3])
        assert counters["stats"]["unique_graphs"] == programs
        assert engine.settled
        assert engine.report().name == "compile", engine.report().reason
        assert len(others.slots) == 64
    finally:
        torch.set_num_threads(threads)
        trunk.engine = eager


@pytest.mark.nightly
def test_compiled_passes_agree_with_eager() -> None:
    model = fixture("dino")[0]
    trunk = model.trunk
    photos = torch.randint(256, (5, 3, *trunk.preprocess.input_size), dtype=torch.uint8)
    with torch.inference_mode():
        expected = trunk.forward(photos).features
        engine = with_engine(model, Compile)
        trunk.build(BatchRequest())
        for size in (5, 1, 3):
            found = trunk.forward(photos[:size]).features
            torch.testing.assert_close(found, expected[:size], atol=1e-5, rtol=0)
    assert engine.report().name == "compile", engine.report().reason

"""Engines: what OpenVINO converts agrees with eager, and what it cannot stays with eager."""

import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from models import Model
from models.assembly import load_checkpoint
from models.checkpoints.checkpoint import HeadState
from models.errors import EngineError
from models.heads.registry import create_head
from models.heads.vqt import Vqt
from models.inputs.transforms import Preprocess
from models.trunks.devices import Placement
from models.trunks.engines import openvino as openvino_engine
from models.trunks.engines.auto import WINS, Auto, _Choice, in_background
from models.trunks.engines.compiled_pass import CompiledPass
from models.trunks.features import LAST_OUTPUT, FeatureRequest, merge
from models.trunks.timm import TimmTrunk
from tests.models.test_fixtures import GOLDENS, fixture

# One of each kind of trunk and plan; the nightly target runs all fixtures.
KINDS = ("clip", "convnext_v2", "dino", "ibot_swin", "mae_finetuned", "mvit", "pit_distilled",
         "scale_mae", "semantic_segmentation", "tnt", "vit_augreg", "vqt")  # fmt: skip


PENDING = "not built and compared yet"


def small_trunk(engine: str = "openvino", **options: Any) -> TimmTrunk:
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=10)
    spec = Preprocess(input_size=(160, 160))
    return TimmTrunk("test_vit", network, spec, Placement(engine=engine, **options))


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", KINDS)
def test_fixtures_run_by_openvino_agree_with_eager(name: str) -> None:
    eager, _, meta = fixture(name)
    path = next(iter(sorted((GOLDENS / name).glob("checkpoint.*"))))
    converted = load_checkpoint(
        path, meta["hyperparameters"], placement=Placement(engine="openvino")
    )
    compare(eager, converted)


@pytest.mark.parametrize("name", ["patchconvnet", "vitgan"])
def test_networks_that_it_cannot_convert_stay_eager_and_say_why(name: str) -> None:
    _, _, meta = fixture(name)
    path = next(iter(sorted((GOLDENS / name).glob("checkpoint.*"))))
    model = load_checkpoint(path, meta["hyperparameters"], placement=Placement(engine="auto"))
    model.build()
    wait_for(lambda: PENDING not in model.trunk.engine.report().reason)
    report = model.trunk.engine.report()
    assert report.name == "eager"
    assert "openvino cannot" in report.reason


def compare(eager: Model, converted: Model) -> None:
    head, other = eager.heads[eager.task], converted.heads[eager.task]
    for size in (2, 1, 5):
        batch = eager.trunk.collate(eager.trunk.samples(size))
        with torch.inference_mode():
            expected = head.forward(
                eager.trunk.forward(batch, merge([(head.request, range(size))]))
            )
            actual = other.forward(
                converted.trunk.forward(batch, merge([(other.request, range(size))]))
            )
        for key, reference in expected.items():
            assert_close(actual[key], reference)
    assert converted.trunk.engine.report().name == "openvino"


def test_text_towers_agree_for_any_number_of_texts() -> None:
    eager, golden, meta = fixture("clip")
    path = next(iter(sorted((GOLDENS / "clip").glob("checkpoint.*"))))
    placement = Placement(engine="openvino")
    converted = load_checkpoint(path, meta["hyperparameters"], placement=placement)
    for token_ids in (golden["token_ids"], golden["token_ids"][:1]):
        expected = eager.run(token_ids=token_ids)["text_embedding"]
        assert_close(converted.run(token_ids=token_ids)["text_embedding"], expected)


def test_query_tokens_are_slots_that_every_engine_reads() -> None:
    """Rows want none, one and several heads; a head that comes later needs no new graph."""
    eager, converted = small_trunk("eager"), small_trunk()
    generator = torch.Generator().manual_seed(0)
    depth, dim = len(eager.blocks), eager.blocks[0].attn.qkv.in_features

    def heads(count: int) -> list[tuple[Vqt, Vqt]]:
        pairs = []
        for queries in range(1, count + 1):
            tensors = {
                "queries": torch.randn(depth, queries, dim, generator=generator),
                "classifier.0.weight": torch.randn(
                    3, dim * (1 + depth * queries), generator=generator
                ),
            }
            state = HeadState(tensors)
            pair = [create_head("vqt", trunk, "abc", state) for trunk in (eager, converted)]
            pairs.append((pair[0], pair[1]))
        return pairs  # type: ignore[return-value]

    rows = ([0, 2], [2, 3], [3])
    batch = eager.collate(eager.samples(4))
    for pairs in (heads(3), heads(3)):
        with torch.inference_mode():
            outputs = [
                trunk.forward(
                    batch,
                    merge((pair[i].request, some) for pair, some in zip(pairs, rows, strict=True)),
                )
                for i, trunk in enumerate((eager, converted))
            ]
            for (head, other), some in zip(pairs, rows, strict=True):
                expected = head.forward(outputs[0].rows(some))["logits"]
                assert_close(other.forward(outputs[1].rows(some))["logits"], expected)
    assert len(converted.engine._passes) == 1


@pytest.mark.parametrize(("counts", "groups", "choices"), [((16, 2), 1, 1), ((17, 2), 2, 0)])
def test_auto_pads_rows_up_to_some_query_tokens_and_runs_longer_ones_eagerly(
    counts: tuple[int, int], groups: int, choices: int
) -> None:
    trunk = small_trunk("auto")
    depth, dim = len(trunk.blocks), trunk.blocks[0].attn.qkv.in_features
    sets = [trunk.add_queries(torch.randn(depth, count, dim)) for count in counts]
    requests = [(FeatureRequest(queries=own), [row]) for row, own in enumerate(sets)]
    request, batch = merge(requests), trunk.collate(trunk.samples(2))
    plan, _, _ = trunk.pass_inputs(batch, request)
    assert len(plan.query_groups) == groups
    output = trunk.forward(batch, request)
    assert [output.queries[own].shape[2] for own in sets] == list(counts)
    assert isinstance(trunk.engine, Auto)
    assert len(trunk.engine._choices) == choices


def test_a_converted_pass_is_read_from_disk_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = small_trunk(cache=tmp_path)
    batch = first.collate(first.samples(1))
    expected = first.forward(batch).features
    import openvino

    monkeypatch.setattr(openvino, "convert_model", None)
    assert_close(small_trunk(cache=tmp_path).forward(batch).features, expected)
    with pytest.raises(EngineError, match="cannot convert"):
        small_trunk().forward(batch)


def test_auto_takes_over_once_it_is_built_and_says_so() -> None:
    trunk, eager = small_trunk("auto"), small_trunk("eager")
    batch = trunk.collate(trunk.samples(2))
    expected = eager.forward(batch).features
    assert PENDING in trunk.engine.report().reason
    trunk.build(LAST_OUTPUT)
    [choice] = trunk.engine._choices.values()  # type: ignore[attr-defined]
    wait_for(lambda: choice.candidate is not None or bool(choice.reason))
    for _ in range(2 * WINS):
        with torch.inference_mode():
            assert_close(trunk.forward(batch).features, expected)
    assert choice.chosen or choice.reason == "openvino is slower"
    report = trunk.engine.report()
    assert report.name == ("openvino" if choice.chosen else "eager")
    if choice.chosen:
        assert report.agreement is not None
        assert report.agreement.largest_error <= 1e-5
        assert report.agreement.top1_agreement == 1


@pytest.mark.parametrize(("usual", "is_chosen"), [(0.8, True), (1.05, True), (1.2, False)])
def test_a_few_slow_trials_do_not_decide(usual: float, is_chosen: bool) -> None:
    engine = small_trunk("auto").engine
    assert isinstance(engine, Auto)
    choice = _Choice(candidate=dict)
    slow = [(9.0, 1.0), (9.0, 1.0)] if is_chosen else [(0.1, 1.0), (0.1, 1.0)]
    for candidate_s, eager_s in [(50.0, 1.0), *slow, *[(usual, 1.0)] * WINS]:
        assert not choice.chosen
        assert choice.candidate
        engine._count(choice, candidate_s, eager_s)
    assert choice.chosen == is_chosen
    assert choice.reason == ("" if is_chosen else "openvino is slower")


def test_an_exit_while_a_pass_is_built_is_a_clean_one() -> None:
    program = (
        "import timm, torch\n"
        "from tests.models.test_engines import small_trunk\n"
        "from models.trunks.features import LAST_OUTPUT\n"
        "for _ in range(5):\n"
        "    small_trunk('auto').build(LAST_OUTPUT)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_engine_that_disagrees_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Doubled(CompiledPass):
        def run(self, *inputs: Tensor, is_wide: bool) -> Mapping[str, Tensor]:
            outputs = super().run(*inputs, is_wide=is_wide)
            return {name: 2 * tensor for name, tensor in outputs.items()}

    monkeypatch.setattr(openvino_engine, "CompiledPass", Doubled)
    trunk = small_trunk("auto")
    batch = trunk.collate(trunk.samples(1))
    expected = small_trunk("eager").forward(batch).features
    trunk.build(LAST_OUTPUT)
    wait_for(lambda: PENDING not in trunk.engine.report().reason)
    assert "differ from eager float32 by" in trunk.engine.report().reason
    assert torch.equal(trunk.forward(batch).features, expected)


def test_a_pass_in_streams_takes_one_share_of_the_threads_or_all_of_them() -> None:
    """Torch's number of threads in the calling thread says which."""
    eager, converted = small_trunk("eager"), small_trunk(threads=2, streams=2)
    batch = eager.collate(eager.samples(1))
    expected = eager.forward(batch).features
    used: list[bool] = []
    [built] = [converted.engine.get(*converted.pass_inputs(batch, LAST_OUTPUT)[:2])]
    assert isinstance(built, CompiledPass)
    run = built.run
    built.run = lambda *inputs, is_wide: used.append(is_wide) or run(*inputs, is_wide=is_wide)  # type: ignore[method-assign, func-returns-value]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert_close(converted.forward(batch).features, expected)
    finally:
        torch.set_num_threads(threads)
    assert used == [False, True]


def test_an_engine_that_fails_later_is_replaced_by_eager() -> None:
    trunk = small_trunk("auto")
    batch = trunk.collate(trunk.samples(1))
    expected = small_trunk("eager").forward(batch).features
    assert isinstance(trunk.engine, Auto)
    trunk.forward(batch)
    [choice] = trunk.engine._choices.values()
    wait_for(lambda: choice.candidate is not None or bool(choice.reason))

    def fail(*inputs: Tensor) -> Mapping[str, Tensor]:
        raise RuntimeError("kernel fault")

    choice.candidate, choice.chosen = fail, True
    assert torch.equal(trunk.forward(batch).features, expected)
    assert trunk.engine.report().name == "eager"
    assert "kernel fault" in trunk.engine.report().reason


def test_layers_and_attention_are_outputs_of_the_graph() -> None:
    eager, converted = small_trunk("eager"), small_trunk()
    request = merge(
        [
            (FeatureRequest(layers=frozenset({0, 2}), cls_attention=frozenset({1})), range(2)),
            (FeatureRequest(keys_values=True, pixels=True), range(2)),
        ]
    )
    batch = eager.collate(eager.samples(2))
    with torch.inference_mode():
        expected, actual = eager.forward(batch, request), converted.forward(batch, request)
    assert_close(actual.layers[2], expected.layers[2])
    assert_close(actual.cls_attention[1], expected.cls_attention[1])
    assert_close(actual.keys_values[3][1], expected.keys_values[3][1])
    assert actual.pixels is not None
    assert expected.pixels is not None
    assert_close(actual.pixels, expected.pixels)


def test_nothing_is_built_for_a_trunk_that_was_unloaded() -> None:
    class Unloaded:
        def build(self) -> None:
            built.append(1)

    class Builder:
        def build(self, batch: Tensor) -> None:
            built.append(len(batch))

    built: list[int] = []
    go, done = threading.Event(), threading.Event()
    in_background(go.wait)
    in_background(Unloaded().build)
    in_background(done.set)
    go.set()
    assert done.wait(60)
    assert built == []
    batch, gone = torch.zeros(2), threading.Event()
    weakref.finalize(batch, gone.set)
    builder = Builder()
    in_background(builder.build, batch)
    del batch
    assert gone.wait(60)  # although no other job has come
    assert built == [2]

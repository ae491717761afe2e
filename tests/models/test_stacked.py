"""Classifiers of many heads as one product: the same as each head's own, whatever their sizes."""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.checkpoints.checkpoint import HeadState
from models.heads.base import Head
from models.heads.embed import Embed
from models.heads.linear import create_classifier, first_size
from models.heads.ranking import best_classes
from models.heads.stacked import (
    MAX_STACKED,
    StackedClassifier,
    classify_together,
    stacked,
)
from models.inference import HeadCall, _groups, run_pass
from models.trunks.adapting import create_adapter
from models.trunks.engines.base import Pass
from models.trunks.engines.bucketed_pass import BucketedPass, Program
from models.trunks.engines.cuda_graph import MAX_FUNCTIONS, GraphedFunctions
from models.trunks.engines.eager import Eager
from models.trunks.slot_bank import FIRST_CAPACITY
from models.trunks.timm import TimmTrunk
from tests.models.test_vqt import KINDS, linear_head, random_head, selecting_head, small_trunk

# Inputs, classes, and whether there is a bias.
SIZES = [(8, 3, True), (8, 3, True), (8, 2, True), (8, 3, False), (8, 11, True)]
SIZES += [(5, 3, True), (5, 9, True)]
LARGE = (900, 90, True)


@pytest.fixture
def trunk(monkeypatch: pytest.MonkeyPatch) -> TimmTrunk:
    monkeypatch.setitem(MAX_STACKED, "cpu", 2**15)  # as GPUs do
    return small_trunk(*KINDS["class token"])


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(5, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def classifier(inputs: int, outputs: int, has_bias: bool) -> nn.Sequential:
    tensors = {"classifier.0.weight": torch.randn(outputs, inputs)}
    if has_bias:
        tensors["classifier.0.bias"] = torch.randn(outputs)
    return create_classifier(HeadState(tensors))


@pytest.mark.parametrize("best", [1, 3, 9])
def test_classifiers_together_find_what_each_finds(trunk: TimmTrunk, best: int) -> None:
    torch.manual_seed(0)
    plain = [classifier(*size) for size in [*SIZES, LARGE]]
    mlp = {"classifier.0.weight": torch.randn(5, 8), "classifier.2.weight": torch.randn(3, 5)}
    plain.append(create_classifier(HeadState(mlp, {"activations": {"1": "relu"}})))
    networks = [stacked(network, trunk) for network in plain]
    apart = [n for n, each in enumerate(networks) if not isinstance(each, StackedClassifier)]
    assert apart == [7, 8]
    for lengths in ([1] * 9, [2, 1, 3, 1, 2, 4, 1, 2, 1]):
        parts = [torch.randn(n, first_size(network))
                 for n, network in zip(lengths, plain, strict=True)]  # fmt: skip
        results = classify_together(trunk, networks, parts, best)
        assert [numbers for numbers, _ in results] == [[0, 1, 2, 3, 4], [5, 6], [7], [8]]
        for numbers, tensors in results:
            expected = [plain[number](parts[number]) for number in numbers]
            if "logits" in tensors:
                torch.testing.assert_close(tensors["logits"], expected[0])
                continue
            start = 0
            for logits in expected:
                count = min(best, logits.shape[1])
                for name, own in best_classes(logits, count).items():
                    found = tensors[name][start : start + len(logits), :count]
                    torch.testing.assert_close(found, own, atol=1e-6, rtol=1e-5)
                start += len(logits)


def test_a_cpu_gathers_nothing() -> None:
    plain = classifier(8, 3, True)
    assert stacked(plain, small_trunk(*KINDS["class token"])) is plain


def test_a_device_of_an_unknown_kind_gathers_nothing(trunk: TimmTrunk) -> None:
    plain = classifier(8, 3, True).to("meta")
    assert stacked(plain, trunk) is plain


def test_large_is_what_is_large_with_its_classes_rounded_up(trunk: TimmTrunk) -> None:
    assert isinstance(stacked(classifier(512, 64, True), trunk), StackedClassifier)
    plain = classifier(500, 65, True)  # 500 * 65 < 2**15 < 500 * 128
    assert stacked(plain, trunk) is plain


def test_a_classifier_keeps_its_weights_when_others_come_and_go(trunk: TimmTrunk) -> None:
    plain = [classifier(8, classes, True) for classes in (3, 60, 40, 3)]
    kept, gone, *_ = networks = [stacked(network, trunk) for network in plain]  # the bank grows
    features = torch.randn(2, 8)
    for own, network in zip(plain, networks, strict=True):
        torch.testing.assert_close(network(features), own(features))
    assert isinstance(gone, StackedClassifier)
    places = gone.slots.places
    del networks, gone, network
    later = stacked(classifier(8, 60, False), trunk)
    assert isinstance(later, StackedClassifier)
    assert later.slots.places == places
    torch.testing.assert_close(kept(features), plain[0](features))
    assert isinstance(kept, StackedClassifier)
    assert kept.nbytes == 4 * 3 * 9


def adapted(trunk: TimmTrunk, head: Head) -> Head:
    layer = trunk.adapters.layers["blocks.0.mlp.fc1"]
    sizes = layer.in_features, layer.out_features
    head.adapt(
        create_adapter(
            trunk, {"blocks.0.mlp.fc1": (torch.randn(2, sizes[0]), torch.randn(sizes[1], 2))}
        )
    )
    return head


def mixed_calls(trunk: TimmTrunk) -> list[list[HeadCall]]:
    """For five rows: heads of many sizes, and one that has no classes."""
    heads: list[Head] = [random_head(trunk, seed, classes=4 + 3 * seed) for seed in range(3)]
    heads += [selecting_head(trunk, seed) for seed in (3, 4, 5)]
    heads += [random_head(trunk, 6, queries=2), linear_head(trunk, 7), linear_head(trunk, 8)]
    embed = HeadCall.of(Embed(trunk), {"pooling": "mean"})
    calls = []
    for row in range(5):
        chosen = [heads[(row + turn) % len(heads)] for turn in range(1 + row)]
        options = [{"top_k": min(1 + row, len(head.labels))} for head in chosen]
        calls.append([*map(HeadCall.of, chosen, options), embed])
    return calls


def adapted_calls(trunk: TimmTrunk) -> list[list[HeadCall]]:
    """For five rows: heads with an adapter each, and two without."""
    torch.manual_seed(0)
    adapted_heads = [adapted(trunk, linear_head(trunk, seed)) for seed in (1, 2, 3)]
    heads = [*adapted_heads, linear_head(trunk, 4), linear_head(trunk, 5)]
    return [[HeadCall.of(head, {})] for head in heads]


def check(trunk: TimmTrunk, pixels: Tensor, calls: Sequence[Sequence[HeadCall]]) -> None:
    """Compare what heads find in one batch with what each finds by itself."""
    together = run_pass(trunk, pixels, calls)
    for row, (found, own) in enumerate(zip(together, calls, strict=True)):
        for one, call in zip(found, own, strict=True):
            [[expected]] = run_pass(trunk, pixels[row : row + 1], [[call]])
            assert not isinstance(one, Exception)
            assert not isinstance(expected, Exception)
            assert one.keys() == expected.keys()
            for name, array in expected.items():
                count = call.top_k or None
                assert call.top_k <= len(one[name])
                np.testing.assert_allclose(one[name][:count], array[:count], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("calls_of", [mixed_calls, adapted_calls])
def test_heads_of_a_batch_find_what_each_finds(
    trunk: TimmTrunk, pixels: Tensor, calls_of: Callable[[TimmTrunk], list[list[HeadCall]]]
) -> None:
    check(trunk, pixels, calls_of(trunk))


def test_equal_calls_get_the_most_classes_that_any_row_wants(
    trunk: TimmTrunk, pixels: Tensor
) -> None:
    heads = [random_head(trunk, seed, classes=40) for seed in range(2)]
    calls = [[HeadCall.of(heads[row % 2], {"top_k": 1 + 5 * row})] for row in range(5)]
    for [found], [call] in zip(run_pass(trunk, pixels, calls), calls, strict=True):
        assert not isinstance(found, Exception)
        assert len(found["index"]) >= call.top_k


@pytest.mark.parametrize(
    ("rows", "expected"), [([63, 2, 62], [63, 64]), ([1, 63, 1], [64, 1]), ([70, 1], [70, 1])]
)
def test_heads_that_compute_together_have_at_most_so_many_rows(
    trunk: TimmTrunk, rows: Sequence[int], expected: Sequence[int]
) -> None:
    heads = [linear_head(trunk, seed) for seed in range(len(rows))]
    places = {HeadCall.of(head, {}): [(row, 0) for row in range(count)]
              for head, count in zip(heads, rows, strict=True)}  # fmt: skip
    assert [sum(map(len, group.values())) for group in _groups(places)] == expected


class Recording(Eager):
    """Runs functions that follow passes on inputs of their own, as graphs do."""

    name = "recording"

    def __init__(self, trunk: TimmTrunk) -> None:
        super().__init__(trunk)
        self.captured: list[int] = []
        self._runs: dict[Hashable, BucketedPass] = {}

    def recorded(self, key: Hashable, function: Pass, rows: Sequence[int]) -> Pass:
        if key not in self._runs:
            self._runs[key] = BucketedPass(lambda own: self._capture(function, own), rows)
        return self._runs[key]

    def _capture(self, function: Pass, own: tuple[Tensor, ...]) -> Program:
        self.captured.append(len(own[0]))
        outputs = {name: tensor.clone() for name, tensor in function(*own).items()}

        @torch.inference_mode()
        def program() -> Mapping[str, Tensor]:
            for name, tensor in function(*own).items():
                outputs[name].copy_(tensor)  # the same memory each time
            return outputs

        return program


def test_recorded_classifiers_find_what_each_finds_in_padded_batches(
    trunk: TimmTrunk, pixels: Tensor
) -> None:
    trunk.engine = engine = Recording(trunk)
    check(trunk, pixels, mixed_calls(trunk))
    first = len(engine.captured)
    assert first
    check(trunk, pixels, mixed_calls(trunk))  # new heads of the same sizes, in the free places
    assert len(engine.captured) == first
    heads = [random_head(trunk, seed, classes=90) for seed in range(2)]
    calls = [[HeadCall.of(heads[row % 2], {})] for row in range(5)]
    rows = run_pass(trunk, pixels, calls)  # the bank has moved
    assert engine.captured[first:] == [6]
    for row, [found] in enumerate(rows):
        [[expected]] = run_pass(trunk, pixels[row : row + 1], [calls[row]])
        assert not isinstance(found, Exception)
        assert not isinstance(expected, Exception)
        best = expected["index"]
        np.testing.assert_array_equal(found["index"][: len(best)], best)


@pytest.mark.parametrize(("best", "recorded"), [([1, 3, 16], [6]), ([17, 40], [])])
def test_few_of_the_best_classes_are_recorded_together_and_many_not(
    trunk: TimmTrunk, pixels: Tensor, best: Sequence[int], recorded: Sequence[int]
) -> None:
    trunk.engine = engine = Recording(trunk)
    heads = [random_head(trunk, seed, classes=40) for seed in range(2)]
    for count in best:
        calls = [[HeadCall.of(heads[row % 2], {"top_k": count})] for row in range(5)]
        check(trunk, pixels, calls)
    assert engine.captured == recorded


def test_no_more_functions_are_recorded_than_there_is_memory_for() -> None:
    functions = GraphedFunctions(None)  # type: ignore[arg-type]

    def double(rows: Tensor) -> Mapping[str, Tensor]:
        return {"double": 2 * rows}

    runs = [functions.get(number, double, (0,)) for number in range(MAX_FUNCTIONS + 1)]
    assert [run is double for run in runs] == [False] * MAX_FUNCTIONS + [True]
    assert functions.get(0, double, (0,)) is runs[0]


def test_a_function_that_cannot_be_recorded_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Stream:
        def run(self, function: Pass, inputs: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
            return function(*inputs)

    captures: list[int] = []
    errors: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory")]
    errors.append(RuntimeError("CUDA error: operation not permitted when stream is capturing"))

    class Capture:
        device = torch.device("cuda", 0)

        def __call__(self, run: Callable[..., object], inputs: tuple[Tensor, ...]) -> Program:
            captures.append(len(inputs[0]))
            raise errors.pop(0)

    module = "models.trunks.engines.cuda_graph.compute_stream"
    monkeypatch.setattr(module, lambda device: Stream())
    functions = GraphedFunctions(Capture())  # type: ignore[arg-type]

    def double(rows: Tensor) -> Mapping[str, Tensor]:
        return {"double": 2 * rows}

    rows = torch.arange(3.0)[:, None]
    with pytest.raises(torch.OutOfMemoryError):  # the lane halves its batch
        functions.get("double", double, (0,))(rows)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(functions.get("double", double, (0,))(rows)["double"], 2 * rows)
    assert captures == [3, 3]
    assert len(caplog.records) == 1
    assert "not run as a graph" in caplog.text


def test_a_trunk_counts_the_room_for_further_heads(trunk: TimmTrunk) -> None:
    weights = trunk.nbytes
    of_class = 4 * (8 + 1)
    kept = stacked(classifier(8, 3, True), trunk)
    gone = stacked(classifier(8, 60, True), trunk)
    assert isinstance(kept, StackedClassifier)
    assert trunk.nbytes == weights + (FIRST_CAPACITY - 63) * of_class
    del gone
    assert trunk.nbytes == weights + (FIRST_CAPACITY - 3) * of_class


def test_a_trunk_counts_the_room_for_further_query_tokens() -> None:
    trunk = small_trunk(*KINDS["class token"])
    weights = trunk.nbytes
    head = random_head(trunk, 0, queries=2)
    of_token = head.queries.nbytes // 2
    assert trunk.nbytes == weights + (FIRST_CAPACITY - 2) * of_token

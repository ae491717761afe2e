"""Queries that ride along: what they gather, that they disturb nothing, and who may carry them."""

import threading
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import normalize

from models.checkpoints.checkpoint import HeadState
from models.errors import CheckpointError
from models.heads.base import Head
from models.heads.registry import create_head
from models.heads.vqt import Vqt, vqt_features
from models.inference import HeadCall, run_pass
from models.inputs.transforms import preprocess_from_timm
from models.trunks.devices import Placement
from models.trunks.features import BatchRequest, merge
from models.trunks.timm import TimmTrunk

SMALL = {"img_size": 56, "patch_size": 14, "embed_dim": 24, "depth": 3, "num_heads": 3}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_small_patch16_224", SMALL),
    "mean pooling": ("vit_small_patch16_224", SMALL | {"global_pool": "avg"}),
    "registers and layer scale": ("vit_small_patch14_reg4_dinov2", SMALL),
    "norms on queries and keys": ("vit_small_patch16_224", SMALL | {"qk_norm": True}),
    "no biases": ("vit_small_patch16_224", SMALL | {"qkv_bias": False}),
    "SwiGLU": (
        "vit_giant_patch14_dinov2",
        SMALL | {"num_classes": 5, "mlp_ratio": 2.0},
    ),
}


def small_trunk(architecture: str, arguments: dict[str, Any]) -> TimmTrunk:
    torch.manual_seed(1)
    network = timm.create_model(architecture, **arguments)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    preprocess = replace(preprocess_from_timm(network), input_size=(56, 56), crop_pct=1.0)
    return TimmTrunk(architecture, network, preprocess, Placement())


@pytest.fixture(params=KINDS)
def trunk(request: pytest.FixtureRequest) -> TimmTrunk:
    return small_trunk(*KINDS[request.param])


def random_head(trunk: TimmTrunk, seed: int, queries: int = 1, classes: int = 4) -> Vqt:
    generator = torch.Generator().manual_seed(seed)
    depth, dim = len(trunk.blocks), trunk.blocks[0].attn.qkv.in_features
    tensors = {
        "queries": torch.randn(depth, queries, dim, generator=generator),
        "classifier.0.weight": torch.randn(
            classes, dim * (1 + depth * queries), generator=generator
        ),
        "classifier.0.bias": torch.randn(classes, generator=generator),
    }
    labels = tuple(f"class {i}" for i in range(classes))
    head = create_head("vqt", trunk, labels, HeadState(tensors))
    assert isinstance(head, Vqt)
    return head


def for_all_rows(head: Vqt) -> BatchRequest:
    return merge([(head.request, range(5))])


def raw_tokens(trunk: TimmTrunk, head: Vqt) -> Tensor:
    """The head's query tokens (L, T, D) as the trunk's bank holds them."""
    bank = trunk._bank.tensors
    assert bank is not None
    slots = head.queries.slots
    return bank[0][:, slots.start : slots.stop]


def as_published(trunk: TimmTrunk, head: Vqt, pixels: Tensor) -> Tensor:
    """The paper's way: queries in front of the sequence, keys and values of the rest alone."""
    network = trunk.network
    x = network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(pixels))))
    segments = []
    for number, block in enumerate(network.blocks):
        raw = raw_tokens(trunk, head)[number].expand(len(x), -1, -1)
        count = raw.shape[1]
        sequence = torch.cat([raw, x], 1)
        attention = block.attn
        qkv = attention.qkv(block.norm1(sequence))
        shape = (*qkv.shape[:2], 3, attention.num_heads, -1)
        q, k, v = qkv.reshape(shape).permute(2, 0, 3, 1, 4)
        q, k = attention.q_norm(q), attention.k_norm(k)
        k, v = k[:, :, count:], v[:, :, count:]
        scores = (q @ k.transpose(-2, -1) * attention.scale).softmax(-1)
        read = attention.proj((scores @ v).transpose(1, 2).flatten(2))
        sequence = sequence + block.ls1(read)
        sequence = sequence + block.ls2(block.mlp(block.norm2(sequence)))
        segments.append(normalize(sequence[:, :count].flatten(1), dim=-1))
        x = sequence[:, count:]
    pooled = network.forward_head(network.norm(x), pre_logits=True)
    features = torch.cat([normalize(pooled, dim=-1), *segments], -1)
    assert head.network is not None
    logits: Tensor = head.network(features)
    return logits


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(5, 3, 56, 56, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("queries", [1, 3])
def test_a_head_reads_the_trunk_as_the_paper_does(
    trunk: TimmTrunk, pixels: Tensor, queries: int
) -> None:
    head = random_head(trunk, 0, queries)
    with torch.inference_mode():
        logits = head.forward(trunk.forward(pixels, for_all_rows(head)))["logits"]
        assert torch.allclose(logits, as_published(trunk, head, pixels), atol=1e-5, rtol=1e-5)


def test_rows_get_their_own_heads_and_the_trunk_is_not_disturbed(
    trunk: TimmTrunk, pixels: Tensor
) -> None:
    """Rows want none, one, and several heads, with different numbers of queries, in one pass."""
    heads = [random_head(trunk, seed, queries) for seed, queries in ((1, 1), (2, 2), (3, 1))]
    rows = ([0, 2, 4], [4, 2], [3])  # row 1 wants none; orders differ
    request = merge((head.request, some) for head, some in zip(heads, rows, strict=True))
    with torch.inference_mode():
        bare = trunk.forward(pixels)
        output = trunk.forward(pixels, request)
        assert torch.equal(output.features, bare.features)
        for head, some in zip(heads, rows, strict=True):
            together_logits = head.forward(output.rows(list(some)))["logits"]
            alone = head.forward(trunk.forward(pixels, for_all_rows(head)))["logits"][some]
            assert torch.allclose(together_logits, alone, atol=1e-5)


def test_threads_read_their_own_passes(pixels: Tensor) -> None:
    from concurrent.futures import ThreadPoolExecutor

    trunk = small_trunk(*KINDS["class token"])
    heads = [random_head(trunk, seed) for seed in range(4)]

    def run(number: int) -> Tensor:
        head = heads[number % 4]
        with torch.inference_mode():
            return head.forward(trunk.forward(pixels, for_all_rows(head)))["logits"]

    expected = [run(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for number, logits in enumerate(pool.map(run, range(80))):
            assert torch.allclose(logits, expected[number % 4], atol=1e-6)


def test_a_block_combines_features_after_an_mlp_of_each_layer(pixels: Tensor) -> None:
    """Upstream's `mlp+selfatten`."""
    trunk = small_trunk(*KINDS["class token"])
    block = Block(24, 3, mlp_ratio=2, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    mlps = nn.ModuleList(Mlp(24, 40) for _ in range(3)).eval()
    tensors = {
        **{f"attend.{key}": value for key, value in block.state_dict().items()},
        **{f"mlps.{key}": value for key, value in mlps.state_dict().items()},
        "positions": torch.randn(1, 4, 24),
        "queries": torch.randn(3, 2, 24),
        "classifier.0.weight": torch.randn(5, 24),
        "classifier.0.bias": torch.randn(5),
    }
    state = HeadState(tensors, {"attending_heads": 3})
    head = create_head("vqt", trunk, tuple("abcde"), state)
    assert isinstance(head, Vqt)
    with torch.inference_mode():
        output = trunk.forward(pixels, for_all_rows(head))
        positions = tensors["positions"][0]
        tokens = [normalize(trunk.pool(output), dim=-1) + positions[0]]
        for layer, mlp in enumerate(mlps):
            for query in output.queries[head.queries][:, layer].unbind(1):
                tokens.append(mlp(normalize(query, dim=-1)) + positions[layer + 1])
        expected = block.eval()(torch.stack(tokens, 1))[:, 0]
        assert torch.allclose(head.features(output), expected, atol=1e-5)
    attending = [*block.parameters(), *mlps.parameters(), positions]
    numbers = sum(tensor.numel() for tensor in attending) + 5 * 24 + 5
    assert head.nbytes == 4 * numbers + head.queries.nbytes
    for name, value in (("positions", torch.zeros(4, 24)), ("mlps.1.fc1.bias", torch.zeros(3))):
        with pytest.raises(CheckpointError, match=name.removesuffix(".fc1.bias")):
            create_head(
                "vqt", trunk, tuple("abcde"), HeadState(tensors | {name: value}, state.settings)
            )


def test_features_can_be_a_selection(pixels: Tensor) -> None:
    trunk = small_trunk(*KINDS["class token"])
    whole = random_head(trunk, 0)
    indices = torch.tensor([0, 5, 30, 95])
    tensors = {
        "queries": raw_tokens(trunk, whole),
        "indices": indices,
        "classifier.0.weight": torch.eye(4),
    }
    head = create_head("vqt", trunk, tuple("abcd"), HeadState(tensors))
    assert isinstance(head, Vqt)
    with torch.inference_mode():
        some = head.forward(trunk.forward(pixels, for_all_rows(head)))["logits"]
        every = whole.features(trunk.forward(pixels, for_all_rows(whole)))
    assert torch.allclose(some, every[:, indices], atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"queries": torch.zeros(2, 1, 24)}, r"the trunk takes \(3, T, 24\)"),
        ({"queries": torch.zeros(3, 300, 24)}, "T up to 256"),
        ({"queries": torch.zeros(3, 24)}, "tensor queries of 3 dimensions"),
        ({"combine": torch.zeros(3, 2)}, "combine must have shape"),
        (
            {"classifier.0.weight": torch.zeros(4, 10)},
            "takes 10 features of 96; the tensor indices",
        ),
        ({"indices": torch.tensor([96] * 96)}, r"must lie in 0\.\.95"),
        ({"indices": torch.tensor([1, 2])}, "indices must be 96 integers"),
        ({"classifier.0.weight": torch.zeros(3, 96)}, "4 labels for 3 outputs"),
        ({"classifier.x.weight": torch.zeros(3, 96)}, "layers are numbered"),
    ],
)
def test_heads_that_do_not_fit_say_why(changed: dict[str, Tensor], message: str) -> None:
    trunk = small_trunk(*KINDS["class token"])
    tensors = {
        "queries": torch.zeros(3, 1, 24),
        "classifier.0.weight": torch.zeros(4, 96),
        **changed,
    }
    with pytest.raises(CheckpointError, match=message):
        create_head("vqt", trunk, tuple("abcd"), HeadState(tensors))


def test_the_garbage_collector_may_release_query_tokens_while_others_are_added() -> None:
    bank = small_trunk(*KINDS["class token"])._bank
    queries = [bank.add(torch.zeros(3, 2, 24))]
    freed = queries[0].slots

    def collect() -> None:
        with bank._lock:
            queries.clear()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert bank.add(torch.zeros(3, 2, 24)).slots == freed


def test_networks_without_such_blocks_carry_no_queries() -> None:
    network = timm.create_model("test_convnext")
    trunk = TimmTrunk("test_convnext", network, preprocess_from_timm(network), Placement())
    tensors = {"queries": torch.zeros(3, 1, 24), "classifier.0.weight": torch.zeros(4, 96)}
    with pytest.raises(CheckpointError, match="blocks of a plain ViT"):
        create_head("vqt", trunk, tuple("abcd"), HeadState(tensors))


@pytest.mark.parametrize("layer", [3, -4])
def test_a_linear_head_reads_no_block_that_is_not_there(layer: int) -> None:
    trunk = small_trunk(*KINDS["class token"])
    state = HeadState({"classifier.0.weight": torch.zeros(2, 24)}, {"layers": [layer]})
    with pytest.raises(CheckpointError, match=f"reads block {layer}; the trunk has 3"):
        create_head("linear", trunk, ("a", "b"), state)


def linear_head(trunk: TimmTrunk, seed: int, **settings: Any) -> Head:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 24, generator=generator)
    return create_head(
        "linear", trunk, tuple("abc"), HeadState({"classifier.0.weight": weight}, settings)
    )


def selecting_head(trunk: TimmTrunk, seed: int) -> Head:
    tensors = {
        "queries": torch.randn(3, 1, 24, generator=torch.Generator().manual_seed(seed)),
        "indices": torch.arange(seed, seed + 8),
        "classifier.0.weight": torch.randn(2, 8, generator=torch.Generator().manual_seed(seed)),
    }
    return create_head("vqt", trunk, ("a", "b"), HeadState(tensors))


def test_mixed_heads_compute_their_features_together(
    pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = small_trunk(*KINDS["class token"])
    heads = [
        random_head(trunk, 1),
        selecting_head(trunk, 2),
        random_head(trunk, 3, classes=7),
        random_head(trunk, 4, queries=2),
        linear_head(trunk, 5),
        linear_head(trunk, 6),
        linear_head(trunk, 7, layers=[1]),
    ]
    calls = [
        [HeadCall.of(heads[(row + turn) % 7], {}) for turn in range(2 + row)] for row in range(5)
    ]
    computed: list[int] = []

    def counting(pooled_BD: Tensor, *others: Any) -> Tensor:
        computed.append(len(pooled_BD))
        return vqt_features(pooled_BD, *others)

    alone = [
        [run_pass(trunk, pixels[row : row + 1], [[call]])[0][0] for call in row_calls]
        for row, row_calls in enumerate(calls)
    ]
    monkeypatch.setattr("models.heads.vqt.vqt_features", counting)
    together = run_pass(trunk, pixels, calls)
    assert len(computed) == 2  # one query token, and two
    for found, expected in zip(together, alone, strict=True):
        for one, other in zip(found, expected, strict=True):
            assert not isinstance(one, Exception)
            assert not isinstance(other, Exception)
            count = len(other["index"])
            np.testing.assert_array_equal(one["index"][:count], other["index"])
            np.testing.assert_allclose(one["score"][:count], other["score"], atol=1e-6)


def test_a_head_that_fails_among_others_fails_alone(pixels: Tensor) -> None:
    trunk = small_trunk(*KINDS["class token"])
    good, bad = random_head(trunk, 1), random_head(trunk, 2)
    bad.network = torch.nn.Linear(5, 4)
    calls = [HeadCall.of(head, {}) for head in (good, bad)]
    rows = run_pass(trunk, pixels[:2], [calls[:1], calls[::-1]])
    assert isinstance(rows[1][0], RuntimeError)
    for arrays in (rows[0][0], rows[1][1]):
        assert not isinstance(arrays, Exception)
        assert arrays["index"].shape == (4,)

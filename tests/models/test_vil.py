"""EsViT's ViL against attention that is written out pair by pair."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from models import load_checkpoint
from models.checkpoints.loading import read_checkpoint
from models.errors import CheckpointError, InputError
from models.networks.longformer import FullAttention, SlidingAttention
from models.networks.vil import Vil
from tests.models.test_segmentors import randomize

SHARED: dict[str, Any] = {"hidden": 32, "norm": True, "grid": [], "bias": True}
STAGES: list[dict[str, Any]] = [
    {**SHARED, "dim": 8, "depth": 1, "heads": 2, "patch": 4, "tokens": 1, "sliding": True,
     "window": 3, "table": 3},
    {**SHARED, "dim": 12, "depth": 2, "heads": 3, "patch": 2, "tokens": 2, "sliding": False,
     "window": 0, "table": 4},
    {**SHARED, "dim": 16, "depth": 1, "heads": 4, "patch": 2, "tokens": 0, "sliding": False,
     "window": 0, "table": 2},
]  # fmt: skip
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def network() -> Vil:
    return randomize(Vil(stages=STAGES))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def path(network: Vil, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run's file: both networks with their heads, and upstream's buffers."""
    state = dict(network.state_dict())
    for number in (1, 2, 3):
        state[f"layer{number}.1.attn.relative_position_index"] = torch.zeros(2, 2).long()
    for name in ("head", "head_dense"):
        state[f"{name}.last_layer.weight_v"] = torch.randn(5, 4)
    path = tmp_path_factory.mktemp("vil") / "checkpoint.pth"
    student = {f"module.{key}": value + 1 for key, value in state.items()}
    torch.save({"student": student, "teacher": state, "epoch": 3}, path)
    return path


def written_out(attention: Any, x: Tensor, rows: int, columns: int) -> Tensor:
    """The attention's output (B, T, D), one pair of tokens after the other."""
    count, heads = attention.tokens, attention.heads
    sliding = isinstance(attention, SlidingAttention)
    if sliding:
        queries, both = attention.query(x), attention.kv(x)
        parts = [queries, *both.chunk(2, -1)]
    else:
        parts = list(attention.qkv(x).chunk(3, -1))
    queries, keys, values = (part.unflatten(2, (heads, -1)) for part in parts)
    scores = attention.scale * torch.einsum("bqhd,bkhd->bhqk", queries, keys)
    table = attention.local_relative_position_bias_table
    side = 2 * attention.window - 1 if sliding else attention.table - 1
    for query in range(x.shape[1]):
        for key in range(x.shape[1]):
            if query < count:
                local = attention.g2l_relative_position_bias[0, :, query]
                bias = attention.g2g_relative_position_bias[:, query, key] if key < count else local
            elif key < count:
                bias = attention.g2l_relative_position_bias[1, :, key]
            else:
                one, other = divmod(query - count, columns), divmod(key - count, columns)
                down, across = one[0] - other[0], one[1] - other[1]
                pairs = zip(one, other, strict=True) if sliding else ()
                windows = [abs(a // attention.window - b // attention.window) for a, b in pairs]
                if max(windows, default=0) > 1:
                    scores[:, :, query, key] = float("-inf")
                    continue
                bias = table[(down + side) * (2 * side + 1) + across + side]
            scores[:, :, query, key] += bias
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values).flatten(2)
    projected: Tensor = attention.proj(out)
    if sliding:  # here the weights of global tokens are those of patches, as published
        assert torch.equal(attention.query.weight, attention.query_global.weight)
    return projected


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (7, 10), (2, 5)])
def test_patches_see_the_windows_around_theirs(rows: int, columns: int) -> None:
    attention = SlidingAttention(8, 2, tokens=1, bias=True, table=3, window=3)
    randomize(attention)
    for part in ("query", "kv", "proj"):
        shared = attention.get_submodule(part).state_dict()
        attention.get_submodule(f"{part}_global").load_state_dict(shared)
    x = torch.randn(2, 1 + rows * columns, 8)
    with torch.no_grad():
        expected = written_out(attention, x, rows, columns)
        torch.testing.assert_close(attention(x, (rows, columns)), expected)


def test_full_attention_has_biases_of_pairs_and_tokens() -> None:
    attention = FullAttention(12, 3, tokens=2, bias=False, table=4, window=0)
    randomize(attention)
    x = torch.randn(2, 18, 12)
    with torch.no_grad():
        torch.testing.assert_close(attention(x, (4, 4)), written_out(attention, x, 4, 4))


def test_a_training_runs_file_has_everything_in_its_shapes(network: Vil, path: Path) -> None:
    checkpoint = read_checkpoint(path, {})
    assert checkpoint.arguments["stages"] == STAGES
    assert checkpoint.assumed == {
        "avg_pool": False, "only_glo": False, "sw_exact": 0, "ln_eps": 1e-6, "mode": 0,
    }  # fmt: skip
    assert checkpoint.preprocess is not None
    assert checkpoint.preprocess.input_size == (32, 32)
    model = load_checkpoint(path)
    found = model.run(PIXELS)
    with torch.no_grad():
        features = network.forward_features(PIXELS)
        means = network.block_means(PIXELS)
    torch.testing.assert_close(found["embedding"], features.mean((2, 3)))
    torch.testing.assert_close(found["linear_features"], torch.cat(means[-4:], -1))
    with pytest.raises(InputError, match="squares alone"):
        model.run(torch.zeros(1, 3, 32, 48))


def test_global_tokens_feed_a_linear_classifier(network: Vil, path: Path, tmp_path: Path) -> None:
    """Of the last blocks, as EsViT publishes it beside the backbone."""
    (tmp_path / "backbone.pth").write_bytes(path.read_bytes())
    weight, bias = torch.randn(7, 12 + 16), torch.randn(7)
    state = {"module.linear.weight": weight, "module.linear.bias": bias}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "linear.pth")
    with torch.no_grad():
        x: Tensor = PIXELS
        tokens = []
        for number in (1, 2, 3):
            layers: Any = network.get_submodule(f"layer{number}")
            x, grid = layers[0](x)
            for layer in list(layers)[1:]:
                x = layer(x, grid)
                tokens.append(x)
            count = STAGES[number - 1]["tokens"]
            if number < 3:
                x = torch.unflatten(x[:, count:].transpose(1, 2), 2, grid)
        last = layer_norm(x, (16,), network.norm.weight, network.norm.bias, 1e-6).mean(1)
        features = torch.cat([tokens[-3][:, 0], last], -1)
    expected = linear(features, weight, bias)
    logits = load_checkpoint(tmp_path / "linear.pth").run(PIXELS)["logits"]
    torch.testing.assert_close(logits, expected)


def test_without_tables_the_description_of_the_stages_is_needed(tmp_path: Path) -> None:
    plain = [{**stage, "table": 0, "grid": [8 // 2**n] * 2} for n, stage in enumerate(STAGES)]
    network = randomize(Vil(stages=plain))
    head = {"head.last_layer.weight_v": torch.randn(5, 4)}
    state = {**network.state_dict(), **head}
    torch.save({"student": state, "teacher": state}, tmp_path / "ape.pth")
    with pytest.raises(CheckpointError, match=r"heads and windows of stage 1 .* set arch"):
        load_checkpoint(tmp_path / "ape.pth")
    arch = "l1,h2,d8,n1,s1,g1,p4,f3_l2,h3,d12,n2,s0,g2,p2,f3_l3,h4,d16,n1,s0,g0,p2,f3"
    model = load_checkpoint(tmp_path / "ape.pth", {"arch": arch})
    with torch.no_grad():
        features = network.forward_features(PIXELS)  # type: ignore[operator]
    torch.testing.assert_close(model.run(PIXELS)["embedding"], features.mean((2, 3)))
    for arguments, message in (
        ({"arch": arch.replace("h3", "h5")}, "5 heads of 12 channels"),
        ({"arch": "l1,h2"}, "arch has 1 stages"),
        ({"arch": arch, "sw_exact": 1}, "sw_exact is 1"),
        ({"arch": arch, "mode": -1}, "mode is -1"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / "ape.pth", arguments)

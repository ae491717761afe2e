"""What LoRA adapters cost: one pass of a batch whose rows have none, one, or one each.

    python -m benchmarks.adapters [--model dinov2-focus-embed] [--batch 8] [--rank 8]

The adapters have random weights on the attention's and the MLP's layers. All passes run eagerly in
float32; the variants take turns, and figures are medians. `merged` is a pass for each row by
itself, as if every adapter were merged into a network of its own.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from models import Registry
from models.heads.embed import Embed
from models.inference import HeadCall, run_pass
from models.trunks.adapting import create_adapter
from models.trunks.base import Trunk

ENDINGS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def adapted_call(trunk: Trunk, rank: int, seed: int) -> HeadCall:
    """A call of an embedding through an adapter with random weights."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {
        name: (
            torch.randn(rank, layer.in_features, generator=generator) * 0.02,
            torch.randn(layer.out_features, rank, generator=generator) * 0.02,
        )
        for name, layer in trunk.adapters.layers.items()
        if name.endswith(ENDINGS)
    }
    head = Embed(trunk)
    head.adapt(create_adapter(trunk, matrices))
    return HeadCall(head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="dinov2-focus-embed")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    trunk = Registry.from_catalog("demo", device="cpu").get(arguments.model).trunk
    size = arguments.batch
    plain = HeadCall(Embed(trunk))
    calls = [adapted_call(trunk, arguments.rank, seed) for seed in range(size)]
    batch = trunk.collate(trunk.samples(size))

    def one_pass(rows: Sequence[HeadCall]) -> Callable[[], object]:
        return lambda: run_pass(trunk, batch, [[call] for call in rows])

    variants: dict[str, Callable[[], object]] = {
        "no adapter": one_pass([plain] * size),
        "one adapter for all rows": one_pass([calls[0]] * size),
        "half the rows have one each": one_pass(
            [*calls[: size // 2], *[plain] * (size - size // 2)]
        ),
        f"{size} adapters, one a row": one_pass(calls),
        "merged": lambda: [run_pass(trunk, batch[n : n + 1], [[plain]]) for n in range(size)],
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(arguments.rounds + 1):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    first = statistics.median(times["no adapter"])
    adapter = calls[0].head.request.adapter
    assert adapter is not None
    print(
        f"{arguments.model}, batch {size}, rank {arguments.rank}, {torch.get_num_threads()} threads"
    )
    print(f"an adapter has {adapter.nbytes / 2**20:.1f} MiB; the trunk {trunk.nbytes / 2**20:.1f}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:28} {median * 1e3:8.1f} ms a batch  {median / first:5.2f}")


if __name__ == "__main__":
    main()

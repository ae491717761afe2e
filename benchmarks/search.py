"""How well a collection's store finds clustered vectors, and what that costs.

    python -m benchmarks.search --count 100000 --dimensions 384
    python -m benchmarks.search --store postgresql://...

Vectors lie around the centres of clusters, as photos of the same things do; in uniformly random
ones, which every index finds badly, no vector has real neighbours. Recall is compared with exact
search by numpy.
"""

import argparse
import asyncio
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from service.search.collection import Collection, Item, VectorStore
from service.search.lance import LanceStore

BATCH = 5000
CLUSTER_SIZE = 100
SPREAD = 0.6  # standard deviation around a centre, relative to the centres' own
QUERIES = 200
NEIGHBOURS = 10


def clustered(count: int, dimensions: int, seed: int = 0) -> np.ndarray:
    """(count, dimensions) float32 of unit length, around count / CLUSTER_SIZE centres."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(1, count // CLUSTER_SIZE), dimensions)).astype(np.float32)
    vectors = centres[rng.integers(0, len(centres), count)]
    for start in range(0, count, BATCH):
        block = vectors[start : start + BATCH]
        block += SPREAD * rng.normal(size=block.shape).astype(np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return vectors


async def measure(store: VectorStore, vectors: np.ndarray, queries: np.ndarray) -> dict[str, float]:
    """Seconds to add and to index, recall at 10, milliseconds of a search, and by how much the
    process grew at most."""
    count, dimensions = vectors.shape
    collection = Collection(
        name="benchmark",
        model="",
        model_digest="",
        preprocess_digest="",
        dimensions=dimensions,
    )
    await store.create(collection)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    for start in range(0, count, BATCH):
        block = vectors[start : start + BATCH]
        await store.add(collection, [Item(str(start + n), row) for n, row in enumerate(block)])
    added = time.perf_counter()
    if isinstance(store, LanceStore):
        await store.maintain("benchmark")
    indexed = time.perf_counter()
    found, seconds = [], []
    for query in queries:
        began = time.perf_counter()
        hits = await store.search(collection, query, NEIGHBOURS, {})
        seconds.append(time.perf_counter() - began)
        found.append({int(hit.id) for hit in hits})
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    exact = np.argpartition(-(queries @ vectors.T), NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
    matching = [len(ids & set(row.tolist())) for ids, row in zip(found, exact, strict=True)]
    await store.delete("benchmark")
    return {
        "vectors": count,
        "dimensions": dimensions,
        "add_s": added - started,
        "index_s": indexed - added,
        "recall_at_10": float(np.mean(matching)) / NEIGHBOURS,
        "p50_ms": 1e3 * float(np.median(seconds)),
        "p99_ms": 1e3 * float(np.quantile(seconds, 0.99)),
        "memory_mib": (memory - before) / 1024,
    }


async def run(location: str, count: int, dimensions: int) -> dict[str, float]:
    """Measure a store."""
    everything = clustered(count + QUERIES, dimensions)
    vectors, queries = everything[:count], everything[count:]
    with tempfile.TemporaryDirectory() as folder:
        if location:
            from service.search.postgres import PostgresStore

            store: VectorStore = await PostgresStore.open(location)
        else:
            store = await LanceStore.open(Path(folder))
        result = await measure(store, vectors, queries)
        await store.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--store", default="", help="a postgresql:// URL; LanceDB if empty")
    arguments = parser.parse_args()
    result = asyncio.run(run(arguments.store, arguments.count, arguments.dimensions))
    print(json.dumps({name: round(value, 3) for name, value in result.items()}, indent=2))


if __name__ == "__main__":
    main()

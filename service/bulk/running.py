"""A whole bulk run: the shards that are not done yet, here or on a Ray cluster."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from service.bulk.job import Job
from service.bulk.runner import ShardRunner
from service.bulk.shards import Shard
from service.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Where to run on Ray.

    Args:
        address: of the cluster, or `local` to start one on this machine.
        actors: how many load the model.
        cpus, gpus: of each.
    """

    address: str
    actors: int = 1
    cpus: float = 1.0
    gpus: float = 0.0


def run_here(settings: Settings, job: Job, shards: Sequence[Shard]) -> Iterator[tuple[int, int]]:
    """Run shards in this process. Yields each one's numbers of images and of failures."""
    with closing(ShardRunner(settings, job)) as runner:
        for shard in shards:
            yield runner.run(shard)


def run_on_ray(
    settings: Settings, job: Job, shards: Sequence[Shard], cluster: Cluster
) -> Iterator[tuple[int, int]]:
    """As `run_here`, with Ray Data. Shards of an actor or node that is lost are run again."""
    import ray
    import ray.data

    ray.init(address=cluster.address, namespace="vitrail", ignore_reinit_error=True)
    ray.data.DataContext.get_current().enable_progress_bars = False
    texts = [{"shard": shard.to_json()} for shard in shards]
    results = ray.data.from_items(texts, override_num_blocks=len(texts)).map_batches(
        ShardRunner,
        fn_constructor_args=(settings, job),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=cluster.actors),
        num_cpus=cluster.cpus,
        num_gpus=cluster.gpus,
        max_restarts=-1,
        max_task_retries=-1,
    )
    for row in results.iter_rows():
        yield row["images"], row["failed"]

"""Which workers answer for a model: those that have it in the version that most of them have."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.remote.worker import Worker


@dataclass(frozen=True, slots=True)
class Version:
    """The workers that have a model ready with the same digest."""

    digest: str | None
    workers: Sequence[Worker]


class Versions:
    """Every model's versions, counted anew only after a change, so that a request stays cheap.

    Attributes:
        differing: the models that workers may have in several versions.
    """

    def __init__(self, having: Callable[[str], Sequence[Worker]]) -> None:
        """
        Args:
            having: returns the workers whose catalogs have a model.
        """
        self._having = having
        # What was counted since the last change, the most frequent version first.
        self._counted: dict[str, list[Version]] = {}
        # A digest of each model. Where another one is seen, the model is in `differing`.
        self._digests: dict[str, str] = {}
        self.differing: set[str] = set()

    def note(self, model: str, digest: str | None) -> None:
        """Note what a worker knows of a model now: its digest, None if there is none."""
        self._counted.pop(model, None)
        if digest is not None and self._digests.setdefault(model, digest) != digest:
            self.differing.add(model)

    def note_removed(self, model: str) -> None:
        """Note that no worker knows a model any more."""
        self._counted.pop(model, None)
        self._digests.pop(model, None)
        self.differing.discard(model)

    def note_worker(self) -> None:
        """Note that a worker was lost, came back or drains."""
        self._counted.clear()

    def serving(self, model: str) -> Version | None:
        """The version that most workers have ready; None if none has.

        Every gateway finds the same one, so a change takes over as a whole. Only where all workers
        of a version keep failing for this gateway, it is the next one.
        """
        if (versions := self._counted.get(model)) is None:
            versions = _count(model, self._having(model))
            if versions:
                self._counted[model] = versions
        well = (version for version in versions if any(map(is_well, version.workers)))
        return next(well, versions[0] if versions else None)

    def left_out(self) -> dict[Worker, list[str]]:
        """The workers that get no requests for some models, because of their version of these."""
        left: defaultdict[Worker, list[str]] = defaultdict(list)
        for model in sorted(self.differing):
            having = self._having(model)
            known = (worker.models.get(model) for worker in having)
            digests = {one.model_digest for one in known if one and one.model_digest}
            if len(digests) < 2:
                self.differing.discard(model)
                self._digests |= zip([model], digests, strict=False)
            elif (serving := self.serving(model)) is not None:
                for worker in having:
                    if worker.has_ready(model) and not worker.has_version(model, serving.digest):
                        left[worker].append(model)
        return left


def is_well(worker: Worker) -> bool:
    """Whether nothing but its models speaks against a worker."""
    return not worker.health.draining and not worker.ejected


def _count(model: str, having: Sequence[Worker]) -> list[Version]:
    workers: defaultdict[str | None, list[Worker]] = defaultdict(list)
    for worker in having:
        if worker.has_ready(model):
            workers[worker.models[model].model_digest].append(worker)
    versions = [Version(digest, of_it) for digest, of_it in workers.items()]
    return sorted(versions, key=_rank, reverse=True)


def _rank(version: Version) -> tuple[int, int, str]:
    staying = sum(not worker.health.draining for worker in version.workers)
    return staying, len(version.workers), version.digest or ""

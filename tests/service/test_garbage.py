"""What is loaded is left out of garbage collections, and nothing else."""

import gc
from pathlib import Path

import pytest

from service.garbage import look_at_all_objects
from service.worker import head_store
from service.worker.head_store import HeadStore
from tests.conftest import running, wait_until


def test_only_loads_leave_objects_out(tiny_catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs: list[bool] = []
    sync = HeadStore._sync

    def counted(self: HeadStore) -> bool:
        syncs.append(sync(self))
        return syncs[-1]

    monkeypatch.setattr("service.worker.backend.look_at_all_objects", look_at_all_objects)
    monkeypatch.setattr(HeadStore, "_sync", counted)
    monkeypatch.setattr(head_store, "INTERVAL_S", 0.01)
    with running(tiny_catalog) as server:
        server.wait_ready()
        left_out = gc.get_freeze_count()
        assert left_out > 0
        done = len(syncs)
        wait_until(lambda: len(syncs) > done + 2)
        assert gc.get_freeze_count() <= left_out
    assert gc.get_freeze_count() == 0

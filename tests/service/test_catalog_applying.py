"""How changes of a catalog are applied in the loader's thread, without a server."""

import asyncio
import gc
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from prometheus_client import CollectorRegistry

from models.catalog import Catalog, ModelEntry, load_catalog
from models.catalog_changes import Edition
from models.checkpoints.store import Store
from models.description import State
from models.errors import CheckpointError
from models.registry import Registry
from service.errors import ServiceError
from service.garbage import look_at_all_objects
from service.metrics import Metrics
from service.worker import catalog_watch
from service.worker.catalog_watch import CatalogWatch
from service.worker.fit_jobs import FitJobs
from service.worker.head_store import HeadStore
from service.worker.loader import Loader


class Applying:
    """A registry whose catalog changes, with its loader."""

    def __init__(self, catalog: Catalog) -> None:
        self.registry = Registry(
            catalog, device="cpu", store=Store(catalog.path.parent / "store"), engine="eager"
        )
        self.loader = Loader(self.registry.device)
        self.watch = CatalogWatch(
            self.registry,
            startup=(),
            interval_s=0,
            in_loader=self.loader.run,
            after=lambda: None,
            on_change=lambda name: None,
            metrics=Metrics(CollectorRegistry()),
        )

    def apply(self, catalog: Catalog) -> None:
        asyncio.run(self.watch._apply(catalog, Edition.of(catalog)))


@pytest.fixture
def collections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """One entry for each time that old objects are left out of collections."""
    seen: list[None] = []
    monkeypatch.setattr(catalog_watch, "leave_out_old_objects", lambda: seen.append(None))
    yield seen
    look_at_all_objects()


def described(catalog: Catalog, text: str) -> Catalog:
    """With other descriptions of all models, none of which are loaded at start."""
    models = {n: replace(entry, description=text) for n, entry in catalog.models.items()}
    return replace(catalog, models=models, startup=())


def test_a_model_mended_before_its_load_at_start_is_loaded(tiny_catalog: Path) -> None:
    mended = load_catalog(tiny_catalog)
    broken = replace(mended.trunks["tiny"], source="file:missing.safetensors")
    applying = Applying(replace(mended, trunks={**mended.trunks, "tiny": broken}))
    registry, loader = applying.registry, applying.loader

    def load_at_start() -> None:
        while loader._pool._work_queue.empty():  # the change comes while this waits
            time.sleep(0.001)
        registry.load("tiny")

    async def start() -> None:
        loading = asyncio.create_task(loader.run(load_at_start))
        await asyncio.sleep(0)
        await applying.watch._apply(mended, Edition.of(mended))
        with pytest.raises(ServiceError):
            await loading

    asyncio.run(asyncio.wait_for(start(), 60))
    assert registry.state("tiny") is State.READY
    assert applying.watch.failures == {}


def test_a_change_of_many_models_leaves_old_objects_out_once(
    tiny_catalog: Path, collections: list[None]
) -> None:
    catalog = load_catalog(tiny_catalog)
    applying = Applying(catalog)
    applying.apply(described(catalog, "none is loaded"))
    assert not collections
    for name in catalog.models:
        applying.registry.load(name)
    applying.apply(described(catalog, "all are loaded"))
    assert len(collections) == 1
    assert applying.registry.catalog.model("conv").description == "all are loaded"


def test_what_a_failed_change_has_built_is_freed(tiny_catalog: Path) -> None:
    class Built:
        """Like networks, part of a cycle."""

        def __init__(self) -> None:
            self.itself = self

    built: list[Any] = []

    def fail() -> None:
        new = Built()
        built.append(weakref.ref(new))
        raise CheckpointError("it does not run")

    watch = Applying(load_catalog(tiny_catalog)).watch
    gc.disable()  # it is not chance that frees it
    try:
        assert not asyncio.run(watch._try(fail, ["tiny"]))
        assert built[0]() is None
    finally:
        gc.enable()
        look_at_all_objects()
    assert watch._failed == {"tiny": "it does not run"}


def test_heads_that_waited_for_a_trunk_that_was_removed_are_forgotten(
    tiny_catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are declared anew once the trunk is back."""
    monkeypatch.setattr(catalog_watch, "SWITCH_S", 0)
    catalog = load_catalog(tiny_catalog)
    applying = Applying(catalog)
    registry = applying.registry
    store = HeadStore(registry, tmp_path, MagicMock(FitJobs), applying.loader.run)
    registry.add(ModelEntry(name="pets", trunk="tiny", task="classify", head="file:pets"))
    store._load("pets")
    without = {name: entry for name, entry in catalog.models.items() if entry.trunk != "tiny"}
    defaults = {task: name for task, name in catalog.defaults.items() if name in without}
    trunks = {"conv": catalog.trunks["conv"]}
    changed = replace(catalog, trunks=trunks, models=without, defaults=defaults)
    applying.apply(replace(changed, startup=()))
    assert set(registry.names()) == {"conv"}
    applying.apply(catalog)
    assert registry.loaded_trunk("tiny") is not None
    assert not store._step()

"""New versions of trunks and models, which are built beside those in use and then replace them."""

import gc
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from models.assembly import Assembly
from models.catalog import ModelEntry, TrunkEntry
from models.checkpoints.loading import LoadedTrunk
from models.checkpoints.store import Store
from models.description import State
from models.errors import ModelsError
from models.loaded_trunks import LoadedTrunks
from models.model import Model
from models.slots import Slot, Slots

logger = logging.getLogger(__name__)


class Replacement:
    """One replacement in a registry."""

    def __init__(
        self,
        entries: Mapping[str, TrunkEntry],
        models: Mapping[str, ModelEntry],
        slots: Slots,
        trunks: LoadedTrunks,
    ) -> None:
        """
        Args:
            entries: trunks that are new or changed, by name.
            models: models that are new or changed, and the others of the catalog on these trunks.
                Heads on them are found here.
        """
        self._entries = entries
        self._slots = slots
        self._trunks = trunks
        self._renewed = [name for name in entries if trunks.get(name) is not None]
        on_renewed = {name for trunk in self._renewed for name in slots.users(trunk)}
        self._heads = on_renewed - models.keys()
        self._old = {
            name: slot
            for name in (*models, *self._heads)
            if (slot := slots.get(name)) is not None and slot.model is not None
        }
        self._new = {name: Slot(entry) for name, entry in models.items()}
        self._new |= {n: Slot(self._old[n].entry) for n in self._heads & self._old.keys()}
        self._built: dict[str, LoadedTrunk] = {}

    def run(
        self,
        base: Path,
        store: Store,
        trunk_in_use: Callable[[str], LoadedTrunk],
        warm_up: Callable[[Model], None],
        retire: Callable[[Model], None],
        commit: Callable[[], None],
    ) -> None:
        """Build and warm up what is loaded now, let it take over, and retire the old.

        Args:
            base: the folder that paths in entries are relative to.
            trunk_in_use: returns a trunk that is not replaced.
            commit: called before the new models take over; nothing fails from then on.

        Raises:
            ModelsError: a part does not load. Everything is as it was.
        """

        def trunk(name: str) -> LoadedTrunk:
            return self._new_trunk(name) if name in self._entries else trunk_in_use(name)

        assembly = Assembly(base, store, trunk)
        slots = [self._new[name] for name in self._old]
        used = {t for slot in (*slots, *self._old.values()) for t in slot.entry.trunks}
        with ExitStack() as locks:
            for slot in self._old.values():
                locks.enter_context(slot.lock)
            try:
                for name in self._renewed:
                    self._new_trunk(name)
                for slot in slots:
                    self._build(slot, assembly, warm_up)
                    slot.format = trunk(slot.entry.trunk).format
            except BaseException:
                _retire_all(slots, retire)
                self._built.clear()
                gc.collect()
                self._trunks.drop(used, self._slots.is_used)
                raise
            commit()
            self._trunks.put(self._built)
            for slot in self._new.values():
                self._slots.put(slot)
            _retire_all(self._old.values(), retire)
        if self._renewed:
            gc.collect()
        if used:
            self._trunks.drop(used, self._slots.is_used)

    def _new_trunk(self, name: str) -> LoadedTrunk:
        if name not in self._built:
            self._built[name] = self._trunks.build_anew(self._entries[name])
        return self._built[name]

    def _build(self, slot: Slot, assembly: Assembly, warm_up: Callable[[Model], None]) -> None:
        """Build a slot's model, and warm it up. A head that does not fit its new trunk is `failed`
        then, as after a restart."""
        started = time.monotonic()
        try:
            slot.model = assembly.build(slot.entry)
        except ModelsError as error:
            if slot.entry.name not in self._heads:
                raise
            slot.state, slot.reason = State.FAILED, str(error)
            logger.warning("head %s does not fit its new trunk: %s", slot.entry.name, error)
            return
        warm_up(slot.model)
        slot.state, slot.load_seconds = State.READY, time.monotonic() - started


def _retire_all(slots: Iterable[Slot], retire: Callable[[Model], None]) -> None:
    """Take the models out of slots, and let them answer what they have accepted."""
    for slot in slots:
        model, slot.model = slot.model, None
        if model is not None:
            retire(model)

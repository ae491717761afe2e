"""Faults inside a worker. Python imports this file when one of the server's processes starts, since
its folder is in PYTHONPATH.

The file that `CHAOS_FAULT` names says which fault there is now:

- `raise`: a pass with a poisonous image raises,
- `nan`: the outputs for it are not finite,
- `kill`: it ends the process,
- `memory`: a pass of more than one image finds no memory.

A poisonous image has one colour.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from math import nan
from pathlib import Path
from types import ModuleType
from typing import Any

PATCHED = "service.worker.runner"
COLOURS = 3


class _Finder(importlib.abc.MetaPathFinder):
    """Patches the module that runs passes, once it has been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != PATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            _patch(module.Runner)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


def _patch(runner: Any) -> None:
    run_pass = runner._run_pass

    def run_with_fault(self: Any, items: Sequence[Any]) -> Any:
        fault = Path(os.environ["CHAOS_FAULT"]).read_text()
        _raise(fault, items)
        results = run_pass(self, items)
        if fault == "nan":
            for item, rows in zip(items, results, strict=True):
                if _is_poisonous(item):
                    rows[:] = [{name: array * nan for name, array in row.items()} for row in rows]
        return results

    runner._run_pass = run_with_fault


def _raise(fault: str, items: Sequence[Any]) -> None:
    if fault == "memory" and len(items) > 1:
        import torch

        torch.empty(2**50)  # raises what torch does
    if fault in ("raise", "kill") and any(map(_is_poisonous, items)):
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("a fault of benchmarks.chaos")


def _is_poisonous(item: Any) -> bool:
    """Whether an item is a poisonous image, and not a probe, which has one colour, too."""
    return bool(item.calls) and len(item.prepared.unique()) <= COLOURS


if "CHAOS_FAULT" in os.environ:
    sys.meta_path.insert(0, _Finder())

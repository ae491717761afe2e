"""The authors' own outputs on this device."""

import itertools
import json
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.gpu.options import Options, Rows, UnfinishedError
from models import load_checkpoint
from models.inference import HeadCall, run_rows
from models.model import Model
from models.trunks.device_errors import is_lost
from models.trunks.devices import Placement, resolve_precision
from models.trunks.engines.registry import engine_class
from models.trunks.features import LAST_OUTPUT

# Largest error over the largest value, by precision: exact, and what reduced precisions may have.
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01}
# What is compared of a fixture.
OUTPUTS = ("logits", "embedding", "tokens", "feature_map", "image_embedding")
INPUTS = ("pixel_values", "token_ids", "latent", "noise", "input_res")
# `--quick` takes one in so many.
QUICK_STEP = 40


def fixtures(options: Options) -> Rows:
    """The authors' own outputs (`shared/goldens`, `goldens2`) on this device, by precision."""
    folders = sorted(path.parent for path in options.shared.glob("goldens*/*/meta.json"))
    if not folders:
        yield {"refused": f"no fixtures in {options.shared}"}
    engines = ("eager", "cuda-graph") if options.is_gpu else ("eager",)
    done = {(row["fixture"], row["precision"], row["engine"]) for row in options.own}
    for folder in folders[::QUICK_STEP] if options.quick else folders:
        for precision, engine in itertools.product(options.precisions, engines):
            if (folder.name, precision, engine) in done:
                continue
            if time.monotonic() > options.end:
                raise UnfinishedError
            row = {"fixture": folder.name, "precision": precision, "engine": engine}
            try:
                worst = _fixture_error(options, folder, precision, engine)
            except Exception as error:  # one that fails is a row of its own
                yield {**row, "failed": f"{type(error).__name__}: {error}"[:300]}
                if is_lost(error, options.device):
                    raise UnfinishedError from error
                continue
            if worst is None:
                yield {**row, "refused": "it has no outputs that are compared"}
            else:
                yield {**row, "error": worst, "holds": worst <= TOLERANCES[precision]}


def _fixture_error(options: Options, folder: Path, precision: str, engine: str) -> float | None:
    """The largest error over the largest value of any output; None if it compares nothing."""
    meta = json.loads((folder / "meta.json").read_text())
    golden = load_file(folder / "golden.safetensors")
    placement = engine_class(engine).place(
        Placement(
            device=options.device,
            precision=resolve_precision(precision, options.device),
            engine=engine,
        )
    )
    path = next(iter(sorted(folder.glob("checkpoint.*"))), None)
    inputs = {name: golden[name] for name in INPUTS if name in golden}
    if path is None or not inputs:
        return None
    model = load_checkpoint(path, arguments=meta["hyperparameters"], placement=placement)
    if "pixel_values" in inputs:
        trunk = model.trunk
        pixels = inputs["pixel_values"].to(options.device)
        plan, tensors, _ = trunk.pass_inputs(pixels, LAST_OUTPUT)
        trunk.engine.prepare(plan, tensors)
    if precision == "float32":
        expected, outputs = golden, model.run(**inputs)
    else:  # of the float32 model, which has its own row
        expected = _exact_outputs(path, json.dumps(meta["hyperparameters"]))
        outputs = _served_outputs(model, inputs)
    errors = [
        float((outputs[name].float() - expected[name]).abs().max() / expected[name].abs().max())
        for name in OUTPUTS
        if name in expected and name in outputs and outputs[name].shape == expected[name].shape
    ]
    return max(errors, default=None)


@lru_cache(maxsize=1)  # each engine is compared with them
def _exact_outputs(path: Path, arguments: str) -> dict[str, torch.Tensor]:
    golden = load_file(path.parent / "golden.safetensors")
    return _served_outputs(load_checkpoint(path, arguments=json.loads(arguments)), golden)


def _served_outputs(model: Model, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What heads answer with, which is all that reduced precisions have."""
    named: dict[str, torch.Tensor] = {}
    for task in ("classify", "embed"):
        if task in model.heads and "pixel_values" in inputs:
            rows = run_rows(model.trunk, inputs["pixel_values"], HeadCall(model.heads[task]))
            named |= {
                key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]
            }
    return named

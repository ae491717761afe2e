"""Describing a model: from the catalog, and from its weights once they are loaded."""

from collections.abc import Sequence
from dataclasses import asdict, replace

from models.catalog import TrunkEntry
from models.description import ModelDescription
from models.slots import Slot
from models.trunks.devices import Precision


def describe(
    slot: Slot, trunk_entry: TrunkEntry, default_for: Sequence[str], device: str, dtype: Precision
) -> ModelDescription:
    """A model's description.

    Args:
        default_for: the tasks that it is the default of.
        device: where it computes, or would.
        dtype: what its trunk's passes compute in.
    """
    entry = slot.entry
    description = ModelDescription(
        name=entry.name,
        task=entry.task,
        tasks=tuple(dict.fromkeys((entry.task, "embed"))),
        default_for=tuple(default_for),
        trunk=entry.trunk,
        text_trunk=entry.text,
        state=str(slot.state),
        reason=slot.reason or None,
        source=trunk_entry.source,
        device=device,
        dtype=dtype,
        licence=entry.licence,
        description=entry.description,
    )
    if (model := slot.model) is None:
        return description
    trunk = model.trunk
    engine, report = trunk.engine, trunk.engine.report()
    return replace(
        description,
        tasks=tuple(model.tasks),
        format=slot.format,
        architecture=trunk.architecture,
        engine=report.name,
        precision=trunk.placement.precision,
        transform=getattr(trunk.preprocess, "transform", "exact"),
        agreement=report.to_json(),
        engine_reason=report.reason or None,
        memory_bytes=model.trunk_bytes + model.head_bytes + engine.nbytes,
        head_bytes=model.head_bytes,
        head=dict(model.about) or None,
        preprocess=asdict(trunk.preprocess),
        labels=len(getattr(model.heads[model.task], "labels", ())),
        model_digest=model.digest,
        preprocess_digest=trunk.preprocess.digest,
        modalities=tuple(model.modalities),
        load_seconds=round(slot.load_seconds, 3),
    )

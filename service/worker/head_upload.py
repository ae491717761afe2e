"""An uploaded head: from the client's bytes to a head's file that fits its trunk."""

from dataclasses import replace

from models.checkpoints.loading import LoadedTrunk
from models.checkpoints.peft import read_archive
from models.errors import CheckpointError, ModelsError
from models.heads.files import HeadFile, decode_head
from models.heads.lora import LORA, class_count, lora_state, lora_task
from models.heads.portable import create_portable
from models.registry import Registry
from models.tasks.labels import numbered_labels
from service.errors import InvalidInputError, UnavailableError
from service.types import HeadUpload


def decode_upload(upload: HeadUpload, registry: Registry) -> HeadFile:
    """The head's file of an upload: Vitrail's own, or peft's two files as one.

    Raises:
        CheckpointError: unreadable, over a limit, or not supported.
        ServiceError: an adapter without a trunk, or for one that is not loaded.
    """
    if upload.kind == LORA:
        return _decode_adapter(upload, registry)
    if upload.kind:
        raise InvalidInputError(
            f"kind is {upload.kind!r}; a head's own file says its kind, and only {LORA} is sent",
            field="kind",
        )
    head = decode_head(upload.content)
    return head if upload.trunk is None else replace(head, trunk=upload.trunk)


def check_fits(head: HeadFile, registry: Registry) -> None:
    """Check that a head can be built on its trunk, which must be loaded.

    Raises:
        CheckpointError: it cannot.
        ServiceError: there is no such trunk, or it is not loaded.
    """
    loaded = _loaded_trunk(head.trunk, registry)
    trunk = loaded.trunk
    head.check_trunk(trunk.digest, trunk.preprocess.digest, loaded.source)
    try:
        create_portable(head, trunk, head.labels)
    except ModelsError:
        raise
    except Exception as error:  # torch raises various errors for unsuitable tensors
        raise CheckpointError(f"the head cannot be built: {error}") from error


def _decode_adapter(upload: HeadUpload, registry: Registry) -> HeadFile:
    """peft's files as a head's file, for the trunk as it is loaded here: they do not say which
    weights the adapter was trained beside."""
    if upload.trunk is None:
        raise InvalidInputError("trunk is missing: the adapter's trunk", field="trunk")
    loaded = _loaded_trunk(upload.trunk, registry)
    adapter = read_archive(upload.content)
    state = lora_state(adapter, loaded.trunk)
    task = lora_task(state, loaded.trunk)
    count = class_count(state, loaded.trunk) if task == "classify" else 0
    labels = loaded.labels if len(loaded.labels) == count else numbered_labels(count)
    return HeadFile(
        kind=LORA,
        task=task,
        trunk=upload.trunk,
        trunk_digest=loaded.trunk.digest,
        preprocess_digest=loaded.trunk.preprocess.digest,
        trunk_source=loaded.source,
        labels=tuple(labels),
        state=state,
        training=dict(adapter.about),
    )


def _loaded_trunk(name: str, registry: Registry) -> LoadedTrunk:
    if name not in registry.catalog.trunks:
        trunks = ", ".join(registry.catalog.trunks)
        raise InvalidInputError(
            f"the head is for the trunk {name!r}; the catalog has {trunks}", field="trunk"
        )
    loaded = registry.loaded_trunk(name)
    if loaded is None:
        raise UnavailableError(
            f"the trunk {name!r} is not loaded; load a model that uses it", retry_after_s=2
        )
    return loaded

"""From a head's file to what a model is built of."""

from collections.abc import Sequence

from models.heads.base import Head
from models.heads.files import HeadFile
from models.heads.lora import LORA, create_lora
from models.heads.registry import create_head
from models.trunks.adapters import Adapter
from models.trunks.base import Trunk


def create_portable(
    file: HeadFile, trunk: Trunk, labels: Sequence[str]
) -> tuple[Head, Adapter | None]:
    """The head of a file, and the adapter that its trunk's passes go through, if it is one.

    Raises:
        CatalogError, CheckpointError: it does not fit the trunk.
    """
    if file.kind == LORA:
        return create_lora(trunk, labels, file.state)
    return create_head(file.kind, trunk, labels, file.state), None

"""What a collection's table in LanceDB holds: its schema, rows, and conditions on them."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from service.search.collection import Collection, Item, Metadata, canonical

KEY = b"vitrail"
THUMBNAIL = "thumbnail"  # a column that the tables of older versions do not have


def schema_of(collection: Collection) -> pa.Schema:
    fields = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("vector", pa.list_(pa.float32(), collection.dimensions)),
        pa.field("metadata", pa.string()),
        pa.field("tags", pa.list_(pa.string())),
        pa.field(THUMBNAIL, pa.binary()),
    ]
    return pa.schema(fields, metadata={KEY: json.dumps(asdict(collection)).encode()})


def collection_of(schema: pa.Schema) -> Collection:
    return Collection(**json.loads(schema.metadata[KEY]))


def rows_of(items: Sequence[Item], schema: pa.Schema) -> pa.Table:
    flat = pa.array(np.concatenate([item.embedding for item in items]).astype(np.float32))
    columns = {
        "id": [item.id for item in items],
        "vector": pa.FixedSizeListArray.from_arrays(flat, schema.field("vector").type.list_size),
        "metadata": [json.dumps(dict(item.metadata)) for item in items],
        "tags": [_tags(item.metadata) for item in items],
        THUMBNAIL: [item.thumbnail for item in items],
    }
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def _tags(metadata: Metadata) -> list[str]:
    """Each field with its value, as one text that a filter can look for."""
    return [f"{canonical(name)}:{canonical(value)}" for name, value in metadata.items()]


def has_all(where: Metadata) -> str:
    """A condition: the metadata has all these values."""
    return f"array_has_all(tags, [{', '.join(map(quoted, _tags(where)))}])"


def id_in(ids: Sequence[str]) -> str:
    """A condition: the id is one of these."""
    return f"id IN ({', '.join(map(quoted, ids))})"


def quoted(text: str) -> str:
    """A text as a literal of a condition."""
    return "'" + text.replace("'", "''") + "'"

"""The file of hashed API keys (`VITRAIL_KEYS_FILE`): JSON that `vitrail keys` writes, and that
servers read again whenever it changes."""

import fcntl
import hashlib
import json
import logging
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    field_validator,
)

logger = logging.getLogger("vitrail.audit")

Scope = Literal["infer", "heads", "collections", "admin", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

Rate = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]


class KeyRecord(BaseModel):
    """One key of the file: what it permits, and the SHA-256 digest of the key itself.

    The digest needs no salt and no slow hash: a key holds 256 random bits, so it cannot be guessed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-z-]{1,64}$")
    name: str = Field("", max_length=200)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: tuple[Scope, ...] = Field(min_length=1)
    # Quotas; None for no limit.
    requests_per_s: Rate | None = None
    images_per_s: Rate | None = None
    created: AwareDatetime
    expires: AwareDatetime | None = None

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and datetime.now(UTC) >= self.expires


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: Annotated[tuple[KeyRecord, ...], FailFast()]

    @field_validator("keys")
    @classmethod
    def _check_differ(cls, keys: tuple[KeyRecord, ...]) -> tuple[KeyRecord, ...]:
        for member in ("id", "sha256"):
            if len({getattr(record, member) for record in keys}) < len(keys):
                raise ValueError(f"two keys have the same {member}")
        return keys


def digest_key(key: str) -> str:
    """The SHA-256 digest of a key, as the file holds it."""
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def read_keys(path: Path) -> tuple[KeyRecord, ...]:
    """The file's keys; none if there is no file.

    Raises:
        OSError: the file cannot be read, or is not a file of keys.
    """
    try:
        return _Content.model_validate_json(path.read_bytes()).keys
    except FileNotFoundError:
        return ()
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise OSError(f"{path} is not a file of keys: {place}: {first['msg']}") from error


def create_key(
    path: Path,
    scopes: Sequence[str],
    *,
    name: str = "",
    expires: datetime | None = None,
    requests_per_s: float | None = None,
    images_per_s: float | None = None,
) -> tuple[KeyRecord, str]:
    """Add a new key to the file, which is created if there is none.

    Returns:
        The record, and the key itself, which is stored nowhere.

    Raises:
        OSError: the file cannot be read or written.
        pydantic.ValidationError: an argument is out of range.
    """
    key_id = secrets.token_hex(4)
    key = f"vitrail-{key_id}-{secrets.token_urlsafe(32)}"
    record = KeyRecord(
        id=key_id,
        name=name,
        sha256=digest_key(key),
        scopes=tuple(dict.fromkeys(scopes)),
        requests_per_s=requests_per_s,
        images_per_s=images_per_s,
        created=datetime.now(UTC).replace(microsecond=0),
        expires=expires,
    )
    with _locked(path):
        _write(path, (*read_keys(path), record))
    return record, key


def revoke_key(path: Path, key_id: str) -> KeyRecord:
    """Remove a key from the file.

    Raises:
        OSError: there is no such key, or the file cannot be read or written.
    """
    with _locked(path):
        records = read_keys(path)
        found = [record for record in records if record.id == key_id]
        if not found:
            raise OSError(f"{path} has no key {key_id!r}")
        _write(path, tuple(record for record in records if record.id != key_id))
    return found[0]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other commands from writing at the same time, by a lock on the file's folder."""
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(path: Path, records: tuple[KeyRecord, ...]) -> None:
    """Replace the file in one step, so that a server never reads half of it. A new file is readable
    by its owner only; an existing one keeps its mode."""
    keys = [record.model_dump(mode="json", exclude_none=True) for record in records]
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    with tempfile.NamedTemporaryFile("w", dir=path.absolute().parent, delete=False) as file:
        try:
            json.dump({"keys": keys}, file, indent=2)
            file.write("\n")
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


class WatchedKeys:
    """The file's keys by digest, read again when the file changes.

    A file that cannot be read any more leaves the last keys in force, and logs the error.
    """

    def __init__(self, path: Path, on_change: Callable[[], None]) -> None:
        """
        Args:
            on_change: called after the keys have changed.

        Raises:
            OSError: the file exists and cannot be read.
        """
        self._path = path
        self._on_change = on_change
        self._seen = self._stat()
        self.by_digest = {record.sha256: record for record in read_keys(path)}
        if self._seen is None:
            logger.warning("%s does not exist yet: no key is valid", path)

    def find(self, key: str) -> KeyRecord | None:
        """The record of a key, by the file as it is now."""
        self.refresh()
        return self.by_digest.get(digest_key(key))

    def refresh(self) -> None:
        """Read the file if it has changed. Otherwise this costs one `stat`."""
        seen = self._stat()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            records = read_keys(self._path)
        except OSError as error:
            logger.error("keys were not reloaded: %s", error)
            return
        before = {record.id for record in self.by_digest.values()}
        self.by_digest = {record.sha256: record for record in records}
        after = {record.id for record in records}
        changes = {"added": sorted(after - before), "removed": sorted(before - after)}
        logger.info("keys reloaded", extra=changes)
        self._on_change()

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

"""Images that a user names, which int8 is calibrated on."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from models.errors import CatalogError, InputError
from models.inputs.images import (
    DEFAULT_LIMITS,
    SUFFIXES,
    ReducedImage,
    decode_image,
    decode_reduced,
)

MAX_IMAGES = 300
# Of so many images one is held out, to compare the calibrated pass with eager on.
HOLD_OUT_EVERY = 8


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Image files, in a fixed order.

    Args:
        digest: SHA-256 over the files' contents.
    """

    files: tuple[Path, ...]
    digest: str

    @property
    def calibration(self) -> Sequence[Path]:
        """The files to calibrate on."""
        if len(self.files) < HOLD_OUT_EVERY:
            return self.files
        return [path for n, path in enumerate(self.files) if n % HOLD_OUT_EVERY]

    @property
    def held_out(self) -> Sequence[Path]:
        """The other files: none if there are fewer than `HOLD_OUT_EVERY`."""
        return self.files[::HOLD_OUT_EVERY] if len(self.files) >= HOLD_OUT_EVERY else ()


def read_calibration(folder: Path) -> CalibrationSet:
    """The images in a folder and its subfolders. Of more than `MAX_IMAGES` an even selection.

    Raises:
        CatalogError: not a folder, no image in it, or a file that cannot be read.
    """
    if not folder.is_dir():
        raise CatalogError(f"calibration: {folder} is not a folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise CatalogError(f"calibration: no image in {folder}")
    if len(files) > MAX_IMAGES:
        files = [files[n * len(files) // MAX_IMAGES] for n in range(MAX_IMAGES)]
    digest = hashlib.sha256()
    try:
        for path in files:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    except OSError as error:
        raise CatalogError(f"calibration: {path}: {error.strerror}") from error
    return CalibrationSet(tuple(files), f"sha256:{digest.hexdigest()}")


def read_images(
    files: Sequence[Path], min_side: int | None
) -> Iterator[Image.Image | ReducedImage]:
    """Image files, decoded as requests' images are.

    Args:
        min_side: as `decode_reduced` takes it; None for whole images.

    Raises:
        CatalogError: a file cannot be read or decoded.
    """
    for path in files:
        try:
            data = path.read_bytes()
            if min_side is None:
                yield decode_image(data)
            else:
                yield decode_reduced(data, DEFAULT_LIMITS, min_side)
        except (InputError, OSError) as error:
            raise CatalogError(f"calibration: {path}: {error}") from error

"""The placement of each trunk of a catalog: its entry's settings, or else the defaults."""

from dataclasses import replace

from models.catalog import Catalog, TrunkEntry
from models.inputs.nvjpeg import create_jpeg_decoder
from models.inputs.transforms import resolve_transform
from models.trunks.calibration import read_calibration
from models.trunks.devices import Placement, Precision, resolve_precision
from models.trunks.engines.registry import engine_class


class Placements:
    """Placements by catalog entry.

    Raises:
        CatalogError: an entry names an unknown engine, transform or precision, or the default
            transform is not one of this device.
    """

    def __init__(self, catalog: Catalog, defaults: Placement) -> None:
        self._base = catalog.path.parent
        self._defaults = defaults
        if defaults.transform == "gpu":
            create_jpeg_decoder(defaults.device)  # refused here rather than for each trunk
        for entry in catalog.trunks.values():
            self.check(entry)

    def check(self, entry: TrunkEntry) -> None:
        """
        Raises:
            CatalogError: the entry names an unknown engine, transform or precision.
        """
        engine_class(entry.engine or self._defaults.engine)
        resolve_transform(entry.transform or self._defaults.transform)
        self.precision(entry)

    def precision(self, entry: TrunkEntry) -> Precision:
        """What a trunk's passes compute in."""
        if entry.precision is None:
            return self._defaults.precision
        return resolve_precision(entry.precision, self._defaults.device)

    def placement(self, entry: TrunkEntry) -> Placement:
        """Where and how a trunk computes.

        Raises:
            CatalogError: int8's calibration images cannot be read.
        """
        precision, calibration = self.precision(entry), None
        if precision == "int8" and entry.calibration is not None:
            calibration = read_calibration(self._base / entry.calibration)
        return replace(
            self._defaults,
            precision=precision,
            tolerance=entry.tolerance,
            calibration=calibration,
            channels_last=entry.channels_last,
            engine=entry.engine or self._defaults.engine,
            transform=resolve_transform(entry.transform or self._defaults.transform),
        )

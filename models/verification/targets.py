"""What `vitrail models verify` compares: a catalog's model, or a checkpoint file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.assembly import load_checkpoint
from models.catalog import Catalog, TrunkEntry, load_catalog
from models.checkpoints.hub import fetch_transformers
from models.checkpoints.loading import read_checkpoint
from models.checkpoints.sources import fetch, parse_source
from models.checkpoints.store import Store
from models.inputs.transforms import resolve_transform
from models.model import Model
from models.registry import Registry
from models.trunks.devices import Placement, resolve_device, resolve_precision
from models.verification.libraries import Library, libraries_of

LOCAL_SCHEMES = ("file", "pypi", "https")


@dataclass(frozen=True, slots=True)
class Target:
    """A model as it is served, and its references; `verify` takes all three."""

    served: Model
    eager: Model
    libraries: Sequence[Library]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAs:
    """How a server runs its models, as in `service/settings.py`. A catalog may override it."""

    device: str = "auto"
    precision: str = "auto"
    engine: str = "auto"
    transform: str = "exact"

    def placement(self) -> Placement:
        """The placement of a model that no catalog names.

        Raises:
            CatalogError: an unknown device, precision or transform.
        """
        device = resolve_device(self.device)
        return Placement(
            device=device,
            precision=resolve_precision(self.precision, device),
            engine=self.engine,
            transform=resolve_transform(self.transform),
        )


def catalog_target(name: str, catalog: str, served_as: ServedAs) -> Target:
    """A catalog's model.

    Raises:
        ModelsError: no such model, or it does not load.
    """
    entries = load_catalog(catalog)
    entry = entries.model(name)
    served = Registry(
        entries,
        device=served_as.device,
        precision=served_as.precision,
        engine=served_as.engine,
        transform=served_as.transform,
    )
    eager = Registry(_in_eager(entries), store=served.store, device=served_as.device)
    model, reference = served.get(name), eager.get(name)
    trunk = entries.trunks[entry.trunk]
    libraries = _libraries(reference, trunk, served.store, entries.path.parent)
    return Target(model, reference, libraries)


def file_target(path: Path, arguments: Mapping[str, Any], served_as: ServedAs) -> Target:
    """A checkpoint file.

    Raises:
        ModelsError: it does not load.
    """
    placement = served_as.placement()
    eager = replace(placement, precision="float32", engine="eager", transform="exact")
    reference = load_checkpoint(path, arguments, placement=eager)
    libraries = tuple(libraries_of(reference, read_checkpoint(path, arguments), path))
    return Target(load_checkpoint(path, arguments, placement=placement), reference, libraries)


def _libraries(
    reference: Model, entry: TrunkEntry, store: Store, base: Path
) -> tuple[Library, ...]:
    source = parse_source(entry.source)
    path = None
    if entry.library == "timm":
        is_local = source.scheme in LOCAL_SCHEMES
        path = fetch(source, store, base) if is_local else fetch_transformers(source.location)
    if path is None:
        return (Library(f"{entry.library} itself built and loaded it: not compared again"),)
    arguments = dict(entry.arguments)
    if entry.architecture:
        arguments["architecture"] = entry.architecture
    return tuple(libraries_of(reference, read_checkpoint(path, arguments), path))


def _in_eager(catalog: Catalog) -> Catalog:
    """The catalog with every trunk in eager float32 and with the exact transform."""
    trunks = {
        name: replace(entry, engine="eager", precision="float32", transform="exact")
        for name, entry in catalog.trunks.items()
    }
    return replace(catalog, trunks=trunks)

"""Which trunks are placed together: those that one model uses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.catalog import Catalog


@dataclass(frozen=True, slots=True)
class TrunkGroup:
    """Trunks that share replicas, and the catalog's models on them.

    Args:
        name: its first trunk's name.
    """

    name: str
    trunks: frozenset[str]
    models: Sequence[str]


def trunk_groups(catalog: Catalog) -> list[TrunkGroup]:
    """The smallest groups such that every model finds all of its trunks in one of them.

    Trunks without a model are in no group, since nothing would load them.
    """
    group_of: dict[str, set[str]] = {}
    for model in catalog.models.values():
        merged = set(model.trunks).union(*(group_of.get(trunk, ()) for trunk in model.trunks))
        group_of |= dict.fromkeys(merged, merged)
    models: Mapping[int, list[str]] = {id(group): [] for group in group_of.values()}
    for name, model in catalog.models.items():
        models[id(group_of[model.trunk])].append(name)
    unique = {id(group): group for group in group_of.values()}
    groups = [
        TrunkGroup(catalog.models[models[key][0]].trunk, frozenset(group), models[key])
        for key, group in unique.items()
    ]
    return sorted(groups, key=lambda group: group.name)

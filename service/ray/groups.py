"""Which trunks are placed together: those that one model uses."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

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


def multiplexed(groups: Sequence[TrunkGroup], startup: Collection[str]) -> list[TrunkGroup]:
    """The groups, with all of those in one that have no start-up model: their replicas load models
    when they are asked for."""
    idle = [group for group in groups if set(startup).isdisjoint(group.models)]
    if not idle:
        return list(groups)
    models = [model for group in idle for model in group.models]
    shared = TrunkGroup(idle[0].name, frozenset[str]().union(*(g.trunks for g in idle)), models)
    return [*(group for group in groups if group not in idle), shared]


def narrowed(catalog: Catalog, models: Collection[str]) -> Catalog:
    """The catalog with only those groups of trunks that these models are in, and with all models of
    the groups; all of it if no models are named."""
    if not models:
        return catalog
    groups = [group for group in trunk_groups(catalog) if not set(models).isdisjoint(group.models)]
    trunks = {trunk for group in groups for trunk in group.trunks}
    kept = {name for group in groups for name in group.models}
    return replace(
        catalog,
        trunks={name: trunk for name, trunk in catalog.trunks.items() if name in trunks},
        models={name: model for name, model in catalog.models.items() if name in kept},
        defaults={task: name for task, name in catalog.defaults.items() if name in kept},
        startup=tuple(name for name in catalog.startup if name in kept),
    )

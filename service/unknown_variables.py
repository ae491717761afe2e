"""Environment variables that are named as settings are, and are none."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from service.settings import Settings


def unknown_variables(settings: Settings, names: Iterable[str]) -> Iterator[str]:
    """What is wrong with variables whose names begin as the settings' do and are none of theirs.

    Args:
        settings: the settings that were read. The variables of commands that call a server pass
            where it has keys; without, `VITRAIL_API_KEY` may be meant for `VITRAIL_API_KEYS`.
        names: the names of environment variables.
    """
    known = [f"VITRAIL_{name.upper()}" for name in Settings.model_fields]
    others = {"VITRAIL_DTYPE", "VITRAIL_STORE", "VITRAIL_URL"}
    if settings.api_keys or settings.admin_keys or settings.keys_file:
        others |= {"VITRAIL_API_KEY", "VITRAIL_ADMIN_KEY"}
    for name in sorted(name for name in names if name.startswith("VITRAIL_")):
        if name not in known and name not in others:
            similar = get_close_matches(name, known, 1, cutoff=0.8)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            yield f"{name} is not a setting{hint}"

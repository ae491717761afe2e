"""Finds misspelt settings: variables that begin with `VITRAIL_` and are not settings."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from service.settings import Settings


def unknown_variables(
    settings: Settings, names: Iterable[str], *, serves: bool = True
) -> Iterator[str]:
    """A message for each variable that begins with `VITRAIL_` and is not known.

    Args:
        settings: the settings that were read. If they have keys, `VITRAIL_API_KEY` and
            `VITRAIL_ADMIN_KEY` are known: commands that call a server read them. In a server
            without keys, they may be meant for `VITRAIL_API_KEYS` and `VITRAIL_ADMIN_KEYS`.
        names: the names of environment variables.
        serves: whether the process is a server, which may need keys.
    """
    known = [f"VITRAIL_{name.upper()}" for name in Settings.model_fields]
    others = {"VITRAIL_DTYPE", "VITRAIL_STORE", "VITRAIL_URL"}
    if not serves or settings.api_keys or settings.admin_keys or settings.keys_file:
        others |= {"VITRAIL_API_KEY", "VITRAIL_ADMIN_KEY"}
    for name in sorted(name for name in names if name.startswith("VITRAIL_")):
        if name not in known and name not in others:
            similar = get_close_matches(name, known, 1, cutoff=0.8)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            yield f"{name} is not a setting{hint}"

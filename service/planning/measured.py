"""What a running server has measured of its trunks' passes, as a file for `vitrail plan`."""

from typing import Any

import httpx

from models.errors import CatalogError

TIMEOUT_S = 10.0


def measured_loads(url: str, key: str | None) -> str:
    """A TOML file of the trunks that have run passes in a server, with one image a second each.

    Args:
        url: of a server that runs its models itself (`vitrail serve`).
        key: an admin key.

    Raises:
        CatalogError: it cannot be asked, or has run no pass.
    """
    try:
        response = httpx.get(
            f"{url.rstrip('/')}/debug/queues",
            headers={} if key is None else {"X-API-Key": key},
            timeout=TIMEOUT_S,
        )
        response.raise_for_status()
        queues: dict[str, Any] = response.json().get("queues", {})
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise CatalogError(f"{url}: {error}") from error
    tables = [
        f'[trunks."{name}"]\nrate = 1.0  # images a second: set your own\npass_ms = {{{costs}}}\n'
        for name, queue in queues.items()
        if (costs := _costs(queue.get("pass_seconds", {})))
    ]
    if not tables:
        raise CatalogError(f"{url}: no trunk has run a pass; send some requests first")
    return "\n".join(tables)


def _costs(seconds: dict[str, float]) -> str:
    return ", ".join(f"{size} = {value * 1e3:.2f}" for size, value in seconds.items())

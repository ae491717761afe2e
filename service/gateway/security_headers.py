"""Security headers of every response, and the content security policy of the pages."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.responses import FileResponse

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def add_security_headers(headers: MutableHeaders, *, encrypted: bool) -> None:
    """Add the headers that a response does not have yet.

    Args:
        encrypted: whether the response goes over TLS.
    """
    headers.setdefault("X-Content-Type-Options", "nosniff")
    headers.setdefault("Referrer-Policy", "no-referrer")
    headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
    if encrypted:
        headers.setdefault("Strict-Transport-Security", "max-age=31536000")


class Page(FileResponse):
    """An HTML file with a policy under which it loads what this server has, runs its own scripts
    and no others, and cannot be framed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, headers={"Content-Security-Policy": _policy(path)})


@cache
def _policy(path: Path) -> str:
    scripts = _SCRIPT.findall(path.read_text(encoding="utf-8"))
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    return "; ".join(
        (
            "default-src 'self'",
            " ".join(("script-src 'self'", *hashes)),
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "media-src 'self' blob:",
            "object-src 'none'",
            "base-uri 'none'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        )
    )

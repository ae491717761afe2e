"""A client of Vitrail's REST interface, for synchronous and asynchronous programs.

    from vitrail_client import Client

    with Client("http://localhost:8000") as client:
        [entry] = client.classify(["cat.jpg"], top_k=3)

It needs httpx alone.
"""

from vitrail_client.async_client import AsyncClient
from vitrail_client.client import Client
from vitrail_client.protocol import Image, VitrailError

__all__ = ["AsyncClient", "Client", "Image", "VitrailError"]

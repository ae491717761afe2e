"""TLS under mixed connections: `python -m benchmarks.tls_soak [--minutes 5]`.

Starts `vitrail serve` with a certificate and classifies photos over HTTPS and gRPC, on connections
that are opened anew every few requests. Meanwhile other clients begin handshakes and do not end
them, send what is no handshake, or leave at once; and the certificate is replaced every few seconds
(by openssl, which is needed). Prints a row for each half minute. The first minute warms up.

Exits with 1 if a request got another answer than 200, or if memory grew by more than
`--tolerance` after the first minute.
"""

import argparse
import asyncio
import ssl
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx

from benchmarks.photos import jpegs
from benchmarks.servers import Server, free_port
from service.stubs import vision_pb2 as pb
from service.stubs.vision_pb2_grpc import VisionStub

ROW_S = 30
RENEW_S = 5.0
HTTPS_CLIENTS, GRPC_CLIENTS, HALF_OPEN_CLIENTS = 3, 2, 20
REQUESTS_EACH = 5  # on a connection
HALF_OPEN_S = 3.0
# How they begin: with nothing, with the first bytes of a handshake, or with another protocol.
BEGINNINGS = (b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/1.1\r\n\r\n")
NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
COLUMNS = ("seconds", "https", "grpc", "lost", "half-open", "renewed", "memory", "growth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--tolerance", type=float, default=0.05, help="the growth that is accepted")
    parser.add_argument("--model", default="efficientnet-lite0")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        certificates = Certificates(Path(folder))
        certificates.issue()
        port, grpc_port = free_port(), free_port()
        command = [
            sys.executable, "-m", "service.cli", "serve", "--port", str(port),
            "--grpc-port", str(grpc_port), "--models", arguments.model, "--log-level", "error",
            "--tls-cert", str(certificates.cert), "--tls-key", str(certificates.key),
        ]  # fmt: skip
        quiet = {"GRPC_VERBOSITY": "NONE"}  # it logs each handshake that fails
        with Server(command, port, environment=quiet, authority=certificates.ca) as server:
            load = Load(certificates, port, grpc_port, arguments.model)
            growth = asyncio.run(load.run(server, arguments.minutes * 60))
    if growth > arguments.tolerance:
        print(f"memory grew by {growth:.1%}", file=sys.stderr)
    sys.exit(load.counts["lost"] > 0 or growth > arguments.tolerance)


class Certificates:
    """A CA, and the server's certificate that it signs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ca, self.cert, self.key = (folder / name for name in ("ca.pem", "cert.pem", "key.pem"))
        self._openssl("req", "-x509", *NEW_KEY, "-days", "2", "-subj", "/CN=CA",
                      "-keyout", "ca.key", "-out", "ca.pem")  # fmt: skip
        (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")

    def issue(self) -> None:
        """A new certificate in place of the one before. For a moment the key is another's."""
        self._openssl("req", *NEW_KEY, "-subj", "/CN=server", "-keyout", "new.key",
                      "-out", "new.csr")  # fmt: skip
        self._openssl("x509", "-req", "-in", "new.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
                      "-days", "2", "-extfile", "names", "-out", "new.pem")  # fmt: skip
        (self._folder / "new.pem").replace(self.cert)
        (self._folder / "new.key").replace(self.key)

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self._folder, check=True, capture_output=True)


class Load:
    """The clients, and what they have seen: `counts` has the columns' names."""

    def __init__(self, certificates: Certificates, port: int, grpc_port: int, model: str) -> None:
        self.counts: Counter[str] = Counter()
        self._certificates = certificates
        self._port, self._grpc_port, self._model = port, grpc_port, model
        self._photo = jpegs()[0]

    async def run(self, server: Server, seconds: float) -> float:
        """Run all clients. Returns the memory's growth since the first minute."""
        clients = [
            *[self._https] * HTTPS_CLIENTS, *[self._grpc] * GRPC_CLIENTS,
            *[self._half_open] * HALF_OPEN_CLIENTS, self._renew,
        ]  # fmt: skip
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._repeat(client)) for client in clients]
            growth = await self._report(server, seconds)
            for task in tasks:
                task.cancel()
        return growth

    async def _report(self, server: Server, seconds: float) -> float:
        print("  ".join(f"{name:>9}" for name in COLUMNS), flush=True)
        warm = growth = 0.0
        for passed in range(ROW_S, int(seconds) + 60 + 1, ROW_S):
            await asyncio.sleep(ROW_S)
            used = await asyncio.to_thread(lambda: server.usage().resident_bytes)
            warm = used if passed <= 60 else warm
            growth = used / warm - 1
            counts = [self.counts[name] for name in COLUMNS[1:6]]
            cells = [*map(str, [passed, *counts]), f"{used / 2**20:.0f} MiB", f"{growth:+.1%}"]
            print("  ".join(f"{cell:>9}" for cell in cells), flush=True)
        return growth

    async def _repeat(self, client: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await client()
            except (httpx.HTTPError, grpc.RpcError) as error:
                self.counts["lost"] += 1
                print(f"{client.__name__}: {error!r}", file=sys.stderr)

    async def _https(self) -> None:
        context = ssl.create_default_context(cafile=self._certificates.ca)
        url = f"https://localhost:{self._port}/classify?model={self._model}"
        async with httpx.AsyncClient(verify=context, timeout=60) as client:
            for _ in range(REQUESTS_EACH):
                (await client.post(url, content=self._photo)).raise_for_status()
                self.counts["https"] += 1

    async def _grpc(self) -> None:
        credentials = grpc.ssl_channel_credentials(self._certificates.ca.read_bytes())
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
        address = f"localhost:{self._grpc_port}"
        async with grpc.aio.secure_channel(address, credentials, options) as channel:
            stub: Any = VisionStub(channel)
            for _ in range(REQUESTS_EACH):
                request = pb.TaskRequest(model=self._model, images=[self._photo])
                await stub.Classify(request, timeout=60)
                self.counts["grpc"] += 1

    async def _half_open(self) -> None:
        number = self.counts["half-open"]
        self.counts["half-open"] += 1
        port = (self._port, self._grpc_port)[number % 2]
        try:
            _, writer = await asyncio.open_connection("localhost", port)
            writer.write(BEGINNINGS[number % len(BEGINNINGS)])
            await writer.drain()
            if number % 5:  # others leave at once
                await asyncio.sleep(HALF_OPEN_S)
            writer.transport.abort()
        except OSError:
            pass  # the server has closed it

    async def _renew(self) -> None:
        await asyncio.sleep(RENEW_S)
        await asyncio.to_thread(self._certificates.issue)
        self.counts["renewed"] += 1


if __name__ == "__main__":
    main()

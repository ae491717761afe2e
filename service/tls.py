"""TLS of both sides: certificates for HTTP and gRPC, and of gateways that call workers.

All files are read again when they change, so that certificates can be renewed without a restart.
"""

import logging
import ssl
from collections.abc import Sequence
from pathlib import Path

import grpc

from service.settings import Settings

logger = logging.getLogger(__name__)


class _Files:
    """Files that are replaced now and then. Empty paths are left out."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = [Path(path) for path in paths if path]
        self._seen = self._stamps()

    def changed(self) -> bool:
        """Whether they have changed since this last returned False, or since `accept`."""
        return self._stamps() != self._seen

    def accept(self) -> None:
        """Take the files as they are for unchanged."""
        self._seen = self._stamps()

    def _stamps(self) -> list[tuple[int, int, int]]:
        try:
            found = [path.stat() for path in self._paths]
        except OSError:  # being replaced
            return []
        return [(status.st_mtime_ns, status.st_size, status.st_ino) for status in found]


def server_context(settings: Settings) -> ssl.SSLContext | None:
    """The context of the HTTP server; None without a certificate.

    Raises:
        OSError: a file is missing, or the key is not the certificate's.
    """
    if not settings.tls_cert:
        return None
    context, files = _create_context(settings), _server_files(settings)

    def renew(
        connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext
    ) -> None:
        """Called at every handshake."""
        nonlocal context
        if files.changed():
            try:
                context = _create_context(settings)
                files.accept()
                logger.info("certificate renewed", extra={"file": settings.tls_cert})
            except OSError as error:  # the next handshake tries again
                logger.warning("%s was not reloaded: %s", settings.tls_cert, error)
        connection.context = context

    listening = _create_context(settings)
    listening.sni_callback = renew
    return listening


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """The credentials of the gRPC server; None without a certificate.

    Raises:
        OSError: a file is missing, or the key is not the certificate's.
    """
    if not settings.tls_cert:
        return None
    files = _server_files(settings)

    def renew() -> grpc.ServerCertificateConfiguration | None:
        """Called at every handshake; None for no change."""
        if not files.changed():
            return None
        try:
            configuration = _create_configuration(settings)
            files.accept()
        except OSError as error:
            logger.warning("%s was not reloaded: %s", settings.tls_cert, error)
            return None
        return configuration

    return grpc.dynamic_ssl_server_credentials(
        _create_configuration(settings),
        renew,  # type: ignore[arg-type]  # the stubs do not know that it may return None
        bool(settings.tls_client_ca),
    )


class WorkerCredentials:
    """What a gateway shows to its workers, and what it asks of them."""

    def __init__(self, settings: Settings) -> None:
        """
        Raises:
            OSError: a file is missing.
        """
        self._settings = settings
        paths = (settings.worker_ca, settings.worker_cert, settings.worker_key)
        self._files = _Files(paths)
        self._current = channel_credentials(settings)
        # Grows whenever the files have changed.
        self.generation = 0

    def channel(
        self, address: str, name: str, options: Sequence[tuple[str, object]]
    ) -> grpc.aio.Channel:
        """A channel to a worker: over TLS if a CA is configured, except to a local socket.

        Args:
            name: the name that the worker's certificate must have; empty for that in the address.
        """
        if self._current is None or address.startswith("unix:"):
            return grpc.aio.insecure_channel(address, options=options)
        if name:
            options = (*options, ("grpc.ssl_target_name_override", name))
        return grpc.aio.secure_channel(address, self._current, options=options)

    def refresh(self) -> int:
        """Read the files if they have changed. Returns the new `generation`."""
        if self._files.changed():
            try:
                self._current = channel_credentials(self._settings)
                self._files.accept()
                self.generation += 1
            except OSError as error:
                logger.warning("the certificates for workers were not reloaded: %s", error)
        return self.generation


def channel_credentials(settings: Settings) -> grpc.ChannelCredentials | None:
    """The credentials of clients of workers; None without a CA.

    Raises:
        OSError: a file is missing.
    """
    if not settings.worker_ca:
        return None
    certificate, key = (
        Path(path).read_bytes() if path else None
        for path in (settings.worker_cert, settings.worker_key)
    )
    return grpc.ssl_channel_credentials(Path(settings.worker_ca).read_bytes(), key, certificate)


def _server_files(settings: Settings) -> _Files:
    return _Files((settings.tls_cert, settings.tls_key, settings.tls_client_ca))


def _create_context(settings: Settings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
        if settings.tls_client_ca:
            context.load_verify_locations(settings.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        names = f"{settings.tls_cert} and {settings.tls_key}"
        raise OSError(f"cannot use the certificate and key {names}: {error}") from error
    return context


def _create_configuration(settings: Settings) -> grpc.ServerCertificateConfiguration:
    _create_context(settings)  # gRPC does not check that they fit together
    certificate, key = (Path(path).read_bytes() for path in (settings.tls_cert, settings.tls_key))
    roots = Path(settings.tls_client_ca).read_bytes() if settings.tls_client_ca else None
    return grpc.ssl_server_certificate_configuration([(key, certificate)], roots)

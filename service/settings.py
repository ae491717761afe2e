"""Every setting, with its unit, bounds and meaning. Environment: `VITRAIL_` + the name."""

from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.worker_options import WorkerOptions

Names = Annotated[tuple[str, ...], NoDecode]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode]


class Settings(BaseSettings):
    """Read once, at start, from the environment under the flags; frozen afterwards."""

    model_config = SettingsConfigDict(env_prefix="VITRAIL_", frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: int = Field(8000, ge=0, le=65535, description="REST port; 0 for any free one.")
    grpc_port: int = Field(8001, ge=0, le=65535, description="gRPC port; 0 for any free one.")
    metrics_port: int = Field(
        8002, ge=0, le=65535, description="A worker's port for /metrics; 0 for none."
    )
    workers: Names = Field(
        (), description="A gateway's workers: host:port, dns:///name:port or unix:path each."
    )

    catalog: str = Field("demo", description="A built-in catalog (demo, hub) or a TOML file.")
    models: Names = Field(
        (), description="Models to load at start; the catalog's own list if empty."
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="What trunks compute in, unless the catalog says otherwise."
    )
    engine: str = Field(
        "auto", description="What runs trunks' passes, unless the catalog says otherwise."
    )
    transform: Literal["exact", "fast"] = Field(
        "exact", description="How images are resized, unless the catalog says otherwise."
    )
    threads: int = Field(0, ge=0, description="CPU threads in all; 0: the usable cores.")
    streams: int = Field(0, ge=0, description="Batches in flight; 0: 1, 2 on a GPU.")
    decode_threads: int = Field(0, ge=0, description="Image decoders; 0: the usable cores.")
    max_batch_size: int = Field(0, ge=0, description="Images in a batch; 0: 16, 64 on a GPU.")
    max_queue_size: int = Field(256, ge=1, description="Images waiting for a trunk, then 429.")
    max_queue_delay_ms: float = Field(
        0, ge=0, description="Milliseconds that an idle device waits for company."
    )

    max_request_bytes: int = Field(64 * 2**20, ge=1, description="Bytes of a request body.")
    max_images: int = Field(64, ge=1, description="Images in a request.")
    max_image_bytes: int = Field(20 * 2**20, ge=1, description="Encoded bytes of an image.")
    max_image_pixels: int = Field(50_000_000, ge=1, description="Pixels of an image.")
    max_image_side: int = Field(16_384, ge=1, description="Longest side of an image in pixels.")
    header_timeout_s: float = Field(10, gt=0, description="Seconds for headers to arrive.")
    body_timeout_s: float = Field(30, gt=0, description="Seconds for a body to arrive.")
    default_timeout_ms: float = Field(
        60_000, gt=0, description="Deadline of requests without X-Timeout-Ms, in milliseconds."
    )
    drain_timeout_s: float = Field(
        60, gt=0, description="Seconds that accepted requests get to finish on SIGTERM."
    )
    probe_interval_s: float = Field(
        30, gt=0, description="Seconds without work after which a trunk proves itself."
    )
    stuck_after_s: float = Field(
        60, gt=0, description="Seconds without a finished batch that mean the device is stuck."
    )

    label_cache_bytes: int = Field(
        256 * 2**20, ge=0, description="Bytes kept of label sets' embeddings, for zero-shot."
    )

    heads_folder: str = Field(
        "", description="Where heads that were uploaded or fitted are kept; in the store if empty."
    )

    api_keys: Secrets = Field((), description="Keys that may use the service; open if empty.")
    admin_keys: Secrets = Field((), description="Keys that may load and unload; off if empty.")
    url_hosts: Names = Field((), description="Hosts that images may be fetched from; off if empty.")
    url_timeout_s: float = Field(10, gt=0, description="Seconds to fetch an image.")
    url_allow_private: bool = Field(
        False, description="Let allowed hosts resolve to private or loopback addresses."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lowest level logged."
    )

    @field_validator("models", "workers", "url_hosts", "api_keys", "admin_keys", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    def rpc_address(self) -> str:
        """Where gRPC listens."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.grpc_port}"

    @field_validator("workers")
    @classmethod
    def _check_workers(cls, workers: tuple[str, ...]) -> tuple[str, ...]:
        for worker in workers:
            _, colon, port = worker.removeprefix("dns:///").rpartition(":")
            if not worker.startswith("unix:") and not (colon and port.isdigit()):
                raise ValueError(f"{worker!r} is not host:port, dns:///name:port or unix:path")
        return workers

    @property
    def worker_options(self) -> WorkerOptions:
        """The settings of a worker's backend."""
        names = WorkerOptions.__dataclass_fields__.keys() - {"startup"}
        return WorkerOptions(startup=self.models, **{name: getattr(self, name) for name in names})

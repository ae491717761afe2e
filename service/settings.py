"""Every setting, with its unit, bounds and meaning. Its environment variable is `VITRAIL_NAME`."""

import os
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.worker_options import WorkerOptions

Names = Annotated[tuple[str, ...], NoDecode]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode]


class Settings(BaseSettings):
    """The settings of a process, read once at start. Flags take precedence over the environment."""

    model_config = SettingsConfigDict(
        env_prefix="VITRAIL_", frozen=True, extra="forbid", populate_by_name=True
    )

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: int = Field(8000, ge=0, le=65535, description="REST port; 0 for any free port.")
    grpc_port: int = Field(8001, ge=0, le=65535, description="gRPC port; 0 for any free port.")
    metrics_port: int = Field(
        8002,
        ge=0,
        le=65535,
        description="A worker's port for /metrics; 0 to turn it off. Where it is set, a gateway "
        "and `vitrail serve` have /metrics there and nowhere else.",
    )
    admin_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Port for loading and unloading models and for /debug/queues, which are then "
        "nowhere else; 0 for the REST port.",
    )
    workers: Names = Field(
        (),
        description="A gateway's workers, each as host:port, dns:///name:port or unix:path.",
    )

    catalog: str = Field(
        "demo",
        description="A built-in catalog (demo, hub), a TOML file, a folder of them, or a URL.",
    )
    catalog_poll_s: float = Field(
        0,
        ge=0,
        description="Seconds between looks at the catalog, whose changes are applied while "
        "requests are served; 0 to read it once.",
    )
    models: Names = Field(
        (), description="Models to load at start; if empty, the catalog's `startup` list."
    )
    model_memory_mb: int = Field(
        0,
        ge=0,
        description="If set, models that are not loaded at start are loaded when they are asked "
        "for, and those that were asked for least recently are unloaded where weights take more "
        "MiB than these.",
    )
    device: str = Field("auto", description="Device of the models: auto, cpu, cuda or cuda:N.")
    precision: Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"] = Field(
        "auto",
        validation_alias=AliasChoices("VITRAIL_PRECISION", "VITRAIL_DTYPE"),
        description="Precision of trunks, unless the catalog sets one; auto: float32 on CPUs, "
        "bfloat16 on GPUs that have it. VITRAIL_DTYPE is its other name.",
    )
    tf32: bool = Field(
        False,
        description="Let products of float32 numbers on GPUs round them to TF32, which has 10 "
        "bits; digests differ then.",
    )
    engine: str = Field(
        "auto", description="Engine that runs trunks' passes, unless the catalog sets one."
    )
    map_weights: bool | None = Field(
        None,
        description="Share weights between processes: keep safetensors files mapped, which must "
        "not be written to then, only replaced by renaming. If not set, those in the store are, "
        "and those of `file:` sources are not.",
    )
    transform: Literal["exact", "fast", "gpu"] = Field(
        "exact", description="How images are resized, unless the catalog sets it."
    )
    threads: int = Field(0, ge=0, description="CPU threads of all batches; 0 for one per core.")
    streams: int = Field(
        0,
        ge=0,
        description="Most batches that run at the same time; 0 for one per core up to 8, or 2 on a "
        "GPU.",
    )
    decode_threads: int = Field(
        0, ge=0, description="Threads that decode images; 0 for one per core, at least 2."
    )
    decoders: Literal["auto", "processes", "threads"] = Field(
        "auto",
        description="Where images are decoded: in processes, which are killed over a bad image, or "
        "in threads of the worker. `auto`: JPEG files in threads if their header says that they "
        "are quick to decode, other files and clips in processes.",
    )
    decode_cpu_s: float = Field(
        5, gt=0, description="Processor seconds to decode an image in a process; clips: six times."
    )
    max_batch_size: int = Field(
        0, ge=0, description="Most images in a batch; 0 for 16, or 64 on a GPU."
    )
    max_queue_size: int = Field(
        256, ge=1, description="Most images that wait for a trunk; beyond it, requests get 429."
    )
    max_queue_delay_ms: float = Field(
        0, ge=0, description="Milliseconds that an idle device waits to fill a batch."
    )

    max_request_bytes: int = Field(64 * 2**20, ge=1, description="Most bytes of a request body.")
    max_bytes_in_flight: int = Field(
        512 * 2**20,
        ge=1,
        description="Most bytes of all requests in flight, with copies of tensors and with large "
        "answers; beyond it, requests get 503. One that takes more alone gets 413: FP16 numbers "
        "take three times what was sent, and so do JSON while it is parsed, and masks in JSON.",
    )
    max_requests_in_flight: int = Field(
        2048, ge=1, description="Most requests in flight; beyond it, requests get 503."
    )
    max_connections: int = Field(
        2048,
        ge=1,
        description="Most connections over HTTP, beyond which they get 503, and over gRPC, beyond "
        "which they are closed.",
    )
    max_images: int = Field(64, ge=1, description="Most images in a request.")
    max_image_bytes: int = Field(20 * 2**20, ge=1, description="Most bytes of an encoded image.")
    max_image_pixels: int = Field(50_000_000, ge=1, description="Most pixels of an image.")
    max_image_side: int = Field(16_384, ge=1, description="Longest side of an image, in pixels.")
    header_timeout_s: float = Field(10, gt=0, description="Seconds for the headers to arrive.")
    body_timeout_s: float = Field(
        30, gt=0, description="Seconds for the body to arrive, and for an unread answer to be read."
    )
    default_timeout_ms: float = Field(
        60_000, gt=0, description="Deadline of requests without X-Timeout-Ms, in milliseconds."
    )
    drain_timeout_s: float = Field(
        60, gt=0, description="Seconds that accepted requests have to finish after SIGTERM."
    )
    drain_delay_s: float = Field(
        0,
        ge=0,
        description="Seconds after SIGTERM in which the process reports that it is not ready and "
        "still accepts requests, so that load balancers turn away before it stops listening.",
    )
    probe_interval_s: float = Field(
        30, gt=0, description="Seconds without a pass after which a trunk is probed."
    )
    stuck_after_s: float = Field(
        60,
        gt=0,
        description="Seconds after which a running batch makes the server report itself not live.",
    )

    label_cache_bytes: int = Field(
        256 * 2**20, ge=0, description="Bytes of the cache of label sets' embeddings (zero-shot)."
    )

    heads_folder: str = Field(
        "", description="Folder of uploaded and fitted heads; if empty, `heads` in the store."
    )
    collections: str = Field(
        "",
        description="Where collections are stored: a folder, or a postgresql:// URL; if empty, "
        "`collections` in the store.",
    )

    image_folders: Names = Field(
        (),
        description="Folders of this machine whose images clients may add to collections; if "
        "empty, folders are refused.",
    )

    api_keys: Secrets = Field(
        (), description="Keys that may use the service; if empty, no key is needed."
    )
    admin_keys: Secrets = Field(
        (),
        description="Keys that may load and unload models; if empty, this is turned off.",
    )
    keys_file: str = Field(
        "", description="JSON file of hashed keys, written by `vitrail keys` and watched."
    )
    worker_token: SecretStr | None = Field(
        None,
        min_length=16,
        description="Credential that gateways send to workers, and that workers then require; if "
        "empty, one is made from the first admin or API key.",
    )
    tls_cert: str = Field(
        "", description="Certificate (PEM, with its chain) of HTTP and gRPC; if empty, no TLS."
    )
    tls_key: str = Field("", description="The certificate's private key (PEM).")
    tls_client_ca: str = Field(
        "",
        description="CA (PEM) whose certificates clients must have; if empty, none is asked for.",
    )
    worker_ca: str = Field(
        "",
        description="CA (PEM) of the workers' certificates; if empty, gateways call without TLS.",
    )
    worker_cert: str = Field("", description="Certificate (PEM) that a gateway shows to workers.")
    worker_key: str = Field("", description="Its private key (PEM).")
    url_hosts: Names = Field(
        (), description="Hosts that images may be fetched from; if empty, URLs are refused."
    )
    url_timeout_s: float = Field(10, gt=0, description="Seconds to fetch an image from a URL.")
    url_allow_private: bool = Field(
        False, description="Whether those hosts may resolve to private or loopback addresses."
    )
    triton_metrics: bool = Field(
        False, description="Export metrics under Triton's names, too (nv_inference_...)."
    )
    shared_memory: str = Field(
        "",
        description="The beginning of the keys of system shared memory that clients of `/v2` may "
        "register. If it is set, they may also register CUDA shared memory; if empty, neither.",
    )
    slow_request_s: float = Field(
        0, ge=0, description="Seconds after which a request is logged as a warning; 0 for never."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lowest level that is logged."
    )

    @field_validator(
        "models",
        "workers",
        "image_folders",
        "url_hosts",
        "api_keys",
        "admin_keys",
        mode="before",
    )
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @model_validator(mode="after")
    def _check_pairs(self) -> "Settings":
        for cert, key in (("tls_cert", "tls_key"), ("worker_cert", "worker_key")):
            if bool(getattr(self, cert)) != bool(getattr(self, key)):
                raise ValueError(f"set both of {cert} and {key}, or neither")
        for needs, needed in (("tls_client_ca", "tls_cert"), ("worker_cert", "worker_ca")):
            if getattr(self, needs) and not getattr(self, needed):
                raise ValueError(f"{needs} needs {needed}")
        return self

    @field_validator("worker_token", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return value or None

    @property
    def stop_timeout_s(self) -> float:
        """Seconds from SIGTERM until the accepted requests are finished."""
        return self.drain_delay_s + self.drain_timeout_s

    @property
    def own_metrics_port(self) -> int:
        """The port of a gateway's /metrics; 0 for the REST port."""
        return self.metrics_port if "metrics_port" in self.model_fields_set else 0

    def rpc_address(self) -> str:
        """Where gRPC listens."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.grpc_port}"

    @field_validator("image_folders")
    @classmethod
    def _check_folders(cls, folders: tuple[str, ...]) -> tuple[str, ...]:
        for folder in folders:
            if not os.path.isabs(folder):
                raise ValueError(f"{folder!r} is not an absolute path")
        return tuple(os.path.normpath(folder) for folder in folders)

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

"""Every way a request can fail, in one table: HTTP status, gRPC status, outcome in the metrics."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from models import errors as library


class FieldError(NamedTuple):
    """What is wrong with one field of a request."""

    field: str
    detail: str


class ServiceError(Exception):
    """Base. `slug` names the problem type; `retry_after_s` becomes the Retry-After header."""

    status: ClassVar[int]
    grpc: ClassVar[str]
    slug: ClassVar[str]
    title: ClassVar[str]
    outcome: ClassVar[str]

    def __init__(
        self,
        detail: str,
        *,
        field: str | None = None,
        fields: Sequence[FieldError] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.fields = [FieldError(field, detail)] if field else list(fields)
        self.retry_after_s = retry_after_s


class BadRequestError(ServiceError):
    status, grpc = 400, "INVALID_ARGUMENT"
    slug, title, outcome = "bad-request", "Malformed request", "invalid"


class UnauthenticatedError(ServiceError):
    status, grpc = 401, "UNAUTHENTICATED"
    slug, title, outcome = "unauthenticated", "API key required", "invalid"


class PermissionDeniedError(ServiceError):
    status, grpc = 403, "PERMISSION_DENIED"
    slug, title, outcome = "permission-denied", "Not permitted", "invalid"


class NotFoundError(ServiceError):
    status, grpc = 404, "NOT_FOUND"
    slug, title, outcome = "not-found", "Not found", "invalid"


class RequestTimeoutError(ServiceError):
    status, grpc = 408, "DEADLINE_EXCEEDED"
    slug, title, outcome = "request-timeout", "Request body too slow", "timeout"


class ConflictError(ServiceError):
    status, grpc = 409, "ALREADY_EXISTS"
    slug, title, outcome = "conflict", "Conflict", "invalid"


class PayloadTooLargeError(ServiceError):
    status, grpc = 413, "INVALID_ARGUMENT"
    slug, title, outcome = "payload-too-large", "Payload too large", "invalid"


class UnsupportedMediaTypeError(ServiceError):
    status, grpc = 415, "INVALID_ARGUMENT"
    slug, title, outcome = "unsupported-media-type", "Unsupported media type", "invalid"


class InvalidInputError(ServiceError):
    status, grpc = 422, "INVALID_ARGUMENT"
    slug, title, outcome = "invalid-input", "Invalid input", "invalid"


class InvalidParametersError(ServiceError):
    status, grpc = 422, "INVALID_ARGUMENT"
    slug, title, outcome = "invalid-parameters", "Invalid parameters", "invalid"


class QueueFullError(ServiceError):
    status, grpc = 429, "RESOURCE_EXHAUSTED"
    slug, title, outcome = "queue-full", "Queue full", "rejected"


class InternalError(ServiceError):
    """What is not the caller's fault and has no better name; the detail says nothing of why."""

    status, grpc = 500, "INTERNAL"
    slug, title, outcome = "internal", "Internal error", "error"


class UnavailableError(ServiceError):
    status, grpc = 503, "UNAVAILABLE"
    slug, title, outcome = "unavailable", "Unavailable", "rejected"


class DeadlineExceededError(ServiceError):
    status, grpc = 504, "DEADLINE_EXCEEDED"
    slug, title, outcome = "deadline-exceeded", "Deadline exceeded", "timeout"


BY_SLUG = {error.slug: error for error in ServiceError.__subclasses__()}

LOADING_RETRY_AFTER_S = 2.0


def from_library(error: library.ModelsError) -> ServiceError:
    """The library's error as the service tells it."""
    match error:
        case library.ImageTooLargeError():
            return PayloadTooLargeError(str(error))
        case library.InputError():
            return InvalidInputError(str(error), field=error.field)
        case library.ModelNotFoundError():
            return NotFoundError(str(error), field="model")
        case library.ModelNotReadyError():
            return UnavailableError(str(error), retry_after_s=LOADING_RETRY_AFTER_S)
        case _:
            return UnavailableError(str(error))

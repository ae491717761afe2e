"""Every way a request can fail, in one table: HTTP status, title, outcome in the metrics."""

from typing import ClassVar

from models import errors as library


class ServiceError(Exception):
    """Base. `slug` names the problem type; `retry_after_s` becomes the Retry-After header."""

    status: ClassVar[int] = 500
    slug: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"
    outcome: ClassVar[str] = "error"

    def __init__(
        self, detail: str, *, field: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field
        self.retry_after_s = retry_after_s


class BadRequestError(ServiceError):
    status, slug, title, outcome = 400, "bad-request", "Malformed request", "invalid"


class UnauthenticatedError(ServiceError):
    status, slug, title, outcome = 401, "unauthenticated", "API key required", "invalid"


class PermissionDeniedError(ServiceError):
    status, slug, title, outcome = 403, "permission-denied", "Not permitted", "invalid"


class NotFoundError(ServiceError):
    status, slug, title, outcome = 404, "not-found", "Not found", "invalid"


class RequestTimeoutError(ServiceError):
    status, slug, title, outcome = 408, "request-timeout", "Request body too slow", "timeout"


class PayloadTooLargeError(ServiceError):
    status, slug, title, outcome = 413, "payload-too-large", "Payload too large", "invalid"


class UnsupportedMediaTypeError(ServiceError):
    status, slug, title, outcome = (
        415,
        "unsupported-media-type",
        "Unsupported media type",
        "invalid",
    )


class InvalidInputError(ServiceError):
    status, slug, title, outcome = 422, "invalid-input", "Invalid input", "invalid"


class QueueFullError(ServiceError):
    status, slug, title, outcome = 429, "queue-full", "Queue full", "rejected"


class InternalError(ServiceError):
    """What is not the caller's fault and has no better name; the detail says nothing of why."""


class UnavailableError(ServiceError):
    status, slug, title, outcome = 503, "unavailable", "Unavailable", "rejected"


class DeadlineExceededError(ServiceError):
    status, slug, title, outcome = 504, "deadline-exceeded", "Deadline exceeded", "timeout"


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

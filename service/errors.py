"""Every error of a request: its HTTP status, gRPC status, problem type, and outcome in metrics."""

import errno
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Self

from models import errors as library


class FieldError(NamedTuple):
    """An error in one field of a request."""

    field: str
    detail: str


# Errors of the system where a disk is full or a quota of it used up.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# An answer to bad input is not as long as the input that it quotes.
MAX_DETAIL = 4000
MAX_FIELD = 200


class ServiceError(Exception):
    """The base of all errors.

    Args:
        detail: what is wrong, for the caller.
        field: the field of the request that is wrong; a short form of `fields`.
        fields: the fields that are wrong.
        retry_after_s: seconds after which a retry may succeed, for the Retry-After header.
    """

    # The HTTP status, and the name of the gRPC status.
    status: ClassVar[int]
    grpc: ClassVar[str]
    # The name and the title of the problem type (RFC 9457).
    slug: ClassVar[str]
    title: ClassVar[str]
    # The `outcome` label of the metrics.
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
        self.detail = cut(detail, MAX_DETAIL)
        named = [FieldError(field, detail)] if field else fields
        self.fields = [
            FieldError(cut(e.field, MAX_FIELD), cut(e.detail, MAX_DETAIL)) for e in named
        ]
        self.retry_after_s = retry_after_s

    def kept(self) -> Self:
        """The error to be kept for an answer: without its traceback, whose frames hold all that was
        being read, and would until the garbage collector finds the cycle."""
        self.__traceback__ = self.__cause__ = self.__context__ = None
        return self


def cut(text: str, length: int) -> str:
    """A text of at most so many characters, 3 or more; a longer one ends in dots."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


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


class QuotaExceededError(ServiceError):
    status, grpc = 429, "RESOURCE_EXHAUSTED"
    slug, title, outcome = "quota-exceeded", "Quota exceeded", "rejected"


class InternalError(ServiceError):
    """An unexpected error. The cause is logged, and is not part of the detail."""

    status, grpc = 500, "INTERNAL"
    slug, title, outcome = "internal", "Internal error", "error"


class UnavailableError(ServiceError):
    status, grpc = 503, "UNAVAILABLE"
    slug, title, outcome = "unavailable", "Unavailable", "rejected"


class InsufficientStorageError(ServiceError):
    status, grpc = 507, "RESOURCE_EXHAUSTED"
    slug, title, outcome = "insufficient-storage", "No room on the disk", "rejected"


class DeadlineExceededError(ServiceError):
    status, grpc = 504, "DEADLINE_EXCEEDED"
    slug, title, outcome = "deadline-exceeded", "Deadline exceeded", "timeout"


BY_SLUG = {error.slug: error for error in ServiceError.__subclasses__()}

LOADING_RETRY_AFTER_S = 2.0


def from_library(error: library.ModelsError) -> ServiceError:
    """The service's error for an error of the library."""
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

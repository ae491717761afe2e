"""Limits of a request, the same for every protocol."""

from service.errors import PayloadTooLargeError
from service.settings import Settings

# Numbers in the answer of a request: 8 MiB as float32, up to 40 MiB as JSON.
MAX_ANSWER_VALUES = 2**21
# Longer timeouts are shortened to a day: gRPC cannot express any length.
MAX_TIMEOUT_MS = 24 * 3600 * 1000.0


def check_input_count(settings: Settings, count: int) -> None:
    """Check the number of images, clips, latent vectors or seeds of one request.

    Raises:
        PayloadTooLargeError: more than `settings.max_images`.
    """
    if count > settings.max_images:
        raise PayloadTooLargeError(
            f"{count} images in one request; the limit is {settings.max_images}"
        )


def check_answer_size(values: int) -> None:
    """Check the numbers that a request's answer would hold, before anything is computed.

    Raises:
        PayloadTooLargeError: more than `MAX_ANSWER_VALUES`.
    """
    if values > MAX_ANSWER_VALUES:
        raise PayloadTooLargeError(
            f"the answer would hold {values} numbers; the limit is {MAX_ANSWER_VALUES}. Send fewer "
            "images at a time, or ask for fewer layers"
        )

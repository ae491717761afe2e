"""The limit on a request's inputs, the same for every protocol."""

from service.errors import PayloadTooLargeError
from service.settings import Settings


def check_input_count(settings: Settings, count: int) -> None:
    """Check the number of images, clips, latent vectors or seeds of one request.

    Raises:
        PayloadTooLargeError: more than `settings.max_images`.
    """
    if count > settings.max_images:
        raise PayloadTooLargeError(
            f"{count} images in one request; the limit is {settings.max_images}"
        )

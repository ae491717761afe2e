"""What can go wrong in the library, free of any web or gRPC vocabulary."""


class ModelsError(Exception):
    """Base of every error that `models` raises on purpose."""


class InputError(ModelsError):
    """The caller's input cannot be used: an image that does not decode, an option out of range.

    `field` names the offending parameter where there is one.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ImageTooLargeError(InputError):
    """An image over the byte, pixel or side limit, refused before it is decoded."""


class TaskError(InputError):
    """The model exists but does not do what was asked of it."""


class ModelNotFoundError(ModelsError):
    """No model of that name is in the catalog."""


class ModelNotReadyError(ModelsError):
    """The model is in the catalog but not loaded: `state` says which state it is in."""

    def __init__(self, message: str, *, state: str) -> None:
        super().__init__(message)
        self.state = state


class CatalogError(ModelsError):
    """The catalog file is wrong; the message names the entry and the remedy."""


class SourceError(ModelsError):
    """A checkpoint could not be fetched, or what came is not what was pinned."""


class CheckpointError(ModelsError):
    """A checkpoint file could not be read, recognised, or does not fit its architecture."""

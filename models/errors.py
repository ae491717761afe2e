"""The library's errors. They know neither HTTP nor gRPC; `service` translates them."""


class ModelsError(Exception):
    """Base of all errors that `models` raises deliberately."""


class InputError(ModelsError):
    """An invalid input: an image that does not decode, an option out of range.

    Args:
        field: the name of the parameter, if it is one.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ImageTooLargeError(InputError):
    """An image over the byte, pixel or side limit, refused before it is decoded."""


class ModalityError(InputError):
    """The model does not take images, texts or whatever the input is."""


class TaskError(InputError):
    """The model does not do the requested task."""


class ModelNotFoundError(ModelsError):
    """The catalog has no model of that name."""


class ModelNotReadyError(ModelsError):
    """The model is in the catalog, but not loaded.

    Args:
        state: the state that it is in, such as `loading` or `failed`.
    """

    def __init__(self, message: str, *, state: str) -> None:
        super().__init__(message)
        self.state = state


class CatalogError(ModelsError):
    """The catalog is invalid; the message names the entry and the remedy."""


class SourceError(ModelsError):
    """A checkpoint cannot be fetched, or does not have the pinned digest."""


class CheckpointError(ModelsError):
    """A checkpoint cannot be read or recognised, or does not fit its architecture."""


class EngineError(ModelsError):
    """An engine cannot run a pass, or its outputs differ from eager's beyond the tolerance."""

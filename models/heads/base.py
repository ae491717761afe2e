"""What every head offers, with the defaults that most heads keep.

A head works in two steps. `forward` runs on the device for all rows of a batch that ask for the
same thing. `finish` runs on the CPU for one input, with that caller's other options.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from models.checkpoints.checkpoint import HeadState
from models.errors import CatalogError
from models.inputs.tiling import View
from models.reference_outputs import Parts, image_outputs
from models.trunks.adapters import Adapter
from models.trunks.base import Trunk
from models.trunks.features import NO_EXTRAS, FeatureRequest
from models.trunks.output import TrunkOutput
from models.trunks.weights import parameter_bytes, state_digest


class Head:
    """A head on a trunk. A class with a `kind` is found by being in this package.

    Class attributes:
        kind: its name in catalogs (`head = "KIND"`) and in head files.
        task: the task that it does, see `models/tasks`.
        state_name: the name of its weights among those that come in a checkpoint; `kind` if empty.
        needs_state: whether it cannot be created without weights.
        is_main: whether a checkpoint that has its weights is a model for its task.
        is_portable: whether it can be a file of its own, to be uploaded.
        is_fittable: whether `vitrail fit` can train it.
        forward_options: the options that `forward` takes. Rows with equal ones share a call. All
            other options go to `finish`.
        forward_is_slow: whether `forward` computes enough to use several CPU threads.
        finish_is_slow: whether `finish` takes milliseconds, so that servers run it in a thread.

    Attributes:
        labels: class names, if it has classes.
        request: what it needs of a pass beyond the trunk's last output.
        view: how it wants images cut, if not by the trunk's transform. `finish` then gets what
            the view has merged.
        network: the module with its own weights, or None.
    """

    kind: ClassVar[str]
    task: ClassVar[str]
    state_name: ClassVar[str] = ""
    needs_state: ClassVar[bool] = False
    is_main: ClassVar[bool] = False
    is_portable: ClassVar[bool] = False
    is_fittable: ClassVar[bool] = False
    forward_options: ClassVar[frozenset[str]] = frozenset()
    forward_is_slow: ClassVar[bool] = False
    finish_is_slow: ClassVar[bool] = False

    labels: Sequence[str] = ()
    request: FeatureRequest = NO_EXTRAS
    view: View | None = None
    network: Any = None

    @classmethod
    def create(cls, trunk: Trunk, labels: Sequence[str], state: HeadState | None) -> Self:
        """The head on a trunk.

        Args:
            labels: class names; may be empty if the weights or the task bring their own.
            state: its weights.

        Raises:
            CatalogError: the trunk lacks what the head needs.
            CheckpointError: the weights do not fit the trunk.
        """
        raise CatalogError(f"the head {cls.kind} cannot be named in a catalog")

    @classmethod
    def comes_with(cls, trunk: Trunk, states: Mapping[str, HeadState]) -> bool:
        """Whether every model on such a trunk, with these weights beside it, has this head."""
        return False

    def companions(self) -> Mapping[str, "Head"]:
        """Heads for other tasks that this head brings."""
        return {}

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise InputError for options that this model cannot honour, before anything runs."""

    def feature_request(self, options: Mapping[str, Any]) -> FeatureRequest:
        """What it needs of a pass for these options of `forward`."""
        return self.request

    def adapt(self, adapter: Adapter) -> None:
        """Have its passes go through an adapter of the trunk."""
        self.request = replace(self.request, adapter=adapter)

    def answer_values(self, options: Mapping[str, Any]) -> int:
        """The most numbers in the answer for one input, for answers that may be large; else 0."""
        return 0

    def at_size(self, options: Mapping[str, Any], size: tuple[int, int]) -> Mapping[str, Any]:
        """The options of `forward` for an image of that (width, height)."""
        return options

    def top_k(self, options: Mapping[str, Any]) -> int:
        """How many of the best classes `finish` takes, of heads that rank classes. 0: it takes
        what `forward` returns."""
        return 0

    def needs_image(self, options: Mapping[str, Any]) -> bool:
        """Whether `finish` takes the decoded image itself, as the option `image`."""
        return False

    # Properties, since each subclass names the options that its own `forward` and `finish` take.

    @property
    def forward(self) -> Callable[..., dict[str, Tensor]]:
        """`forward(output, **options)`: named tensors for a batch, first dimension B."""
        raise NotImplementedError

    @property
    def shared(self) -> Hashable:
        """What this head computes as others do. Heads of a batch with equal values run in one call
        of `forward_together`; None: alone."""
        return None

    @classmethod
    def forward_together(
        cls, heads: Sequence[Any], output: TrunkOutput, index: Sequence[Sequence[int]], best: int
    ) -> list[tuple[Sequence[int], Mapping[str, Tensor]]]:
        """The best classes of heads that rank them, each for its own rows.

        Args:
            output: for all rows of the heads.
            index: for each head its rows of `output`.
            best: how many of the best classes are needed.

        Returns:
            Numbers of heads, with what they return for their rows, one head's after another's:
            `index` and `score`, or `logits` that are still to be ranked.
        """
        raise NotImplementedError

    @property
    def finish(self) -> Callable[..., dict[str, np.ndarray]]:
        """`finish(row, size, **options)`: one input's row of those to its answer's named arrays.
        `size` is the image's (width, height)."""
        raise NotImplementedError

    @property
    def digests(self) -> list[str]:
        """Digests over the head's own weights and settings."""
        return [] if self.network is None else [state_digest(self.network.state_dict())]

    @property
    def nbytes(self) -> int:
        """Bytes of the head's own weights on the device."""
        return 0 if self.network is None else parameter_bytes(self.network)

    def reference_outputs(self, parts: Parts, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `Model.run` returns for a model whose own head this is."""
        return image_outputs(parts, inputs) if "pixel_values" in inputs else {}

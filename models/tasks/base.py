"""What a task is: its options, its named outputs, and how an answer is rendered."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from models.inputs.types import Input

# What a head returns for one input: named arrays without a batch dimension.
Arrays = Mapping[str, np.ndarray]

PNG = "image/png"
NPY = "application/x-npy"


class Options(BaseModel):
    """A task's options: types, bounds, defaults and descriptions, declared once.

    REST parameters, OpenAPI, gRPC, the Open Inference Protocol and the command line read them.
    Unknown options are errors, so that a typo is never ignored.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    # What routes add to a task's options; no head takes them.
    route_fields: ClassVar[frozenset[str]] = frozenset({"model", "timing"})
    # Options that are inputs themselves, such as the texts to embed.
    input_fields: ClassVar[frozenset[str]] = frozenset()
    # Options for `Task.render`. All others go to the head.
    render_fields: ClassVar[frozenset[str]] = frozenset()

    def inputs(self) -> Sequence[Input] | None:
        """The inputs that the options hold, or None if images come with the request."""
        return None

    def head_options(self) -> dict[str, Any]:
        """The options that the head takes, without those left at None."""
        others = self.route_fields | self.input_fields | self.render_fields
        return self.model_dump(exclude=set(others), exclude_none=True)

    def render_options(self) -> dict[str, Any]:
        """The options that `Task.render` takes."""
        return self.model_dump(include=set(self.render_fields))


@dataclass(frozen=True, slots=True)
class Output:
    """A named output as the Open Inference Protocol's metadata describes it.

    Args:
        shape: with the batch dimension first; -1 where the size varies.
        on_request: left out of an answer unless it is asked for by name.
        form: one of several forms of the same answer. The option `output` chooses one of them.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    on_request: bool = False
    form: bool = False


@dataclass(frozen=True, slots=True)
class Body:
    """A response body other than JSON, for one media type of the `Accept` header.

    `encode` gets the arrays of every input, or of the first one alone if `first_only`, and the
    render options. It returns None if the arrays hold nothing of this media type. `form` is the
    option `output` where a request accepts the media type and does not name one.
    """

    media_type: str
    encode: Callable[..., bytes | None]
    first_only: bool = True
    form: str | None = None


def no_members(arrays: Arrays | None) -> dict[str, Any]:
    """The default of `Task.members`."""
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task, and everything that routes, protocols and the command line need to offer it.

    Args:
        name: also the route's path, `/name`.
        summary: one or two sentences for OpenAPI and the command line.
        options: the task's `Options`.
        outputs: the arrays that heads return, those of every form included.
        render: `render(arrays, **render_options)`: one entry of `results`.
        line: an entry as one line of text, for terminals.
        modalities: what the route takes; empty if all inputs come as options.
        bodies: response bodies other than JSON.
        members: further members of the whole answer, from the first input that did not fail.
        digests: whether the whole answer carries the model's and the transform's digests.
        example: options of an example request, for OpenAPI.
    """

    name: str
    summary: str
    options: type[Options]
    outputs: tuple[Output, ...]
    render: Callable[..., dict[str, Any]]
    line: Callable[[Mapping[str, Any]], str]
    modalities: tuple[str, ...] = ("image",)
    bodies: tuple[Body, ...] = ()
    members: Callable[[Arrays | None], dict[str, Any]] = no_members
    digests: bool = False
    example: Mapping[str, Any] = field(default_factory=dict)

    @property
    def forms(self) -> tuple[str, ...]:
        """The outputs that the option `output` chooses from; the first one is its default."""
        return tuple(output.name for output in self.outputs if output.form)

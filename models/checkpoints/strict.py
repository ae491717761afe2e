"""Strict loading: every key of the weights is used, every parameter of the network is set."""

from collections.abc import Mapping

from torch import Tensor, nn

from models.errors import CheckpointError

# What building a network or a head raises if shapes or arguments do not fit each other.
UNFIT = (
    AssertionError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
COUNTER = "num_batches_tracked"


def load_strictly(
    network: nn.Module, state_dict: Mapping[str, Tensor], name: str, *, mapped: bool = False
) -> None:
    """Load a state dict after `check_strictly`, and raise as it does.

    Args:
        mapped: keep tensors that are views of a mapped file, as those of safetensors are. Processes
            that map the same file then share its memory. It must not be written to any more.
    """
    check_strictly(network, state_dict, name)
    if mapped:
        own = network.state_dict()
        kept = {key: value for key, value in state_dict.items() if _can_be_kept(value, own[key])}
        for key in own.keys() - kept.keys():
            kept[key] = own[key].copy_(state_dict[key])
        network.load_state_dict(kept, assign=True)
    else:
        network.load_state_dict(dict(state_dict))


def _can_be_kept(tensor: Tensor, own: Tensor) -> bool:
    """Whether a tensor may take the place of a network's own: it is in a file's mapping, whose
    memory torch did not allocate, and computing with it gives the same bits."""
    return (
        not tensor.untyped_storage().resizable()
        and tensor.dtype == own.dtype
        and tensor.stride() == own.stride()
    )


def check_strictly(network: nn.Module, state_dict: Mapping[str, Tensor], name: str) -> None:
    """Check that a state dict fits a network, which may be on the meta device.

    Args:
        name: the network's name, for the error.

    Raises:
        CheckpointError: keys are missing, left over, of another shape, whole numbers in place of
            fractions or the reverse, or not finite; it names the first ten of each. Batch norms'
            counters may be of any type and value: they play no part in evaluation.
    """
    expected = network.state_dict()
    missing = [key for key in expected if key not in state_dict]
    left = [key for key in state_dict if key not in expected]
    misshapen = [
        f"{key} {tuple(state_dict[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]
    mistyped = [
        f"{key} {state_dict[key].dtype} instead of {value.dtype}"
        for key, value in expected.items()
        if key in state_dict and state_dict[key].is_floating_point() != value.is_floating_point()
        if not key.endswith(COUNTER)
    ]
    not_finite = [
        key
        for key, value in state_dict.items()
        if value.is_floating_point() and not value.is_meta  # a shape alone has no values
        if not key.endswith(COUNTER) and not bool(value.isfinite().all())
    ]
    problems = [
        f"{what}: {', '.join(keys[:10])}" + (f" and {len(keys) - 10} more" if keys[10:] else "")
        for what, keys in (
            ("missing", missing),
            ("left over", left),
            ("wrong shape", misshapen),
            ("wrong type", mistyped),
            ("not finite", not_finite),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(f"the weights do not fit {name}; {'; '.join(problems)}")

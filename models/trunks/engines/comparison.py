"""How far a built pass agrees with its module, run eagerly in float32."""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from models.errors import EngineError
from models.trunks.engines.base import Pass, PassSource
from models.trunks.engines.report import Agreement

# A batch, and the named outputs of its pass.
Outputs = tuple[Tensor, Mapping[str, Tensor]]


@torch.inference_mode()
def compare(source: PassSource, pairs: Iterable[tuple[Outputs, Outputs]]) -> Agreement:
    """Compare outputs with those of eager float32.

    Args:
        pairs: at least one batch's expected and actual outputs. They may be computed as they are
            iterated, without gradients.

    Raises:
        EngineError: outputs of other names or shapes, or values that are not finite.
    """
    error, cosines, same_class, is_classifier = 0.0, [], 0, False
    for (batch, expected), (other_batch, actual) in pairs:
        error = max(error, largest_error(expected, actual))
        reference, is_classifier = source.summary(batch, expected)
        summary, _ = source.summary(other_batch, actual)
        same_class += int((reference.argmax(1) == summary.argmax(1)).sum())
        cosines += cosine_similarity(reference.float(), summary.float()).tolist()
    count = len(cosines)
    if is_classifier:
        return Agreement(error, count, top1_agreement=same_class / count)
    return Agreement(error, count, cosine=sum(cosines) / count)


def run_both(
    module: Pass, built: Pass, examples: Iterable[tuple[Tensor, ...]]
) -> Iterator[tuple[Outputs, Outputs]]:
    """The outputs of a module and of what an engine built of it, for each example's inputs."""
    for inputs in examples:
        yield (inputs[0], module(*inputs)), (inputs[0], built(*inputs))


def largest_error(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> float:
    """The largest difference over the largest value of the output that it is in.

    Raises:
        EngineError: outputs of other names or shapes, or a difference that is not finite.
    """
    if expected.keys() != actual.keys():
        raise EngineError(f"outputs {sorted(actual)} instead of {sorted(expected)}")
    worst = 0.0
    for name, reference in expected.items():
        if reference.shape != actual[name].shape:
            raise EngineError(
                f"{name} has shape {tuple(actual[name].shape)} instead of {tuple(reference.shape)}"
            )
        if reference.numel():
            difference = (actual[name].float() - reference.float()).abs().max()
            scale = reference.float().abs().max().clamp(min=1e-12)
            error = float(difference / scale)
            if not math.isfinite(error):
                raise EngineError(f"{name} has values that are not finite")
            worst = max(worst, error)
    return worst

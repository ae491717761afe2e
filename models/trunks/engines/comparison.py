"""How far a built pass agrees with its module, run eagerly in float32."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from models.errors import EngineError
from models.trunks.engines.base import Pass, PassSource
from models.trunks.engines.report import Agreement


@torch.inference_mode()
def compare(
    source: PassSource, module: Pass, built: Pass, examples: Iterable[tuple[Tensor, ...]]
) -> Agreement:
    """Run a module and what an engine built of it on the same inputs.

    Args:
        examples: inputs of the pass; at least one.

    Raises:
        EngineError: outputs of other names or shapes, or values that are not finite.
    """
    errors, cosines, same_class, count = [0.0], [0.0], 0, 0
    is_classifier = False
    for inputs in examples:
        batch = inputs[0]
        expected, actual = module(*inputs), built(*inputs)
        errors.append(largest_error(expected, actual))
        reference, is_classifier = source.summary(batch, expected)
        summary, _ = source.summary(batch, actual)
        same_class += int((reference.argmax(1) == summary.argmax(1)).sum())
        cosines += cosine_similarity(reference.float(), summary.float()).tolist()
        count += len(batch)
    if is_classifier:
        return Agreement(max(errors), count, top1_agreement=same_class / count)
    return Agreement(max(errors), count, cosine=sum(cosines) / count)


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

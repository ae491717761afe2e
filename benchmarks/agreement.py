"""Compares answers under load with plain timm's, so that wrong answers do not count as fast."""

import re
from collections.abc import Mapping, Sequence

TOP = 5
# Every server's answer names its classes so. The quotes are escaped where JSON is within JSON.
INDEX = re.compile(rb'"index\\?"\s*:\s*(\d+)')


def agreement(answers: Mapping[int, bytes], expected: Sequence[Sequence[Sequence[int]]]) -> float:
    """The share of the expected classes that the answers name.

    Args:
        answers: the body of an answer, by the number of the request.
        expected: for each request, for each of its images, the five best classes.

    Returns:
        0 where there are no answers.
    """
    named = total = 0
    for number, body in answers.items():
        classes = [int(index) for index in INDEX.findall(body)]
        for place, best in enumerate(expected[number]):
            named += len(set(best) & set(classes[place * TOP : (place + 1) * TOP]))
            total += len(best)
    return named / total if total else 0.0

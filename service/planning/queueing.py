"""The latency of one device by a queueing model, without simulating it.

Images arrive as a Poisson process. A device that becomes idle takes what waits at once, up to the
largest batch, and a pass takes a fixed time for its number of images: a queue with batch service,
M/D/1 with batches (Bailey, "On Queueing Processes with Bulk Service", 1954; for inference servers
Inoue, "Queueing Analysis of GPU-Based Inference Servers with Dynamic Batching", 2021). The number
of images that wait when a pass ends is a Markov chain, which is solved numerically.

Lanes are modelled as one device that takes as many times the images in a pass.
"""

import math
from dataclasses import dataclass

import numpy as np

from service.planning.load import TrunkLoad

# Places in a pass at which arrivals are looked at.
GRID = 8
# States beyond this many full batches are left out, or earlier where few images arrive.
STATES = 12
# The images that come after one before its pass begins: a normal distribution as three points, in
# deviations from its mean, with their probabilities (Gauss-Hermite).
BEHIND = ((-math.sqrt(3), 1 / 6), (0.0, 2 / 3), (math.sqrt(3), 1 / 6))


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds from an image's arrival in the queue to its result; infinite under overload.

    Args:
        batch: images in a pass, on average.
    """

    p50: float
    p99: float
    batch: float


OVERLOAD = Prediction(math.inf, math.inf, math.nan)


def predict(load: TrunkLoad, lanes: int = 1) -> Prediction:
    """What the images of a trunk that has a device for itself will take."""
    seconds = _round_seconds(load, lanes)
    states = _waiting(load.rate, seconds)
    return OVERLOAD if states is None else _latency(load.rate, seconds, states)


def _round_seconds(load: TrunkLoad, lanes: int) -> np.ndarray:
    """Seconds in which all lanes together compute 0, 1, ... images: a single one on all cores, more
    divided among the lanes."""
    seconds = load.seconds()
    images = np.arange(lanes * load.max_batch_size + 1)
    together = seconds[-(-images // lanes)]
    together[1] = seconds[1] / lanes
    return np.asarray(np.maximum.accumulate(together))


def _latency(rate: float, seconds: np.ndarray, states: np.ndarray) -> Prediction:
    """
    Args:
        seconds: of passes of 0, 1, ... images.
        states: the probabilities that 0, 1, ... images wait when a pass ends.
    """
    most = len(seconds) - 1
    values: list[np.ndarray] = [seconds[1:2]]  # an image that finds the device idle
    weights: list[np.ndarray] = [states[:1]]
    images = 0.0
    for waiting in np.flatnonzero(states > 1e-6):
        first = max(int(waiting), 1)
        size = min(first, most)
        left = first - size
        images += states[waiting] * size
        expected = rate * seconds[size]
        ends = seconds[size] * (np.arange(GRID) + 0.5) / GRID  # of the pass, for one that comes
        most_before = int(expected + 6 * math.sqrt(expected) + 8)
        before = _poisson(rate * (seconds[size] - ends), most_before)
        place = left + 1 + np.arange(most_before)
        rounds = (place - 1) // most
        until = ends[:, None] + rounds * seconds[most]
        for deviation, share in BEHIND:
            behind = (rate * until + deviation * np.sqrt(rate * until)).round().clip(0)
            together = np.minimum(most, place - rounds * most + behind).astype(int)
            values.append((until + seconds[together]).ravel())
            weights.append((states[waiting] * share * expected / GRID * before).ravel())
    value, weight = np.concatenate(values), np.concatenate(weights)
    order = np.argsort(value)
    cumulated = np.cumsum(weight[order]) / weight.sum()
    p50, p99 = (float(value[order][np.searchsorted(cumulated, q)]) for q in (0.5, 0.99))
    return Prediction(p50, p99, float(images))


def _waiting(rate: float, seconds: np.ndarray) -> np.ndarray | None:
    """The probabilities that 0, 1, ... images wait when a pass has ended; None if too many do."""
    most = len(seconds) - 1
    arriving = rate * seconds[most]  # in a full pass, fewer than it holds
    if arriving >= most:
        return None
    usual = arriving * (2 + 3 / (1 - arriving / most)) + 24
    count = int(min(STATES * most + 32, usual))
    step = np.zeros((count, count))
    arrivals = _poisson(rate * seconds, count)
    for waiting in range(count):
        size = min(max(waiting, 1), most)
        left = max(waiting, 1) - size
        step[waiting, left:] = arrivals[size, : count - left]
    step[:, -1] += 1 - step.sum(axis=1)  # all beyond
    equations = step.T - np.eye(count)
    equations[-1] = 1.0
    target = np.zeros(count)
    target[-1] = 1.0
    states = np.linalg.solve(equations, target).clip(0.0)
    return None if states[-1] > 1e-3 else states / states.sum()


def _poisson(means: np.ndarray, count: int) -> np.ndarray:
    """(means, count) probabilities of 0, 1, ... arrivals."""
    numbers = np.arange(count)
    factorials = np.cumsum(np.log(np.maximum(numbers, 1)))
    means = np.maximum(means, 1e-12)[:, None]
    return np.asarray(np.exp(numbers * np.log(means) - means - factorials))

"""Which trunks go to which devices, so that each keeps its latency."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil

from models.errors import CatalogError
from service.planning.load import TrunkLoad
from service.planning.queueing import Prediction, predict
from service.planning.simulation import Simulated, simulate

# Trunks that share a device take no more than this share of its time.
SHARED_UTILIZATION = 0.7
# The scheduler is simulated with so many images for each set of trunks that might share a device,
# and must keep to this share of the target: the 99th percentile of so few varies.
SHARED_IMAGES = 2000
SHARED_MARGIN = 0.9
# Trunks with fewer images in the simulation are taken to wait as long as all of them do.
MIN_IMAGES = 200
# Shared devices that are tried for a trunk, the fullest ones first.
TRIED = 1
MAX_DEVICES = 100_000


@dataclass(slots=True)
class Device:
    """Devices with the same trunks.

    Args:
        loads: what each of them gets.
        predictions: for each trunk, by the queueing model if it is alone, or else as simulated.
    """

    loads: list[TrunkLoad]
    predictions: list[Prediction] = field(default_factory=list)
    count: int = 1

    @property
    def utilization(self) -> float:
        """The share of a lane's time that full passes take."""
        return sum(load.utilization for load in self.loads)

    @property
    def memory(self) -> int:
        """Bytes of all trunks."""
        return sum(load.memory for load in self.loads)


def place(
    loads: Sequence[TrunkLoad], p99_s: float, *, lanes: int = 1, memory: int = 0
) -> list[Device]:
    """The fewest devices that were found for which the 99th percentile of every trunk's latency is
    predicted to keep to a target. Trunks that need several devices have them for themselves; others
    share.

    Args:
        p99_s: seconds from an image's arrival in the queue to its result.
        memory: bytes of a device; 0 for any.

    Raises:
        CatalogError: a trunk cannot keep to it on any number of devices, or does not fit on one.
    """
    whole: list[Device] = []
    shared: list[Device] = []
    for load in sorted(loads, key=lambda load: load.utilization, reverse=True):
        if memory and load.memory > memory:
            raise CatalogError(
                f"{load.name} needs {load.memory / 1e6:.0f} MB, more than a device has"
            )
        count = _fewest(load, p99_s, lanes)
        alone = Device([load.part(count)], [predict(load.part(count), lanes)], count)
        if count > 1:
            whole.append(alone)
        elif not _join(load, shared, p99_s, lanes, memory):
            shared.append(alone)
    return whole + shared


def _fewest(load: TrunkLoad, p99_s: float, lanes: int) -> int:
    """The fewest devices on which a trunk alone keeps to the target."""

    def enough(count: int) -> bool:
        return predict(load.part(count), lanes).p99 <= p99_s

    low = max(1, ceil(load.utilization / lanes))
    high = low
    while not enough(high):
        if high > MAX_DEVICES or load.rate / high < 1e-3:
            fastest = float(load.seconds()[1]) / lanes
            raise CatalogError(
                f"{load.name} cannot keep to {p99_s * 1e3:.0f} ms: a pass of one image takes "
                f"{fastest * 1e3:.0f} ms, and an image may have to wait for one"
            )
        low, high = high + 1, 2 * high
    return _first(enough, low, high)


def _first(condition: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest number from `low` to `high` with a condition that `high` has."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if condition(middle) else (middle + 1, high)
    return high


def _join(load: TrunkLoad, shared: list[Device], p99_s: float, lanes: int, memory: int) -> bool:
    """Put a trunk on a device beside others. Returns whether there is one."""
    limit = SHARED_UTILIZATION * lanes - load.utilization
    fitting = [
        device
        for device in shared
        if device.utilization <= limit and (not memory or device.memory + load.memory <= memory)
    ]
    for device in sorted(fitting, key=lambda device: device.utilization, reverse=True)[:TRIED]:
        together = [*device.loads, load]
        predictions = _shared(together, lanes)
        if max(prediction.p99 for prediction in predictions) <= SHARED_MARGIN * p99_s:
            device.loads, device.predictions = together, predictions
            return True
    return False


def _shared(loads: Sequence[TrunkLoad], lanes: int) -> list[Prediction]:
    """The latencies of trunks on one device, by the scheduler in virtual time."""
    seen = simulate(loads, images=SHARED_IMAGES, lanes=lanes)
    everything = Simulated([latency for each in seen for latency in each.latencies])
    return [
        Prediction(
            (each if each.latencies else everything).quantile(0.5),
            (each if len(each.latencies) >= MIN_IMAGES else everything).quantile(0.99),
            each.images / each.passes if each.passes else 1.0,
        )
        for each in seen
    ]

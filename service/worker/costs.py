"""What batches and decoding cost: moving averages of measured seconds."""

# The weight of a new value. Averages fall faster than they rise, because the first batches of a
# trunk, and those that are interrupted, take longer than others.
RISING, FALLING = 0.2, 0.5


def moved(average: float | None, value: float) -> float:
    """A moving average with a new value; None is the average of nothing."""
    if average is None:
        return value
    weight = RISING if value > average else FALLING
    return (1 - weight) * average + weight * value


class BatchCosts:
    """The lane seconds of one trunk's batches, by size to the next power of two.

    A batch costs less per image the larger it is, so the averages of sizes are kept apart.
    """

    def __init__(self) -> None:
        self._per_image: dict[int, float] = {}

    def add(self, size: int, seconds: float) -> None:
        """Count a batch of `size` images that took `seconds` of one lane."""
        key = _key(size)
        self._per_image[key] = moved(self._per_image.get(key), seconds / size)

    def passes(self) -> dict[int, float]:
        """Lane seconds of a pass, for those powers of two near which some have run."""
        return {1 << key: (1 << key) * self._per_image[key] for key in sorted(self._per_image)}

    def per_image(self, size: int) -> float:
        """Lane seconds of an image in a batch of that size; of the next smaller size where none of
        it has run, else of the next larger one; 0 before the first batch."""
        if not self._per_image:
            return 0.0
        smaller = [key for key in self._per_image if key <= _key(size)]
        return self._per_image[max(smaller) if smaller else min(self._per_image)]


def _key(size: int) -> int:
    return (size - 1).bit_length()

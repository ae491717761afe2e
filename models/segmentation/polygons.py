"""The polygons of a mask's regions, as JSON.

GDAL holds the interpreter's lock while it finds them: for a third of a second in 16 million pixels.
Those of large masks are therefore found in a process of their own, which runs this module.
"""

import json
import logging
import resource
import subprocess
import sys
from collections import defaultdict

import numpy as np
from rasterio.features import shapes

from models.child import child_environment, limit_memory
from models.errors import InputError

logger = logging.getLogger(__name__)

# A process takes a third of a second to start. Finding the polygons of larger masks, and of those
# with more vertices, would stop all threads for longer than 50 ms.
LARGE_PIXELS = 2**21
MANY_VERTICES = 2**16
# Up to 40 MB as JSON.
MAX_VERTICES = 2**21
# Rows of which vertices are counted at a time.
ROWS = 256
# Of a process: the most seconds of processor time, and altogether; and the memory for a pixel and
# for a vertex, and besides.
MAX_CPU_S = 30
MAX_S = 60
BYTES_PER_PIXEL = 8
BYTES_PER_VERTEX = 256
MARGIN_BYTES = 256 * 2**20


def polygons_by_class(mask_HW: np.ndarray, background: int) -> dict[int, bytes]:
    """JSON of the polygons of each class in an (H, W) mask of class numbers, as GeoJSON's
    MultiPolygon coordinates in pixels, exterior ring first.

    Args:
        background: the class number that is left out.

    Raises:
        InputError: the outlines have too many vertices.
    """
    vertices = count_vertices(mask_HW)
    if vertices > MAX_VERTICES:
        raise _refusal(f"the outlines have more than {MAX_VERTICES} vertices")
    if mask_HW.size <= LARGE_PIXELS and vertices <= MANY_VERTICES:
        return _find(mask_HW, background)
    for _ in range(2):
        try:
            return _find_apart(mask_HW, background)
        except subprocess.SubprocessError as error:
            logger.warning("a process that finds polygons failed: %s", error)
    raise _refusal("finding the polygons takes too much time or memory")


def count_vertices(mask_HW: np.ndarray) -> int:
    """The vertices inside a mask of the outlines of all regions, the background's included."""
    vertices = 0
    for start in range(0, len(mask_HW) - 1, ROWS):
        rows = mask_HW[start : start + ROWS + 1]
        across = (rows[:, 1:] != rows[:, :-1]).view(np.uint8)
        down = (rows[1:] != rows[:-1]).view(np.uint8)
        # Of the four pixels around each point, those that differ from both of their neighbours. If
        # it is one, the other three are of one region, which has a vertex there, too.
        alone = (across[1:] + across[:-1]) * (down[:, 1:] + down[:, :-1])
        vertices += int(alone.sum()) + int(np.count_nonzero(alone == 1))
    return vertices


def _refusal(reason: str) -> InputError:
    return InputError(
        f"{reason}; leave small regions out with min_area, or use output=rle", field="output"
    )


def _find(mask_HW: np.ndarray, background: int) -> dict[int, bytes]:
    """Found together: GDAL passes over the whole mask whatever the number of classes."""
    by_class: defaultdict[int, list[str]] = defaultdict(list)
    # 4-connected outlines along pixel edges never touch themselves, so each polygon is valid
    for geometry, index in shapes(mask_HW, mask=mask_HW != background, connectivity=4):
        by_class[int(index)].append(json.dumps(geometry["coordinates"]))
    return {index: f"[{', '.join(found)}]".encode() for index, found in by_class.items()}


def _find_apart(mask_HW: np.ndarray, background: int) -> dict[int, bytes]:
    """
    Raises:
        subprocess.SubprocessError: the process died, or did not end in time.
    """
    height, width = mask_HW.shape
    process = subprocess.run(
        [sys.executable, "-m", __name__, str(height), str(width), mask_HW.dtype.str,
         str(background)],
        input=np.ascontiguousarray(mask_HW).data.cast("B"),
        stdout=subprocess.PIPE,
        timeout=MAX_S,
        check=True,
        process_group=0,  # signals from a terminal are for the process that waits
        env=child_environment(),
    )  # fmt: skip
    by_class = (found.partition(b" ") for found in process.stdout.split(b"\0")[:-1])
    return {int(index): polygons for index, _, polygons in by_class}


def main() -> None:
    """Find the polygons of the mask on standard input; write those of each class, and a zero."""
    height, width, dtype, background = sys.argv[1:]
    size = int(height) * int(width)
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
    limit_memory(MARGIN_BYTES + BYTES_PER_PIXEL * size + BYTES_PER_VERTEX * MAX_VERTICES)
    mask = np.frombuffer(sys.stdin.buffer.read(), dtype).reshape(int(height), int(width))
    for index, polygons in _find(mask, int(background)).items():
        sys.stdout.buffer.write(b"%d %s\0" % (index, polygons))


if __name__ == "__main__":
    main()

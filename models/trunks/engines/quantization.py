"""int8 for OpenVINO: post-training quantisation of weights and activations with NNCF.

NNCF runs in a process of its own (`quantizer.py`): it imports a lot, and draws progress bars on
stdout. https://github.com/openvinotoolkit/nncf
"""

import logging
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from torch import Tensor, nn

from models.errors import EngineError
from models.trunks.devices import Placement
from models.trunks.engines import quantizer

logger = logging.getLogger(__name__)


def check_calibration(placement: Placement) -> None:
    """Check that passes can be quantised.

    Raises:
        EngineError: there are no calibration images, or NNCF is not installed.
    """
    if placement.calibration is None:
        raise EngineError(
            "int8 needs images to calibrate on: set calibration = 'FOLDER' in the trunk's entry"
        )
    if find_spec("nncf") is None:
        raise EngineError("int8 needs NNCF: pip install 'vitrail[int8]'")


def quantize(model: Any, module: nn.Module, images_BCHW: Tensor) -> Any:
    """A converted pass in int8.

    Args:
        model: the OpenVINO model of the pass.
        module: the pass's module.
        images_BCHW: prepared images to calibrate on.

    Raises:
        EngineError: NNCF cannot quantise the model.
    """
    logger.info("quantising a pass on %d images", len(images_BCHW))
    with tempfile.TemporaryDirectory(prefix="vitrail-int8-") as name:
        folder = Path(name)
        openvino.save_model(model, folder / quantizer.MODEL, compress_to_fp16=False)
        np.save(folder / quantizer.IMAGES, images_BCHW.numpy())
        # -P: the modules beside the program would hide libraries of the same names
        command = [sys.executable, "-P", quantizer.__file__, name]
        if has_attention(module):
            command.append(quantizer.TRANSFORMER)
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            last = (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1]
            raise EngineError(f"NNCF cannot quantise it: {last}")
        return openvino.Core().read_model(folder / quantizer.QUANTIZED)


def has_attention(module: nn.Module) -> bool:
    """Whether it is a transformer, whose attention NNCF treats differently."""
    return any("attention" in type(part).__name__.lower() for part in module.modules())

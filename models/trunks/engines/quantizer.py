"""The program that quantises a model: `python -P quantizer.py FOLDER [transformer]`.

The folder has the model and the images, and gets the quantised model. The program imports nothing
of Vitrail, which would load torch and all networks.
"""

import sys
from pathlib import Path

import numpy as np

MODEL, IMAGES, QUANTIZED = "model.xml", "images.npy", "int8.xml"
TRANSFORMER = "transformer"


def main(folder: Path, is_transformer: bool) -> None:
    """Quantise the folder's model."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import nncf
    import openvino
    from nncf.quantization.advanced_parameters import OverflowFix

    images_NCHW = np.load(folder / IMAGES)
    quantized = nncf.quantize(
        openvino.Core().read_model(folder / MODEL),
        nncf.Dataset([image_CHW[None] for image_CHW in images_NCHW]),
        subset_size=len(images_NCHW),
        model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
        # CPUs without VNNI add products in 16 bits, which would overflow. Weights of 7 bits do not,
        # and give the same outputs on all CPUs.
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE),
    )
    openvino.save_model(quantized, folder / QUANTIZED, compress_to_fp16=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), TRANSFORMER in sys.argv[2:])

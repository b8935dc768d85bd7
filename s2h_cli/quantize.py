"""Post-training quantization to int8 with ONNX Runtime: weights by channel, activations by what calibration images give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from . import exports
from .errors import UserError, why
from .files import writing

#: Images that are looked at to find the range of each activation.
CALIBRATION_IMAGES = 512


def quantize(source: Path, target: Path, loader: DataLoader, metadata: dict[str, Any], fixed: bool) -> None:
    """Writes an int8 copy of an ONNX file: static quantization, in the form with QuantizeLinear and DequantizeLinear nodes that other
    runtimes read too.

    Args:
        source: a float32 ONNX file of `exports.export`.
        target: the file to write.
        loader: gives batches of images (N, C, H, W); `CALIBRATION_IMAGES` of all classes are enough.
        fixed: whether the network takes a batch of this size alone; an incomplete one is left out.
        metadata: as for `exports.export`.

    Raises:
        UserError: ONNX Runtime cannot quantize this network.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self):
            size = loader.batch_sampler.batch_size
            self.feeds = ({"images": images.numpy()} for images, _ in loader if len(images) == size or not fixed)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    with writing(target.parent) as aside:
        try:
            with exports.quiet():
                ready, quantized = aside / "ready.onnx", aside / target.name
                quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
                quantize_static(str(ready), str(quantized), Images(), quant_format=QuantFormat.QDQ, per_channel=True,
                                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
                ready.unlink()
                model = onnx.load(str(quantized))
                model.metadata_props.clear()
                onnx.helper.set_model_props(model, {exports.METADATA: json.dumps(metadata)})
                onnx.save(model, str(quantized))
        except (UserError, OSError):  # an image that cannot be read; a full disk
            raise
        except Exception as error:  # the quantizer raises whatever it likes
            raise UserError(f"ONNX Runtime cannot quantize {source} ({why(error)}); export it with --fp16 instead") from error

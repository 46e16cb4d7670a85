"""Makes ONNX files with 8-bit integer weights, by ONNX Runtime's own tools.

    to_int8(Path("model.onnx"), Path("model_int8.onnx"), "static", images)      images: batches of float32 [B, 3, H, W]
    to_int8(Path("model.onnx"), Path("model_int8_dynamic.onnx"), "dynamic")

"static" fixes the scale of every activation beforehand, on training images; "dynamic" takes it from each batch as it
comes. Layers with weights of their own are quantised, each output channel by its own scale, but for the first
convolution and the classifier, whose errors no later layer evens out. Products of activations, softmax, normalisation
and GELU stay in float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

import utils
from dataset import Splits, make_batches
from deployment.exported import add_section
from deployment.onnx_file import label, labels_of, open_session, quiet
from deployment.onnx_table import onnx_rows, onnx_section
from utils import RunError

INT8_FILES = {"static": "model_int8.onnx", "dynamic": "model_int8_dynamic.onnx"}
CALIBRATION_IMAGES, CALIBRATION_BATCH = 256, 32


def write_int8(folder: Path, full: Path, name: str, most: int, splits: Splits, workers: int = 0) -> list[dict]:
    """Write both int8 files next to the model.onnx of an exported model, onnx.csv, and a section in the card.

    Args:
        full: the ONNX file of the network of full size, which the table's first row, `name`, is about.
        most: images of the larger batch that is timed; one image is, too.
        splits: what the models were made for; training images calibrate, test images judge.

    Returns:
        the rows of onnx.csv: `name`, removed, removed int8, removed int8 dynamic; see `onnx_rows`.
    """
    calibration = make_batches(splits.train, splits.facts, CALIBRATION_BATCH, "cpu", workers=workers)
    images = (batch for batch, _ in calibration.sequential(CALIBRATION_IMAGES // CALIBRATION_BATCH))
    with tempfile.TemporaryDirectory(prefix="int8-") as drafts:
        files = {name: full, "removed": folder / "model.onnx"}
        files |= {"removed int8": Path(drafts) / INT8_FILES["static"]}
        files |= {"removed int8 dynamic": Path(drafts) / INT8_FILES["dynamic"]}
        to_int8(files["removed"], files["removed int8"], "static", images)
        to_int8(files["removed"], files["removed int8 dynamic"], "dynamic")
        test = make_batches(splits.test, splits.facts, 250, "cpu", workers=workers)
        rows = onnx_rows(files, test, tuple(sorted({1, most})))
        for file in INT8_FILES.values():
            content = (Path(drafts) / file).read_bytes()
            utils.write_atomic(folder / file, lambda target, content=content: target.write(content))
    utils.write_csv(folder / "onnx.csv", rows)
    add_section(folder, onnx_section(rows))
    return rows


def to_int8(source: Path, target: Path, form: str, images: Iterable[Tensor] = ()) -> None:
    """Quantise an ONNX file whose input is `images` and whose output is `logits`.

    Args:
        form: "static" or "dynamic".
        images: what "static" calibrates on; the smallest and largest value of each activation set its scale.

    Raises:
        RunError: no image came to calibrate on, or the logits are not finite (no file is left).
    """
    with tempfile.TemporaryDirectory(prefix="int8-") as folder, quiet():
        prepared, draft = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        _prepare(source, prepared)
        if form == "static":
            _quantise_static(prepared, draft, images)
        else:
            _quantise_dynamic(prepared, draft)
        label(draft, labels_of(source))
        if not np.isfinite(open_session(draft)(_noise(draft))).all():
            raise RunError(f"--int8: the {form} file gives logits that are not finite; not written", code=1)
        utils.write_atomic(target, lambda file: file.write(draft.read_bytes()))


def better_form(path: Path) -> str:
    """The form that is faster for an ONNX file's network: "static" where most layers are convolutions, which have fast
    int8 kernels only when all scales are known beforehand; "dynamic" for matrix products, which gain more that way."""
    return "static" if "Conv" in _layers(path)[0] else "dynamic"


def _prepare(source: Path, target: Path) -> None:
    """The first step of ONNX Runtime's guide: shapes inferred, batch norms folded into convolutions."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(source), str(target))


def _quantise_static(source: Path, target: Path, images: Iterable[Tensor]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    batches = [{"images": batch.cpu().numpy()} for batch in images]
    left = iter(batches)

    class Reader(CalibrationDataReader):
        """Hands out the images, batch by batch."""

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(left, None)

    if not batches:
        raise RunError("--int8: no training image to calibrate on; give --dataset NAME and --data DIR that has some")
    # Outputs of matrix products stay in float32: requantising them costs accuracy and, on a CPU, time. Convolutions
    # have int8 kernels only from int8 to int8.
    options = {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]}
    kinds, left_out = _layers(source)
    quantize_static(
        source,
        target,
        Reader(),
        op_types_to_quantize=kinds,
        nodes_to_exclude=left_out,
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options=options,
    )


def _quantise_dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kinds, left_out = _layers(source)
    # the integer convolution takes unsigned weights only
    weights = QuantType.QUInt8 if "Conv" in kinds else QuantType.QInt8
    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=[kind for kind in kinds if kind in ("Conv", "MatMul", "Gemm")],
        nodes_to_exclude=left_out,
        per_channel=True,
        reduce_range=True,
        weight_type=weights,
    )


def _layers(path: Path) -> tuple[list[str], list[str]]:
    """Kinds of operators to quantise, and the names of those that stay in float32.

    Weights take 7 bits (`reduce_range` above): without VNNI instructions an x86 processor adds pairs of 8-bit products
    in 16 bits, which overflow. On Fashion-MNIST that alone moved a ViT's logits by 1.9% instead of 0.5%.
    """
    import onnx

    graph = onnx.load(str(path)).graph
    weights = {tensor.name for tensor in graph.initializer}
    convolutions = [node.name for node in graph.node if node.op_type == "Conv"]
    matrices = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    products = [node.name for node in matrices if node.input[1] not in weights]
    kinds = ["MatMul", "Gemm"]
    if len(convolutions) > 1:  # between int8 convolutions, sums and activations stay in int8 as well
        kinds += ["Conv", "Add", "Relu"]
    return kinds, [*products, *convolutions[:1], matrices[-1].name]


def _noise(path: Path) -> np.ndarray:
    """Two random images of the size that the file takes."""
    import onnx

    shape = onnx.load(str(path)).graph.input[0].type.tensor_type.shape.dim
    sides = [side.dim_value for side in shape[1:]]
    return np.random.default_rng(0).standard_normal((2, *sides), dtype=np.float32)

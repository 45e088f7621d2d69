"""Direct ONNX → TFLite conversion: normalize → read quantization → fuse → lower → write, without TensorFlow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx

from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite import lowerings as _lowerings  # noqa: F401 (fills the table of lowerings)
from edgekit.exporters.tflite.builder import Builder
from edgekit.exporters.tflite.fuse import fuse, fuse_activations
from edgekit.exporters.tflite.ir import QParams
from edgekit.exporters.tflite.metadata import NAME, Description, labeled_output, metadata, with_labels
from edgekit.exporters.tflite.normalize import normalize, rejection
from edgekit.exporters.tflite.notes import float_islands
from edgekit.exporters.tflite.quantized import read_quantization
from edgekit.exporters.tflite.registry import lower
from edgekit.exporters.tflite.versions import min_runtime, too_new
from edgekit.exporters.tflite.write import write

# As TensorFlow's converter writes it: zero-padded text in a buffer of this name and size.
RUNTIME_METADATA = "min_runtime_version"
RUNTIME_METADATA_SIZE = 16

__all__ = ["Converted", "Description", "QParams", "convert", "convert_with_notes"]


@dataclass(frozen=True)
class Converted:
    """A TFLite file in memory, what is worth saying about it, and its int8 tensors' parameters by tensor name.

    `min_runtime` is the oldest release of the TFLite runtime that has its operators, `2.9.0` say.
    """

    data: bytes
    notes: tuple[str, ...]
    qparams: dict[str, QParams]
    min_runtime: str


def convert(onnx_model: onnx.ModelProto, *, layout: Literal["nchw", "nhwc"] = "nchw") -> bytes:
    """Convert an ONNX model (opset 13 and newer, fixed shapes; fp32, fp16 weights or int8 QDQ) to a TFLite file.

    `layout` "nchw" keeps every input and output shaped as in the ONNX model; "nhwc" takes and returns rank-4 tensors
    channels-last. Scales and zero points are those of the ONNX file, uint8 ones shifted by 128. Names are kept, and
    the signature `serving_default` carries them. Raises EdgeKitError for anything that cannot be expressed exactly.
    """
    return convert_with_notes(onnx_model, layout=layout).data


def convert_with_notes(
    onnx_model: onnx.ModelProto, *, layout: Literal["nchw", "nhwc"] = "nchw", about: Description | None = None
) -> Converted:
    """Like `convert`, and says what the file holds that costs time: float islands, transposes, fallbacks.

    `about` goes into the file as TFLite Metadata, which Android's tools read.
    """
    if layout not in ("nchw", "nhwc"):
        raise ValueError(f"layout must be 'nchw' or 'nhwc', not {layout!r}")
    try:
        return _convert(onnx_model, layout, about)
    except EdgeKitError:
        raise
    except Exception as error:
        # Either the model breaks ONNX's rules in a way that its checker does not see, or this is a bug.
        reason = rejection(onnx_model)
        if reason is None:
            raise
        raise EdgeKitError(f"the ONNX model is not valid: {reason}", "export it anew") from error


def _convert(onnx_model: onnx.ModelProto, layout: Literal["nchw", "nhwc"], about: Description | None) -> Converted:
    graph = normalize(onnx_model)
    fuse_activations(graph)
    read_quantization(graph)
    fuse(graph)
    builder = Builder(graph, layout)
    for node in graph.nodes:
        builder.source = node.name
        lower(builder, node)
    builder.finish()
    names = (graph.inputs, graph.outputs)
    runtime = min_runtime(builder.ops)
    buffers = {RUNTIME_METADATA: runtime.encode().ljust(RUNTIME_METADATA_SIZE, b"\0")}
    if about is not None:
        buffers[NAME] = metadata(about, builder.inputs, builder.outputs, names, layout)
    data = write(builder.ops, builder.inputs, builder.outputs, names, buffers)
    if about is not None and about.labels:
        if labeled_output(about, builder.outputs) is not None:
            data = with_labels(data, about.labels)
        else:
            builder.note(f"the {len(about.labels)} labels are not in the file: no output has a value for each")
    tensors = [tensor for op in builder.ops for tensor in (*op.inputs, *op.outputs) if tensor is not None and tensor.q]
    qparams = {tensor.name: tensor.q for tensor in tensors if tensor.q is not None}
    notes = dict.fromkeys((*builder.notes, *float_islands(builder.ops), *too_new(builder.ops)))
    return Converted(data, tuple(notes), qparams, runtime)

"""Direct ONNX → TFLite conversion: normalize → read quantization → fuse → lower → write, without TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite import ops as _ops  # noqa: F401 (fills the table of lowerings)
from edgekit.exporters.tflite.builder import Builder
from edgekit.exporters.tflite.int8_check import Place, judged, places, steps
from edgekit.exporters.tflite.ir import QParams
from edgekit.exporters.tflite.passes.float_islands import float_islands
from edgekit.exporters.tflite.passes.fuse import fuse, fuse_activations
from edgekit.exporters.tflite.read import batch
from edgekit.exporters.tflite.read.batch import Lowered
from edgekit.exporters.tflite.read.normalize import normalize, rejection
from edgekit.exporters.tflite.read.opset_upgrade import with_shapes
from edgekit.exporters.tflite.read.qdq import read_quantization
from edgekit.exporters.tflite.registry import lower
from edgekit.exporters.tflite.versions import min_runtime, too_new
from edgekit.exporters.tflite.write.flatbuffer import write
from edgekit.exporters.tflite.write.metadata import NAME, Description, labeled_output, labels_behind, metadata
from edgekit.types import Layout

# As TensorFlow's converter writes it: zero-padded text in a buffer of this name and size.
RUNTIME_METADATA = "min_runtime_version"
RUNTIME_METADATA_SIZE = 16

__all__ = ["Converted", "Description", "Place", "QParams", "check_int8", "convert", "convert_with_notes"]


@dataclass(frozen=True)
class Converted:
    """A TFLite file's bytes in pieces, what is worth saying about it, and its int8 tensors' parameters by tensor name.

    `min_runtime` is the oldest release of the TFLite runtime that has its operators, `2.9.0` say. `places` says where
    the file holds the int8 tensors of the ONNX model, by their names there.
    """

    pieces: tuple[bytes | memoryview, ...]
    notes: tuple[str, ...]
    qparams: dict[str, QParams]
    min_runtime: str
    places: dict[str, Place]

    @property
    def data(self) -> bytes:
        """The file's bytes, which are copies of the pieces."""
        return b"".join(self.pieces)


Shapes = Mapping[str, Sequence[int]]


def convert(onnx_model: onnx.ModelProto, *, layout: Layout = "nchw", shapes: Shapes | None = None) -> bytes:
    """Convert an ONNX model (fixed shapes; fp32, fp16 weights or int8 QDQ) to a TFLite file.

    `shapes` gives the shapes of inputs, by name, where the model leaves sizes open. A batch size that it does not give
    stays open: the file's inputs can be resized along it, and start with 1. Opsets before 13 are upgraded, if
    the model computes the same afterwards.

    `layout` "nchw" keeps every input and output shaped as in the ONNX model; "nhwc" takes and returns rank-4 tensors
    channels-last. Scales and zero points are those of the ONNX file, uint8 ones shifted by 128. Names are kept, and
    the signature `serving_default` carries them. Raises EdgeKitError for anything that cannot be expressed exactly.
    """
    return convert_with_notes(onnx_model, layout=layout, shapes=shapes).data


def convert_with_notes(
    onnx_model: onnx.ModelProto,
    *,
    layout: Layout = "nchw",
    about: Description | None = None,
    shapes: Shapes | None = None,
) -> Converted:
    """Like `convert`, and says what the file holds that costs time: float islands, transposes, fallbacks.

    `about` goes into the file as TFLite Metadata, which Android's tools read.
    """
    if layout not in ("nchw", "nhwc"):
        raise ValueError(f"layout must be 'nchw' or 'nhwc', not {layout!r}")
    if shapes:
        onnx_model = with_shapes(onnx_model, shapes)
    try:
        return _convert(onnx_model, layout, about)
    except EdgeKitError:
        raise
    except Exception as error:
        # Either the model breaks ONNX's rules in a way that its checker does not see, or this is a bug.
        reason = rejection(batch.sized(onnx_model, 1) if batch.has_open_batch(onnx_model) else onnx_model)
        if reason is None:
            raise
        raise EdgeKitError(f"the ONNX model is not valid: {reason}", "export it anew") from error


def check_int8(
    onnx_model: onnx.ModelProto, converted: Converted, feeds: Mapping[str, np.ndarray], *, layout: Layout = "nchw"
) -> tuple[str, ...]:
    """Compare each int8 op of a file with ONNX Runtime's, on the inputs that the file's op had; returns notes.

    `feeds` are one run's inputs by name, shaped as in the ONNX model. Raises EdgeKitError for an op that is wrong.
    """
    if not converted.places:
        return ()
    return judged(steps(onnx_model, converted.data, converted.places, feeds, layout))


def _convert(onnx_model: onnx.ModelProto, layout: Layout, about: Description | None) -> Converted:
    if not batch.has_open_batch(onnx_model):
        builder = _lowered(onnx_model, layout)
        return _written(builder, Lowered(builder.ops, builder.inputs, builder.outputs), about)
    try:
        small, large = (_lowered(batch.sized(onnx_model, size), layout, fixed_batch=False) for size in batch.SIZES)
    except EdgeKitError as error:
        _lowered(batch.sized(onnx_model, 1), layout)  # says what is wrong where that is not the batch
        raise batch.refused(error.what) from error
    lowered = batch.with_open_batch(*(Lowered(each.ops, each.inputs, each.outputs) for each in (small, large)))
    large.release()
    converted = _written(small, lowered, about)
    int8 = bool(converted.qparams)
    batch.check(converted.data, onnx_model, layout, (lambda fixed: convert(fixed, layout=layout)) if int8 else None)
    return converted


def _lowered(onnx_model: onnx.ModelProto, layout: Layout, fixed_batch: bool = True) -> Builder:
    graph = normalize(onnx_model)
    fuse_activations(graph)
    read_quantization(graph)
    fuse(graph)
    builder = Builder(graph, layout, fixed_batch)
    for node in graph.nodes:
        builder.source = node.name
        lower(builder, node)
    builder.finish()
    return builder


def _written(builder: Builder, lowered: Lowered, about: Description | None) -> Converted:
    ops, inputs, outputs = lowered.ops, lowered.inputs, lowered.outputs
    names = (builder.graph.inputs, builder.graph.outputs)
    runtime = min_runtime(ops)
    buffers = {RUNTIME_METADATA: runtime.encode().ljust(RUNTIME_METADATA_SIZE, b"\0")}
    if about is not None:
        buffers[NAME] = metadata(about, inputs, outputs, names, builder.image_layout)
    tensors = [tensor for op in ops for tensor in (*op.inputs, *op.outputs) if tensor is not None and tensor.q]
    qparams = {tensor.name: tensor.q for tensor in tensors if tensor.q is not None}
    where = places(builder, ops)
    islands = float_islands(ops)
    builder.release()
    pieces: tuple[bytes | memoryview, ...] = (write(ops, inputs, outputs, names, buffers),)
    if about is not None and about.labels:
        if labeled_output(about, outputs) is not None:
            pieces = (*pieces, labels_behind(len(pieces[0]), about.labels))
        else:
            builder.note(f"the {len(about.labels)} labels are not in the file: no output has a value for each")
    notes = dict.fromkeys((*builder.notes, *islands, *too_new(ops)))
    return Converted(pieces, tuple(notes), qparams, runtime, where)

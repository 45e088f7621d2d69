"""TFLite Metadata: what Android's tools read from a file to feed it and to name its results.

The tables are those of metadata_schema.fbs in tensorflow/tflite-support, semantic version 1.0.0.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np

from edgekit.exporters.tflite.ir import Tensor

NAME = "TFLITE_METADATA"
IDENTIFIER = b"M001"
LABELS = "labels.txt"
# Slots of the tables' fields, and the numbers of enums and union members, in the schema's order.
MODEL_NAME, MODEL_DESCRIPTION, MODEL_SUBGRAPHS, MODEL_PARSER_VERSION = 0, 1, 3, 7
SUBGRAPH_INPUTS, SUBGRAPH_OUTPUTS = 2, 3
TENSOR_NAME, TENSOR_CONTENT, TENSOR_PROCESS_UNITS, TENSOR_FILES = 0, 3, 4, 6
CONTENT_TYPE, CONTENT = 0, 1
FEATURE_PROPERTIES, IMAGE_PROPERTIES = 1, 2
IMAGE_COLORS, COLORS = 0, {3: 1, 1: 2}  # channels → RGB, GRAYSCALE
UNIT_TYPE, UNIT, NORMALIZATION = 0, 1, 1
NORMALIZATION_MEAN, NORMALIZATION_STD = 0, 1
FILE_NAME, FILE_DESCRIPTION, FILE_TYPE, AXIS_LABELS = 0, 1, 2, 2


@dataclass(frozen=True)
class Description:
    """What there is to say of a model: its name, how uint8 images become its float input, and its classes' labels.

    `mean` and `std` are TFLite's: the input is (x - mean) / std of values x from 0 to 255, per channel or one for all;
    empty where it is not known. `labels` name the values along the last axis of an output.
    """

    name: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Table:
    """A flatbuffer table: slot → text, a list of floats, a table, a list of tables, or the number of an enum."""

    fields: dict[int, Any]


def metadata(
    about: Description,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    names: tuple[list[str], list[str]],
    layout: str,
) -> bytes:
    """Returns the ModelMetadata of a file; `names` are those of its inputs and outputs, `layout` that of its images.

    The normalization goes to the one rank-4 float input. It is called an image where the file takes it channels-last
    with one or three channels (gray or RGB): TFLite's tools feed images in no other layout.
    """
    labeled = labeled_output(about, outputs)
    image = image_input(inputs)
    subgraph = _Table(
        {
            SUBGRAPH_INPUTS: [
                _tensor(name, _image(about, tensor, layout) if tensor is image else {})
                for name, tensor in zip(names[0], inputs, strict=True)
            ],
            SUBGRAPH_OUTPUTS: [
                _tensor(name, _labels() if tensor is labeled else {})
                for name, tensor in zip(names[1], outputs, strict=True)
            ],
        }
    )
    model = _Table(
        {
            MODEL_NAME: about.name,
            MODEL_DESCRIPTION: "Exported by EdgeKit",
            MODEL_SUBGRAPHS: [subgraph],
            MODEL_PARSER_VERSION: "1.0.0",
        }
    )
    builder = flatbuffers.Builder(1024)
    builder.Finish(_pack(builder, model), IDENTIFIER)
    return bytes(builder.Output())


def image_input(inputs: Sequence[Tensor]) -> Tensor | None:
    """Returns the one rank-4 float input, or None where there are none or several."""
    images = [tensor for tensor in inputs if len(tensor.shape) == 4 and tensor.dtype == np.float32]
    return images[0] if len(images) == 1 else None


def labeled_output(about: Description, outputs: Sequence[Tensor]) -> Tensor | None:
    """Returns the first output with one value per label in each row, [batch, labels], or None."""
    fits = (tensor for tensor in outputs if len(tensor.shape) == 2 and tensor.shape[1] == len(about.labels))
    return next(fits, None)


class _Behind(io.BytesIO):
    """What stands behind the first `start` bytes of a file, with places counted from the file's beginning."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.start = start

    def tell(self) -> int:
        return self.start + super().tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.start + super().seek(offset - self.start if whence == io.SEEK_SET else offset, whence)


def labels_behind(size: int, labels: Sequence[str]) -> bytes:
    """Returns labels.txt, one label a line, as an uncompressed zip archive to stand behind a .tflite file of `size`."""
    behind = _Behind(size)
    with zipfile.ZipFile(behind, "w", zipfile.ZIP_STORED) as archive:
        # A fixed date: the same model gives the same bytes.
        archive.writestr(zipfile.ZipInfo(LABELS), "".join(f"{' '.join(label.split())}\n" for label in labels))
    return behind.getvalue()


def _tensor(name: str, facts: dict[int, Any]) -> _Table:
    feature = _Table({CONTENT_TYPE: FEATURE_PROPERTIES, CONTENT: _Table({})})
    return _Table({TENSOR_NAME: name, TENSOR_CONTENT: feature, **facts})


def _image(about: Description, tensor: Tensor, layout: str) -> dict[int, Any]:
    facts: dict[int, Any] = {}
    if layout == "nhwc" and tensor.shape[-1] in COLORS:
        properties = _Table({IMAGE_COLORS: COLORS[tensor.shape[-1]]})
        facts[TENSOR_CONTENT] = _Table({CONTENT_TYPE: IMAGE_PROPERTIES, CONTENT: properties})
    if about.mean:
        options = _Table({NORMALIZATION_MEAN: list(about.mean), NORMALIZATION_STD: list(about.std)})
        facts[TENSOR_PROCESS_UNITS] = [_Table({UNIT_TYPE: NORMALIZATION, UNIT: options})]
    return facts


def _labels() -> dict[int, Any]:
    described = {FILE_NAME: LABELS, FILE_DESCRIPTION: "One label a line.", FILE_TYPE: AXIS_LABELS}
    return {TENSOR_FILES: [_Table(described)]}


def _pack(builder: flatbuffers.Builder, value: Any) -> int:
    """Writes text, a table or a list, what it holds first; returns its offset."""
    if isinstance(value, str):
        return int(builder.CreateString(value))
    if isinstance(value, _Table):
        fields = {slot: v if isinstance(v, int) else _pack(builder, v) for slot, v in value.fields.items()}
        builder.StartObject(max(fields, default=-1) + 1)
        for slot, held in fields.items():
            if isinstance(value.fields[slot], int):
                builder.PrependInt8Slot(slot, held, 0)
            else:
                builder.PrependUOffsetTRelativeSlot(slot, held, 0)
        return int(builder.EndObject())
    if value and isinstance(value[0], float):
        return int(builder.CreateNumpyVector(np.array(value, np.float32)))
    offsets = [_pack(builder, entry) for entry in value]
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())

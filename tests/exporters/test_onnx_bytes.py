"""ONNX files in pieces: the very bytes that protobuf writes."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from edgekit.errors import EdgeKitError
from edgekit.exporters.onnx import pieces
from edgekit.exporters.onnx.export import to_onnx
from edgekit.exporters.onnx.graph import LIGHT
from edgekit.exporters.onnx.ort_passes import fastest, for_onnxruntime
from edgekit.exporters.onnx.pieces import file_pieces
from edgekit.quant.ptq.recipes import RECIPES

PRECISIONS = {"fp32": False, "fp16": True, "int8": False, "int8-dynamic": False, "int8-weight-only": False}


def network() -> nn.Module:
    """One weight that is small, some that are large, and one that two layers share."""
    torch.manual_seed(0)
    shared = nn.Linear(300, 300)
    return nn.Sequential(nn.Linear(8, 300), nn.ReLU(), shared, nn.ReLU(), shared, nn.LayerNorm(300)).eval()


def exported(precision: str) -> onnx.ModelProto:
    batch = (torch.randn(4, 8),)
    program = RECIPES[precision].apply(network(), batch, [batch], frozenset()).program
    return to_onnx(program, ["x"], ["y"], half_weights=PRECISIONS[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_pieces_are_what_protobuf_writes(precision: str) -> None:
    proto = exported(precision)
    pieces = [*file_pieces(fastest(proto))]
    assert b"".join(pieces) == for_onnxruntime(proto).SerializeToString()
    assert any(len(piece) > LIGHT for piece in pieces)  # a weight alone


def change_none(proto: onnx.ModelProto) -> None:
    """As it is."""


def change_texts(proto: onnx.ModelProto) -> None:
    """Fields behind the graph, behind its initializers and behind the values of a tensor."""
    proto.metadata_props.add(key="a", value="b" * 200)
    proto.graph.doc_string = "graph"
    for tensor in proto.graph.initializer:
        tensor.doc_string = "tensor"


def change_storage(proto: onnx.ModelProto) -> None:
    """Values that are no raw bytes, and text."""
    proto.graph.initializer.append(onnx.helper.make_tensor("text", onnx.TensorProto.STRING, [1], [b"t"]))
    proto.graph.initializer.append(onnx.helper.make_tensor("none", onnx.TensorProto.FLOAT, [0], []))


@pytest.mark.parametrize("change", [change_none, change_texts, change_storage])
def test_pieces_of_any_model_are_read_as_the_same_model(change: Callable[[onnx.ModelProto], None]) -> None:
    proto = exported("fp32")
    change(proto)
    written = ir.to_proto(ir.from_proto(proto))
    assert onnx.load_from_string(b"".join(file_pieces(ir.from_proto(proto)))) == written


def test_model_of_more_than_a_file_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LARGEST", 300_000)
    with pytest.raises(EdgeKitError, match="ends at 2 GB"):
        file_pieces(fastest(exported("fp32")))

"""ONNX: recurrent layers that torch's exporter has no translation for, RNNs and LSTMs with projections.

RNNs become RNN ops. ONNX's LSTM has no projection: its state h is o · tanh(c), where torch's is W·o · tanh(c). But
of h only R·h is read, so that an LSTM whose recurrent weights are R·W computes the same from the second step on. R·W
takes more room than the two, so the file holds these, and the product is made as it is loaded. The first step, whose h
comes from outside, is spelled out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib.ops.core import aten_lstm

aten = torch.ops.aten

Given = Sequence[Any]


def _rows(x: Any, start: int, end: int) -> Any:
    return op.Slice(x, op.Constant(value_ints=[start]), op.Constant(value_ints=[end]), op.Constant(value_ints=[0]))


def _row(x: Any, index: int) -> Any:
    return op.Squeeze(_rows(x, index, index + 1), op.Constant(value_ints=[0]))


def _first_axis(x: Any) -> Any:
    return op.Unsqueeze(x, op.Constant(value_ints=[0]))


def _joined(parts: Given, axis: int) -> Any:
    return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=axis)


def _each(params: Given, num_layers: int, bidirectional: bool) -> list[list[Given]]:
    """The parameters of each direction of each layer."""
    directions = 2 if bidirectional else 1
    per = len(params) // num_layers // directions
    each = [params[start : start + per] for start in range(0, len(params), per)]
    return [each[start : start + directions] for start in range(0, len(each), directions)]


def _rnn(activation: str) -> Callable[..., Any]:
    def translate(
        x: Any,
        hx: Any,
        params: Given,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Any, Any]:
        x = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
        lasts = []
        for layer, directions in enumerate(_each(params, num_layers, bidirectional)):
            count = len(directions)
            matrices = [_joined([_first_axis(each[index]) for each in directions], 0) for index in (0, 1)]
            biases = [_first_axis(op.Concat(*each[2:], axis=0)) for each in directions] if has_biases else []
            y, last = op.RNN(
                x,
                *matrices,
                _joined(biases, 0) if biases else None,
                None,
                _rows(hx, layer * count, (layer + 1) * count),
                activations=[activation] * count,
                direction="bidirectional" if bidirectional else "forward",
                hidden_size=hx.shape[2],
            )
            x = _merged(y, hx.shape[2] * count)
            lasts.append(last)
        return (op.Transpose(x, perm=[1, 0, 2]) if batch_first else x), _joined(lasts, 0)

    return translate


def _merged(y: Any, width: int) -> Any:
    """[time, directions, batch, hidden] as [time, batch, directions · hidden]."""
    return op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, width]))


def _lstm(
    x: Any,
    hx: Given,
    params: Given,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Any, Any, Any]:
    if hx[0].shape[2] == hx[1].shape[2]:
        return aten_lstm(x, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
    steps = x.shape[1 if batch_first else 0]
    x = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
    lasts: list[tuple[Any, Any]] = []
    for directions in _each(params, num_layers, bidirectional):
        outputs = []
        for direction, each in enumerate(directions):
            index = len(lasts)
            y, *last = _projected(
                x, steps, _row(hx[0], index), _row(hx[1], index), each, hx[1].shape[2], direction == 1
            )
            outputs.append(y)
            lasts.append((last[0], last[1]))
        x = _joined(outputs, 2)
    h, c = (_joined([_first_axis(each[place]) for each in lasts], 0) for place in (0, 1))
    return (op.Transpose(x, perm=[1, 0, 2]) if batch_first else x), h, c


def _projected(x: Any, steps: int, h: Any, c: Any, params: Given, hidden: int, backward: bool) -> tuple[Any, Any, Any]:
    """One direction [steps, batch, features] → all outputs, the last h and the last c."""
    w, r, *biases, projection = params
    w, r, *biases = (_ordered(each, hidden) for each in (w, r, *biases))
    start = steps - 1 if backward else 0
    z = op.Add(op.MatMul(_row(x, start), _turned(w)), op.MatMul(h, _turned(r)))
    for bias in biases:
        z = op.Add(z, bias)
    i, o, f, g = op.Split(z, axis=-1, num_outputs=4)
    c = op.Add(op.Mul(op.Sigmoid(f), c), op.Mul(op.Sigmoid(i), op.Tanh(g)))
    inside = op.Mul(op.Sigmoid(o), op.Tanh(c))
    all_steps, last = _first_axis(inside), inside
    if steps > 1:
        rest = _rows(x, 0, steps - 1) if backward else _rows(x, 1, steps)
        bias = _first_axis(op.Concat(*biases, axis=0)) if biases else None
        y, last, c = op.LSTM(
            rest,
            _first_axis(w),
            _first_axis(op.MatMul(r, projection)),
            bias,
            None,
            _first_axis(inside),
            _first_axis(c),
            direction="reverse" if backward else "forward",
            hidden_size=hidden,
        )
        y, last, c = op.Squeeze(y, op.Constant(value_ints=[1])), _row(last, 0), _row(c, 0)
        all_steps = op.Concat(y, all_steps, axis=0) if backward else op.Concat(all_steps, y, axis=0)
    return op.MatMul(all_steps, _turned(projection)), op.MatMul(last, _turned(projection)), c


def _turned(x: Any) -> Any:
    return op.Transpose(x, perm=[1, 0])


def _ordered(x: Any, hidden: int) -> Any:
    """Gates i, f, g, o as ONNX has them: i, o, f, g."""
    return op.Concat(*[_rows(x, gate * hidden, (gate + 1) * hidden) for gate in (0, 3, 1, 2)], axis=0)


def keeps_factors(fold: Callable[[ir.Node], bool]) -> Callable[[ir.Node], bool]:
    """Returns what tells torch's exporter which nodes it must not fold, `fold`, with the products R·W among them."""

    def keeps(node: ir.Node) -> bool:
        return fold(node) or is_factored(node)

    return keeps


def is_factored(node: ir.Node) -> bool:
    """Whether a node makes the recurrent weights of an LSTM with projection out of their factors."""
    return node.op_type == "MatMul" and any(
        use.node.op_type == "LSTM" and use.idx == 2
        for unsqueezed in node.outputs[0].uses()
        if unsqueezed.node.op_type == "Unsqueeze"
        for use in unsqueezed.node.outputs[0].uses()
    )


TRANSLATIONS: dict[Callable, Callable] = {
    aten.lstm.input: _lstm,
    aten.rnn_tanh.input: _rnn("Tanh"),
    aten.rnn_relu.input: _rnn("Relu"),
}

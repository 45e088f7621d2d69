"""The session that LiteRT and tflite-runtime share: both have the same Interpreter class.

It is pushed to devices beside the worker, so it imports the standard library and numpy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from .session import TensorInfo, checked_feeds, named

SIGNATURE = "serving_default"


class Interpreter(Protocol):
    """The part of `Interpreter` that a session uses."""

    def allocate_tensors(self) -> None: ...  # noqa: D102
    def get_input_details(self) -> list[dict[str, Any]]: ...  # noqa: D102
    def get_output_details(self) -> list[dict[str, Any]]: ...  # noqa: D102
    def get_signature_list(self) -> dict[str, Any]: ...  # noqa: D102
    def get_signature_runner(self, signature_key: str) -> Any: ...  # noqa: D102
    def set_tensor(self, tensor_index: int, value: np.ndarray) -> None: ...  # noqa: D102
    def get_tensor(self, tensor_index: int) -> np.ndarray: ...  # noqa: D102
    def invoke(self) -> None: ...  # noqa: D102


class InterpreterSession:
    """One loaded .tflite file."""

    def __init__(self, interpreter: Interpreter, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Names are those of the signature `serving_default`, or of the tensors in a file without it.

        Raises ValueError for names that the file does not have.
        """
        interpreter.allocate_tensors()
        self._interpreter: Interpreter | None = interpreter
        input_names, output_names = _signature_names(interpreter)
        input_table = _table(interpreter.get_input_details(), input_names)
        output_table = _table(interpreter.get_output_details(), output_names)
        self.inputs = named([info for info, _ in input_table], inputs, "input")
        self.outputs = named([info for info, _ in output_table], outputs, "output")
        input_index = {info.name: index for info, index in input_table}
        output_index = {info.name: index for info, index in output_table}
        self._input_indices = [input_index[info.name] for info in self.inputs]
        self._output_indices = [output_index[info.name] for info in self.outputs]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. Raises ValueError for a feed that does not match `inputs`."""
        return dict(zip((info.name for info in self.outputs), self.prepared(feeds)(), strict=True))

    def prepared(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], list[np.ndarray]]:
        """What runs once on `feeds`, copies in and out included: the interpreter has memory of its own for both.

        Raises ValueError for a feed that does not match `inputs`.
        """
        interpreter = self._interpreter
        if interpreter is None:
            raise ValueError("this session is closed")
        given = list(zip(self._input_indices, checked_feeds(self.inputs, feeds), strict=True))

        def call() -> list[np.ndarray]:
            for index, array in given:
                interpreter.set_tensor(index, array)
            interpreter.invoke()
            return [interpreter.get_tensor(index) for index in self._output_indices]

        return call

    def close(self) -> None:
        """Let go of the model."""
        self._interpreter = None


def _signature_names(interpreter: Interpreter) -> tuple[dict[int, str], dict[int, str]]:
    """Tensor index → signature name, of the inputs and of the outputs; empty where there is no such signature."""
    if SIGNATURE not in interpreter.get_signature_list():
        return {}, {}
    runner = interpreter.get_signature_runner(SIGNATURE)
    return (
        {details["index"]: name for name, details in runner.get_input_details().items()},
        {details["index"]: name for name, details in runner.get_output_details().items()},
    )


def _table(details: Sequence[Mapping[str, Any]], signature: Mapping[int, str]) -> list[tuple[TensorInfo, int]]:
    """(info, tensor index) in the order of the main subgraph; a signature is sorted by name instead."""
    if signature and set(signature) != {int(row["index"]) for row in details}:
        raise ValueError(f"the signature '{SIGNATURE}' and the main subgraph have different inputs or outputs")
    table = []
    for row in details:
        index = int(row["index"])
        name = signature.get(index, row["name"])
        table.append((TensorInfo(name, np.dtype(row["dtype"]).name, tuple(int(size) for size in row["shape"])), index))
    return table

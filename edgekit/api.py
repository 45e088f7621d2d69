"""The Python API: the jobs of `pipeline` and `pruning`, with what Python's users pass, read and expect of a library.

Data may be arrays, pairs, or a torch Dataset; libraries are kept quiet; errors speak of keyword arguments.
"""

from __future__ import annotations

import functools
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import ParamSpec, TypeVar

from edgekit.commands import compare as commands_compare
from edgekit.commands import export as pipeline
from edgekit.commands import profile as commands_profile
from edgekit.commands import prune as pruning
from edgekit.commands import verify as commands_verify
from edgekit.data.python_samples import FORMS, as_source
from edgekit.data.sources import HELP
from edgekit.errors import EdgeKitError, single_errors
from edgekit.util.atomic_files import torch_cache

Given = ParamSpec("Given")
Result = TypeVar("Result")

SOURCES = ("data", "train")  # arguments that hold samples
NOISY = ("torch", "executorch", "onnx", "onnxscript", "onnx_ir", "torchao")
FLAGS = {"ops", "qat", "resume", "sensitivity", "explain", "augment"}
RENAMED = {"input": "inputs", "format": "formats", "no-cache": "cache=False", "no-augment": "augment=False"}
# Option → what its value looks like, where a message gives one; `--data with …` gives none.
VALUES = {
    "precision": r"(?:fp32|fp16|int8(?:-[a-z]+)*)(?![\w-])",
    "format": r"(?:executorch|onnx|tflite)(?:,(?:onnx|tflite))*",
    "input": r"(?:[A-Za-z_]\w*:)?(?:\d+(?:x\d+)+|\w+\[[\d,]+\])",
    "code": r"[\w./]+\.py(?::\w+)?",
    "name": r"(?!of\b|or\b|and\b)[\w-]+",
    "metric": r"[\w./]+\.py:\w+",
    "max-drop": r"\d[\d.]*",
    "ratio": r"\d[\d.]*",
    "sparsity": r"\d[\d.]*",
    "target-latency": r"\d[\d.]*x?",
    "target-size": r"\d[\d.]*x?",
    "epochs": r"\d+",
    "rounds": r"\d+",
    "round-to": r"\d+",
    "learning-rate": r"\d[\d.]*",
    "method": r"l1|l2|fpgm|taylor|wanda",
    "allocation": r"uniform|global|sensitivity",
    "schedule": r"one-shot|cubic",
}
_OPTION = re.compile(r"--([a-z]+(?:-[a-z]+)*)")


def in_python(job: Callable[Given, Result]) -> Callable[Given, Result]:
    """Returns `job` for callers in Python."""

    @functools.wraps(job)
    def called(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        objects = [name for name in SOURCES if not isinstance(kwargs.get(name), (str, Path, NoneType))]
        with quiet(), torch_cache():
            try:
                kwargs.update({name: as_source(kwargs[name]) for name in objects})
                return job(*args, **kwargs)
            except EdgeKitError as error:
                for one in {error, *single_errors(error)}:
                    words = FORMS if objects and one.help == HELP else one.help
                    one.what, one.help = in_words(one.what), in_words(words) if words else None
                raise

    return called


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the warnings and logs of libraries to themselves, as the command line does."""
    loggers = [logging.getLogger(name) for name in NOISY]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def in_words(text: str) -> str:
    """Returns a message with keyword arguments for options: `precision="fp16"` for `--precision fp16`."""
    words, at = "", 0
    for option in _OPTION.finditer(text):
        if option.start() < at:
            continue
        name = option[1]
        keyword = RENAMED.get(name, name.replace("-", "_"))
        words += text[at : option.start()]
        value = re.match(rf" ({VALUES[name]})", text[option.end() :]) if name in VALUES else None
        at = option.end() + (value.end() if value else 0)
        if value is None:
            placeholder = re.match(r" [A-Z]{3,}\b", text[option.end() :])  # DATA, NAME
            at += placeholder.end() if placeholder else 0
            words += keyword if "=" in keyword else f"{keyword}=True" if name in FLAGS else f"{keyword}=..."
        elif re.fullmatch(r"\d+(\.\d+)?", value[1]):
            words += f"{keyword}={value[1]}"
        else:
            shown = f'"{value[1]}"'
            words += f"{keyword}=[{shown}]" if keyword == "inputs" else f"{keyword}={shown}"
    return words + text[at:]


export = in_python(pipeline.export)
compare = in_python(commands_compare.compare)
profile = in_python(commands_profile.profile)
verify = in_python(commands_verify.verify)
prune = in_python(pruning.prune)

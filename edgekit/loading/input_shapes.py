"""Infer the shapes of a model's inputs from its layers, where they leave no doubt."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgekit.types import TensorSpec
from edgekit.util.wording import counted

# Sizes that images and signals are commonly given in; a layer that accepts one of them alone pins it.
SIZES = (
    8, 12, 14, 16, 20, 24, 28, 30, 32, 36, 40, 48, 50, 56, 60, 64, 72, 80, 84, 96, 100, 112, 120, 128, 144, 150, 160,
    180, 192, 200, 224, 227, 240, 256, 288, 299, 300, 320, 331, 380, 384, 416, 448, 456, 480, 512, 528, 600, 640, 768,
    800, 1024,
)  # fmt: skip
LENGTHS = (*SIZES, 1000, 1250, 1280, 1500, 1600, 2000, 2048, 2500, 3000, 4000, 4096, 5000, 8000, 8192, 10000, 16000)
ALL_SIZES = range(1, 257)  # tried where no common one fits
LARGEST_RUN = 128
STRIDE = 32  # of a network's pools: sizes that are less apart may give the same features
TOKENS = (32, 16, 8, 4, 64, 128, 256, 512, *range(2, 33))
CONVOLUTIONS = {"Conv1d": 1, "Conv2d": 2, "Conv3d": 3, "BatchNorm2d": 2, "BatchNorm3d": 3, "InstanceNorm2d": 2}
RECURRENT = ("LSTM", "GRU", "RNN")
MIXING = ("MultiheadAttention", "Transformer", *RECURRENT)  # layers that look at more than one row of features
_TEXT = re.compile(r"id|tok|mask|segment|type|pos|text|word|len|src|tgt|^x$|^input$", re.IGNORECASE)


@dataclass(frozen=True)
class Inferred:
    """What the layers of a model tell of its inputs: their specs and a note, or no specs and a hint for the user."""

    specs: tuple[TensorSpec, ...]
    told: str


def infer(module: torch.nn.Module, required: Sequence[str]) -> Inferred:
    """Returns the shapes of the inputs called `required`, for a batch of one, from the first layer with weights.

    The shapes are tried: of a convolution the one size that all later layers accept, of a linear layer its features
    where nothing reshapes the input before it, of an embedding a length that the model takes.
    """
    layer = next(_weighted(module), None)
    if layer is None or not required:
        return Inferred((), "")
    kind, weight = _kind(layer), _weight(layer)
    if kind in ("Embedding", "EmbeddingBag"):
        return _tokens(module, required)
    if len(required) > 1:
        return Inferred((), "")
    name = required[0]
    if kind in CONVOLUTIONS:
        channels = weight.shape[0] if weight.ndim == 1 else weight.shape[1] * int(getattr(layer, "groups", 1))
        return _pinned(module, name, kind, channels, CONVOLUTIONS[kind])
    if kind == "Linear":
        return _features(module, name, layer, weight.shape[1])
    if kind in RECURRENT:
        features = _recurrent_weight(layer).shape[1]
        shape = f"1x16x{features}" if getattr(layer, "batch_first", False) else f"16x1x{features}"
        return Inferred((), f"its first layer, {kind}, takes {features} features: such as --input {shape}")
    return Inferred((), "")


def _weighted(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The layers that tell a shape, in the order in which they were made."""
    for layer in module.modules():
        kind = _kind(layer)
        if kind in ("Embedding", "EmbeddingBag", "Linear", *CONVOLUTIONS):
            weight = _weight(layer)
        else:
            weight = _recurrent_weight(layer) if kind in RECURRENT else None
        if weight is not None:
            yield layer


def _kind(layer: Any) -> str:
    """The class of a layer; of TorchScript the one that it was made from."""
    kind = getattr(layer, "original_name", type(layer).__name__)
    return "Linear" if kind == "NonDynamicallyQuantizableLinear" else kind


def _weight(layer: Any) -> Any:
    weight = getattr(layer, "weight", None)
    ready = isinstance(weight, torch.Tensor) and not torch.nn.parameter.is_lazy(weight)
    return weight if ready else None


def _recurrent_weight(layer: Any) -> Any:
    return getattr(layer, "weight_ih_l0", None)


def _runs(module: Callable[..., Any], *tensors: torch.Tensor) -> bool:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module(*tensors)
    except Exception:  # whatever the user's forward raises
        return False
    return True


def _without_weights(module: torch.nn.Module) -> Any:
    """A copy of `module` that computes shapes alone; None where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return copy.deepcopy(module).to("meta").eval()
    except Exception:  # whatever a module of the user's raises when it is copied or moved
        return None


def _pinned(module: torch.nn.Module, name: str, kind: str, channels: int, rank: int) -> Inferred:
    """Images or signals of the one size that the model accepts."""
    example = f"1x{channels}x{'x'.join({1: ['1000'], 2: ['224'] * 2, 3: ['16', '112', '112']}[rank])}"
    hint = f"its first layer, {kind}, takes {counted(channels, 'channel')}: such as --input {example}"
    if rank > 2:
        return Inferred((), hint)
    trial, device = _without_weights(module), "meta"
    sizes: Sequence[int] = LENGTHS if rank == 1 else SIZES
    if trial is None:  # TorchScript, say: small samples are run for real
        trial, device, sizes = module, "cpu", [size for size in sizes if size <= LARGEST_RUN]

    def fitting(sizes: Sequence[int]) -> list[list[int]]:
        """Runs of neighbors among `sizes` that the model accepts."""
        found: list[list[int]] = [[]]
        for size in sizes:
            if _runs(trial, torch.zeros(1, channels, *[size] * rank, device=device)):
                found[-1].append(size)
            elif found[-1]:
                found.append([])
        return [neighbors for neighbors in found if neighbors]

    # Below the size that fits a table of positions a single position may fit it too, by broadcasting.
    runs = fitting(sizes) or (fitting(ALL_SIZES) if device == "meta" else [])
    fits = runs[-1] if 1 <= len(runs) <= 2 else []
    if not fits or fits[-1] - fits[0] >= STRIDE:
        return Inferred((), hint)
    size = max(fits, key=lambda s: (s & -s, -s))  # of neighbors that give the same features the roundest
    spec = TensorSpec(name, "float32", (1, channels, *[size] * rank))
    return Inferred((spec,), f"the shape of its input was inferred, {_shown(spec)}: its layers accept no other size")


def _features(module: torch.nn.Module, name: str, first: torch.nn.Module, features: int) -> Inferred:
    """Rows of features, where the first linear layer gets the input as it is."""
    square = math.isqrt(features)
    image = f" or 1x1x{square}x{square}" if square * square == features else ""
    third = math.isqrt(features // 3)
    if third * third * 3 == features:
        image = f" or 1x3x{third}x{third}"
    mixes = any(_kind(layer).startswith(MIXING) or _kind(layer) in CONVOLUTIONS for layer in module.modules())
    rows = f"1x16x{features}" if mixes else f"1x{features}"
    hint = f"its first layer takes {features} features: such as --input {rows}{image}"
    if mixes or not _runs(module, torch.zeros(1, features)) or _reshapes(module, first, features):
        return Inferred((), hint)
    spec = TensorSpec(name, "float32", (1, features))
    return Inferred((spec,), f"the shape of its input was inferred, {_shown(spec)}, from its first linear layer")


def _reshapes(module: Any, first: torch.nn.Module, features: int) -> bool:
    """Whether something flattens the input before the layer `first`: then it may be of any shape."""
    if isinstance(module, torch.jit.ScriptModule):  # no hooks there
        return bool(re.search(r"aten::(flatten|view|reshape)\b", str(module.inlined_graph)))
    shapes: list[tuple[int, ...]] = []
    hook = first.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    sample = torch.zeros(1, 2, features)
    try:
        _runs(module, sample)
    finally:
        hook.remove()
    return shapes[:1] != [tuple(sample.shape)]


def _tokens(module: torch.nn.Module, required: Sequence[str]) -> Inferred:
    """Rows of token numbers, of the first length that the model takes."""
    hint = "its first layer is an embedding: such as --input int64[1,128]"
    if not all(_TEXT.search(name) for name in required) and len(required) > 1:
        return Inferred((), hint)

    def specs(length: int) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(n, "int64", (1,) if "len" in n.lower() else (1, length)) for n in required)

    for length in TOKENS:
        # Ones are right for tokens, masks and types alike; a length is that of the row.
        tensors = [torch.full(s.shape, length if len(s.shape) == 1 else 1) for s in specs(length)]
        if _runs(module, *tensors):
            shown = ", ".join(map(_shown, specs(length)))
            told = f"the shapes of its inputs were inferred from its embedding: {shown}; --input gives another length"
            return Inferred(specs(length), told)
    return Inferred((), hint)


def _shown(spec: TensorSpec) -> str:
    return f"{spec.name}:{'x'.join(map(str, spec.shape))}" if spec.dtype == "float32" else str(spec)

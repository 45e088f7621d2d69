"""Load a model and open its data, each telling the other what it does not know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgekit.data import sources
from edgekit.errors import EdgeKitError, MissingInputs
from edgekit.types import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

    from edgekit.loading.model import Model


def load(
    model: Any,
    *,
    data: Any,
    inputs: Any,
    code: str | None,
    mean: Sequence[float],
    std: Sequence[float],
    like: Sequence[TensorSpec] = (),
) -> tuple[Model, sources.Data | None]:
    """Loads the model and opens its data, each telling the other what it does not know: shapes, or an image size.

    Where `inputs` are not given, the batch and the image size are those of `like`, the inputs of an exported file.
    """
    from edgekit.loading.model import given_inputs, read_specs
    from edgekit.loading.model import load as load_model

    sources.check_normalization(mean, std)
    if data is None:
        if mean:
            raise EdgeKitError("--mean and --std normalize data, and none are given", "add --data, or leave them out")
        return load_model(model, code=code, inputs=inputs), None
    asked = bool(given_inputs(inputs))
    specs = read_specs(inputs) if asked else like
    shape = specs[0].shape if specs else ()
    size = image_size(shape, channels_last=not asked)
    source = sources.load(data, image_size=size, mean=mean, std=std)
    if any(spec.name == "y" for spec in specs):
        source = source.with_targets_as("y") or source
    try:
        loaded, source = _loaded(model, source, inputs, code, like)
    except MissingInputs as error:
        found = source.with_targets_as(error.names[0]) if len(error.names) == 1 else None
        if found is None:
            raise
        loaded, source = _loaded(model, found, inputs, code, like)
    if any(spec.name == "y" for spec in loaded.inputs):  # as forward names it, where `inputs` names none
        source = source.with_targets_as("y") or source
    first = next(iter(sources.batches(source.evaluation, loaded.inputs)))[0]  # tells now whether the data fits
    return replace(loaded, example=(*as_tensors(first), *loaded.example[len(first) :])), source


def _loaded(
    model: Any, source: sources.Data, inputs: Any, code: str | None, like: Sequence[TensorSpec]
) -> tuple[Model, sources.Data]:
    """Loads the model on a sample of `source`; images stay as they are where it takes bytes or scales them itself."""
    from edgekit.loading.model import given_inputs
    from edgekit.loading.model import load as load_model

    scaled = source.preprocessing
    unscaled = source.unscaled() if scaled is not None and not scaled.mean else None
    examples = [None if given is None else given.example() for given in (source, unscaled)]
    if like and like[0].shape and not given_inputs(inputs):
        repeats = max(like[0].shape[0], 1)
        examples = [e and {key: array.repeat(repeats, axis=0) for key, array in e.items()} for e in examples]
        if examples[1] and like[0].dtype != "uint8":
            examples[1] = {key: array.astype(like[0].dtype) for key, array in examples[1].items()}
    example, images = (None if given is None else _named(given) for given in examples)
    loaded = load_model(model, code=code, inputs=inputs, example=example, images=images)
    return loaded, source if unscaled is None or not loaded.unscaled else unscaled


def image_size(shape: Sequence[int], channels_last: bool = False) -> tuple[int, int, int] | None:
    """Returns the (channels, height, width) of images of `shape`, None where they are open or it has none.

    With `channels_last` shapes of that layout are read too: `fitted` then tells what is wrong with such a file.
    """
    if len(shape) != 4 or min(shape[1:]) < 1:
        return None
    last = channels_last and shape[1] not in sources.IMAGE_CHANNELS and shape[3] in sources.IMAGE_CHANNELS
    return (shape[3], shape[1], shape[2]) if last else (shape[1], shape[2], shape[3])


def _named(example: sources.Arrays) -> list[np.ndarray] | dict[str, np.ndarray]:
    if all(isinstance(key, int) for key in example):
        return list(example.values())
    return {"x" if key == 0 else str(key): array for key, array in example.items()}


def as_tensors(arrays: Sequence[np.ndarray]) -> tuple[torch.Tensor, ...]:
    """Returns arrays as tensors that share their memory."""
    import torch

    return tuple(torch.from_numpy(array) for array in arrays)

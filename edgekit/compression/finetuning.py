"""Fine-tuning: the user's own training function trains the pruned network, and its result is checked.

The function is called as `train(student, teacher, samples)` and trains `student` in place, or returns another module
with weights of the same names and shapes.

- `student` is the user's own module with fewer channels or with masked weights, in training mode.
- `teacher` is the original in eval mode, without gradients.
- `samples` is an iterable: each pass over it is one epoch in an order of its own. It yields (inputs, target): `inputs`
  is a tuple for `student(*inputs)`, or a dict for `student(**inputs)` where the model takes inputs by keyword; `target`
  a tensor (N,), or None without labels. `len(samples)` is the number of batches.

For quantization-aware training `student` is the network with its rounding, to be trained in place, and `teacher` its
fp32 original; both are graphs that take inputs by position.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import EdgeKitError
from edgekit.util import atomic_files
from edgekit.util.user_code import import_code, running

if TYPE_CHECKING:
    import torch

    from edgekit.compression.training_samples import Memory
    from edgekit.loading.model import Model

SIGNATURE = "write def train(student, teacher, samples), which trains student in place or returns a module"


@dataclass(frozen=True)
class UserTraining:
    """The user's function, what they called it, and the folder that it imports from."""

    function: Callable[..., Any]
    text: str
    folder: Path | None


@dataclass(frozen=True)
class Taught:
    """A network that the user's function trained, the name of that function, and how often it read the samples."""

    module: torch.nn.Module
    function: str
    epochs: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {"function": self.function, "epochs": self.epochs}


def find(given: Any) -> UserTraining:
    """Returns the function that `FILE.py:train` or a callable names; raises EdgeKitError where it is none."""
    folder: Path | None = None
    if isinstance(given, (str, Path)):
        code = import_code(str(given))
        if code.name is None:
            raise EdgeKitError(f"{given} names no function", f"name it: --finetune {given}:train")
        function, text, folder = code.get(), str(given), code.folder
    else:
        function, text = given, getattr(given, "__name__", type(given).__name__)
    if not callable(function):
        raise EdgeKitError(f"{text} is a {type(function).__name__}, not a function", SIGNATURE)
    try:
        inspect.signature(function).bind(None, None, None)
    except TypeError as error:
        raise EdgeKitError(f"{text} cannot be called with three arguments: {error}", SIGNATURE) from None
    except ValueError:  # a callable that does not tell its arguments
        pass
    return UserTraining(function, text, folder)


class Samples:
    """The training samples, as the user's function sees them."""

    def __init__(self, memory: Memory, names: tuple[str, ...] | None, seed: int, begin: Callable[[], None]) -> None:
        """With `names` inputs are a dict; `begin` is called before each epoch."""
        import torch

        self._memory, self._names, self._begin = memory, names, begin
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self._memory.steps

    def __iter__(self) -> Iterator[tuple[Any, torch.Tensor | None]]:
        self._begin()
        for inputs, target in self._memory.epoch(self._generator):
            yield (inputs if self._names is None else dict(zip(self._names, inputs, strict=True))), target


def fine_tune(training: UserTraining, narrow: Any, original: Model, memory: Memory, seed: int, kept: Path) -> Taught:
    """Calls the user's function on a copy of `narrow`, a `Flat`, and returns what became of it.

    Before each epoch but the first the weights so far are written to `kept`, as .safetensors, where they are finite.
    Raises EdgeKitError for what the function raises, and for weights that are not finite or of another network.
    """
    import torch

    from edgekit.quant.graph.copies import deep_copy

    student = deep_copy(narrow.inner).requires_grad_(True).train()
    teacher: Any = deep_copy(original.module)
    epochs: list[bool] = []  # whether the weights were kept at the beginning of each

    def begin() -> None:
        epochs.append(bool(epochs) and _keep(student, narrow, kept))

    samples = Samples(memory, _names(narrow, original), seed, begin)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        with running(training.text, training.folder), torch.enable_grad():
            returned = training.function(student, teacher.inner.eval().requires_grad_(False), samples)
    finally:
        torch.random.set_rng_state(state)
    if returned is not None and not isinstance(returned, torch.nn.Module):
        raise EdgeKitError(f"{training.text} returned a {type(returned).__name__}, not a module", SIGNATURE)
    trained = student if returned is None else returned
    left = f"; {kept} holds the weights after epoch {_last(epochs)}" if _last(epochs) else ""
    _check(trained, narrow, training.text, left)
    module = deep_copy(narrow)
    module.inner = trained.to("cpu").eval().requires_grad_(False)
    return Taught(module, training.text, len(epochs))


def _last(epochs: list[bool]) -> int:
    """The number of the last epoch whose weights were kept."""
    return max((number for number, good in enumerate(epochs) if good), default=0)


def _names(narrow: Any, original: Model) -> tuple[str, ...] | None:
    from torch.utils import _pytree as pytree

    _, keywords = pytree.tree_unflatten(list(narrow.fixed), narrow.in_spec)
    return tuple(spec.name for spec in original.inputs) if keywords else None


def _unsound(module: torch.nn.Module) -> str | None:
    """The first weight that is not finite."""
    from edgekit.quant.graph.copies import state_tensors

    for name, tensor in state_tensors(module).items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return name
    return None


def _keep(student: torch.nn.Module, narrow: Any, kept: Path) -> bool:
    from edgekit.loading.pruned_mark import weight_bytes

    if _unsound(student) is not None:
        return False
    atomic_files.write(kept, weight_bytes(student))
    return True


def _check(trained: torch.nn.Module, narrow: Any, text: str, left: str) -> None:
    from edgekit.quant.graph.copies import state_tensors

    found, wanted = state_tensors(trained), state_tensors(narrow.inner)
    differ = sorted(k for k in found.keys() | wanted.keys() if k not in found or k not in wanted)
    differ += [k for k in found if k in wanted and found[k].shape != wanted[k].shape]
    if differ:
        raise EdgeKitError(
            f"{text} made another network of the student: {differ[0]} is not as it was",
            "train the weights that are there; wrap, add or remove no layers",
        )
    name = _unsound(trained)
    if name is not None:
        raise EdgeKitError(
            f"the training diverged: {text} left values in {name} that are not finite{left}",
            "train with a lower learning rate, or prune less",
        )

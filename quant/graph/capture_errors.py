"""Why torch cannot capture a model as a graph: the user's own line, what it asks for, and what to write instead."""

from __future__ import annotations

import logging
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.export._trace
from torch.nn.utils.rnn import PackedSequence

from edgekit.errors import EdgeKitError, reason
from edgekit.util.export_speedups import replaced

LOGS = ("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._export")
MOST_QUOTED = 80  # characters of a user's line

# Where code lies that is not the user's: EdgeKit's rooms, Python's own library, torch; and what else is installed.
HERE = Path(__file__).resolve().parents[2]
TOOLS = (
    *(HERE / room for room in ("edgekit", "quant", "exporters", "runtimes")),
    Path(sysconfig.get_path("stdlib")).resolve(),
    Path(torch.__file__).resolve().parent,
)
INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib"))

# What a message of torch's holds → what torch could not capture, and what to write instead.
CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"PackedSequence",
        "a packed sequence is laid out by the values of its lengths, which a graph does not have yet",
        "give the recurrent layer the padded input (batch, time, features), take the lengths as an input, and mask the "
        "output behind them: y * (torch.arange(y.shape[1]) < lengths[:, None])[..., None]; the last output of each "
        "sequence is y[torch.arange(len(y)), lengths - 1]. The way back of a bidirectional layer would begin in the "
        "padding: export that for one length",
    ),
    (
        r"nested_tensor|NestedTensor|_nested_|jagged",
        "nested tensors are laid out by lengths, which a graph does not have yet",
        "pad to one length, and mask what is behind each sequence",
    ),
    (
        r"data-dependent|DataDependent|GuardOnDataDependent|Dynamic control flow|unbacked",
        "a graph has no values yet, and this line decides by the value of a tensor",
        "compute both sides and choose with torch.where(condition, a, b), branch with torch.cond, count with shapes "
        "(x.shape[0]) rather than with values, and leave out checks of values",
    ),
    (
        r"__format__|JSON serializable|Sym(Float|Int|Bool)",
        "a graph has no values yet, and this line asks for one",
        "leave texts, logs and Python's numbers of values out of forward; shapes (x.shape[0]) are there",
    ),
    (
        r"constant's list",
        "a tensor passes through something that a graph does not follow, such as another thread",
        "compute everything in forward itself, without threads and queues",
    ),
    (
        r"\.numpy\(\)|numpy|__array__|Tensor subclasses",
        "NumPy computes on values, which a graph does not have yet",
        "use torch's functions instead of NumPy's",
    ),
    (
        r"data pointer|data_ptr|storage",
        "this line asks where a tensor's values lie in memory, and in a graph they lie nowhere yet",
        "leave data_ptr and storage out of forward, or wrap the kernel with torch.library.custom_op and register_fake",
    ),
    (
        r"fake impl|register_fake|meta kernel|Meta' backend|no fake|abstract impl",
        "this operator does not tell the shape of its result without computing it",
        "register that with OPERATOR.register_fake, or compute it with torch's own functions: runtimes on devices have "
        "no kernel for it either",
    ),
    (
        r"ScriptModule|ScriptFunction|RecursiveScriptModule|torch\.jit|forward\(\) takes .* positional",
        "part of the model is TorchScript, which is not captured again",
        "build that part from its Python class, or give the TorchScript file itself to EdgeKit",
    ),
    (
        r"autocast",
        "autocast changes dtypes by rules that the graph does not hold",
        "leave autocast out of forward: --precision chooses the dtype",
    ),
    (
        r"complex|view_as_real|ComplexFloat",
        "complex numbers do not go into these files",
        "compute with real and imaginary parts",
    ),
    (
        r"was assigned during export|were assigned|must be registered as buffers",
        "forward keeps a tensor in an attribute of its own",
        "hold state in buffers: self.register_buffer(name, tensor), and assign to that",
    ),
    (
        r"requires_grad|autograd|leaf Variable|grad_fn|vmap|functorch",
        "forward computes gradients",
        "wrap what runs at inference alone, without torch.autograd.grad",
    ),
    (
        r"pytree|dict_keys|Node type mismatch|key mismatch|serialization name|not supported as (an )?(in|out)put",
        "inputs or outputs are of a class that torch does not take apart, or come in another order than in the example",
        "take and return tensors, tuples, lists and dicts with the same keys in the same order",
    ),
    (
        r"random|generator|Generator",
        "this line uses a random generator of its own",
        "leave out generator=: a file draws numbers by itself, or takes them as an input",
    ),
)
UNKNOWN = (
    "torch.export cannot follow it",
    "forward has to compute with torch's functions alone, and to branch on shapes and settings, not on values",
)


@contextmanager
def told() -> Iterator[None]:
    """Raises whatever a capture raises as an EdgeKitError with the user's file and line.

    What torch logs and prints of a failed capture, the half of the graph that it has, is left out.
    """
    logs = [logging.getLogger(name) for name in LOGS]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        with replaced(torch.export._trace, "print", lambda *values, **options: None):
            yield
    except (EdgeKitError, MemoryError):
        raise
    except Exception as error:  # whatever torch.export or the user's forward raises
        raise explained(error) from error
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def explained(error: BaseException) -> EdgeKitError:
    """Returns what a failed capture tells the user."""
    text = f"{type(error).__name__}: {error}{' of a PackedSequence' if _packed(error) else ''}"
    known = next(((what, help) for words, what, help in CAUSES if re.search(words, text)), None)
    said, help = known or UNKNOWN
    why = said if known else f"{said}: {reason(error)}"
    place = user_line(error)
    where = f"at {place}: " if place else ""
    return EdgeKitError(f"this model cannot be captured as a graph, {where}{why}", help)


def _packed(error: BaseException) -> bool:
    """Whether an error went through a function that holds a packed sequence: torch's own message does not say so."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(isinstance(value, PackedSequence) for frame in frames for value in frame.f_locals.values())


def user_line(error: BaseException) -> str | None:
    """Returns "FILE:LINE, `code`" of the innermost line of the user's own code that an error went through.

    Where it went through none, the model comes from an installed library, and the line is that library's.
    """
    frames = traceback.extract_tb(error.__traceback__)
    for foreign in ((*TOOLS, *INSTALLED), TOOLS):
        own = [frame for frame in frames if not _is_in(frame.filename, foreign)]
        if own:
            code = f", `{own[-1].line[:MOST_QUOTED]}`" if own[-1].line else ""
            return f"{own[-1].filename}:{own[-1].lineno}{code}"
    return None


def _is_in(filename: str, folders: Iterable[Path]) -> bool:
    """Whether a file is generated, as <frozen …> and <eval_with_key> are, or lies in one of `folders`."""
    path = Path(filename)
    return not path.is_absolute() or any(path.is_relative_to(folder) for folder in folders)

"""What a model's own forward needs that a machine without its training set-up does not give, by what it raises."""

from __future__ import annotations

import re
from typing import Any

from edgekit.errors import reason, user_line

# What an error says → what to do about it.
CAUSES: tuple[tuple[str, str], ...] = (
    (
        r"\bCUDA\b|\bcuda\b|\bMPS\b|\bmps\b|expected all tensors to be on the same device|NVIDIA",
        "export runs on the CPU: leave .cuda() and device names out of forward, and make tensors on x.device",
    ),
    (
        r"does not require grad|grad_fn|[Ii]nference tensor|torch\.autograd",
        "forward computes gradients, which no file does: wrap what runs at inference alone, without torch.autograd",
    ),
)
HOOKS = (
    "hooks that write into the object that they were made for do not reach its copy: compute in forward what they do"
)


def told(error: BaseException) -> str:
    """Returns what `error`, raised by a forward, says, and the user's own line that it came from."""
    words, line = reason(error), user_line(error)
    named = f"{type(error).__name__} " if isinstance(error, LookupError) and words[:1] == "'" else ""
    return f"{named}{words}" + (f" ({line})" if line else "")


def remedy(error: BaseException, module: Any, otherwise: str) -> str:
    """Returns what to do about an error of the forward of `module`, a torch.nn.Module, or else `otherwise`."""
    text = f"{type(error).__name__}: {error}"
    known = next((help for words, help in CAUSES if re.search(words, text)), None)
    if known is not None:
        return known
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    return HOOKS if hooked and isinstance(error, (LookupError, AttributeError)) else otherwise

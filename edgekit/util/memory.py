"""Memory of large models: what glibc keeps is given back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


LARGE = 128 << 20  # bytes of weights from which a model is lowered to one format after the other
MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)
MAPPED = 1 << 20  # bytes of a block from which memory of its own is mapped for it


def is_large(module: torch.nn.Module) -> bool:
    """Whether a module has so many weights that their copies are what matters for memory."""
    state = module.state_dict().values()  # a module's extra state may be anything
    return sum(getattr(value, "nbytes", 0) for value in state) > LARGE


def map_weights() -> None:
    """Has each larger block of memory go back to the system as soon as nothing uses it, from now on.

    glibc learns from the first ones to keep them for later, between others: an export then holds weights twice.
    """
    import ctypes

    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if set_option is not None:
        set_option(MMAP_THRESHOLD, MAPPED)


def release_memory() -> None:
    """Gives memory that nothing uses any more back to the system."""
    import ctypes
    import gc

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)

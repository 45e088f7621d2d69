"""Whether a precision changed anything: files that gained nothing by it are fp32 files, and are called so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.compression import compress
from edgekit.util.progress import Progress

if TYPE_CHECKING:
    from edgekit.loading.model import Model
    from edgekit.quant.ptq.recipes import Compressed

PLAIN = "fp32"
QUANTIZED = ("int8", "int8-dynamic", "int8-weight-only")
INSTEAD = "for a smaller file choose --precision fp16"


def named(
    original: Model, compressed: Compressed | None, precision: str, progress: Progress
) -> tuple[Compressed | None, str, tuple[str, ...]]:
    """Returns what is to be exported, the precision that its files are called by, and what to know of that.

    That is what was given, unless hardly anything of it is quantized: then the network at fp32. An ONNX file is not
    taken apart.
    """
    if compressed is None or precision not in QUANTIZED:
        return compressed, precision, ()
    from edgekit.quant.ptq.shares import left_in_float, shares

    found = shares(compressed.program)
    notes = left_in_float(found.left, precision)
    if found.worth_a_file:
        return compressed, precision, notes
    gained = (
        f"{precision} would quantize {100 * found.weights:.0f} % of this model's weights and "
        f"{100 * found.products:.0f} % of its multiplications, for no gain: the files are {PLAIN}, and are called so; "
        f"{INSTEAD}"
    )
    return compress.compress(original, None, PLAIN, progress), PLAIN, (*notes, gained)

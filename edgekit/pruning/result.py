"""The result of a pruning: the network, what went, and what it is worth."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.loading import pruned_mark
from edgekit.metrics.accuracy import Accuracy
from edgekit.pruning.options import Options
from edgekit.util.wording import counted

if TYPE_CHECKING:
    import torch

    from edgekit.compression.finetuning import Taught
    from edgekit.pruning.cost import Measured
    from edgekit.pruning.target_search import Found
    from edgekit.quant.pruning.allocation import LayerChange
    from edgekit.quant.pruning.distillation import Recovered
    from edgekit.quant.pruning.masks import MaskedLayer


@dataclass(frozen=True, repr=False)
class Pruned:
    """A pruned network and what it took: per layer, in all, and in accuracy where the data has labels.

    `accuracy` is measured in torch on the evaluation samples, after fine-tuning; `unrecovered` before it. `masked` are
    the layers of a masked network, whose shapes stay. `files` were exported to be measured, and `search` says how the
    ratio was found. `module` takes and gives what the original does, in eval mode.
    """

    path: Path
    name: str
    options: Options
    layers: tuple[LayerChange, ...]
    masked: tuple[MaskedLayer, ...]
    parameters: tuple[int, int]
    unrecovered: Accuracy | None
    accuracy: Accuracy | None
    recovered: Recovered | Taught | None
    search: Found | None
    files: tuple[Measured, ...]
    notes: tuple[str, ...]
    module: torch.nn.Module = field(compare=False)

    def __repr__(self) -> str:
        before, after = self.macs
        return f"Pruned({str(self.path)!r}, {before:,} multiply-adds to {after:,}, {counted(len(self.files), 'file')})"

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-adds of one sample before and after; a zero weight is multiplied like any other."""
        return sum(layer.macs_before for layer in self.layers), sum(layer.macs_after for layer in self.layers)

    @property
    def zeros(self) -> tuple[int, int]:
        """Masked weights, and all weights of convolution, linear and recurrent layers."""
        return sum(layer.zeros for layer in self.masked), sum(layer.weights for layer in self.masked)

    @property
    def summary(self) -> dict[str, Any]:
        """What the manifest of a bundle says of the pruned network that it was exported from."""
        whole = self.to_dict()
        keys = ("ratio", "method", "allocation", "fingerprint", "macs", "parameters", "accuracy")
        return {"folder": self.path.name, **{key: whole[key] for key in keys}}

    @property
    def summary_notes(self) -> tuple[str, ...]:
        """What the notes of that bundle say of it."""
        before, after = self.macs
        notes = [
            f"pruned: {100 * (1 - after / before):.0f} % of the multiply-adds went, and all files are checked against "
            f"what is left, {self.path.name}/model.pt2; compare with the original tells what that costs"
        ]
        if self.accuracy is not None:
            low, high = self.accuracy.ci95
            notes.append(
                f"pruning dropped {self.accuracy.metric} by {self.accuracy.drop:.2f} points (95 % interval {low:+.2f} "
                f"to {high:+.2f}, {self.accuracy.n:,} samples) before anything was quantized"
            )
        return (*notes, *self.notes)

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form, which is also that of `prune.json`."""
        before, after = self.macs
        zeros, weights = self.zeros
        options = self.options
        return {
            "model": self.name,
            "ratio": self.search.chosen.ratio if self.search else options.ratio,
            "sparsity": {"pattern": str(options.pattern), "zeros": zeros, "weights": weights} if self.masked else None,
            "method": options.method,
            "allocation": options.allocation,
            "steps": options.steps,
            "fingerprint": pruned_mark.fingerprint(self.module),
            "macs": {"before": before, "after": after, "removed": 1 - after / before},
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
            "accuracy": self.accuracy.to_dict() if self.accuracy else None,
            "accuracy_before_recovery": self.unrecovered.to_dict() if self.unrecovered else None,
            "recovery": self.recovered.to_dict() if self.recovered else None,
            "search": self.search.to_dict() if self.search else None,
            "files": [measured.to_dict() for measured in self.files],
            "layers": [layer.to_dict() for layer in self.masked or self.layers],
            "notes": list(self.notes),
        }

"""PRUNE: take channels out of a network, fine-tune what is left, and save it so that everyone can load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import data as sources
from edgekit import files, judge, stages, training
from edgekit.errors import EdgeKitError
from edgekit.progress import Progress, Silent
from edgekit.results import Accuracy

if TYPE_CHECKING:
    import numpy as np
    import torch

    from edgekit.model import Model
    from edgekit.quant.channels import Structure
    from edgekit.quant.pruning import LayerChange
    from edgekit.quant.recovery import Plan, Recovered
    from edgekit.quant.surgery import Group

MANIFEST = "prune.json"
SALIENCY_SAMPLES = 512
SENSITIVITY_SAMPLES = 128
BATCH = 64
SAMPLES_SEEN = 60_000  # of all epochs together, where their number is not given
EPOCHS = (5, 60)  # the fewest and the most that this may come to
METRIC = "top1"
OWN_MODULES = ("module", "state_dict", "checkpoint", "safetensors", "factory", "object")


@dataclass(frozen=True)
class Options:
    """What `prune` was asked for, checked; see there."""

    ratio: float
    method: str
    allocation: str
    round_to: int
    epochs: int | None
    plan: Mapping[str, Any]


@dataclass(frozen=True)
class Pruned:
    """A pruned network and what it took: per layer, in all, and in accuracy where the data has labels.

    `accuracy` is measured in torch on the evaluation samples, after fine-tuning; `unrecovered` before it. `module`
    takes and gives what the original does, in eval mode.
    """

    path: Path
    name: str
    options: Options
    layers: tuple[LayerChange, ...]
    parameters: tuple[int, int]
    unrecovered: Accuracy | None
    accuracy: Accuracy | None
    recovered: Recovered | None
    notes: tuple[str, ...]
    module: torch.nn.Module = field(repr=False, compare=False)

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-adds of one sample before and after."""
        return sum(layer.macs_before for layer in self.layers), sum(layer.macs_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form, which is also that of `prune.json`."""
        before, after = self.macs
        return {
            "model": self.name,
            "ratio": self.options.ratio,
            "method": self.options.method,
            "allocation": self.options.allocation,
            "macs": {"before": before, "after": after, "removed": 1 - after / before},
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
            "accuracy": self.accuracy.to_dict() if self.accuracy else None,
            "accuracy_before_recovery": self.unrecovered.to_dict() if self.unrecovered else None,
            "recovery": self.recovered.to_dict() if self.recovered else None,
            "layers": [layer.to_dict() for layer in self.layers],
            "notes": list(self.notes),
        }


def prune(
    model: Any,
    *,
    ratio: float,
    data: Any = None,
    train: Any = None,
    method: str | None = None,
    allocation: str | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
    augment: bool = True,
    patience: int | None = None,
    round_to: int = 8,
    seed: int = 0,
    inputs: Sequence[str] = (),
    code: str | None = None,
    out: str | Path = ".",
    name: str | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> Pruned:
    """Takes out channels that hold `ratio` of the multiply-adds of `model`, fine-tunes the rest, and saves it.

    `ratio` is the share of the multiply-adds of convolution, linear and recurrent layers that goes: at least so much,
    and little more, as layers keep multiples of `round_to` channels where they have two of them. `data` is any source
    that `edgekit.data.load` takes. The methods "taylor" and "wanda" and the allocation "sensitivity" read its
    calibration samples; with labels the accuracy is measured on its evaluation samples. Fine-tuning reads all samples
    of `train`, else those that calibration may read; the original is the teacher, so labels are not needed. Without
    data the least weights go, and nothing is fine-tuned.

    Writes OUT/<name>-pruned/ with `model.pt2`, `model.safetensors` and `prune.json`, whole or not at all; beside it
    lies a checkpoint while the training runs, from which `resume` goes on. Raises EdgeKitError for bad input, a
    network that cannot be traced or has nothing to prune, a ratio out of reach, and a training that diverges.
    """
    from edgekit import pruned_files

    progress = progress or Silent()
    plan = {"learning_rate": learning_rate, "augment": augment, "patience": patience, "seed": seed}
    options = check(ratio, method, allocation, epochs, round_to, data is not None or train is not None, plan)
    with progress.step("Loading"):
        given = data if data is not None else train
        original, source = stages.load(model, data=given, inputs=inputs, code=code, mean=mean, std=std)
        check_form(original)
        lessons = None if train is None or data is None else _lessons(train, original, mean, std)
    job = Job(original, source, lessons, data is not None, options, progress)
    folder = Path(out) / f"{name or original.name}-pruned"
    checkpoint = folder.with_name(f"{folder.name}.checkpoint.pt")
    with files.new_folder(folder, {MANIFEST, *pruned_files.FILES}) as building:
        with stages.quickest_threads(original):
            result = job.run(folder, checkpoint, resume)
        with progress.step("Saving"):
            notes = pruned_files.save(original, result.module, model, code, building)
        result = replace(result, notes=(*result.notes, *notes))
        files.write_json(building / MANIFEST, result.to_dict())
    checkpoint.unlink(missing_ok=True)
    return result


def check(
    ratio: float,
    method: str | None,
    allocation: str | None,
    epochs: int | None,
    round_to: int,
    has_data: bool,
    plan: Mapping[str, Any],
) -> Options:
    """Fills in what was not given; raises EdgeKitError for values that are unknown, out of range or lack data."""
    from edgekit.quant import pruning, saliency

    method = method or ("wanda" if has_data else "l2")
    allocation = allocation or ("sensitivity" if has_data else "global")
    pruning.check(ratio, method, allocation, saliency.METHODS)
    needs = ((method, method in saliency.NEED_DATA), (allocation, allocation == "sensitivity"))
    lacking = [word for word, reads in needs if reads]
    if not has_data and (lacking or epochs):
        raise EdgeKitError(
            f"{lacking[0] if lacking else 'fine-tuning'} reads samples, and none are given",
            "add --data with some hundred real samples, or choose --method l2 --allocation global and no --epochs",
        )
    if epochs is not None and epochs < 0:
        raise EdgeKitError(f"{epochs} epochs cannot be trained", "give 0 or more: --epochs 20")
    rate = plan["learning_rate"]
    if rate is not None and not 0 < rate < float("inf"):
        raise EdgeKitError(f"a learning rate of {rate:g} trains nothing", "give one above 0: --learning-rate 0.003")
    if round_to < 1:
        raise EdgeKitError(f"channels cannot be rounded to {round_to}", "give 1 or more: --round-to 8")
    return Options(ratio, method, allocation, round_to, epochs, plan)


def check_form(original: Model) -> None:
    """Raises EdgeKitError for a model that is a graph, in which every shape is a constant already."""
    if original.form not in OWN_MODULES:
        raise EdgeKitError(
            f"{original.name} is a graph ({original.form}) with every shape built in: its layers cannot lose channels",
            "prune the PyTorch model it was exported from (weights with --code, or FILE.py:factory), then export that",
        )


def _lessons(train: Any, original: Model, mean: Sequence[float], std: Sequence[float]) -> sources.Data:
    shape = original.inputs[0].shape
    size = (shape[1], shape[2], shape[3]) if len(shape) == 4 else None
    return sources.load(train, image_size=size, mean=mean, std=std)


class Job:
    """One pruning: the model, its samples and options; the steps are methods in their order."""

    def __init__(
        self,
        original: Model,
        source: sources.Data | None,
        lessons: sources.Data | None,
        evaluates: bool,
        options: Options,
        progress: Progress,
    ) -> None:
        """`lessons` are training samples apart from `source`; where it `evaluates`, `source` measures accuracy."""
        self.original, self.source, self.lessons = original, source, lessons
        self.options, self.progress = options, progress
        self.specs = training.widened(original, BATCH)
        self.evaluation: stages.Evaluation | None = None
        self._right: np.ndarray | None = None  # what the original gets right
        if source is not None and evaluates:
            found = stages.evaluation_set(source, replace(original, inputs=self.specs))
            self.evaluation = found if found.target is not None and self._classifies() else None

    def _classifies(self) -> bool:
        return len(self.original.outputs[0].shape) == 2 and self.original.outputs[0].shape[1] > 1

    def run(self, folder: Path, checkpoint: Path, resume: bool) -> Pruned:
        """Runs every step but the saving."""
        from edgekit.quant import channels, pruning

        module, options = self.original.module, self.options
        with self.progress.step("Tracing the structure"):
            structure = channels.structure(module, self.original.example)
        scores = self.saliency(structure)
        kept = self.widths(structure, scores)
        narrow = self.narrowed(scores, kept)
        unrecovered = self.accuracy(narrow, "Measuring the pruned network")
        recovered = self.recover(narrow, checkpoint, resume)
        final = recovered.module if recovered is not None else narrow
        layers = pruning.changes(module, final, self.original.example, structure.kept)
        return Pruned(
            folder,
            self.original.name,
            options,
            tuple(replace(layer, name=own_name(layer.name), kept=_own_names(layer.kept)) for layer in layers),
            (pruning.parameters(module), pruning.parameters(final)),
            unrecovered,
            self.accuracy(final, "Measuring the recovered network") if recovered is not None else unrecovered,
            recovered,
            tuple(dict.fromkeys(self.notes(recovered))),
            final,
        )

    def samples(self, most: int) -> list[tuple[tuple[torch.Tensor, ...], torch.Tensor | None]]:
        """Returns batches of calibration samples, with labels where there are any."""
        if self.source is None:
            return []
        return list(training.labeled(self.source.calibration, self.specs, self.original.inputs, most))

    def saliency(self, structure: Structure) -> dict[Group, torch.Tensor]:
        """Scores every channel."""
        from edgekit.quant import saliency

        with self.progress.step(f"Scoring channels ({self.options.method})"):
            batches = self.samples(SALIENCY_SAMPLES) if self.options.method in saliency.NEED_DATA else []
            return saliency.saliency(self.original.module, structure.groups, self.options.method, batches)

    def widths(self, structure: Structure, scores: Mapping[Group, torch.Tensor]) -> dict[Group, int]:
        """Chooses how many channels each group keeps."""
        from edgekit.quant import pruning

        options = self.options
        losses = None
        if options.allocation == "sensitivity":
            batches = [inputs for inputs, _ in self.samples(SENSITIVITY_SAMPLES)]
            with self.progress.step("Measuring sensitivities", len(scores)) as advance:
                losses = pruning.sensitivity(self.original.module, scores, batches, options.round_to, advance)
        costs = pruning.Costs(self.original.module, structure, self.original.example)
        return pruning.allocate(costs, scores, options.ratio, options.allocation, options.round_to, losses)

    def narrowed(self, scores: Mapping[Group, torch.Tensor], kept: Mapping[Group, int]) -> torch.nn.Module:
        """Takes the least salient channels out; with samples, the layers that read them learn to do without."""
        from edgekit.quant import pruning, reconstruction

        gone = {group: pruning.least_salient(scores[group], group.size - count) for group, count in kept.items()}
        narrow = pruning.prune(self.original.module, gone)
        if self.source is not None:
            batches = [inputs for inputs, _ in self.samples(SALIENCY_SAMPLES)]
            steps = len(reconstruction.readers(narrow, self.original.module))
            with self.progress.step("Reconstructing", steps) as advance:
                reconstruction.reconstruct(narrow, self.original.module, gone, batches, advance)
        return narrow

    def accuracy(self, module: torch.nn.Module, step: str) -> Accuracy | None:
        """Measures `module` against the original on labeled evaluation samples; None where there are none."""
        if self.evaluation is None:
            return None
        with self.progress.step(step):
            if self._right is None:
                self._right = self._correct(self.original.module)
            return judge.accuracy(METRIC, self._right, self._correct(module))

    def _correct(self, module: torch.nn.Module) -> np.ndarray:
        given = self.evaluation
        assert given is not None and given.target is not None
        return judge.correct(METRIC, given.cut(stages.run_module(module, given.feeds))[0], given.target)

    def recover(self, narrow: torch.nn.Module, checkpoint: Path, resume: bool) -> Recovered | None:
        """Fine-tunes; None without samples, or with no epochs."""
        from edgekit.quant.recovery import recover

        if self.source is None or self.options.epochs == 0:
            return None
        if self.lessons is not None:
            stream = self.lessons.evaluation
        elif self.evaluation is None and not self.source.separate:
            stream = self.source.evaluation  # nothing is measured on it
        else:
            stream = self.source.training or self.source.calibration
        with self.progress.step("Reading the training samples"):
            memory = training.read(stream, self.original, self.options.plan["seed"])
        plan = self._plan(len(memory))
        with self.progress.step(f"Fine-tuning, {plan.epochs} epochs", plan.epochs * memory.steps) as advance:
            return recover(
                narrow, self.original.module, memory, plan, checkpoint=checkpoint, resume=resume, advance=advance
            )

    def _plan(self, count: int) -> Plan:
        from edgekit.quant.recovery import Plan

        epochs = self.options.epochs or min(max(SAMPLES_SEEN // count, EPOCHS[0]), EPOCHS[1])
        return Plan(epochs, **{key: value for key, value in self.options.plan.items() if value is not None})

    def notes(self, recovered: Recovered | None) -> list[str]:
        """Returns what to know of the result."""
        found = [*self.original.notes, *(self.source.notes if self.source is not None else ())]
        if recovered is None:
            found.append("not fine-tuned: " + ("no epochs were asked for" if self.source else "no --data was given"))
        elif self.evaluation is not None and self.lessons is None and self.source and not self.source.separate:
            found.append("fine-tuning saw samples that the accuracy is measured on: give --train, or calib_x in --data")
        return found


def own_name(path: str) -> str:
    """Returns a layer's name in the user's own model."""
    return path.removeprefix("inner.") or "(the model)"


def _own_names(text: str | None) -> str | None:
    return text.replace("inner.", "") if text is not None else None

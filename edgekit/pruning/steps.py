"""The steps of a pruning, each on one screen: score, choose, take out or mask, reconstruct, fine-tune, measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.compression import finetuning, training_samples
from edgekit.data import batch_axis, sources
from edgekit.loading import pruned_mark
from edgekit.measuring import running
from edgekit.measuring.evaluation import Evaluation, score
from edgekit.metrics import classification, table
from edgekit.metrics.accuracy import Accuracy, accuracy_of
from edgekit.pruning.options import Options
from edgekit.util.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import torch

    from edgekit.compression.finetuning import Taught
    from edgekit.loading.model import Model
    from edgekit.metrics.scores import Scores
    from edgekit.quant.pruning.allocation import Costs
    from edgekit.quant.pruning.dependency_graph import Structure
    from edgekit.quant.pruning.distillation import Plan, Recovered
    from edgekit.quant.pruning.masks import MaskedLayer
    from edgekit.quant.pruning.surgery import Group

SALIENCY_SAMPLES = 512
SENSITIVITY_SAMPLES = 128
BATCH = 64
SAMPLES_SEEN = 840_000  # of all epochs together, where their number is not given
WORK = 2e13  # multiply-adds of the original on them, at most: about an hour on one core
EPOCHS = (5, 300)  # the fewest and the most that this may come to
# From training.MANY samples on, each is seen so seldom that it teaches more as it is, and by its label too.
MANY_SAMPLES = {"learning_rate": 5e-3, "mixed": 0.0, "features": 3.0, "labels": 1.0}
TRIAL = 0.01  # of the training: how long it is tried out without each branch
TRIAL_STEPS = 32  # of each such training at least, where the whole has as many
METRIC = table.METRICS["top1"]


@dataclass(frozen=True)
class Analysis:
    """What a network's channels are worth: their groups, the score of each, what widths cost and what they lose."""

    structure: Structure
    scores: Mapping[Group, torch.Tensor]
    costs: Costs
    losses: Mapping[Group, Mapping[int, float]] | None

    def most(self, round_to: int) -> float:
        """The largest share of the multiply-adds that can go where channels stay in multiples of `round_to`."""
        from edgekit.quant.pruning.allocation import levels

        least = {g: g.size if g.branch else levels(g, round_to)[0] for g in self.scores}
        return 1 - self.costs.macs(least) / self.costs.total


@dataclass(frozen=True)
class Changed:
    """A network after one schedule: with fewer channels or masked weights, and trained where that was asked for.

    `unrecovered` is the accuracy before the last training; `masked` and `masks` are empty where channels went.
    """

    module: Any
    structure: Structure | None
    masked: tuple[MaskedLayer, ...]
    masks: Mapping[str, torch.Tensor]
    unrecovered: Accuracy | None
    accuracy: Accuracy | None
    recovered: Recovered | Taught | None


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
        self.specs = training_samples.widened(original, BATCH)
        self.evaluation: Evaluation | None = None
        self.unmeasured = False  # there are labels that top-1 is not for
        self._right: Scores | None = None  # what the original gets right
        self._memory: training_samples.Memory | None = None
        if source is not None and evaluates:
            found = Evaluation(source, replace(original, inputs=self.specs))
            self.evaluation = found if self._classifies(found.target) else None
            self.unmeasured = found.target is not None and self.evaluation is None

    def _classifies(self, target: np.ndarray | None) -> bool:
        """Whether there are class scores and class indices, by which pruning measures accuracy."""
        scores = self.original.outputs[0].shape
        if target is None or len(scores) != 2 or scores[1] < 2:
            return False
        return classification.class_indices(target, scores[1]) is not None

    def channels(self, ratio: float, checkpoint: Path, resume: bool) -> Changed:
        """Takes channels out in the steps of the schedule, with a training after each."""
        from edgekit.quant.pruning.masks import shares

        module, whole, result = self.original.module, 0.0, None
        structure = None
        for number, part in enumerate(shares(self.options.steps), 1):
            step = self.analyze(module, self.options.round_to or 1)
            structure = structure or step.structure
            whole = whole or step.costs.total
            relative = 1 - (1 - part * ratio) * whole / step.costs.total
            if relative <= 0:  # rounding took as much before
                continue
            kept = self.allocated(step, relative, self.options.round_to or 1)
            result = self.narrow(module, step, kept, checkpoint, resume, number)
            module = result.module
        assert result is not None and structure is not None  # the first step takes something
        return replace(result, structure=structure)

    def narrow(
        self,
        module: torch.nn.Module,
        analysis: Analysis,
        kept: Mapping[Group, int],
        checkpoint: Path,
        resume: bool,
        number: int = 1,
    ) -> Changed:
        """Takes the least salient channels of `module` out, down to the widths `kept`, and trains what is left."""
        narrow = self._reconstructed(module, analysis, kept)
        unrecovered = self.accuracy(narrow, "Measuring the pruned network")
        recovered = self.recover(narrow, checkpoint, resume, number)
        final = recovered.module if recovered is not None else narrow
        accuracy = self.accuracy(final, "Measuring the recovered network") if recovered is not None else unrecovered
        return Changed(final, analysis.structure, (), {}, unrecovered, accuracy, recovered)

    def masks(self, checkpoint: Path, resume: bool) -> Changed:
        """Sets weights to zero in the steps of the schedule, with a training after each that keeps them there."""
        from edgekit.quant.graph.copies import deep_copy
        from edgekit.quant.pruning import masks

        options = self.options
        assert options.pattern is not None
        module, result = self.original.module, None
        for number, part in enumerate(masks.shares(options.steps), 1):
            pattern = options.pattern.at(part)
            with self.progress.step(f"Masking weights, {pattern}"):
                batches = [inputs for inputs, _ in self.samples(SALIENCY_SAMPLES)] if options.method == "wanda" else []
                found, kept = masks.find(module, pattern, options.method, batches)
                sparse = deep_copy(module)
                masks.apply(sparse, found)
            unrecovered = self.accuracy(sparse, "Measuring the masked network")
            masks.hold(sparse, found)
            recovered = self.recover(sparse, checkpoint, resume, number)
            module = recovered.module if recovered is not None else sparse
            masks.release(module, found)
            accuracy = unrecovered
            if recovered is not None:
                accuracy = self.accuracy(module, "Measuring the recovered network")
            layers = masks.describe(module, found, kept)
            result = Changed(module, None, layers, found, unrecovered, accuracy, recovered)
        assert result is not None
        return result

    def changed(self, module: Any) -> Model:
        """The original with `module` in its place."""
        return replace(self.original, module=module)

    def samples(self, most: int) -> list[tuple[tuple[torch.Tensor, ...], torch.Tensor | None]]:
        """Returns batches of calibration samples, with labels where there are any."""
        if self.source is None:
            return []
        return list(training_samples.labeled(self.source.calibration, self.specs, self.original.inputs, most))

    def analyze(self, module: torch.nn.Module, round_to: int) -> Analysis:
        """Scores every channel of `module`, and with samples measures what each width loses."""
        from edgekit.quant.pruning import allocation, saliency
        from edgekit.quant.pruning import dependency_graph as channels

        options, example = self.options, self.original.example
        with self.progress.step("Tracing the structure"):
            structure = channels.structure(module, example)
        with self.progress.step(f"Scoring channels ({options.method})"):
            batches = self.samples(SALIENCY_SAMPLES) if options.method in saliency.NEED_DATA else []
            scores = saliency.saliency(module, structure.groups, options.method, batches)
        losses = None
        if options.allocation == "sensitivity":
            inputs = [tensors for tensors, _ in self.samples(SENSITIVITY_SAMPLES)]
            with self.progress.step("Measuring sensitivities", len(scores)) as advance:
                losses = allocation.sensitivity(module, scores, inputs, round_to, advance)
            if self.options.epochs != 0 and self.options.finetune is None:
                losses |= self._trials(module, [group for group in scores if group.branch], inputs)
        return Analysis(structure, scores, allocation.Costs(module, structure, example), losses)

    def _trials(
        self, module: torch.nn.Module, branches: Sequence[Group], inputs: Sequence[tuple[torch.Tensor, ...]]
    ) -> dict[Group, dict[int, float]]:
        """Measures what is lost without each branch after a short training: before any it says little."""
        from edgekit.quant.pruning import allocation, distillation

        if not branches:
            return {}
        memory, found = self._samples_to_train(), {}
        plan = self._plan(len(memory))
        every = plan.epochs * memory.steps
        steps = max(round(TRIAL * every), min(TRIAL_STEPS, every))
        plan = replace(plan, epochs=-(-steps // memory.steps), patience=None)
        part = training_samples.Part(memory, min(steps, memory.steps))
        with self.progress.step("Trying without each branch", len(branches) * plan.epochs * part.steps) as advance:
            for group in branches:
                student = allocation.prune(module, {group: [0]})
                tried = distillation.recover(student, self.original.module, part, plan, advance=advance).module
                found[group] = {1: 0.0, 0: distillation.distance(tried, self.original.module, inputs)}
        return found

    def allocated(self, analysis: Analysis, ratio: float, round_to: int) -> dict[Group, int]:
        """Chooses how many channels each group keeps."""
        from edgekit.quant.pruning import allocation

        costs, scores = analysis.costs, analysis.scores
        return allocation.allocate(costs, scores, ratio, self.options.allocation, round_to, analysis.losses)

    def without(self, module: torch.nn.Module, analysis: Analysis, kept: Mapping[Group, int]) -> torch.nn.Module:
        """Returns a copy of `module` without its least salient channels, down to the widths `kept`."""
        from edgekit.quant.pruning import allocation

        return allocation.prune(module, _gone(analysis, kept))

    def left(self, analysis: Analysis, kept: Mapping[Group, int], module: torch.nn.Module) -> tuple[float, float]:
        """The shares of multiply-adds and parameters that `module` has left."""
        from edgekit.quant.pruning.allocation import parameters

        macs = analysis.costs.macs(kept) / analysis.costs.total
        return macs, parameters(module) / parameters(self.original.module)

    def _reconstructed(self, module: torch.nn.Module, analysis: Analysis, kept: Mapping[Group, int]) -> torch.nn.Module:
        """Takes the least salient channels out; with samples, the layers that read them learn to do without."""
        from edgekit.quant.pruning import allocation, reconstruction

        gone = _gone(analysis, kept)
        narrow = allocation.prune(module, gone)
        if self.source is not None:
            batches = [inputs for inputs, _ in self.samples(SALIENCY_SAMPLES)]
            steps = len(reconstruction.readers(narrow, module))
            with self.progress.step("Reconstructing", steps) as advance:
                reconstruction.reconstruct(narrow, module, gone, batches, advance)
        return narrow

    def accuracy(self, module: torch.nn.Module, step: str) -> Accuracy | None:
        """Measures `module` against the original on labeled evaluation samples; None where there are none."""
        if self.evaluation is None:
            return None
        with self.progress.step(step):
            if self._right is None:
                self._right = self._correct(self.original.module)
            return accuracy_of(METRIC, self._right, self._correct(module))

    def _correct(self, module: torch.nn.Module) -> Scores:
        assert self.evaluation is not None
        return score(self.evaluation, lambda chunk: running.run_module(module, chunk.feeds), METRIC)

    def recover(
        self, narrow: torch.nn.Module, checkpoint: Path, resume: bool, number: int
    ) -> Recovered | Taught | None:
        """Fine-tunes after step `number`; None without samples, or with no epochs."""
        from edgekit.quant.pruning.distillation import recover

        if self.source is None or self.options.epochs == 0:
            return None
        memory = self._samples_to_train()
        kept = checkpoint_of(checkpoint, number if self.options.steps > 1 else None)
        if self.options.finetune is not None:
            with self.progress.step(f"Fine-tuning by {self.options.finetune.text}"):
                kept = kept.with_suffix(".safetensors")
                seed = self.options.plan["seed"]
                return finetuning.fine_tune(self.options.finetune, narrow, self.original, memory, seed, kept)
        plan = self._plan(len(memory))
        with self.progress.step(f"Fine-tuning, {plan.epochs} epochs", plan.epochs * memory.steps) as advance:
            return recover(
                narrow,
                self.original.module,
                memory,
                plan,
                checkpoint=kept,
                resume=resume,
                advance=advance,
                model=pruned_mark.fingerprint(self.original.module),
            )

    def _samples_to_train(self) -> training_samples.Memory:
        if self._memory is None:
            assert self.source is not None
            if self.lessons is not None:
                stream = self.lessons.evaluation
            elif self.evaluation is None and not self.source.separate:
                stream = self.source.evaluation  # nothing is measured on it
            else:
                stream = self.source.training or self.source.calibration
            with self.progress.step("Reading the training samples"):
                self._memory = training_samples.read(stream, self.original, self.options.plan["seed"])
        return self._memory

    def _plan(self, count: int) -> Plan:
        from edgekit.quant.pruning.allocation import macs
        from edgekit.quant.pruning.distillation import Plan

        each = sum(macs(self.original.module, self.original.example).values()) / batch_axis.batch_of(
            self.original.inputs
        )
        seen = min(SAMPLES_SEEN, int(WORK / max(each, 1)))
        epochs = self.options.epochs or min(max(seen // count, EPOCHS[0]), EPOCHS[1])
        epochs = max(epochs // self.options.steps, 1)
        given = {key: value for key, value in self.options.plan.items() if value is not None}
        many = MANY_SAMPLES if count >= training_samples.MANY else {}
        return Plan(epochs, half=True, **{**many, **given})

    def notes(self, changed: Changed) -> Sequence[str]:
        """Returns what to know of the result."""
        recovered, now, before = changed.recovered, changed.accuracy, changed.unrecovered
        found = [*self.original.notes]
        for source in (self.source, self.lessons):
            found += source.notes if source is not None else ()
        if self.unmeasured:
            found.append(
                "accuracy was not measured: the labels are no class indices; edgekit compare has other metrics"
            )
        if recovered is None:
            found.append("not fine-tuned: " + ("no epochs were asked for" if self.source else "no --data was given"))
        elif self.evaluation is not None and self.lessons is None and self.source and not self.source.separate:
            found.append("fine-tuning saw samples that the accuracy is measured on: give --train, or calib_x in --data")
        if recovered is not None and now is not None and before is not None and now.value < before.value:
            found.append(
                f"fine-tuning made it worse, {100 * before.value:.2f} % → {100 * now.value:.2f} %: train longer "
                "(--epochs), more gently (--learning-rate) or on more samples (--train)"
            )
        return found


def checkpoint_of(checkpoint: Path, number: int | None) -> Path:
    """The checkpoint of one step of a schedule; `checkpoint` itself where there is one step."""
    return checkpoint if number is None else checkpoint.with_name(f"{checkpoint.stem}-{number}{checkpoint.suffix}")


def _gone(analysis: Analysis, kept: Mapping[Group, int]) -> dict[Group, list[int]]:
    from edgekit.quant.pruning.allocation import least_salient

    return {group: least_salient(analysis.scores[group], group.size - count) for group, count in kept.items()}

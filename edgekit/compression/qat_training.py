"""QAT: train a network with int8 rounding in its forward pass, towards the outputs that it has in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.artifacts import bundles
from edgekit.artifacts.artifact import Artifact
from edgekit.compression import compress, training_samples
from edgekit.compression import finetuning as finetune
from edgekit.compression.finetuning import Samples, UserTraining
from edgekit.data import batch_axis, sources
from edgekit.errors import EdgeKitError
from edgekit.loading import pruned_mark
from edgekit.metrics import classification
from edgekit.util import atomic_files
from edgekit.util.progress import Progress
from edgekit.util.user_code import running

if TYPE_CHECKING:
    import torch

    from edgekit.loading.model import Model
    from edgekit.quant.pruning.distillation import Recovered
    from edgekit.quant.ptq.recipes import Compressed

PRECISION = "int8"
LEARNING_RATE = 3e-4
SAMPLES_SEEN = 20_000  # of all epochs together, where their number is not given
EPOCHS = (2, 40)  # the fewest and the most that this may come to
JUDGED = 2000  # labeled samples that a network without training and a trained one are compared on
MEASURED = 512  # samples of the training that its effect is measured on, where none are held out
SUMMARY = "int8 weights, activation ranges and scales by quantization-aware training"


@dataclass(frozen=True)
class Qat:
    """How `export` trains a network for int8; the fp32 network is the teacher, so labels are not needed.

    `train` is any source that `edgekit.data.sources.load` takes, all of whose samples are trained on; without it those
    that calibration may read. `epochs` follow from the number of samples where they are not given. `learning_rate` is
    the highest of a one-cycle schedule of AdamW; `augment` changes images at random; with `patience`, training stops
    after so many epochs without a lower loss on held-out samples. `resume` goes on from the checkpoint of a run that
    ended early. `finetune`, a function or FILE.py:function, trains in the place of all this: see
    `edgekit.compression.finetuning` for how it is called; the student is the network with its rounding, to be trained
    in place.
    """

    train: Any = None
    epochs: int | None = None
    learning_rate: float | None = None
    augment: bool = True
    patience: int | None = None
    seed: int = 0
    resume: bool = False
    finetune: Any = None


@dataclass(frozen=True)
class Trained:
    """An int8 network after its training, what that took or the name of the user's own, and what to know of it.

    `distances` are those of the int8 outputs from the fp32 ones without the training and after it
    (`allocation.divergence`), on held-out samples where there are any, else on some of the
    training. `right` is how many of up to JUDGED labeled evaluation samples each of the two gets right, and of how
    many, where there are labels. `kept` tells whether the trained network is the better of the two, by `right` and else
    by `distances`; `compressed` then is it, and else the int8 network without training.
    """

    compressed: Compressed
    recovered: Recovered | None
    function: str | None
    samples: int
    distances: tuple[float, float]
    plan: Qat
    notes: tuple[str, ...]
    right: tuple[int, int, int] | None = None
    kept: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Returns what the manifest's recipe says of it."""
        facts: dict[str, Any] = {"samples": self.samples, "seed": self.plan.seed, "distances": list(self.distances)}
        facts |= {"kept": self.kept, "right": list(self.right) if self.right is not None else None}
        if self.recovered is None:
            facts["function"] = self.function
        else:
            facts |= {"learning_rate": self.plan.learning_rate or LEARNING_RATE, **self.recovered.to_dict()}
        return {"summary": SUMMARY, "qat": facts} if self.kept else {"qat": facts}


def is_trained(artifact: Artifact) -> bool:
    """Whether the bundle around a file tells that it was trained for int8."""
    told = bundles.recipe_of(artifact).get("qat")
    return isinstance(told, dict) and bool(told.get("kept", True))


def check(plan: Qat, precision: str, tuned: bool, onnx: bool, has_data: bool) -> None:
    """Raises EdgeKitError for options that do not go together, are out of range, or lack samples."""
    if precision != PRECISION:
        raise EdgeKitError(
            f"--qat trains for int8 weights and activations, and {precision} has none",
            f"add --precision {PRECISION}, or leave --qat out",
        )
    if onnx:
        raise EdgeKitError("--qat trains a PyTorch model, and this is an ONNX file", "give the PyTorch model")
    if not has_data:
        raise EdgeKitError(
            "--qat learns from samples, and none are given",
            "add --data with some hundred real samples, and --train with more: labels are not needed",
        )
    if tuned:
        raise EdgeKitError(
            "--max-drop and --sensitivity choose layers for int8 without training, and --qat trains all of them",
            "leave out one or the other",
        )
    if plan.epochs is not None and plan.epochs < 1:
        raise EdgeKitError(f"{plan.epochs} epochs train nothing", "give 1 or more: --epochs 20, or leave --qat out")
    if plan.learning_rate is not None and not 0 < plan.learning_rate < float("inf"):
        raise EdgeKitError(
            f"a learning rate of {plan.learning_rate:g} trains nothing", f"give one above 0: {LEARNING_RATE:g}"
        )
    given = {"--epochs": plan.epochs, "--learning-rate": plan.learning_rate, "--patience": plan.patience}
    given |= {"--resume": plan.resume or None, "--no-augment": None if plan.augment else True}
    asked = next((name for name, value in given.items() if value is not None), None)
    if plan.finetune is not None and asked is not None:
        raise EdgeKitError(
            f"{asked} is for EdgeKit's own training, and --finetune brings its own", "leave out one or the other"
        )


def train(
    original: Model,
    source: sources.Data,
    plan: Qat,
    checkpoint: Path,
    progress: Progress,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Trained:
    """Calibrates `original`, trains it for int8 and converts it; `checkpoint` lies on disk while that runs.

    What the network loses at int8 without training is measured too, and the better of the two is what comes back.
    Raises EdgeKitError where there are no samples, where the training diverges, and where the user's own fails.
    """
    from edgekit.quant import qat
    from edgekit.quant.ptq.recipes import convert

    own = finetune.find(plan.finetune) if plan.finetune is not None else None
    lessons, notes = _lessons(original, source, plan, mean, std)
    notes += atomic_files.not_resumed(checkpoint, plan.resume)
    with progress.step("Reading the training samples"):
        memory = training_samples.read(lessons, original, plan.seed)
    with compress.quickest_threads(original):
        with progress.step(f"Calibrating {PRECISION}"):
            calibration = compress.Calibration(source, original.inputs)
            prepared = qat.prepare(original.module, original.example, calibration)
            batch = batch_axis.batch_of(original.inputs)
            few = memory.some(min(len(memory) // batch, 3) * batch)
            pair = qat.pupil(prepared, original.module, few)
        if pair is None:
            pair = qat.Student(prepared.prepared), original.module
            memory = _cut(memory, batch)
            notes.append(f"QAT: the model takes batches of {batch} alone, and learned from as few at each step")
        elif memory.batch < training_samples.BATCHES[0]:
            memory = _cut(memory, training_samples.BATCHES[0])
        student, teacher = pair
        recovered = None
        if own is not None:
            learned = _finetuned(own, student, teacher, memory, plan.seed, progress)
            done = f"trained by {own.text}"
        else:
            if plan.patience is not None and not memory.held_out:
                notes.append(
                    f"QAT: of fewer than {training_samples.HELD_OUT_FROM:,} samples none are held out: no early stop"
                )
            name = pruned_mark.fingerprint(original.module)
            recovered = _recovered(student, teacher, memory, plan, checkpoint, name, progress)
            learned = recovered.module
            done = f"{len(recovered.losses)} epochs"
        trained = qat.trained(prepared, learned)
        plain = compress.compress(original, source, PRECISION, progress)
        assert plain is not None
        with progress.step("Measuring what the training brought"):
            both = qat.InBatches(plain.program, batch), learned
            distances = _distance(both[0], teacher, memory), _distance(both[1], teacher, memory)
            right = _right(both, source, original)
        kept = _is_better(distances, right)
        notes.append(_told(done, len(memory), distances, right, kept))
        if kept:
            with progress.step("Converting to int8"):
                compressed = convert(trained)
        else:
            compressed, notes = plain, [*plain.notes, *notes]
    function = own.text if own else None
    return Trained(compressed, recovered, function, len(memory), distances, plan, tuple(notes), right, kept)


def _lessons(
    original: Model, source: sources.Data, plan: Qat, mean: Sequence[float], std: Sequence[float]
) -> tuple[Any, list[str]]:
    """Returns the samples to train on, and what to know of them."""
    if plan.train is not None:
        lessons = training_samples.lessons(plan.train, original, source, mean, std)
        return lessons.evaluation, list(lessons.notes)
    if source.separate:
        return source.training or source.calibration, []
    note = "QAT saw samples that accuracy is measured on: give --train, or calib_x in --data"
    return source.training or source.calibration, [note]


def _cut(memory: training_samples.Memory, batch: int) -> training_samples.Memory:
    """Returns the same samples in batches of `batch`; a part of the held-out ones that is no batch is left out."""
    held_out = memory.held_out
    return replace(
        memory, batch=batch, held_out=held_out.cut(batch) if isinstance(held_out, training_samples.HeldOut) else ()
    )


def _recovered(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    memory: training_samples.Memory,
    plan: Qat,
    checkpoint: Path,
    model: str,
    progress: Progress,
) -> Recovered:
    from edgekit.quant.pruning.distillation import Plan, recover

    epochs = plan.epochs or min(max(SAMPLES_SEEN // len(memory), EPOCHS[0]), EPOCHS[1])
    how = Plan(
        epochs,
        plan.learning_rate or LEARNING_RATE,
        weight_decay=0.0,
        features=0.0,
        augment=plan.augment,
        patience=plan.patience,
        seed=plan.seed,
    )
    with progress.step(f"Quantization-aware training, {epochs} epochs", epochs * memory.steps) as advance:
        return recover(
            student,
            teacher,
            memory,
            how,
            checkpoint=checkpoint,
            resume=plan.resume,
            advance=advance,
            model=model,
            job="training",
            remedy="leave --qat out",
        )


def _distance(network: torch.nn.Module, teacher: torch.nn.Module, memory: training_samples.Memory) -> float:
    """Returns how far the outputs of `network` are from the teacher's on samples as they are."""
    from edgekit.quant.pruning.distillation import distance

    if memory.held_out:
        return distance(network, teacher, memory.held_out)
    some = memory.some(max(MEASURED // memory.batch, 1) * memory.batch)
    parts = zip(*(tensor.split(memory.batch) for tensor in some), strict=True)
    return distance(network, teacher, [part for part in parts if len(part[0]) == memory.batch] or [some])


def _right(networks: Sequence[torch.nn.Module], source: sources.Data, original: Model) -> tuple[int, int, int] | None:
    """Returns how many labeled samples each of two networks gets right, and of how many; None without such labels."""
    import torch

    found, count = [0, 0], 0
    for arrays, real, target in sources.batches(source.evaluation, original.inputs):
        if target is None or count >= JUDGED:
            break
        inputs = tuple(map(torch.from_numpy, arrays))
        with torch.no_grad():
            scores = [network(*inputs)[0][:real] for network in networks]
        if scores[0].ndim != 2 or scores[0].shape[1] < 2:
            break
        indices = classification.class_indices(target[:real], scores[0].shape[1])
        if indices is None:
            break
        labels = torch.from_numpy(indices)
        found = [n + int((score.argmax(1) == labels).sum()) for n, score in zip(found, scores, strict=True)]
        count += real
    return (found[0], found[1], count) if count else None


def _is_better(distances: tuple[float, float], right: tuple[int, int, int] | None) -> bool:
    """Whether the trained network, the second, is better: by right answers, or where these are even by distance."""
    if right is not None and right[0] != right[1]:
        return right[1] > right[0]
    return distances[1] < distances[0]


def _told(
    done: str, samples: int, distances: tuple[float, float], right: tuple[int, int, int] | None, kept: bool
) -> str:
    """Says what was measured of the int8 network without training and with it, and which of the two was kept."""
    before, after = distances
    measured = f"the distance of int8 from the fp32 outputs: {before:.2g} → {after:.2g}"
    if right is not None:
        measured += (
            f", top-1 on {right[2]:,} samples: {100 * right[0] / right[2]:.2f} → {100 * right[1] / right[2]:.2f} %"
        )
    outcome = "" if kept else ": the training made it no better, and int8 without it was kept; try more samples"
    return f"QAT: {done} on {samples:,} samples; {measured}{outcome}"


def _finetuned(
    given: UserTraining,
    student: Any,
    teacher: Any,
    memory: training_samples.Memory,
    seed: int,
    progress: Progress,
) -> torch.nn.Module:
    """Lets the user's function train a copy of `student`."""
    import torch

    from edgekit.quant.graph.copies import deep_copy

    learned, guide = deep_copy(student).requires_grad_(True).train(), deep_copy(teacher)
    learned.single = guide.single = True
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        with progress.step(f"Training by {given.text}"), running(given.text, given.folder), torch.enable_grad():
            returned = given.function(learned, guide.requires_grad_(False), Samples(memory, None, seed, lambda: None))
    finally:
        torch.random.set_rng_state(state)
    if returned is not None and returned is not learned:
        raise EdgeKitError(
            f"{given.text} returned another network than the one it was given",
            "train that one in place: its rounding is what the files will do",
        )
    learned.single = guide.single = False
    return learned.to("cpu").eval()

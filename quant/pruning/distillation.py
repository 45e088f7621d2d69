"""Distillation: fine-tuning a pruned network towards the outputs of the network that it came from.

The original is the teacher (https://arxiv.org/abs/1503.02531): softened classes, and the outputs of the blocks that
were pruned inside (https://arxiv.org/abs/1412.6550). Its answers to changed inputs are known as well, so images are
shifted, mirrored, blended and patched together whatever their labels mean, for many epochs: few samples then teach as
many different ones do (https://arxiv.org/abs/2106.05237).
"""

from __future__ import annotations

import copy
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from edgekit.errors import EdgeKitError, reason
from edgekit.quant.graph.copies import deep_copy, state_tensors
from edgekit.quant.pruning.allocation import divergence
from edgekit.quant.pruning.surgery import BATCH_NORMS, Tensors
from edgekit.util import atomic_files

LARGEST_GRADIENT = 5.0  # norm that longer gradients are cut to
SMALLEST_IMAGE = 16  # pixels: smaller ones are not shifted
MIXED = 0.8  # share of the batches whose images are mixed in pairs, where few samples are seen many times


@dataclass(frozen=True)
class Plan:
    """How a network is fine-tuned: AdamW under a one-cycle schedule.

    `labels`, `features` weigh cross-entropy and block outputs against the distillation of the outputs at
    `temperature`. `augment` changes images at random, and mixes them in pairs in a share `mixed` of the batches. With
    `patience`, training stops after so many epochs without a lower loss on the held-out samples. `half` computes in
    bfloat16, on weights in float32, where that is faster.
    """

    epochs: int
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    temperature: float = 3.0
    features: float = 30.0  # of few samples, every place of a block's output teaches more than their classes do
    labels: float = 0.0
    augment: bool = True
    mixed: float = MIXED
    patience: int | None = None
    seed: int = 0
    half: bool = False


@dataclass(frozen=True)
class Recovered:
    """A fine-tuned network, how many epochs it took, the mean training loss of each, and the epoch of its weights."""

    module: nn.Module
    losses: tuple[float, ...]
    held_out: tuple[float, ...]
    best_epoch: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {
            "epochs": len(self.losses),
            "losses": list(self.losses),
            "held_out": list(self.held_out),
            "best_epoch": self.best_epoch,
        }


class Batches(Protocol):
    """Batches that are read anew at each pass."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensors]: ...


class Samples(Protocol):
    """Training samples: `epoch` gives shuffled batches of inputs and labels; `held_out` is never trained on."""

    @property
    def steps(self) -> int:
        """How many batches an epoch has."""
        ...

    @property
    def held_out(self) -> Batches:
        """Batches that are never trained on."""
        ...

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensors, torch.Tensor | None]]:
        """Yields the batches of one epoch."""
        ...


def recover(
    student: nn.Module,
    teacher: nn.Module,
    samples: Samples,
    plan: Plan,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    advance: Callable[[], None] = lambda: None,
    model: str = "",
    job: str = "pruning",
    remedy: str = "a lower --ratio",
) -> Recovered:
    """Fine-tunes a copy of `student` towards `teacher`; calls `advance` after each step.

    Runs on the GPU where there is one. After each epoch `checkpoint` holds all that `resume` needs to go on. Raises
    EdgeKitError where the loss is no longer a number: the checkpoint then holds the last good epoch; and for the
    checkpoint of another `model`, which is named by its fingerprint. Messages call what is done `job`, and name
    `remedy` beside a lower learning rate.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rng = torch.random.get_rng_state()
    torch.manual_seed(plan.seed)
    module = deep_copy(student).to(device)
    guide = deep_copy(teacher).to(device).eval().requires_grad_(False)
    module.requires_grad_(True)
    try:
        with ExitStack() as stack:
            training = _Training(module, guide, samples, plan, device, model, stack)
            if resume and checkpoint is not None and checkpoint.is_file():
                training.restore(checkpoint, job)
            while training.goes_on():
                training.run_epoch(advance, checkpoint, remedy)
                if checkpoint is not None:
                    training.save(checkpoint)
            module.load_state_dict(training.best)
    finally:
        torch.random.set_rng_state(rng)
    module.eval().requires_grad_(False).to("cpu")
    return Recovered(module, tuple(training.losses), tuple(training.held_out), training.best_epoch)


class _Training:
    """The state of one run."""

    def __init__(
        self,
        module: nn.Module,
        guide: nn.Module,
        samples: Samples,
        plan: Plan,
        device: torch.device,
        model: str,
        stack: ExitStack,
    ) -> None:
        self.module, self.guide, self.samples, self.plan, self.device = module, guide, samples, plan, device
        inputs = _on(_first(samples, plan.seed), device)
        self.pairs = _features(module, guide, inputs, stack) if plan.features else []
        decayed = [p for p in module.parameters() if p.ndim > 1]
        rest = [p for p in module.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, plan.learning_rate)
        total = plan.epochs * samples.steps
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, plan.learning_rate, total_steps=total + 1, pct_start=0.1
        )
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.losses: list[float] = []
        self.held_out: list[float] = []
        self.best: Mapping[str, torch.Tensor] = copy.deepcopy(module.state_dict())
        self.best_epoch = 0
        self.frozen_norms = samples_per_step(samples, plan.seed) < 8
        self.key = self._key(model)
        self.half = plan.half and _multiplies_half(device)

    def goes_on(self) -> bool:
        since = len(self.losses) - self.best_epoch
        patient = self.plan.patience is None or not self.held_out or since < self.plan.patience
        return len(self.losses) < self.plan.epochs and patient

    def run_epoch(self, advance: Callable[[], None], checkpoint: Path | None, remedy: str) -> None:
        self.module.train()
        for layer in self.module.modules():  # statistics of a handful of samples are worse than those that there are
            if self.frozen_norms and isinstance(layer, BATCH_NORMS):
                layer.eval()
        total = 0.0
        for inputs, labels in self.samples.epoch(self.generator):
            inputs, labels = _on(inputs, self.device), None if labels is None else labels.to(self.device)
            if self.plan.augment:
                inputs, labels = augment(inputs, labels, self.generator, self.plan.mixed)
            loss = self._loss(inputs, labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.module.parameters(), LARGEST_GRADIENT)
            if not (math.isfinite(float(loss.detach())) and math.isfinite(float(norm))):
                raise _diverged(len(self.losses), checkpoint, self.plan, remedy)
            self.optimizer.step()
            self.schedule.step()
            total += float(loss.detach())
            advance()
        self.module.eval()
        self.losses.append(total / max(self.samples.steps, 1))
        if self.samples.held_out:
            parts = (_on(x, self.device) for x in self.samples.held_out)
            self.held_out.append(distance(self.module, self.guide, parts))
        if not self.held_out or self.held_out[-1] <= min(self.held_out):
            self.best, self.best_epoch = copy.deepcopy(self.module.state_dict()), len(self.losses)

    def _loss(self, inputs: Tensors, labels: torch.Tensor | None) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            with torch.no_grad():
                wanted = self.guide(*inputs)
            got = self.module(*inputs)
        if self.half:
            wanted, got = _float(wanted), _float(got)
        loss = soft_divergence(got, wanted, self.plan.temperature)
        if self.pairs:
            parts = [_relative(student.value, teacher.value) for student, teacher in self.pairs]
            loss = loss + self.plan.features * torch.stack(parts).mean()
        if labels is not None and self.plan.labels and got[0].ndim == 2:
            loss = loss + self.plan.labels * F.cross_entropy(got[0], labels)
        return loss

    def save(self, path: Path) -> None:
        state = {
            "key": self.key,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "random": torch.random.get_rng_state(),
            "best": dict(self.best),
            "best_epoch": self.best_epoch,
            "losses": self.losses,
            "held_out": self.held_out,
        }
        content = io.BytesIO()  # torch.save tells a full disk by a RuntimeError
        torch.save(state, content)
        atomic_files.write(path, content.getvalue())

    def restore(self, path: Path, job: str) -> None:
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            key = state["key"]
        except Exception as error:  # whatever torch raises for a file that it did not write, and one of another form
            why = type(error).__name__ if "weights_only" in str(error) else reason(error)
            raise EdgeKitError(f"{path} is no checkpoint: {why}", "leave --resume out") from None
        if key != self.key:
            raise EdgeKitError(
                f"{path} is the checkpoint of another {job}",
                "give the model and the options it was started with, or leave --resume out",
            )
        try:
            self._take(state)
        except Exception as error:  # whatever its parts raise where they are damaged
            raise EdgeKitError(f"{path} is damaged: {reason(error)}", "leave --resume out") from None

    def _take(self, state: Mapping[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"].cpu())
        torch.random.set_rng_state(state["random"].cpu())
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.losses, self.held_out = state["losses"], state["held_out"]

    def _key(self, model: str) -> str:
        """Tells this training from others. Not by its samples: a user's loader may shuffle them."""
        shapes = {name: tuple(tensor.shape) for name, tensor in state_tensors(self.module).items()}
        return hashlib.sha256(repr((asdict(self.plan), shapes, self.samples.steps, model)).encode()).hexdigest()


def distance(module: nn.Module, reference: nn.Module, batches: Iterable[Tensors]) -> float:
    """Returns the mean `divergence` of the outputs of `module` from those of `reference` over `batches`."""
    with torch.no_grad():
        moved = [float(divergence(module(*inputs), reference(*inputs))) for inputs in batches]
    return sum(moved) / len(moved)


def _diverged(epoch: int, checkpoint: Path | None, plan: Plan, remedy: str) -> EdgeKitError:
    kept = f"; {checkpoint} holds the weights after epoch {epoch}" if checkpoint is not None and epoch else ""
    return EdgeKitError(
        f"the training diverged in epoch {epoch + 1}: its loss is no longer a number{kept}",
        f"give a lower --learning-rate than {plan.learning_rate:g}, or {remedy}",
    )


def soft_divergence(outputs: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], temperature: float) -> Any:
    """Returns `divergence` with classes softened by `temperature`, times its square: gradients keep their size."""
    total = torch.zeros((), device=reference[0].device)
    for a, b in zip(outputs, reference, strict=True):
        classes = b.ndim == 2 and b.shape[1] > 1 and b.is_floating_point()
        scale = temperature if classes else 1.0
        total = total + (scale**2 * divergence(a / scale, b / scale) if b.is_floating_point() else 0.0)
    return total


def _relative(value: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    value, reference = value.float(), reference.float()
    return (value - reference).square().mean() / reference.square().mean().clamp_min(1e-12)


def _float(tensors: Sequence[torch.Tensor]) -> Tensors:
    return tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors)


def _multiplies_half(device: torch.device) -> bool:
    """Whether the processor has units that multiply matrices of bfloat16: without them it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))


def augment(
    inputs: Tensors, labels: torch.Tensor | None, generator: torch.Generator, mixed: float = MIXED
) -> tuple[Tensors, torch.Tensor | None]:
    """Shifts images (N, C, H, W) by up to an eighth, mirrors every other one, and mixes a share of batches in pairs.

    Pairs are blended (https://arxiv.org/abs/1710.09412), or a window of one is put into the other
    (https://arxiv.org/abs/1905.04899). Inputs of any other rank, and several inputs, stay as they are. Mixed images
    have no labels.
    """
    images = inputs[0]
    if len(inputs) != 1 or images.ndim != 4 or min(images.shape[2:]) < SMALLEST_IMAGE or images.shape[1] > 4:
        return inputs, labels
    n, _, height, width = images.shape
    reach = height // 8, width // 8
    padded = F.pad(images, (reach[1], reach[1], reach[0], reach[0]), mode="reflect")
    rows = torch.randint(0, 2 * reach[0] + 1, (n, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(0, 2 * reach[1] + 1, (n, 1), generator=generator) + torch.arange(width)
    mirrored = torch.rand(n, generator=generator) < 0.5
    columns[mirrored] = columns[mirrored].flip(1)
    each = torch.arange(n)[:, None, None]
    moved = padded.movedim(1, -1)[each, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()
    drawn = float(torch.rand((), generator=generator))
    if drawn >= mixed:
        return (moved,), labels
    other = moved[torch.randperm(n, generator=generator)]
    if drawn < mixed / 2:
        share = torch.rand((n, 1, 1, 1), generator=generator).to(moved.device)
        return (share * moved + (1 - share) * other,), None
    window = _windows(n, height, width, generator).to(moved.device)
    return (torch.where(window, other, moved),), None


def _windows(count: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Masks (count, 1, height, width) of one window each anywhere, whose area is uniform from nothing to all."""
    side = torch.rand((count, 1), generator=generator).sqrt() / 2
    inside = []
    for size in (height, width):
        places = (torch.arange(size) + 0.5) / size
        inside.append((places - torch.rand((count, 1), generator=generator)).abs() < side)
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


@dataclass
class _Tap:
    """The last output of a block."""

    value: Any = None

    def __call__(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self.value = outputs


def _features(student: nn.Module, teacher: nn.Module, inputs: Tensors, stack: ExitStack) -> list[tuple[_Tap, _Tap]]:
    """Taps on the smallest blocks that were pruned inside, still compute, and give out what they gave before.

    Where a branch went, what is compared is the block around the one that lost it: the blocks before it make up for it.
    """
    left = dict(student.named_parameters())
    gone = [name for name, _ in teacher.named_parameters() if name not in left]
    changed = [name for name, parameter in left.items() if parameter.shape != teacher.get_parameter(name).shape]
    computing = {parent for name in left for parent in _parents(name)}
    blocks = {parent for name in (*changed, *gone) for parent in _parents(name)} & computing
    taps: dict[str, tuple[_Tap, _Tap]] = {}
    for name in sorted(blocks):
        pair = _Tap(), _Tap()
        for module, tap in zip((student, teacher), pair, strict=True):
            stack.callback(module.get_submodule(name).register_forward_hook(tap).remove)
        taps[name] = pair
    was = student.training
    with torch.no_grad():
        student.eval()(*inputs)
        teacher(*inputs)
    student.train(was)
    alike = {
        name
        for name, (a, b) in taps.items()
        if isinstance(a.value, torch.Tensor) and isinstance(b.value, torch.Tensor) and a.value.shape == b.value.shape
    }
    around = [{parent for parent in _parents(name) if parent in alike} for name in gone]
    shorter = {max(parents, key=len) for parents in around if parents}
    chosen = set(shorter)
    for name in changed:
        parents = [parent for parent in _parents(name) if parent in alike]
        if parents and not shorter & set(parents):
            chosen.add(parents[0])
    once = {
        id(taps[name][1].value): taps[name] for name in sorted(chosen)
    }  # a stage gives out what its last block does
    return list(once.values())


def _parents(name: str) -> list[str]:
    """The modules around a parameter, the innermost first, without the network itself and its wrapper."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 2, 1, -1)]


def _first(samples: Samples, seed: int) -> Tensors:
    return next(iter(samples.epoch(torch.Generator().manual_seed(seed))))[0]


def samples_per_step(samples: Samples, seed: int) -> int:
    """Returns how many samples one step sees."""
    first = _first(samples, seed)[0]
    return first.shape[0] if first.ndim else 1


def _on(inputs: Tensors, device: torch.device) -> Tensors:
    return tuple(tensor.to(device) for tensor in inputs)

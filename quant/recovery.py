"""RECOVER: fine-tuning a pruned network towards the outputs of the network that it came from.

The original is the teacher (https://arxiv.org/abs/1503.02531): softened classes, and the outputs of the blocks that
were pruned inside (https://arxiv.org/abs/1412.6550). Its answers to changed inputs are known as well, so images are
shifted, mirrored and mixed (https://arxiv.org/abs/2106.05237) whatever their labels mean.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from edgekit.errors import EdgeKitError
from edgekit.quant.pruning import divergence
from edgekit.quant.surgery import BATCH_NORMS, Tensors

LARGEST_GRADIENT = 5.0  # norm that longer gradients are cut to
SMALLEST_IMAGE = 16  # pixels: smaller ones are not shifted


@dataclass(frozen=True)
class Plan:
    """How a network is fine-tuned: AdamW under a one-cycle schedule.

    `labels`, `features` weigh cross-entropy and block outputs against the distillation of the outputs at
    `temperature`. `augment` changes images at random. With `patience`, training stops after so many epochs without a
    lower loss on the held-out samples.
    """

    epochs: int
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    temperature: float = 3.0
    features: float = 1.0
    labels: float = 0.0
    augment: bool = True
    patience: int | None = None
    seed: int = 0


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


class Samples(Protocol):
    """Training samples: `epoch` gives shuffled batches of inputs and labels; `held_out` is never trained on."""

    @property
    def steps(self) -> int:
        """How many batches an epoch has."""
        ...

    @property
    def held_out(self) -> Sequence[Tensors]:
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
) -> Recovered:
    """Fine-tunes a copy of `student` towards `teacher`; calls `advance` after each step.

    Runs on the GPU where there is one. After each epoch `checkpoint` holds all that `resume` needs to go on. Raises
    EdgeKitError where the loss is no longer a number: the checkpoint then holds the last good epoch.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rng = torch.random.get_rng_state()
    torch.manual_seed(plan.seed)
    module = copy.deepcopy(student).to(device)
    guide = copy.deepcopy(teacher).to(device).eval().requires_grad_(False)
    module.requires_grad_(True)
    try:
        with ExitStack() as stack:
            training = _Training(module, guide, samples, plan, device, stack)
            if resume and checkpoint is not None and checkpoint.is_file():
                training.restore(checkpoint)
            while training.goes_on():
                training.run_epoch(advance, checkpoint)
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
        self, module: nn.Module, guide: nn.Module, samples: Samples, plan: Plan, device: torch.device, stack: ExitStack
    ) -> None:
        self.module, self.guide, self.samples, self.plan, self.device = module, guide, samples, plan, device
        self.pairs = _features(module, guide, _on(_first(samples, plan.seed), device), stack)
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

    def goes_on(self) -> bool:
        since = len(self.losses) - self.best_epoch
        patient = self.plan.patience is None or not self.held_out or since < self.plan.patience
        return len(self.losses) < self.plan.epochs and patient

    def run_epoch(self, advance: Callable[[], None], checkpoint: Path | None) -> None:
        self.module.train()
        for layer in self.module.modules():  # statistics of a handful of samples are worse than those that there are
            if self.frozen_norms and isinstance(layer, BATCH_NORMS):
                layer.eval()
        total = 0.0
        for inputs, labels in self.samples.epoch(self.generator):
            inputs, labels = _on(inputs, self.device), None if labels is None else labels.to(self.device)
            if self.plan.augment:
                inputs, labels = augment(inputs, labels, self.generator)
            loss = self._loss(inputs, labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.module.parameters(), LARGEST_GRADIENT)
            if not (math.isfinite(float(loss.detach())) and math.isfinite(float(norm))):
                raise _diverged(len(self.losses), checkpoint, self.plan)
            self.optimizer.step()
            self.schedule.step()
            total += float(loss.detach())
            advance()
        self.module.eval()
        self.losses.append(total / max(self.samples.steps, 1))
        if self.samples.held_out:
            with torch.no_grad():
                parts = [_on(x, self.device) for x in self.samples.held_out]
                moved = [float(divergence(self.module(*x), self.guide(*x))) for x in parts]
            self.held_out.append(sum(moved) / len(moved))
        if not self.held_out or self.held_out[-1] <= min(self.held_out):
            self.best, self.best_epoch = copy.deepcopy(self.module.state_dict()), len(self.losses)

    def _loss(self, inputs: Tensors, labels: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():
            wanted = self.guide(*inputs)
        got = self.module(*inputs)
        loss = soft_divergence(got, wanted, self.plan.temperature)
        if self.pairs and self.plan.features:
            parts = [_relative(student.value, teacher.value) for student, teacher in self.pairs]
            loss = loss + self.plan.features * torch.stack(parts).mean()
        if labels is not None and self.plan.labels and got[0].ndim == 2:
            loss = loss + self.plan.labels * F.cross_entropy(got[0], labels)
        return loss

    def save(self, path: Path) -> None:
        state = {
            "key": self._key(),
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
        partial = path.with_name(f"{path.name}.partial")
        torch.save(state, partial)
        partial.replace(path)

    def restore(self, path: Path) -> None:
        import pickle

        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise EdgeKitError(f"{path} is no checkpoint: {str(error).splitlines()[0]}", "leave --resume out") from None
        if state["key"] != self._key():
            raise EdgeKitError(
                f"{path} is the checkpoint of another pruning",
                "give the options it was started with, or leave --resume out",
            )
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"].cpu())
        torch.random.set_rng_state(state["random"].cpu())
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.losses, self.held_out = state["losses"], state["held_out"]

    def _key(self) -> str:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.module.state_dict().items()}
        return hashlib.sha256(repr((asdict(self.plan), shapes, self.samples.steps)).encode()).hexdigest()


def _diverged(epoch: int, checkpoint: Path | None, plan: Plan) -> EdgeKitError:
    kept = f"; {checkpoint} holds the weights after epoch {epoch}" if checkpoint is not None and epoch else ""
    return EdgeKitError(
        f"the training diverged in epoch {epoch + 1}: its loss is no longer a number{kept}",
        f"give a lower --learning-rate than {plan.learning_rate:g}, or a lower --ratio",
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
    return (value - reference).square().mean() / reference.square().mean().clamp_min(1e-12)


def augment(
    inputs: Tensors, labels: torch.Tensor | None, generator: torch.Generator
) -> tuple[Tensors, torch.Tensor | None]:
    """Shifts images (N, C, H, W) by up to an eighth, mirrors every other one, and mixes every other batch in pairs.

    Inputs of any other rank, and several inputs, stay as they are. Mixed images have no labels.
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
    if float(torch.rand((), generator=generator)) < 0.5:
        return (moved,), labels
    share = torch.rand((n, 1, 1, 1), generator=generator).to(moved.device)
    other = torch.randperm(n, generator=generator)
    return (share * moved + (1 - share) * moved[other],), None


@dataclass
class _Tap:
    """The last output of a block."""

    value: Any = None

    def __call__(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self.value = outputs


def _features(student: nn.Module, teacher: nn.Module, inputs: Tensors, stack: ExitStack) -> list[tuple[_Tap, _Tap]]:
    """Taps on the smallest blocks that were pruned inside and still give out what they gave before."""
    changed = [
        name for name, parameter in student.named_parameters() if parameter.shape != teacher.get_parameter(name).shape
    ]
    blocks = {parent for name in changed for parent in _parents(name)}
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
    parents = (next((parent for parent in _parents(name) if parent in alike), None) for name in changed)
    return [taps[name] for name in sorted({parent for parent in parents if parent is not None})]


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

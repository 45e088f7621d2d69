"""What a pruning is asked for: values from the command line and from Python, checked before any work is done."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgekit import targets
from edgekit.errors import EdgeKitError, UsageError
from edgekit.types import SUFFIXES

if TYPE_CHECKING:
    from edgekit.compression.finetuning import UserTraining
    from edgekit.quant.pruning.masks import Pattern

SCHEDULES = ("one-shot", "cubic")
STEPS = 4  # of the cubic schedule
ROUND_TO = 8
UNITS = {"latency": {"x": 1.0, "us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}, "size": {"x": 1.0, "kB": 1e3, "MB": 1e6}}
EXAMPLES = {"latency": "--target-latency 0.6x (of the original's) or 5ms", "size": "--target-size 0.5x or 800kB"}


@dataclass(frozen=True)
class Limit:
    """What a file may take at most: a share of the original's latency or size, or so many ms or bytes."""

    kind: Literal["latency", "size"]
    value: float
    relative: bool
    text: str

    def allowed(self, original: float) -> float:
        """Returns what a file may take whose original takes `original`."""
        return self.value * original if self.relative else self.value

    @property
    def what(self) -> str:
        """The limit in words."""
        return f"{self.text} of the original's {self.kind}" if self.relative else f"a {self.kind} of {self.text}"


@dataclass(frozen=True)
class Wanted:
    """The files that are exported and measured: formats, precision, and where and how they run."""

    formats: tuple[str, ...]
    precision: str
    device: str
    threads: int
    timeout: float | None


@dataclass(frozen=True)
class Options:
    """What `prune` was asked for, checked; see there.

    One of `ratio`, `limit` and `pattern` is given. `files` is None where none are exported; `round_to` where the
    search tries several; `steps` is 1 for the schedule that takes all at once.
    """

    ratio: float | None
    limit: Limit | None
    pattern: Pattern | None
    method: str
    allocation: str
    round_to: int | None
    steps: int
    epochs: int | None
    finetune: UserTraining | None
    files: Wanted | None
    plan: Mapping[str, Any]


def check(
    *,
    ratio: float | None,
    target_latency: str | None,
    target_size: str | None,
    sparsity: str | float | None,
    block: str | None,
    method: str | None,
    allocation: str | None,
    schedule: str,
    steps: int | None,
    epochs: int | None,
    finetune: Any,
    round_to: int | None,
    formats: str | Sequence[str] | None,
    precision: str | None,
    device: str,
    threads: int,
    timeout: float | None,
    resume: bool,
    has_data: bool,
    plan: Mapping[str, Any],
) -> Options:
    """Fills in what was not given; raises EdgeKitError for values that are unknown, out of range or lack data."""
    from edgekit.quant.pruning import allocation as pruning
    from edgekit.quant.pruning import masks, saliency

    given = {"--ratio": ratio, "--target-latency": target_latency, "--target-size": target_size, "--sparsity": sparsity}
    asked = [name for name, value in given.items() if value is not None]
    if len(asked) != 1:
        raise EdgeKitError(
            f"{' and '.join(asked)} ask for different things" if asked else "nothing says how much is to go",
            f"give exactly one of {', '.join(given)}",
        )
    pattern = masks.parse(sparsity, block) if sparsity is not None else None
    if block is not None and pattern is None:
        raise EdgeKitError("--block is the shape of what --sparsity takes out", "give --sparsity 0.8 too")
    method = method or ("wanda" if has_data else "l1" if pattern else "l2")
    allocation = allocation or ("sensitivity" if has_data and pattern is None else "global")
    known = masks.METHODS if pattern else saliency.METHODS
    pruning.check(0.5 if ratio is None else ratio, method, allocation, known)
    needs = ((method, method in saliency.NEED_DATA), (allocation, allocation == "sensitivity"))
    lacking = [word for word, reads in needs if reads] + (["fine-tuning"] if epochs or finetune is not None else [])
    if not has_data and lacking:
        raise EdgeKitError(
            f"{lacking[0]} reads samples, and none are given",
            "add --data with some hundred real samples, or choose --method l2 --allocation global and no --epochs",
        )
    _check_training(epochs, finetune, resume, plan)
    if round_to is not None and round_to < 1:
        raise EdgeKitError(f"channels cannot be rounded to {round_to}", "give 1 or more: --round-to 8")
    limit = None
    if target_latency is not None or target_size is not None:
        limit = parse_limit("latency" if target_latency is not None else "size", target_latency or target_size or "")
    exports = formats is not None or precision is not None or limit is not None or pattern is not None
    return Options(
        ratio,
        limit,
        pattern,
        method,
        allocation,
        round_to if limit else round_to or ROUND_TO,
        _steps(schedule, steps, limit, pattern),
        epochs,
        _training(finetune),
        _files(formats, precision, device, threads, timeout, has_data) if exports else None,
        plan,
    )


def _training(finetune: Any) -> UserTraining | None:
    from edgekit.compression import finetuning

    return None if finetune is None else finetuning.find(finetune)


def _check_training(epochs: int | None, finetune: Any, resume: bool, plan: Mapping[str, Any]) -> None:
    if epochs is not None and epochs < 0:
        raise EdgeKitError(f"{epochs} epochs cannot be trained", "give 0 or more: --epochs 20")
    rate = plan["learning_rate"]
    if rate is not None and not 0 < rate < float("inf"):
        raise EdgeKitError(f"a learning rate of {rate:g} trains nothing", "give one above 0: --learning-rate 0.003")
    if finetune is None:
        return
    for name, value in (("--epochs", epochs), ("--learning-rate", rate), ("--patience", plan["patience"])):
        if value is not None:
            raise EdgeKitError(f"{name} is for EdgeKit's own training, not for --finetune", "leave one of the two out")
    if resume:
        raise EdgeKitError("--resume goes on with EdgeKit's own training, not with --finetune", "leave --resume out")


def _steps(schedule: str, steps: int | None, limit: Limit | None, pattern: Pattern | None) -> int:
    if schedule not in SCHEDULES:
        raise UsageError(f"unknown schedule '{schedule}'", f"choose one of {', '.join(SCHEDULES)}")
    if schedule == "one-shot":
        if steps not in (None, 1):
            raise EdgeKitError(f"the schedule one-shot has one step, not {steps}", "add --schedule cubic")
        return 1
    if limit is not None:
        raise EdgeKitError(
            "the schedule cubic goes step by step to a known end, and a target has to be searched for first",
            "search with --target-… once, then give the --ratio and --round-to that it found with --schedule cubic",
        )
    if pattern is not None and pattern.stay is not None:
        raise EdgeKitError(f"there are no steps on the way to {pattern}", "leave --schedule out")
    if steps is not None and steps < 2:
        raise EdgeKitError(f"the schedule cubic cannot have {steps} steps", "give 2 or more: --steps 4")
    return steps or STEPS


def _files(
    formats: str | Sequence[str] | None,
    precision: str | None,
    device: str,
    threads: int,
    timeout: float | None,
    has_data: bool,
) -> Wanted:
    names = targets.Target(tuple(SUFFIXES), "fp32", "local", "what is measured here")
    chosen = targets.find_precision(precision or names.precision)
    if targets.PRECISIONS[chosen] and not has_data:
        raise EdgeKitError(f"{chosen} needs data to calibrate on", "add --data, or choose --precision fp16")
    return Wanted(targets.find_formats(formats, names), chosen, device, threads, timeout)


def parse_limit(kind: Literal["latency", "size"], text: str) -> Limit:
    """Reads `0.6x` of the original's, `5ms` or `800kB`; raises EdgeKitError for anything else."""
    units = UNITS[kind]
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([A-Za-zµ]+)", str(text).strip())
    if not found or found[2] not in units or not float(found[1]):
        raise EdgeKitError(f"cannot read the {kind} '{text}'", f"write {EXAMPLES[kind]}")
    value = float(found[1]) * units[found[2]]
    if found[2] == "x" and value >= 1:
        raise EdgeKitError(f"{text} of the original's {kind} is no less than it takes", f"write {EXAMPLES[kind]}")
    return Limit(kind, value, found[2] == "x", found[0])

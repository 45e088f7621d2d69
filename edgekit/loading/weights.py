"""Find the weights in what a file holds, and put them into the network they belong to."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekit.errors import EdgeKitError
from edgekit.screening.unpickle import Inert
from edgekit.util.user_code import UserCode, running

if TYPE_CHECKING:
    import torch

# Where training scripts put the weights in a checkpoint, the commonest first; averaged weights after the plain ones.
CHECKPOINT_KEYS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "net_state_dict", "network", "weights", "params",
    "module", "ema", "ema_state_dict", "model_ema", "state_dict_ema", "ema_model", "params_ema", "teacher", "student",
    "backbone", "encoder", "generator",
)  # fmt: skip
_FACTORY = re.compile(r"((build|create|make|get|new)_\w*|\w*_?(model|net|network))", re.IGNORECASE)
# What DataParallel, torch.compile, Lightning and averaging put before a name. Under these alone may a file hold
# more than the model (a loss, a counter); anywhere else a model would be filled with a part of another one.
_WRAPPERS = frozenset({"module", "_orig_mod", "model", "net", "network", "ema"})
# What wrappers put inside names, at any depth: by torch's own wrappers alone first, as a class may call a part `model`.
_TORCH_WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_forward_module", "_checkpoint_wrapped_module"}
)
_INSIDE: tuple[frozenset[str], ...] = (
    frozenset(),
    _TORCH_WRAPPERS,
    _TORCH_WRAPPERS | {"module"},
    _TORCH_WRAPPERS | {"module", "model", "net", "network"},
)
_TRAINING = re.compile(r"optim|sched|scaler", re.IGNORECASE)  # keys under which tensors are no weights
_EXTRA = "_extra_state"  # what a module's own get_extra_state gave: anything, be it no tensor
_DEPTH = 4  # levels of a checkpoint in which weights are looked for
_SHOWN = 4

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """One way to read the weights in a checkpoint: tensors by name, and where they lie in it."""

    weights: dict[str, Any]
    path: KeyPath = ()


@dataclass(frozen=True)
class Checkpoint:
    """The readings of a file's content, the likeliest first, and the content itself, to tell what one leaves aside."""

    readings: tuple[Reading, ...]
    content: Mapping[Any, Any]

    def notes(self, chosen: Reading) -> list[str]:
        """Returns what was taken, and everything that was not: other weights, and the rest."""
        node: Any = self.content
        others: list[str] = []
        ignored: list[str] = []
        for depth in range(len(chosen.path) + 1):
            inside = chosen.path[depth : depth + 1]
            for key, value in node.items():
                name = ".".join((*chosen.path[:depth], str(key)))
                if str(key) in inside or (depth == len(chosen.path) and _is_taken(str(key), value, chosen)):
                    continue
                (others if _has_weights(key, value) else ignored).append(name)
            node = node[inside[0]] if inside else node
        notes = []
        if chosen.path:
            aside = f", not {_some(list(map(repr, others)), 8)}" if others else ""
            notes.append(f"took the weights under {'.'.join(chosen.path)!r}{aside}")
        elif others:
            notes.append(f"ignored beside the weights: {_some(others, 8)}")
        if ignored:
            notes.append(f"ignored in the checkpoint: {_some(ignored, 8)}")
        return notes


def find_weights(loaded: Any, what: str) -> tuple[str, torch.nn.Module | Checkpoint, list[str]]:
    """Form (`module`, `state_dict`, `checkpoint`), the module or the readings of its tensors, and notes on a module.

    A mapping of names to tensors is a state_dict; any other mapping is read as the entries under the usual keys, as any
    other entry that holds weights, and as a whole whose parts lie under keys of their own. Raises EdgeKitError where
    there are no weights.
    """
    from torch import nn

    if isinstance(loaded, nn.Module):
        return "module", loaded, []
    if not isinstance(loaded, Mapping):
        raise EdgeKitError(
            f"{what} holds a {type(loaded).__name__}, not a model or its weights", "save model.state_dict()"
        )
    if _is_state_dict(loaded):
        return "state_dict", Checkpoint((Reading(_tensors(loaded)),), loaded), []
    usual = [k for k in CHECKPOINT_KEYS if k in loaded and _has_weights(k, loaded[k])]
    first = next(iter(usual), None)
    if first is not None and isinstance(loaded[first], nn.Module):
        held = Checkpoint((), loaded)
        return "checkpoint", loaded[first], held.notes(Reading({}, (first,)))
    modules = [k for k, v in loaded.items() if isinstance(v, nn.Module)]
    if first is None and len(modules) == 1:
        return "checkpoint", loaded[modules[0]], Checkpoint((), loaded).notes(Reading({}, (str(modules[0]),)))
    readings = tuple(sorted(_readings(loaded), key=_likelihood))
    if not readings:
        raise EdgeKitError(
            f"{what} holds no weights: its keys are {_some(list(map(str, loaded)))}", "save model.state_dict()"
        )
    form = "state_dict" if all(not reading.path for reading in readings) else "checkpoint"
    return form, Checkpoint(readings, loaded), []


def _readings(node: Mapping[Any, Any], path: KeyPath = ()) -> Iterator[Reading]:
    """Every part of a checkpoint that holds weights, and the whole of it, each with names from there on."""
    weights = _tensors(node)
    if weights:
        yield Reading(weights, path)
    for key, value in node.items():
        if isinstance(key, str) and isinstance(value, Mapping) and _has_weights(key, value) and len(path) < _DEPTH:
            yield from _readings(value, (*path, key))


def _likelihood(reading: Reading) -> tuple[int, list[int], int]:
    """Sorts readings: entries of the usual keys before others, and the whole of a mapping after its entries."""
    order = {key: number for number, key in enumerate(CHECKPOINT_KEYS)}
    ranks = [order.get(key, len(order)) for key in reading.path]
    return (0 if ranks else 1, ranks + [len(order)] * (_DEPTH + 1 - len(ranks)), -len(reading.path))


def _has_weights(key: Any, value: Any) -> bool:
    """Whether an entry of a checkpoint holds a module or tensors by name; what an optimizer keeps does not count."""
    import torch

    if isinstance(value, torch.nn.Module):
        return True
    return not _TRAINING.search(str(key)) and isinstance(value, Mapping) and any(True for _ in _tensors(value))


def _is_taken(key: str, value: Any, chosen: Reading) -> bool:
    """Whether all of an entry beside others is part of a reading."""
    if isinstance(value, Mapping):
        return any(name.startswith(f"{key}.") for name in chosen.weights)
    return key in chosen.weights


def _is_state_dict(value: Mapping[Any, Any]) -> bool:
    import torch

    tensors = sum(isinstance(v, torch.Tensor) for v in value.values())
    rest = [k for k, v in value.items() if not isinstance(v, torch.Tensor) and not str(k).endswith(_EXTRA)]
    return tensors > 0 and not rest and all(isinstance(k, str) for k in value)


def _tensors(value: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """The tensors in a mapping and in the mappings inside it, by their dotted names; extra state is kept as it is."""
    import torch

    found: dict[str, Any] = {}
    for key, item in value.items():
        if not isinstance(key, str) or (_TRAINING.search(key) and isinstance(item, Mapping)):
            continue
        if isinstance(item, torch.Tensor) or key.endswith(_EXTRA):
            found[prefix + key] = item
        elif isinstance(item, Mapping) and depth < _DEPTH:
            found |= _tensors(item, f"{prefix}{key}.", depth + 1)
    return found if any(isinstance(item, torch.Tensor) for item in found.values()) else {}


def build(code: UserCode) -> torch.nn.Module:
    """The module that `code` names: a class or function without required arguments, or a module object."""
    from torch import nn

    if code.name is not None:
        return _construct(code, code.name, code.get())
    classes = _classes(code)
    ready = [name for name, cls in classes.items() if not _required(cls)]
    if len(ready) == 1:
        return _construct(code, ready[0], classes[ready[0]])
    objects = [k for k, v in vars(code.module).items() if isinstance(v, nn.Module)]
    names = ready or list(classes) or objects or list(_factories(code))
    raise EdgeKitError(
        f"{code.text} does not say which model to take" if names else f"{code.text} defines no torch.nn.Module",
        f"name one: {', '.join(f'{code.text}:{n}' for n in names[:6])}" if names else "name a class or a function",
    )


def fit(code: UserCode, checkpoint: Checkpoint, what: str, pruned: bool = False) -> tuple[torch.nn.Module, list[str]]:
    """The module of `code` with the weights loaded, and notes. For `pruned` weights its layers lose channels first.

    Without a name in `code`, the class whose parameter names and shapes are those of the weights is taken; functions
    called like a factory (`build_…`, `…_model`) are tried where no class fits.
    """
    if code.name is not None:
        module = build(code)
        return module, _filled(module, checkpoint, what, code.name, pruned)
    tried: dict[str, torch.nn.Module] = {}
    needy: list[str] = []
    for group in (_classes(code), _factories(code)):
        for name, maker in group.items():
            if _required(maker):
                needy.append(f"{name} (needs {', '.join(_required(maker))})")
                continue
            tried[name] = _construct(code, name, maker)
            if pruned:
                _narrow(tried[name], checkpoint.readings[0].weights)
        for unused in (False, True):  # a class that uses all of the weights is the better one
            fitting = [name for name, module in tried.items() if _fitting(module, checkpoint, unused) is not None]
            if len(fitting) == 1:
                return tried[fitting[0]], _filled(tried[fitting[0]], checkpoint, what, fitting[0])
            if fitting:
                raise EdgeKitError(
                    f"the weights in {what} fit several models of {code.text}: {', '.join(fitting)}",
                    f"name one: --code {code.text}:{fitting[0]}",
                )
    if not tried:
        raise EdgeKitError(
            f"{code.text} has no model that can be made without arguments" + (f": {', '.join(needy)}" if needy else ""),
            f"write a function that returns the model, and name it: --code {code.text}:make_model",
        )
    best = max(tried, key=lambda name: max(len(_match(tried[name], r.weights).found) for r in checkpoint.readings))
    try:
        return tried[best], _filled(tried[best], checkpoint, what, best)
    except EdgeKitError as error:
        others = [n for n in tried if n != best] + needy
        more = f" (also tried: {', '.join(others)})" if others else ""
        raise EdgeKitError(error.what + more, error.help) from None


def _filled(module: torch.nn.Module, checkpoint: Checkpoint, what: str, name: str, pruned: bool = False) -> list[str]:
    """Load the reading that fits `module` into it; returns notes on what was taken and what was not."""
    if pruned:
        _narrow(module, checkpoint.readings[0].weights)
    chosen = next((c for c in (_fitting(module, checkpoint, u) for u in (False, True)) if c is not None), None)
    if chosen is None:
        sets = [r.path[0] for r in checkpoint.readings if len(r.path) == 1]
        if len(sets) > 1 and not set(sets) & set(CHECKPOINT_KEYS):
            raise EdgeKitError(
                f"{what} holds several sets of weights: {', '.join(map(repr, sets))}, and none of them, nor all "
                f"together, are those of {name}",
                "save the one you mean by itself, torch.save(checkpoint[...], path), or name another class with --code",
            )
        chosen = max(checkpoint.readings, key=lambda reading: len(_match(module, reading.weights).found))
    return [*checkpoint.notes(chosen), *fill(module, chosen.weights, what, name)]


def _fitting(module: torch.nn.Module, checkpoint: Checkpoint, unused: bool) -> Reading | None:
    """The likeliest reading that gives `module` all of its weights, where `unused` with some left over."""
    own = module.state_dict()
    for reading in checkpoint.readings:
        match = _match(module, reading.weights)
        if match.is_whole(own) and (not match.unused or (unused and match.may_leave(own))):
            return reading
    return None


@dataclass(frozen=True)
class Match:
    """The weights of a file under the names of a module.

    `found` are those of its own names; `prefix` and `wrappers` were taken off the file's names; `outside` lies beside
    that prefix, and `unused` under names that the module has not.
    """

    found: dict[str, Any]
    prefix: str
    wrappers: tuple[str, ...]
    outside: tuple[str, ...]
    unused: tuple[str, ...]

    def is_whole(self, own: Mapping[str, Any]) -> bool:
        """Whether every weight of the module is found in its shape."""
        return not _missing(own, self.found) and all(
            _lazy(own[k]) or own[k].shape == v.shape for k, v in self.found.items() if hasattr(own[k], "shape")
        )

    def may_leave(self, own: Mapping[str, Any]) -> bool:
        """Whether what is unused can be for training alone: parts of its own, beside those of the model.

        Inside a part of the model (`block.gamma`, a sixth layer of five) it would change what the model computes, and
        more than the model itself would be another model.
        """
        heads = {name.partition(".")[0] for name in own}
        parts = {name.partition(".")[0] for name in self.unused if not _AUXILIARY.search(name)}
        return len(self.unused) <= len(self.found) and not parts & heads and not any(map(str.isdecimal, parts))


_AUXILIARY = re.compile(r"(^|\.)aux(iliary)?(_?\d+|_\w+)?\.", re.IGNORECASE)  # heads that training alone reads


def _missing(own: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """The weights of a module that are not found; counters of batches, which inference never reads, may be missing."""
    tensors = [name for name, value in own.items() if hasattr(value, "shape")]
    return [name for name in tensors if name not in found and not name.endswith("num_batches_tracked")]


def fill(module: torch.nn.Module, weights: dict[str, Any], what: str, name: str) -> list[str]:
    """Load the weights into `module`, wrappers taken off their names; returns notes.

    Raises EdgeKitError with some of the missing and unexpected names, or of the shapes that differ.
    """
    own = module.state_dict()
    match = _match(module, weights)
    differ = [
        f"{k} is {list(v.shape)} in the file, {list(own[k].shape)} in {name}"
        for k, v in match.found.items()
        if hasattr(own[k], "shape") and not _lazy(own[k]) and own[k].shape != v.shape
    ]
    if differ:
        raise EdgeKitError(
            f"the weights in {what} have other shapes than {name}: {'; '.join(differ[:_SHOWN])}"
            + (f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""),
            "make the model with the arguments it was trained with, in a function that --code names",
        )
    missing = _missing(own, match.found)
    unexpected = [] if match.may_leave(own) and not missing else list(match.unused)
    if missing or unexpected:
        parts = [f"missing: {_some(missing)}"] if missing else []
        parts += [f"unexpected: {_some(unexpected)}"] if unexpected else []
        raise EdgeKitError(
            f"the weights in {what} are not those of {name}: {'; '.join(parts)}", "name another class with --code"
        )
    try:
        module.load_state_dict(match.found, strict=False)
    except Exception as error:
        raise EdgeKitError(
            f"the weights in {what} do not load into {name}: {str(error).splitlines()[-1].strip()}"
        ) from error
    notes = [f"prefix {match.prefix!r} taken off the names of the weights"] if match.prefix else []
    if match.wrappers:
        notes.append(f"wrappers taken out of the names of the weights: {', '.join(match.wrappers)}")
    if match.outside:
        notes.append(f"ignored beside the model's weights: {_listed(match.outside)}")
    if match.unused:
        notes.append(f"{name} has no place for {_listed(match.unused)}: taken for parts of the training")
    lost = [k for k in own if k.endswith(_EXTRA) and k not in match.found]
    return [*notes, f"the file has no {_listed(lost)}: as {name} makes it"] if lost else notes


def _match(module: torch.nn.Module, weights: Mapping[str, Any]) -> Match:
    """The weights under the names that `module` uses: the fewest wrappers are taken out with which most are found."""
    own = module.state_dict()
    found = [match for inside in _INSIDE if (match := _match_without(own, weights, inside)) is not None]
    return max(found, key=lambda match: (len(match.found), -len(match.unused)))


def _match_without(own: Mapping[str, Any], weights: Mapping[str, Any], inside: frozenset[str]) -> Match | None:
    """The match of names without the segments `inside`, in the file and in the module; None where two become one."""
    mine = {_without(name, inside): name for name in own}
    theirs = {_without(name, inside): name for name in weights}
    if len(mine) < len(own) or len(theirs) < len(weights):
        return None
    ends = {name.rpartition(".")[2] for name in mine}
    prefixes = {""}
    for name in theirs:
        parts = name.split(".")
        if parts[-1] in ends:
            prefixes |= {".".join(parts[:i]) + "." for i in range(1, min(len(parts), 5))}

    def plausible(prefix: str) -> bool:
        return set(prefix[:-1].split(".")) <= _WRAPPERS or all(name.startswith(prefix) for name in theirs)

    def count(prefix: str) -> int:
        return sum(prefix + name in theirs for name in mine)

    prefix = max(sorted(filter(plausible, prefixes), key=lambda p: (len(p), p)), key=count)
    under = {name.removeprefix(prefix): theirs[name] for name in theirs if name.startswith(prefix)}
    found = {mine[name]: weights[full] for name, full in under.items() if name in mine}
    removed = {part for name, full in under.items() if name in mine for part in full.split(".") if part in inside}
    removed -= {part for name in found for part in name.split(".")}
    return Match(
        {name: value for name, value in found.items() if not _is_stand_in(value)},
        prefix,
        tuple(sorted(removed)),
        tuple(full for name, full in theirs.items() if not name.startswith(prefix)),
        tuple(name for name in under if name not in mine),
    )


def _without(name: str, segments: frozenset[str]) -> str:
    *parts, last = name.split(".")
    return ".".join([*(part for part in parts if part not in segments), last])


def _is_stand_in(value: Any) -> bool:
    """Whether an extra state is made of what no file may ask for: the module keeps its own then."""
    return isinstance(value, Inert)


def _listed(names: Sequence[str], most: int = 8) -> str:
    """The names of whole parts: `head.*` for several weights under `head`."""
    parts = [name.partition(".")[0] for name in names]
    shown = list(dict.fromkeys(f"{p}.*" if parts.count(p) > 1 else n for p, n in zip(parts, names, strict=True)))
    return _some(shown, most)


def _narrow(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    from edgekit.quant.pruning.surgery import narrow

    narrow(module, weights)


def _lazy(tensor: Any) -> bool:
    from torch.nn.parameter import is_lazy

    return bool(is_lazy(tensor))


def _classes(code: UserCode) -> dict[str, Any]:
    from torch import nn

    found = {k: v for k, v in vars(code.module).items() if isinstance(v, type) and issubclass(v, nn.Module)}
    own = {k: v for k, v in found.items() if v.__module__ == code.module.__name__}
    return own or {k: v for k, v in found.items() if not v.__module__.startswith("torch.")}


def _factories(code: UserCode) -> dict[str, Any]:
    """Functions of the code that say by name or annotation that they return a model; no others are called unasked."""
    from torch import nn

    def returns_module(function: Any) -> bool:
        annotation = getattr(function, "__annotations__", {}).get("return")
        named = isinstance(annotation, str) and annotation.endswith("Module")
        return named or (isinstance(annotation, type) and issubclass(annotation, nn.Module))

    functions = {k: v for k, v in vars(code.module).items() if inspect.isfunction(v)}
    own = {k: v for k, v in functions.items() if v.__module__ == code.module.__name__ and not k.startswith("_")}
    return {k: v for k, v in own.items() if _FACTORY.fullmatch(k) or returns_module(v)}


def _required(maker: Any) -> list[str]:
    try:
        parameters = inspect.signature(maker).parameters.values()
    except (TypeError, ValueError):
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def _construct(code: UserCode, name: str, maker: Any) -> torch.nn.Module:
    from torch import nn

    if isinstance(maker, nn.Module):
        return maker
    if not callable(maker):
        raise EdgeKitError(
            f"{code.text} is a {type(maker).__name__}", "name a class or a function that returns a model"
        )
    if _required(maker):
        raise EdgeKitError(
            f"{name} in {code.text} needs arguments: {', '.join(_required(maker))}",
            "write a function without arguments that returns the model, and name it instead",
        )
    with running(f"{name}()", code.folder):
        made = maker()
    if not isinstance(made, nn.Module):
        raise EdgeKitError(f"{name}() in {code.text} returned a {type(made).__name__}, not a torch.nn.Module")
    return made


def _some(names: list[str], most: int = _SHOWN) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

"""Find the weights in what a file holds, and put them into the network they belong to."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgekit.code import UserCode, running
from edgekit.errors import EdgeKitError

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
_SHOWN = 4


def find_weights(loaded: Any, what: str) -> tuple[str, torch.nn.Module | dict[str, torch.Tensor], list[str]]:
    """Form (`module`, `state_dict`, `checkpoint`), the module or its tensors by name, and notes on what was left aside.

    A mapping of names to tensors is a state_dict; in any other mapping the usual keys are looked through, then the only
    entry that holds weights. Raises EdgeKitError where there are none or several of equal standing.
    """
    from torch import nn

    if isinstance(loaded, nn.Module):
        return "module", loaded, []
    if not isinstance(loaded, Mapping):
        raise EdgeKitError(
            f"{what} holds a {type(loaded).__name__}, not a model or its weights", "save model.state_dict()"
        )
    if _is_state_dict(loaded):
        return "state_dict", _tensors(loaded), []
    holders = {k: inner for k, v in loaded.items() if (inner := _weights_in(v)) is not None}
    usual = [k for k in CHECKPOINT_KEYS if k in holders]
    chosen = usual or list(holders)
    if not usual and len(holders) > 1:
        raise EdgeKitError(
            f"{what} holds several sets of weights: {', '.join(map(repr, holders))}",
            "save the one you mean by itself: torch.save(checkpoint[...], path)",
        )
    if chosen:
        key = chosen[0]
        others = [k for k in holders if k != key]
        notes = [f"took the weights under {key!r}" + (f", not {', '.join(map(repr, others))}" if others else "")]
        ignored = [str(k) for k in loaded if k not in holders]
        if ignored:
            notes.append(f"ignored in the checkpoint: {', '.join(ignored[:8])}")
        return "checkpoint", holders[key], notes
    tensors = _tensors(loaded)
    if tensors:
        ignored = [str(k) for k in loaded if k not in tensors]
        return "state_dict", tensors, [f"ignored beside the weights: {', '.join(ignored[:8])}"]
    raise EdgeKitError(
        f"{what} holds no weights: its keys are {_some(list(map(str, loaded)))}", "save model.state_dict()"
    )


def _weights_in(value: Any) -> Any:
    """A module or a state_dict, be it one level down (`{"model": {"state_dict": …}}`); None if there is none."""
    from torch import nn

    if isinstance(value, nn.Module):
        return value
    if not isinstance(value, Mapping):
        return None
    if _is_state_dict(value):
        return _tensors(value)
    inner = [k for k in CHECKPOINT_KEYS if isinstance(value.get(k), Mapping) and _is_state_dict(value[k])]
    return _tensors(value[inner[0]]) if inner else None


def _is_state_dict(value: Mapping[Any, Any]) -> bool:
    import torch

    tensors = sum(isinstance(v, torch.Tensor) for v in value.values())
    rest = [k for k, v in value.items() if not isinstance(v, torch.Tensor) and not str(k).endswith("_extra_state")]
    return tensors > 0 and not rest and all(isinstance(k, str) for k in value)


def _tensors(value: Mapping[Any, Any]) -> dict[str, Any]:
    import torch

    return {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}


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


def fit(
    code: UserCode, weights: dict[str, torch.Tensor], what: str, pruned: bool = False
) -> tuple[torch.nn.Module, list[str]]:
    """The module of `code` with the weights loaded, and notes. For `pruned` weights its layers lose channels first.

    Without a name in `code`, the class whose parameter names and shapes are those of the weights is taken; functions
    called like a factory (`build_…`, `…_model`) are tried where no class fits.
    """
    if code.name is not None:
        module = build(code)
        if pruned:
            _narrow(module, weights)
        return module, fill(module, weights, what, code.name)
    tried: dict[str, torch.nn.Module] = {}
    needy: list[str] = []
    for group in (_classes(code), _factories(code)):
        for name, maker in group.items():
            if _required(maker):
                needy.append(f"{name} (needs {', '.join(_required(maker))})")
                continue
            tried[name] = _construct(code, name, maker)
            if pruned:
                _narrow(tried[name], weights)
        fitting = [name for name, module in tried.items() if _fits(module, weights)]
        if len(fitting) == 1:
            return tried[fitting[0]], fill(tried[fitting[0]], weights, what, fitting[0])
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
    best = max(tried, key=lambda name: len(set(tried[name].state_dict()) & set(_strip(tried[name], weights)[0])))
    try:
        return tried[best], fill(tried[best], weights, what, best)
    except EdgeKitError as error:
        others = [n for n in tried if n != best] + needy
        more = f" (also tried: {', '.join(others)})" if others else ""
        raise EdgeKitError(error.what + more, error.help) from None


def fill(module: torch.nn.Module, weights: dict[str, torch.Tensor], what: str, name: str) -> list[str]:
    """Load the weights into `module`, any common prefix taken off; returns notes.

    Raises EdgeKitError with some of the missing and unexpected names, or of the shapes that differ.
    """
    stripped, prefix, outside = _strip(module, weights)
    own = module.state_dict()
    tensors = {name for name, value in own.items() if hasattr(value, "shape")}
    notes = [f"prefix {prefix!r} taken off the names of the weights"] if prefix else []
    if outside:
        notes.append(f"ignored beside the model's weights: {_some(outside)}")
    differ = [
        f"{k} is {list(v.shape)} in the file, {list(own[k].shape)} in {name}"
        for k, v in stripped.items()
        if k in tensors and not _lazy(own[k]) and own[k].shape != v.shape
    ]
    if differ:
        raise EdgeKitError(
            f"the weights in {what} have other shapes than {name}: {'; '.join(differ[:_SHOWN])}"
            + (f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""),
            "make the model with the arguments it was trained with, in a function that --code names",
        )
    try:
        result = module.load_state_dict(stripped, strict=False)
    except Exception as error:
        raise EdgeKitError(
            f"the weights in {what} do not load into {name}: {str(error).splitlines()[-1].strip()}"
        ) from error
    # Files older than torch 0.4.1 have no such counters, and inference does not read them.
    missing = [k for k in result.missing_keys if k in tensors and not k.endswith("num_batches_tracked")]
    if missing or result.unexpected_keys:
        parts = [f"missing: {_some(missing)}"] if missing else []
        parts += [f"unexpected: {_some(result.unexpected_keys)}"] if result.unexpected_keys else []
        raise EdgeKitError(
            f"the weights in {what} are not those of {name}: {'; '.join(parts)}", "name another class with --code"
        )
    return notes


def _strip(module: torch.nn.Module, weights: dict[str, Any]) -> tuple[dict[str, Any], str, list[str]]:
    """Weights under the names that `module` uses, the prefix taken off, and the names outside that prefix.

    Of the prefixes in the file, the one under which most of the module's names are found wins; the shortest first.
    """
    own = set(module.state_dict())
    ends = {k.rpartition(".")[2] for k in own}
    prefixes = {""}
    for key in weights:
        parts = key.split(".")
        if parts[-1] in ends:
            prefixes |= {".".join(parts[:i]) + "." for i in range(1, min(len(parts), 5))}

    def plausible(prefix: str) -> bool:
        return set(prefix[:-1].split(".")) <= _WRAPPERS or all(k.startswith(prefix) for k in weights)

    def found(prefix: str) -> int:
        return sum(prefix + k in weights for k in own)

    prefix = max(sorted(filter(plausible, prefixes), key=lambda p: (len(p), p)), key=found)
    inside = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    return inside, prefix, [k for k in weights if not k.startswith(prefix)]


def _narrow(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    from edgekit.quant.surgery import narrow

    narrow(module, weights)


def _fits(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    own = module.state_dict()
    stripped, _, _ = _strip(module, weights)
    tensors = {k for k, v in own.items() if hasattr(v, "shape")}
    missing = {k for k in tensors - stripped.keys() if not k.endswith("num_batches_tracked")}
    return not missing and not stripped.keys() - own.keys() and all(
        _lazy(own[k]) or own[k].shape == v.shape for k, v in stripped.items() if k in tensors
    )  # fmt: skip


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


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

"""The form of a bundle's manifest: what each key that EdgeKit reads has to hold. Other keys are passed over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from edgekit.screening import limits
from edgekit.types import ITEM_BITS, SUFFIXES

Rule = Callable[[Any], str | None]  # returns what a value should be where it is not


def _is(kind: type | tuple[type, ...], wanted: str) -> Rule:
    return lambda value: None if isinstance(value, kind) and not isinstance(value, bool) else wanted


def _one_of(names: Any) -> Rule:
    return lambda value: None if isinstance(value, str) and value in names else f"one of {', '.join(sorted(names))}"


def _shape(value: Any) -> str | None:
    sizes = isinstance(value, list) and all(isinstance(d, int) and not isinstance(d, bool) and d >= -1 for d in value)
    if not sizes or len(value) > limits.RANK or math.prod(map(abs, value)) > limits.ELEMENTS:
        return "a shape"
    return None


TEXT, COUNT, NUMBER, MAPPING = _is(str, "text"), _is(int, "a number"), _is((int, float), "a number"), _is(dict, "a map")
MAYBE_TEXT = _is((str, type(None)), "text")
DTYPE, FORMAT = _one_of(ITEM_BITS), _one_of(SUFFIXES)
SPEC = {"name": TEXT, "dtype": DTYPE, "shape": _shape}
LAYER = {"node": TEXT, "path?": MAYBE_TEXT, "op?": TEXT, "sqnr_db?": NUMBER}
GRID = {"scale": NUMBER, "zero_point?": COUNT}
# A name that ends in `?` may be missing. A list holds the rule of each entry, and `*` that of each value of a map.
MANIFEST: dict[str, Any] = {
    "schema": COUNT,
    "model": {"name": TEXT, "form?": TEXT, "pruned?": {"fingerprint?": MAYBE_TEXT}},
    "target": TEXT,
    "precision": TEXT,
    "recipe?": {"name?": TEXT, "summary?": TEXT, "sensitivity?": [LAYER], "float_layers?": [LAYER]},
    "made_on?": TEXT,
    "inputs": [SPEC],
    "outputs": [SPEC],
    "state?": [{"input": TEXT, "output": TEXT, "dtype": DTYPE, "shape": _shape, "initial": TEXT}],
    "labels?": [TEXT],
    "qparams": {"inputs?": {"*": GRID}, "outputs?": {"*": GRID}},
    "artifacts": [
        {"file": TEXT, "format": FORMAT, "sha256": TEXT, "layout?": TEXT, "size_bytes?": COUNT, "parity?": MAPPING}
    ],
    "golden": {"file?": TEXT, "sha256": TEXT},
    "notes": [TEXT],
}


def problem(content: Any, form: Any = MANIFEST, where: str = "it") -> str | None:
    """Returns what is wrong with a manifest, or None: "inputs[0].shape is no shape" for one."""
    if callable(form):
        wanted = form(content)
        return f"{where} is not {wanted}" if wanted else None
    if isinstance(form, list):
        if not isinstance(content, list):
            return f"{where} is not a list"
        found = (problem(item, form[0], f"{where}[{i}]") for i, item in enumerate(content))
        return next(filter(None, found), None)
    if not isinstance(content, Mapping):
        return f"{where} is not a map"
    start = "" if where == "it" else f"{where}."
    for key, rule in form.items():
        name = key.removesuffix("?")
        if key == "*":
            found = (problem(value, rule, f"{start}{k}") for k, value in content.items())
            if (first := next(filter(None, found), None)) is not None:
                return first
        elif name in content:
            if (first := problem(content[name], rule, f"{start}{name}")) is not None:
                return first
        elif key == name:
            return f"it has no {start}{name}"
    return None

"""Open TorchScript and `.pt2` archives without running what a stranger put in them.

Neither `torch.jit.load` nor `torch.export.load` is meant for files from strangers (torch 2.13):

- a `.pt2` may hold pickles that `torch.export.load` opens with `weights_only=False` (weights, constants, sample
  inputs) and compiled libraries that it loads; its `model.json` holds
  symbolic expressions that sympy evaluates as Python, tree specifications that import modules, guards that become
  Python, and call targets that are looked up from `torch` (`torch.serialization.os.system`);
- TorchScript is interpreted, never Python, but its operators can write a tensor to any path (`aten::save`) or map
  any file (`aten::from_file`), and `__setstate__` methods run while the file is being loaded.

So every part is screened against a list of what is allowed, and only the parts that are needed are read.
"""

from __future__ import annotations

import io
import json
import re
import tokenize
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import EdgeKitError, reason
from edgekit.unpickle import pickle_globals, refusal

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

_OPS = re.compile(r"torch\.ops\.(aten|prim|prims|quantized|quantized_decomposed|torchao|torchvision)\.\w+\.\w+")
_HIGHER_ORDER = re.compile(
    r"torch\.ops\.higher_order\.(cond|while_loop|map_impl|scan|associative_scan|wrap_with_set_grad_enabled|wrap_with_autocast)"
)
_SCALARS = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|lshift|rshift|getitem)"
    r"|math\.\w+|torch\._?sym_\w+"
)
_FILE_OPS = frozenset({"save", "from_file", "load_tensor"})
_SYMPY_NAMES = frozenset({
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Eq", "Ne", "Lt", "Le",
    "Gt", "Ge", "And", "Or", "Not", "Piecewise", "ExprCondPair", "Abs", "FloorDiv", "ModularIndexing", "Where",
    "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "LShift", "RShift", "PowByNatural", "FloatPow",
    "FloatTrueDiv", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt",
    "RoundDecimal", "ToFloat", "Identity", "Equality", "Unequality", "StrictLessThan", "LessThan",
    "StrictGreaterThan", "GreaterThan", "floor", "ceiling", "oo", "int_oo", "zoo", "positive", "nonnegative",
    "negative", "nonzero", "integer", "real", "finite", "precision", "evaluate", "True", "False", "true", "false",
})  # fmt: skip
_SYMBOL = re.compile(r"Symbol\('[a-z]+\d+'|[a-z]{1,3}\d+")
_WORD = re.compile(r"[\w./+\-]*")
_TREES = frozenset({None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"})
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")


def load_exported(path: Path) -> ExportedProgram:
    """The ExportedProgram in a `.pt2` archive; EdgeKitError where it holds anything but operators and tensors."""
    from torch.export.pt2_archive._package import PT2ArchiveReader

    try:
        with PT2ArchiveReader(str(path)) as reader, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _deserialize(reader, path.name)
    except EdgeKitError:
        raise
    except Exception as error:
        raise EdgeKitError(
            f"{path.name} cannot be read as an exported program: {reason(error)}",
            "export it again on the CPU with torch.export.save and the torch that `edgekit doctor` names",
        ) from error


def _deserialize(reader: Any, what: str) -> ExportedProgram:
    from torch._export.serde.schema import ExportedProgram as Schema
    from torch._export.serde.serialize import ExportedProgramDeserializer, _bytes_to_dataclass
    from torch.export.pt2_archive._package import _load_constants, _load_state_dict

    members = set(reader.get_file_names())
    models = sorted(m.removeprefix("models/").removesuffix(".json") for m in members if m.startswith("models/"))
    if not models:
        compiled = ", only compiled libraries" if any("aotind" in m for m in members) else ""
        raise EdgeKitError(
            f"{what} holds no exported program{compiled}",
            "save it with torch.export.save(torch.export.export(model, example), path)",
        )
    name = "model" if "model" in models else models[0]
    for kind in ("weights", "constants"):
        if f"data/{kind}/{name}.pt" in members:
            raise EdgeKitError(
                f"{what} stores its {kind} as a pickle, an old form", "export it again with torch 2.9 or newer"
            )
        _screen_payloads(json.loads(reader.read_string(f"data/{kind}/{name}_{kind}_config.json")), what)
    program = json.loads(reader.read_bytes(f"models/{name}.json"))
    program["guards_code"] = []  # turned into Python by ExportedProgram.module; shapes are checked by running anyway
    program["graph_module"]["treespec_namedtuple_fields"] = {}
    screened = _screen(_without_metadata(program), what)
    return ExportedProgramDeserializer().deserialize(
        _bytes_to_dataclass(Schema, json.dumps(screened).encode()),
        _load_state_dict(reader, name),
        _load_constants(reader, name),
        _sample_inputs(reader.read_bytes(f"data/sample_inputs/{name}.pt"), what),
    )


def _screen_payloads(config: dict[str, Any], what: str) -> None:
    """Only plain tensors: neither pickles nor custom nor opaque objects."""
    for tensor, payload in config["config"].items():
        if payload["use_pickle"] or not _PAYLOAD.fullmatch(payload["path_name"]):
            raise EdgeKitError(
                f"{what} stores {tensor!r} as a pickled object, which can run code when it is read",
                "export a model whose weights are plain tensors (not quantized or other tensor subclasses)",
            )


def _sample_inputs(content: bytes, what: str) -> Any:
    """The example `(args, kwargs)` of the archive, or None."""
    import torch

    if not content:
        return None
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            member = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            names = pickle_globals(io.BytesIO(archive.read(member)))
        asked = sorted(names - set(torch._weights_only_unpickler._get_allowed_globals()))
        raise refusal(f"{what} (its sample inputs)", asked or ["an unreadable pickle"], None) from error


def _without_metadata(node: Any) -> Any:
    """The same JSON with empty `metadata`: stack traces and sources, of no use here, some of them looked up by name."""
    if isinstance(node, dict):
        return {k: {} if k == "metadata" else _without_metadata(v) for k, v in node.items()}
    return [_without_metadata(v) for v in node] if isinstance(node, list) else node


def _screen(node: Any, what: str, key: str = "") -> Any:
    """Return `node` if every string in it is of a form that cannot become code; EdgeKitError otherwise."""
    if isinstance(node, dict):
        for name in node:
            symbolic = key == "range_constraints" and _is_expression(name)
            _require(symbolic or _WORD.fullmatch(name) is not None, what, "name", name)
        return {k: _screen(v, what, k) for k, v in node.items()}
    if isinstance(node, list):
        return [_screen(v, what, key) for v in node]
    if isinstance(node, str):
        if key == "target":
            _require(_is_operator(node), what, "call of", node)
        elif key == "expr_str":
            _require(_is_expression(node), what, "expression", node)
        elif key in ("in_spec", "out_spec"):
            _require(node == "" or _is_tree(json.loads(node)[1]), what, "tree", node)
        elif key not in ("as_string", "as_strings"):  # those are operator arguments: data
            _require(_WORD.fullmatch(node) is not None, what, "name", node)
    return node


def _require(fine: bool, what: str, kind: str, found: str) -> None:
    if not fine:
        raise EdgeKitError(
            f"{what} holds a {kind} {found[:120]!r}, which EdgeKit does not run",
            "only a file you trust should ask for this; load the model from its state_dict with --code",
        )


def _is_operator(target: str) -> bool:
    if _OPS.fullmatch(target):
        return target.split(".")[3] not in _FILE_OPS
    return any(form.fullmatch(target) for form in (_HIGHER_ORDER, _SCALARS))


def _is_expression(text: str) -> bool:
    rest = _SYMBOL.sub(lambda m: "Symbol(" if m[0].startswith("Symbol") else "", text)
    if not re.fullmatch(r"[\w\s+\-*/%(),<>=&|~.]*", rest) or re.search(r"(?<!\d)\.|\.(?!\d)", rest):
        return False
    return set(re.findall(r"[A-Za-z_]\w*", rest)) <= _SYMPY_NAMES


def _is_tree(node: Any) -> bool:
    context = json.loads(node["context"]) if node["context"] else None
    plain = context is None or (isinstance(context, list) and all(isinstance(c, (str, int)) for c in context))
    keys = [c for c in context or () if isinstance(c, str)]
    return (
        node["type"] in _TREES
        and plain
        and all(_WORD.fullmatch(k) for k in keys)
        and all(_is_tree(c) for c in node["children_spec"])
    )


def load_script(path: Path) -> torch.jit.ScriptModule:
    """The ScriptModule in a TorchScript archive, on the CPU; EdgeKitError where its code could touch files."""
    import torch

    try:
        _screen_archive(torch._C.PyTorchFileReader(str(path)), path.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.load(str(path), map_location="cpu")
    except EdgeKitError:
        raise
    except Exception as error:
        raise EdgeKitError(
            f"{path.name} cannot be read as TorchScript: {reason(error)}", "save it again, or copy it again"
        ) from error


def _screen_archive(reader: Any, what: str) -> None:
    """Screen what torch's own reader finds; Python's zipfile reads crafted archives in other ways.

    That reader ignores the case of names, so that of two alike only one would be screened.
    """
    members = reader.get_all_records()
    if len({member.lower() for member in members}) < len(members):
        raise EdgeKitError(f"{what} holds two members of one name", "save it again with torch.jit.save")
    for member in members:
        if member.lower().endswith(".py"):
            _screen_script(reader.get_record(member).decode(), what)
        elif member.lower().endswith((".pkl", ".json")) and b"torch.classes" in reader.get_record(member):
            raise EdgeKitError(f"{what} holds custom C++ objects", "save a model of plain operators")


def _screen_script(source: str, what: str) -> None:
    words = set(re.findall(r"\w+", source))
    spaces = set(re.findall(r"\bops\s*\.\s*(\w+)", source)) - {"aten", "prim", "prims", "quantized", "quantization"}
    bad = sorted(words & _FILE_OPS) + sorted(f"ops.{s}" for s in spaces)
    if "classes" in words:
        bad.append("torch.classes")
    # getattr with a string in pieces or in escapes could name what the words above do not show.
    if "getattr" in words and _has_disguised_strings(source):
        bad.append("getattr of a composed name")
    if bad:
        raise EdgeKitError(
            f"{what} asks for {', '.join(bad)}, which can read or write files or run native code",
            "load the model from its state_dict with --code",
        )


def _has_disguised_strings(source: str) -> bool:
    previous = None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.STRING and (previous == tokenize.STRING or "\\" in token.string):
            return True
        if token.type != tokenize.NL:
            previous = token.type
    return False

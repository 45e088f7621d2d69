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

import ast
import io
import json
import math
import re
import tokenize
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import EdgeKitError, reason
from edgekit.screening import limits
from edgekit.screening.allowed_ops import PRIM, is_aten, is_target
from edgekit.screening.unpickle import check_tensors, globals_in, refusal

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

MOST_NAMED = 6  # operators that one message names
_FROM_SOURCE = "export it from its source: its class or factory with --code, and its weights as a state_dict"
# Not traced_inputs.pkl: its tensors are saved without their values, and nothing reads them.
_READ_PICKLES = ("data.pkl", "constants.pkl")
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
_POWERS = ("Pow", "PowByNatural", "FloatPow")
_SHIFTS = ("LShift", "RShift")
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
            _check_sizes(reader.archive_file, path)
            return _deserialize(reader, str(path))
    except EdgeKitError:
        raise
    except Exception as error:
        raise EdgeKitError(
            f"{path} cannot be read as an exported program: {reason(error)}",
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
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = globals_in(archive, f"{what} (its sample inputs)")
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
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
            _require(is_target(node), what, "call of", node)
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
            f"only a file you trust should ask for this; {_FROM_SOURCE}",
        )


def _is_expression(text: str) -> bool:
    if len(text) > limits.EXPRESSION_CHARACTERS:
        return False
    rest = _SYMBOL.sub(lambda m: "Symbol(" if m[0].startswith("Symbol") else "", text)
    if not re.fullmatch(r"[\w\s+\-*/%(),<>=&|~.]*", rest) or re.search(r"(?<!\d)\.|\.(?!\d)", rest):
        return False
    return set(re.findall(r"[A-Za-z_]\w*", rest)) <= _SYMPY_NAMES and _is_small(text)


def _is_small(text: str) -> bool:
    """Whether no number that an expression can come to is of more than limits.EXPRESSION_BITS bits."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return sum(1 for _ in ast.walk(tree)) <= limits.EXPRESSION_NODES and _bits(tree) <= limits.EXPRESSION_BITS
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


def _bits(node: ast.AST) -> float:
    """Returns a bound of the bits of what a part of an expression comes to, infinity where there is none."""
    if isinstance(node, ast.Constant):
        return float(abs(int(node.value)).bit_length() + 1) if isinstance(node.value, int | float) else 1.0
    if isinstance(node, ast.Name):
        return limits.SYMBOL_BITS
    if isinstance(node, ast.Call):
        name, parts = getattr(node.func, "id", ""), list(node.args)
        if name == "Symbol":
            return limits.SYMBOL_BITS
    elif isinstance(node, ast.BinOp):
        name, parts = type(node.op).__name__, [node.left, node.right]
    else:
        return sum(map(_bits, ast.iter_child_nodes(node)))
    if name in _POWERS and len(parts) == 2:
        power = _number(parts[1])
        return math.inf if power is None else _bits(parts[0]) * max(power, 1)
    if name in _SHIFTS and len(parts) == 2:
        power = _number(parts[1])
        return math.inf if power is None else _bits(parts[0]) + power
    return 1 + sum(map(_bits, parts))


def _number(node: ast.AST) -> int | None:
    """The absolute value of a plain number, rounded up; None for anything else."""
    if isinstance(node, ast.UnaryOp):
        return _number(node.operand)
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Integer", "Float", "Rational") and node.args:
        return _number(node.args[0])
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return math.ceil(abs(node.value))
    return None


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
        reader = torch._C.PyTorchFileReader(str(path))
        _check_sizes(reader, path)
        _screen_archive(reader, str(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.jit.load(str(path), map_location="cpu")
        _screen_graph(module, str(path))
        return module
    except EdgeKitError:
        raise
    except Exception as error:
        raise EdgeKitError(
            f"{path} cannot be read as TorchScript: {reason(error)}", "save it again, or copy it again"
        ) from error


def traced_inputs(path: Path) -> list[Any]:
    """The arguments, as tensors of the meta device, that the `forward` of a TorchScript file was traced with.

    None where it was not traced, or keeps none: torch stores their shapes and types, without their values.
    """
    import torch
    from torch._weights_only_unpickler import Unpickler

    def storage(saved: tuple[Any, ...]) -> Any:
        kind, count = saved[1], int(saved[4])
        raw = torch.UntypedStorage(count * kind.dtype.itemsize, device="meta")
        return torch.storage.TypedStorage(wrap_storage=raw, dtype=kind.dtype, _internal=True)

    tagged = (lambda value, _tag: value, "torch.jit._pickle.restore_type_tag")
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        if "traced_inputs.pkl" not in reader.get_all_records():
            return []
        with torch.serialization.safe_globals([tagged]):
            unpickler: Any = Unpickler(io.BytesIO(reader.get_record("traced_inputs.pkl")))
            unpickler.persistent_load = storage
            found = unpickler.load()
    except Exception:  # what is no plain tensor there is not needed: shapes can be given
        return []
    samples = found.get("forward") if isinstance(found, dict) else None
    return samples if isinstance(samples, list) else []


def _check_sizes(reader: Any, path: Path) -> None:
    """Bounds what torch's own reader finds; Python's zipfile reads crafted archives in other ways."""
    limits.check_members(path, [(name, reader.get_record_size(name)) for name in reader.get_all_records()])


def _screen_archive(reader: Any, what: str) -> None:
    members = reader.get_all_records()
    sizes = {member: reader.get_record_size(member) for member in members}
    for member in members:
        if member.lower().endswith(".py"):
            _screen_script(reader.get_record(member).decode(), what)
        elif member.lower().endswith((".pkl", ".json")):
            content = reader.get_record(member)
            if b"torch.classes" in content:
                raise EdgeKitError(f"{what} holds custom C++ objects", "save a model of plain operators")
            if member.lower() in _READ_PICKLES:
                folder = member.rpartition(".")[0]  # constants.pkl names what lies in constants/
                check_tensors(content, {n.removeprefix(f"{folder}/"): size for n, size in sizes.items()}, what)


def _screen_script(source: str, what: str) -> None:
    words = set(re.findall(r"\w+", source))
    bad = sorted(words & _FILE_OPS)
    if "classes" in words:
        bad.append("torch.classes")
    # getattr with a string in pieces or in escapes could name what the words above do not show.
    if "getattr" in words and _has_disguised_strings(source):
        bad.append("getattr of a composed name")
    if bad:
        raise EdgeKitError(
            f"{what} asks for {', '.join(bad)}, which can read or write files or run native code", _FROM_SOURCE
        )
    _refuse(sorted(_operators_refused(source)), what)


def _operators_refused(source: str) -> Iterator[str]:
    """The operators that a TorchScript source names and that are not allowed: whatever stands behind a dot."""
    import torch

    known = {schema.name for schema in torch._C._jit_get_all_schemas()}
    attributes = set(re.findall(r"^\s+(\w+) : ", source, re.MULTILINE))
    before = ["", "", "", ""]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT):
            continue
        word = token.string
        if token.type == tokenize.STRING and "getattr" in source:
            word = token.string.strip("\"'")
            before[-1] = "."
        if before[-1] == "." and word.isidentifier():
            if before[0] == "ops":
                space = {"prim": PRIM, "aten": None}.get(before[2], frozenset())
                if not (is_aten(word) if space is None else word in space):
                    yield f"{before[2]}.{word}"
            elif before[2] == "self" and word in attributes:
                pass
            elif before[2] != "ops" and f"aten::{word}" in known and not is_aten(word) and word not in PRIM:
                yield f"aten.{word}"
        before = [*before[1:], word]


def _screen_graph(module: Any, what: str) -> None:
    """Screens what TorchScript's source was compiled to, with all that forward calls."""
    if not hasattr(module, "forward"):
        return
    graph = module.inlined_graph  # whose nodes live as long as it does
    pending, bad = [graph], set()
    while pending:
        for node in pending.pop().nodes():
            space, _, name = node.kind().partition("::")
            if not (name in PRIM if space == "prim" else space == "aten" and is_aten(name)):
                bad.add(f"{space}.{name}")
            pending += node.blocks()
    _refuse(sorted(bad), what)


def _refuse(operators: Sequence[str], what: str) -> None:
    if any(name.startswith(("quantized.", "quantization.")) for name in operators):
        raise EdgeKitError(
            f"{what} is quantized already ({operators[0]})", "load the float model: EdgeKit quantizes it"
        )
    if operators:
        raise EdgeKitError(
            f"{what} asks for {', '.join(operators[:MOST_NAMED])}: operators that EdgeKit does not run from a file",
            _FROM_SOURCE,
        )


def _has_disguised_strings(source: str) -> bool:
    """Whether a string that may be a name is in pieces or in escapes; what has spaces in it is a message."""
    group: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.STRING:
            group.append(token.string)
        elif token.type not in (tokenize.NL, tokenize.COMMENT):
            text = "".join(group)
            if (len(group) > 1 or "\\" in text) and " " not in text:
                return True
            group = []
    return False

"""Model files that try to run code. Each payload would write a marker file; none may ever appear."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgekit.errors import EdgeKitError
from edgekit.loading.model import load
from edgekit.screening import limits
from edgekit.screening.unpickle import LEGACY_MAGIC, pickle_globals, resolve

CODE = """
import os
from os import system
from torch import nn

class Net(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

class Runner:
    def __init__(self, command):
        os.system(command)
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def code(tmp_path: Path) -> str:
    path = tmp_path / f"user_{tmp_path.name}.py"
    path.write_text(CODE)
    return str(path)


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.args


def assert_refused(path: Path, marker: Path, *names: str, code: str | None = None) -> None:
    with pytest.raises(EdgeKitError) as refused:
        load(path, code=code, inputs=["1x2"])
    assert not marker.exists()
    assert all(name in refused.value.what for name in names), refused.value.what
    assert "weights_only=" not in str(refused.value) and "add_safe_globals" not in str(refused.value)


def carriers(evil: Any) -> dict[str, Any]:
    """The places in an ordinary file where a payload may hide."""
    module = nn.Linear(2, 2)
    module.extra = evil
    return {
        "top": evil,
        "checkpoint": {"state_dict": nn.Linear(2, 2).state_dict(), "optimizer": evil},
        "weights": {"weight": evil, "bias": torch.ones(2)},
        "module": module,
    }


@pytest.mark.parametrize("place", carriers(None))
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("with_code", [False, True])
@pytest.mark.parametrize("function", ["system", "eval", "exec"])
def test_code_in_a_pickle(place, legacy, with_code, function, marker: Path, code: str, tmp_path: Path) -> None:
    touch = f"open({str(marker)!r}, 'w').close()"
    evil = {"system": Call(os.system, f"touch {marker}"), "eval": Call(eval, touch), "exec": Call(exec, touch)}[
        function
    ]
    path = tmp_path / "model.pt"
    torch.save(carriers(evil)[place], path, _use_new_zipfile_serialization=not legacy)
    name = {"system": f"{os.name}.system", "eval": "builtins.eval", "exec": "builtins.exec"}[function]
    assert_refused(path, marker, "model.pt asks for code", name, code=code if with_code else None)
    torch.load(path, weights_only=False)
    assert marker.exists()  # the payload is live


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_bare_and_modern_pickles(protocol: int, marker: Path, tmp_path: Path) -> None:
    evil = Call(os.system, f"touch {marker}")
    bare = tmp_path / "bare.pt"
    bare.write_bytes(pickle.dumps(evil, protocol=protocol))
    assert_refused(bare, marker, *([] if protocol < 2 else ["posix.system"]))
    saved = tmp_path / "saved.pt"
    torch.save(evil, saved, pickle_protocol=max(protocol, 1))
    assert_refused(saved, marker, "posix.system")


def opcodes(module: str, name: str, argument: str) -> bytes:
    """A protocol 2 pickle that calls `module.name(argument)`, whether or not such a thing exists."""
    data = argument.encode()
    return b"".join(
        [b"\x80\x02c", f"{module}\n{name}\n".encode(), b"X", struct.pack("<I", len(data)), data, b"\x85R."]
    )  # fmt: skip


FAKES = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("subprocess", "Popen"),
    ("builtins", "__import__"),
    ("builtins", "getattr"),
    ("__builtin__", "eval"),
    ("runpy", "run_path"),
    ("importlib", "import_module"),
    ("torch", "load"),
    ("torch", "save"),
    ("torch", "from_file"),
    ("torch", "compile"),
    ("torch.hub", "load"),
    ("torch.hub", "load_state_dict_from_url"),
    ("torch.jit", "load"),
    ("torch.package", "PackageImporter"),
    ("torch.utils.cpp_extension", "load_inline"),
    ("torch.utils.collect_env", "run"),
    ("torch.utils._config_module", "ConfigModule.load_config"),
    ("torch._C", "_import_ir_module_from_buffer"),
    ("torch._C", "PyTorchFileWriter"),
    ("torch.ops", "load_library"),
    ("torch._ops", "ops.load_library"),
    ("torch.serialization", "os.system"),
    ("torch.nn.modules", "os"),
    ("torch.nn.modules", "os.system"),
    ("torch.nn.modules.os", "system"),
    ("torch.nn.modules.module", "torch"),
    ("torch.nn.modules.module", "torch.load"),
    ("torch.nn.modules.module", "warnings.sys.modules"),
    ("torch.nn.modules.linear", "F"),
    ("torch.nn.modules.linear", "init"),
    ("torch.nn.modules.linear", "Module"),
    ("torch.nn.modules.linear", "Linear.__init__"),
    ("torch.nn.modules.linear", "Linear.load_state_dict"),
    ("torch.nn.modules.linear", "Tensor"),
    ("torch.nn.modules.utils", "import_module"),
    ("torch.nn.functional", "boolean_dispatch"),
    ("torch.nn.functional", "importlib.import_module"),
    ("torch.nn.modules.lazy", "warnings"),
    ("torch._weights_only_unpickler", "load"),
    ("torch._utils", "_import_dotted_name"),
    ("numpy", "load"),
    ("numpy.lib.npyio", "load"),
    ("edgekit.util.user_code", "import_code"),
]


@pytest.mark.parametrize(("module", "name"), FAKES)
@pytest.mark.parametrize("with_code", [False, True])
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_names_that_pretend(module, name, with_code, container, marker: Path, code: str, tmp_path: Path) -> None:
    payload = opcodes(module, name, f"touch {marker}")
    path = tmp_path / "model.pt"
    if container == "zip":
        torch.save({"w": torch.ones(1)}, path)
        rewrite(path, {"data.pkl": lambda _old: payload})
    else:
        path.write_bytes(LEGACY_MAGIC + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2) + payload)
    shown = {"os": "posix"}.get(module, module).replace("__builtin__", "builtins")
    asked = pickle_globals(io.BytesIO(payload), "model.pt")
    assert asked in ({f"{shown}.{name}"}, {f"{module}.{name}"})
    assert_refused(path, marker, *asked, code=code if with_code else None)


def test_a_pickle_of_too_many_operations_is_told_with_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PICKLE_OPCODES", 3)
    with pytest.raises(EdgeKitError, match=r"^sub/model\.pt holds a pickle of more than 3 operations\n"):
        pickle_globals(io.BytesIO(pickle.dumps([1, 2, 3])), "sub/model.pt")


def test_user_code_lends_its_networks_and_nothing_else(marker: Path, code: str, tmp_path: Path) -> None:
    """`--code` allows the classes of its file that are networks: not its functions, imports or other classes."""
    stem = Path(code).stem
    for name in ("Runner", "os.system", "system", "Net.forward", "nn", "__loader__.exec_module", "os"):
        path = tmp_path / "model.pt"
        torch.save({"w": torch.ones(1)}, path)
        rewrite(path, {"data.pkl": lambda _old, name=name: opcodes(stem, name, f"touch {marker}")})
        assert_refused(path, marker, f"{stem}.{name}", code=code)


def test_only_real_modules_are_resolved() -> None:
    assert resolve("torch.nn.modules.linear.Linear", None) is nn.Linear
    assert resolve("torch.nn.modules.container.Sequential", None) is nn.Sequential
    assert resolve("torch.nn.functional.relu", None) is nn.functional.relu
    for module, name in FAKES:
        assert resolve(f"{module}.{name}", None) is None


def rewrite(
    path: Path, changes: dict[str, Callable[[bytes], bytes] | None], add: dict[str, bytes] | None = None
) -> None:
    """Change members of an archive (by name under its top folder); None drops one."""
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    top = next(iter(members)).partition("/")[0]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            change = changes.get(name.removeprefix(f"{top}/"), lambda old: old)
            if change is not None:
                archive.writestr(name, change(content))
        for name, content in (add or {}).items():
            archive.writestr(f"{top}/{name}", content)


def pickled(evil: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(evil, buffer)
    return buffer.getvalue()


def change_json(edit: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def change(old: bytes) -> bytes:
        content = json.loads(old)
        edit(content)
        return json.dumps(content).encode()

    return change


PROGRAM = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
MODULE_IMPORT = {
    "type": "builtins.tuple",
    "context": '{"__enum__": true, "fqn": "evil_import:X", "name": "x"}',
    "children_spec": [],
}
FACTORY = {
    "type": "collections.defaultdict",
    "context": {"default_factory_module": "evil_import", "default_factory_name": "x", "dict_context": []},
    "children_spec": [],
}


def graph(program: Any) -> Any:
    return program["graph_module"]["graph"]


def call_system(program: Any, command: str, target: str = "torch.serialization.os.system") -> None:
    argument = {"name": "", "arg": {"as_string": command}, "kind": 1}
    graph(program)["nodes"].insert(
        0, {"target": target, "inputs": [argument], "outputs": [{"as_none": True}], "metadata": {}, "name": "run"}
    )  # fmt: skip


def set_size(program: Any, expression: str) -> None:
    hint = {"as_int": 1}
    graph(program)["tensor_values"]["linear"]["sizes"][0] = {"as_expr": {"expr_str": expression, "hint": hint}}


def set_spec(program: Any, tree: Any) -> None:
    program["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps([1, tree])


def add_constant(config: Any, path_name: str) -> None:
    config["config"]["c"] = {"path_name": path_name, "is_param": False, "use_pickle": True, "tensor_meta": None}


def use_pickle(config: Any) -> None:
    config["config"]["weight"]["use_pickle"] = True


# What a .pt2 may carry that torch.export.load runs: members to change, and members to add.
PT2 = {
    "sample inputs": lambda cmd, evil: ({"data/sample_inputs/model.pt": lambda _: pickled(((evil,), {}))}, {}),
    "pickled weight": lambda cmd, evil: (
        {WEIGHTS: change_json(use_pickle), "data/weights/weight_0": lambda _: pickled(evil)}, {}),
    "opaque constant": lambda cmd, evil: (
        {CONSTANTS: change_json(lambda c: add_constant(c, "opaque_obj_0"))},
        {"data/constants/opaque_obj_0": pickle.dumps(evil)}),
    "pickled constant": lambda cmd, evil: (
        {CONSTANTS: change_json(lambda c: add_constant(c, "tensor_0"))}, {"data/constants/tensor_0": pickled(evil)}),
    "old weights": lambda cmd, evil: ({}, {"data/weights/model.pt": pickled({"weight": evil})}),
    "old constants": lambda cmd, evil: ({}, {"data/constants/model.pt": pickled({"c": evil})}),
    "expression": lambda cmd, evil: (
        {PROGRAM: change_json(lambda p: set_size(p, f"__import__('os').system('{cmd}')"))}, {}),
    "enum import": lambda cmd, evil: ({PROGRAM: change_json(lambda p: set_spec(p, MODULE_IMPORT))}, {}),
    "factory import": lambda cmd, evil: ({PROGRAM: change_json(lambda p: set_spec(p, FACTORY))}, {}),
}  # fmt: skip


def exported(path: Path) -> Path:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), path)
    return path


@pytest.mark.parametrize("case", PT2)
def test_code_in_an_exported_program(case: str, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_import.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil_import", raising=False)
    path = exported(tmp_path / "model.pt2")
    command = f"touch {marker}"
    changes, added = PT2[case](command, Call(os.system, command))
    rewrite(path, changes, added)
    assert_refused(path, marker, "model.pt2")
    with contextlib.suppress(Exception):  # a payload need not leave a working program
        torch.export.load(path).module()(torch.ones(1, 2))
    assert marker.exists()  # the payload is live: torch itself runs it


REFUSED_STRINGS = {
    "call": lambda p: call_system(p, "x"),
    "file operator": lambda p: call_system(p, "x", "torch.ops.aten.from_file.default"),
    "save operator": lambda p: call_system(p, "x", "torch.ops.aten.save.default"),
    "operator that calls": lambda p: call_system(p, "x", "_operator.call"),
    "operator that looks up": lambda p: call_system(p, "x", "_operator.attrgetter"),
    "hub": lambda p: call_system(p, "x", "torch.hub.load"),
    "library": lambda p: call_system(p, "x", "torch.ops.load_library"),
    "triton": lambda p: call_system(p, "x", "torch.ops.higher_order.triton_kernel_wrapper_functional"),
    "extension": lambda p: call_system(p, "x", "#evil:op"),
    "attribute in an expression": lambda p: set_size(p, "s0.__class__"),
    "call in an expression": lambda p: set_size(p, "sympify(s0)"),
    "string in an expression": lambda p: set_size(p, "Symbol('s0') + 'x'"),
    "lambda in an expression": lambda p: set_size(p, "(lambda: s0)()"),
    "name": lambda p: graph(p)["nodes"][0].update(name="x); import os; (y"),
    "keys": lambda p: set_spec(p, {"type": "builtins.dict", "context": '["a\'); evil("]', "children_spec": []}),
}


@pytest.mark.parametrize("case", REFUSED_STRINGS)
def test_strings_in_an_exported_program(case: str, marker: Path, tmp_path: Path) -> None:
    path = exported(tmp_path / "model.pt2")
    rewrite(path, {PROGRAM: change_json(REFUSED_STRINGS[case])})
    assert_refused(path, marker, "which EdgeKit does not run")


def test_guards_of_an_exported_program_are_not_run(marker: Path, tmp_path: Path) -> None:
    path = exported(tmp_path / "model.pt2")
    guard = f"__import__('os').system('touch {marker}') == 0"
    rewrite(path, {PROGRAM: change_json(lambda p: p.update(guards_code=[guard]))})
    assert load(path).outputs[0].shape == (1, 2)
    assert not marker.exists()
    torch.export.load(path).module()(torch.ones(1, 2))
    assert marker.exists()  # the payload is live


def test_compiled_libraries_are_not_loaded(marker: Path, tmp_path: Path) -> None:
    path = exported(tmp_path / "model.pt2")
    rewrite(path, {}, {"data/aotinductor/model/evil.so": b"\x7fELF"})
    assert load(path).outputs[0].shape == (1, 2)
    rewrite(path, {PROGRAM: None})
    assert_refused(path, marker, "only compiled libraries")


class Writes(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, self.path)
        return x


class WritesWhenLoaded(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.ones(1), self.path)


class Reads(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.from_file(self.path, True, 2)


@pytest.mark.parametrize("kind", [Writes, WritesWhenLoaded, Reads])
def test_torchscript_that_touches_files(kind: type[nn.Module], marker: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.script(kind(str(marker))).save(path)
    assert_refused(path, marker, "from_file" if kind is Reads else "save")
    torch.jit.load(path)(torch.ones(1, 2))
    assert marker.exists()  # the payload is live


def disguised(content: bytes, how: str) -> bytes:
    """The TorchScript archive `content` so that Python's zipfile sees no code in it, or other code than torch does."""
    crafted = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(crafted, "w") as to:
        for name in archive.namelist():
            to.writestr(name.replace(".py", ".PY") if how == "case" else name, archive.read(name))
        for name in archive.namelist():
            if how == "twice" and name.endswith(".py"):
                to.writestr(name, b"")
    return crafted.getvalue()


@pytest.mark.parametrize("how", ["case", "twice"])
def test_torchscript_that_other_readers_see_otherwise(how: str, marker: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.script(WritesWhenLoaded(str(marker))).save(path)
    path.write_bytes(disguised(path.read_bytes(), how))
    assert_refused(path, marker, "save" if how == "case" else "two members")
    torch.jit.load(path)
    assert marker.exists()  # the payload is live


@pytest.mark.parametrize("member", ["data.pkl", "constants.pkl"])
def test_pickles_in_torchscript(member: str, marker: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.script(nn.Linear(2, 2)).save(path)
    rewrite(path, {member: lambda _old: pickle.dumps(Call(os.system, f"touch {marker}"), 2)})
    assert_refused(path, marker, "model.pt")


@pytest.mark.parametrize(
    "source", ['getattr(torch, "sa" "ve")(x, "f")', 'getattr(torch, "\\x73ave")(x, "f")', "ops.evil.run(x)"]
)
def test_disguised_names_in_torchscript(source: str, marker: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.script(nn.Identity()).save(path)
    line = f"def evil(x: Tensor) -> NoneType:\n  return {source}\n"
    rewrite(path, {}, {"code/__torch__/evil.py": line.encode()})
    assert_refused(path, marker, "model.pt asks for")


def test_an_archive_of_two_kinds_is_read_as_the_one_that_is_screened(marker: Path, tmp_path: Path) -> None:
    """A pickle inside a TorchScript or .pt2 archive, and the other way round, is never opened by another reader."""
    evil = pickle.dumps(Call(os.system, f"touch {marker}"), 2)
    script = tmp_path / "script.pt"
    torch.jit.script(nn.Linear(2, 2)).save(script)
    rewrite(script, {"constants.pkl": None}, {"code/x.py": b""} | {"other.pkl": evil})
    assert_refused(script, marker)
    program = exported(tmp_path / "model.pt2")
    rewrite(program, {}, {"data.pkl": evil})
    load(program)
    assert not marker.exists()

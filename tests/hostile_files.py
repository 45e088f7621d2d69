"""Files that are damaged, lie, or ask for more than there is, in every form that is read; and what is made of them.

    python tests/hostile_files.py --full              every file, and 2,000 mutated artifacts and manifests
    python tests/hostile_files.py --only onnx [--full]
    python tests/hostile_files.py --full --only artifact --first 250 --mutations 500      # the latter half of them

Each file goes through the command line in a process of its own: mutated ones through inspect, profile and verify in turn.
It has to end within 30 s of processor time and 2 GB of memory, with exit code 0, 1 or 3, without a traceback, name the file
by its path where it is refused, and leave nothing behind. tests/test_hostile_files.py runs a part.
"""

# ruff: noqa: E501 (a file to a line)

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from kit import NET, network, samples
from onnx import TensorProto, helper, numpy_helper
from torch import nn

SECONDS = 30.0
BYTES = 2_000_000_000
HUGE = 1 << 40
ALLOWED_CODES = (0, 1, 3)
FITS_NOT = "; its inputs: "  # a model that takes no such data
COMMANDS = ("inspect", "profile", "verify")
PLACE = "given"  # the folder that the files lie in: their paths are more than their names


class Case(NamedTuple):
    """A family, a name, and a function that writes files into a folder and returns the command's arguments."""

    family: str
    name: str
    make: Callable[[Path], tuple[str, ...]]


class Outcome(NamedTuple):
    """How one case ended."""

    case: Case
    paths: tuple[str, ...]
    code: int
    seconds: float
    peak: int
    said: str
    left: list[str]

    @property
    def problem(self) -> str | None:
        """What of it must not be, or None."""
        if self.code < 0 or self.code not in ALLOWED_CODES:
            return f"ended with {self.code}"
        if "Traceback" in self.said:
            return "a traceback"
        if self.seconds > SECONDS:
            return f"took {self.seconds:.0f} s"
        if self.peak > BYTES:
            return f"took {self.peak / 1e9:.1f} GB"
        if self.left:
            return f"left {self.left}"
        if self.code == 1 and "error:" not in self.said:
            return "said nothing"
        words = "".join(self.said.split())  # as lines break anywhere
        if self.code == 1 and FITS_NOT not in self.said and not any(path in words for path in self.paths):
            return "does not name the file by its path"
        return "a control character" if "\x1b" in self.said else None


def run(case: Case, folder: Path) -> Outcome:
    """Runs the command of a case in a copy of this process, which has imported all that it needs."""
    given = folder / PLACE
    given.mkdir(parents=True)
    args = tuple(f"{PLACE}/{arg}" if (given / arg.partition(":")[0]).exists() else arg for arg in case.make(given))
    paths = tuple(arg for arg in args if arg.startswith(PLACE))
    before = set(folder.rglob("*"))
    said, started = folder.with_suffix(".said"), time.monotonic()
    pid = os.fork()
    if not pid:
        code = 9
        try:
            code = _command(args, folder, said)
        finally:
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    left = [str(path.relative_to(folder)) for path in sorted(set(folder.rglob("*")) - before)]
    text = said.read_text(errors="replace")
    code = os.waitstatus_to_exitcode(status)
    if code == 0 and args[0] == "export":
        left = []
    shutil.rmtree(folder)
    said.unlink()
    seconds = min(usage.ru_utime + usage.ru_stime, time.monotonic() - started)
    return Outcome(case, paths, code, seconds, usage.ru_maxrss << 10, text, left)


def _command(args: tuple[str, ...], folder: Path, said: Path) -> int:
    from edgekit.cli import app

    os.chdir(folder)
    output = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    temporary = Path(f"{folder}.tmp")
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    try:
        app.app(list(args))
    except SystemExit as end:
        left = [path.name for path in temporary.iterdir()]
        shutil.rmtree(temporary, ignore_errors=True)
        if left:
            (folder / f"left-{'-'.join(left)}").touch()
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    return 9


# --- Pickles and their archives


def op(*parts: Any) -> bytes:
    """A protocol 2 pickle out of opcodes; text becomes BINUNICODE."""
    out = b"\x80\x02"
    for part in parts:
        out += part if isinstance(part, bytes) else b"X" + struct.pack("<I", len(part.encode())) + part.encode()
    return out + b"."


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def storage(kind: str = "FloatStorage", key: str = "0", count: bytes = b"K\x04") -> bytes:
    words = b"".join(b"X" + struct.pack("<I", len(w)) + w for w in (b"storage",))
    rest = b"".join(b"X" + struct.pack("<I", len(w)) + w for w in (key.encode(), b"cpu"))
    return b"(" + words + named("torch", kind) + rest + count + b"tQ"


def tensor(
    count: bytes = b"K\x04", offset: bytes = b"K\x00", size: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85"
) -> bytes:
    start = named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage(count=count) + offset + size + stride
    return start + b"\x89" + named("collections", "OrderedDict") + b")RtR"


def in_dict(value: bytes) -> bytes:
    return b"}X\x01\x00\x00\x00w" + value + b"s"


def long(number: int) -> bytes:
    return pickle.dumps(number, 2)[2:-1]


PICKLES: dict[str, bytes] = {
    "long4 length": op(b"\x8b" + struct.pack("<i", 2**31 - 1)),
    "negative long4": op(b"\x8b" + struct.pack("<i", -5)),
    "binunicode length": op(b"X" + struct.pack("<I", 2**32 - 1) + b"abc"),
    "binunicode8 length": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.",
    "binbytes8 length": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
    "bytearray8 length": b"\x80\x05\x96" + struct.pack("<Q", 2**35) + b"abc.",
    "frame length": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.",
    "memo index": op(b"}r" + struct.pack("<I", 2**31 - 1)),
    "memo that is not there": op(b"h\x07"),
    "empty stack": op(b"0000"),
    "no mark": op(b"t"),
    "digits": b"I" + b"9" * 100_000 + b"\n.",
    "decimal long": b"L" + b"9" * 1_000_000 + b"L\n.",
    "not a float": b"Fnan1\n.",
    "persistent id of text": op(b"}", "abc", b"Qs"),
    "persistent id of a number": op(b"}K\x01QK\x01s"),
    "persistent id in text": b"Pabc\n.",
    "deep lists": op(b"]" * 1_000_000 + b"a" * 999_999),
    "deep tuples": op(b"K\x01" + b"\x85" * 1_000_000),
    "laughs": op(b"]q\x00" + b"".join(b"](" + b"h" + bytes([i]) + (b"h" + bytes([i])) * 9 + b"eq" + bytes([i + 1]) for i in range(60))),
    "six million nones": op(b"(" + b"N" * 6_000_000 + b"t"),
    "reduce chain": op(b")" + (named("collections", "OrderedDict") + b")R0") * 20_000),
    "reduce of a number": op(b"K\x01)R"),
    "unhashable key": op(b"}]K\x01s"),
    "counter": op(named("collections", "Counter") + b"(" + b"X\x03\x00\x00\x00aaa" + b"tR"),
    "bytearray": op(named("builtins", "bytearray") + long(10**11) + b"\x85R"),
    "size": op(named("torch", "Size") + b"(" + long(HUGE) * 3 + b"t\x85R"),
    "dunder": op(named("torch", "Tensor.__class__") + b")R"),
    "dunder of a class": op(named("collections", "OrderedDict.__init__.__globals__") + b")R"),
    "global without a name": op(named("torch", "") + b")R"),
    "global with newlines only": b"\x80\x02c\n\n)R.",
    "stack global of numbers": b"\x80\x04K\x01K\x02\x93.",
    "stack global of a dunder": b"\x80\x04\x8c\x05torch\x8c\x09__class__\x93.",
    "extension": op(b"\x82\x01"),
    "newobj": op(named("torch.nn.modules.linear", "Linear") + b")\x81}b"),
    "build of a module": op(named("torch.nn.modules.linear", "Linear") + b")\x81}(", "_modules", b"K\x01", "training", b"K\x02ub"),
    "module within itself": op(
        named("torch.nn.modules.container", "Sequential") + b")\x81q\x01}(", "_modules", b"}", "0", b"h\x01s",
        "_parameters", b"}", "_buffers", b"}", "training", b"\x89ub"),
    "module without its attributes": op(named("torch.nn.modules.conv", "Conv2d") + b")\x81"),
    "recurrent module of nothing": op(named("torch.nn.modules.rnn", "LSTM") + b")\x81}(", "_all_weights", b"K\x05ub"),
    "storage of too many": op(in_dict(tensor(long(HUGE)))),
    "storage of a negative count": op(in_dict(tensor(long(-1)))),
    "storage that is not there": op(in_dict(tensor().replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x007"))),
    "storage elsewhere": op(in_dict(tensor().replace(b"cpu", b"xyz"))),
    "storage of a kind unknown": op(in_dict(tensor().replace(b"FloatStorage", b"EvilStorage!"[:12]))),
    "size beyond": op(in_dict(tensor(size=long(HUGE) + b"\x85"))),
    "stride beyond": op(in_dict(tensor(stride=long(HUGE) + b"\x85"))),
    "stride of zero": op(in_dict(tensor(size=long(HUGE) + b"\x85", stride=b"K\x00\x85"))),
    "negative size": op(in_dict(tensor(size=long(-4) + b"\x85"))),
    "negative offset": op(in_dict(tensor(offset=long(-4)))),
    "offset beyond": op(in_dict(tensor(offset=long(HUGE)))),
    "sizes of another rank": op(in_dict(tensor(size=b"K\x02K\x02\x86"))),
    "a hundred dimensions": op(in_dict(tensor(size=b"(" + b"K\x01" * 100 + b"t", stride=b"(" + b"K\x01" * 100 + b"t"))),
    "size of text": op(in_dict(tensor(size=b"X\x01\x00\x00\x00a\x85"))),
    "meta tensor": op(in_dict(named("torch._utils", "_rebuild_meta_tensor_no_storage") + b"(" + named("torch", "float32") + long(HUGE) + b"\x85" + b"K\x01\x85\x89tR")),
    "sparse tensor": op(in_dict(named("torch._utils", "_rebuild_sparse_tensor") + b"(" + named("torch.serialization", "_get_layout") + b"X\x10\x00\x00\x00torch.sparse_coo\x85R" + b"(" + tensor() + tensor() + long(HUGE) + b"\x85t" + b"tR")),
    "nested tensor": op(in_dict(named("torch._utils", "_rebuild_nested_tensor") + b"(" + tensor() * 4 + b"tR")),
    "quantized tensor": op(in_dict(named("torch._utils", "_rebuild_qtensor") + b"(" + storage("QInt8Storage", count=b"K\x10") + b"K\x00K\x10\x85K\x01\x85(" + named("torch", "per_tensor_affine") + b"G" + struct.pack(">d", 0.0) + long(HUGE) + b"t\x89" + named("collections", "OrderedDict") + b")RtR")),
    "numpy tensor": op(in_dict(named("torch._utils", "_rebuild_device_tensor_from_numpy") + b"(K\x01" + named("torch", "float32") + b"X\x03\x00\x00\x00cpu\x89tR")),
    "parameter of a number": op(in_dict(named("torch._utils", "_rebuild_parameter") + b"(K\x01\x89}tR")),
    "codec": op(named("_codecs", "encode") + b"(" + b"X\x03\x00\x00\x00aaa" + b"X\x05\x00\x00\x00rot13" + b"tR"),
    "escape in a name": op(b"}X\x08\x00\x00\x00" + b"\x1b]0;a\x07w" + tensor() + b"s"),
}  # fmt: skip


def saved(content: bytes | None = None, **members: bytes) -> bytes:
    """What torch.save writes of one tensor, with other members."""
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(4)}, buffer)
    made = io.BytesIO()
    with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(made, "w") as to:
        for name in archive.namelist():
            inner = name.partition("/")[2]
            to.writestr(
                name,
                members.pop(inner.replace("/", "_").replace(".", "_"), archive.read(name))
                if inner != "data.pkl" or content is None
                else content,
            )
    return made.getvalue()


def bomb(name: str, size: int) -> bytes:
    """A zip archive with `size` zeros under a name, in some kB for each 16 MB, whose checksum is wrong."""
    packer, block = zlib.compressobj(9, zlib.DEFLATED, -15), bytes(1 << 24)
    first = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    data = first * (size >> 24) + zlib.compressobj(9, zlib.DEFLATED, -15).flush()
    start = struct.pack("<4s5H3I2H", b"PK\x03\x04", 45, 0, 8, 0, 0, 0, len(data), min(size, 2**32 - 1), len(name), 20)
    extra = struct.pack("<HHQQ", 1, 16, size, len(data))
    local = start + name.encode() + extra + data
    entry = struct.pack(
        "<4s6H3I5H2I",
        b"PK\x01\x02",
        45,
        45,
        0,
        8,
        0,
        0,
        0,
        len(data),
        min(size, 2**32 - 1),
        len(name),
        12,
        0,
        0,
        0,
        0,
        0,
    )
    central = entry + name.encode() + struct.pack("<HHQ", 1, 8, size)
    return local + central + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(central), len(local), 0)


def zipped(members: dict[str, bytes], edit: Callable[[zipfile.ZipInfo], None] = lambda info: None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            edit(info)
            archive.writestr(info, content)
    return buffer.getvalue()


HONEST = {"a/data.pkl": op(in_dict(tensor())), "a/data/0": bytes(16), "a/version": b"3\n", "a/byteorder": b"little"}
ARCHIVES: dict[str, Callable[[], bytes]] = {
    "zeros in data.pkl": lambda: bomb("a/data.pkl", 8 << 30),
    "zeros in a storage": lambda: bomb("a/data/0", 8 << 30),
    "zeros in code": lambda: bomb("a/code/x.py", 4 << 30),
    "zeros in a program": lambda: bomb("a/models/model.json", 4 << 30),
    "paths out": lambda: zipped({**HONEST, "../../evil.py": b"x", "/etc/evil": b"x"}),
    "a link": lambda: zipped(HONEST, lambda info: setattr(info, "external_attr", 0o120777 << 16)),
    "one name in two cases": lambda: zipped({**HONEST, "a/DATA.pkl": b"x"}),
    "many members": lambda: zipped({**HONEST, **{f"a/x{i}": b"" for i in range(20_000)}}),
    "no storage": lambda: zipped({k: v for k, v in HONEST.items() if k != "a/data/0"}),
    "a short storage": lambda: zipped({**HONEST, "a/data/0": b"1"}),
    "no pickle": lambda: zipped({k: v for k, v in HONEST.items() if k != "a/data.pkl"}),
    "two pickles": lambda: zipped({**HONEST, "b/data.pkl": b"x"}),
    "unknown compression": lambda: zipped(HONEST).replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x63\x00"),
    "encrypted": lambda: zipped(HONEST).replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00"),
    "sizes that lie": lambda: zipped(HONEST).replace(struct.pack("<II", 16, 16), struct.pack("<II", 16, 2**31)),
    "no directory": lambda: zipped(HONEST)[:-22],
    "a long comment": lambda: zipped(HONEST)[:-2] + struct.pack("<H", 65535) + bytes(65535),
    "big-endian": lambda: zipped({**HONEST, "a/byteorder": b"big"}),
    "byte order unknown": lambda: zipped({**HONEST, "a/byteorder": b"middle"}),
    "version unknown": lambda: zipped({**HONEST, "a/version": b"99999999999999\n"}),
    "version of text": lambda: zipped({**HONEST, "a/version": b"\xff\xfe"}),
    "names with escapes": lambda: zipped({f"\x1b[31m{k}": v for k, v in HONEST.items()}),
}  # fmt: skip


def mutated(content: bytes, seed: int) -> bytes:
    """`content` with some of its bytes changed, cut out, doubled, or cut off."""
    rng = random.Random(seed)
    data = bytearray(content)
    how = seed % 5
    if how == 0:
        del data[rng.randrange(len(data)) :]
    elif how == 1:
        at = rng.randrange(len(data))
        del data[at : at + rng.randrange(1, 64)]
    elif how == 2:
        at = rng.randrange(len(data))
        data[at:at] = data[at : at + rng.randrange(1, 256)]
    else:
        for _ in range(1 if how == 3 else rng.randrange(2, 40)):
            at = rng.randrange(len(data))
            data[at : at + 1] = bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))])
    return bytes(data)


def inspecting(name: str, content: Callable[[], bytes], *options: str) -> Callable[[Path], tuple[str, ...]]:
    def make(folder: Path) -> tuple[str, ...]:
        (folder / name).write_bytes(content())
        return ("inspect", name, *options)

    return make


CODE = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(__import__("torch").zeros(4))
    def forward(self, x):
        return x * self.w
"""


def with_code(content: bytes) -> Callable[[Path], tuple[str, ...]]:
    def make(folder: Path) -> tuple[str, ...]:
        (folder / "model.pt").write_bytes(content)
        (folder / "its_code.py").write_text(CODE)
        return ("inspect", "model.pt", "--code", "its_code.py", "--input", "1x4")

    return make


def pickles() -> Iterator[Case]:
    for name, content in PICKLES.items():
        yield Case("pickle", name, with_code(saved(content)))
    for name in ("size beyond", "storage of too many", "newobj", "deep lists", "laughs", "bytearray"):
        legacy = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
        yield Case(
            "pickle",
            f"legacy: {name}",
            with_code(legacy + PICKLES[name] + pickle.dumps(["0"], 2) + struct.pack("<q", HUGE)),
        )
        yield Case("pickle", f"bare: {name}", inspecting("model.pt", lambda name=name: PICKLES[name]))  # type: ignore[misc]
    for name, made in ARCHIVES.items():
        yield Case("archive", name, inspecting("model.pt", made, "--input", "1x4"))
        yield Case("archive", f"data: {name}", data_of("data.pt", made))
    whole = io.BytesIO()
    torch.save(network(), whole)
    for seed in range(20):
        content = mutated(whole.getvalue(), seed)
        yield Case(
            "archive",
            f"mutated {seed}",
            inspecting("model.pt", lambda content=content: content, "--input", "1x3x16x16"),
        )  # type: ignore[misc]
        inner = mutated(op(in_dict(tensor())), seed)
        yield Case("pickle", f"mutated {seed}", with_code(saved(inner)))


# --- TorchScript

SCRIPTS = {
    "endless loop": "i = 0\n    while True:\n      i = torch.add(i, 1)\n    return torch.add(x, i)",
    "long loop": "y = x\n    for i in range(1000000000000):\n      y = torch.add(y, 1)\n    return y",
    "growing list": "l = [0]\n    while True:\n      _0 = torch.append(l, 1)\n    return x",
    "growing tensor": "y = x\n    while True:\n      y = torch.cat([y, y])\n    return y",
    "huge zeros": "return torch.zeros([1099511627776], dtype=6)",
    "huge ones": "return torch.ones([4294967296], dtype=6)",
    "huge expansion": "return torch.contiguous(torch.expand(x, [1099511627776, 1, 4]))",
    "huge text": 's = torch.mul("a", 1099511627776)\n    return x',
    "python op": "return ops.prim.PythonOp(x)",
    "set_": "return torch.set_(x, torch.zeros([2], dtype=6))",
    "set_ by a method": "return (x).set_(x)",
    "set_ by another name": "t = torch\n    return t.set_(x, x)",
    "resize_": "return torch.resize_(x, [1099511627776])",
    "sparse": "return torch.to_dense(torch._sparse_coo_tensor_unsafe(x, x, [4]))",
    "save": 'ops.aten.save(x, "evil")\n    return x',
    "getattr of save": 'return getattr(torch, "save")(x, "evil")',
    "quantized": "return ops.quantized.linear(x, x, 1.0, 0)",
    "unknown namespace": "return ops.evil.run(x)",
    "embedding bag": "return (torch.embedding_bag(x, torch.zeros([2], dtype=4), torch.full([2], -1000000000, dtype=4)))[0]",
    "as_strided": "return torch.as_strided(x, [1000000], [1000000])",
    "itself": "return (self).forward(x, )",
    "raises": 'ops.prim.RaiseException("\\x1b[31mevil", "")\n    return x',
    "prints": 'print("\\x1b[31mevil")\n    return x',
    "text": 'return "a"',
    "nothing": "return None",
    "not closed": "return torch.add(x, (((1",
    "deep": "return " + "torch.add(" * 3000 + "x" + ", 1)" * 3000,
    "deep parentheses": "return " + "(" * 50_000 + "x" + ")" * 50_000,
    "null": "return x\0",
    "divides": "return torch.add(x, torch.floordiv(1, 0))",
}


def scripted(body: str = "return x", state: str = "") -> bytes:
    """A TorchScript archive of one class whose forward is `body`, with more methods."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Identity()), buffer)
    made = io.BytesIO()
    with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(made, "w") as to:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("linear.py"):
                head, _, _ = content.decode().partition("  def forward(")
                code = f"  def forward(self: __torch__.torch.nn.modules.linear.Identity,\n    x: Tensor) -> Tensor:\n    {body}\n"
                content = (head + code + state).encode()
            if not name.endswith(".debug_pkl"):
                to.writestr(name, content)
    return made.getvalue()


SETSTATE = """
  def __setstate__(self: __torch__.torch.nn.modules.linear.Identity,
    state: Any) -> NoneType:
    while True:
      pass
    return None
"""


def scripts() -> Iterator[Case]:
    for name, body in SCRIPTS.items():
        yield Case("torchscript", name, inspecting("model.pt", lambda body=body: scripted(body), "--input", "1x4"))  # type: ignore[misc]
    yield Case(
        "torchscript",
        "loops while loading",
        inspecting("model.pt", lambda: scripted("return x", SETSTATE), "--input", "1x4"),
    )
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(4, 4)), buffer)
    for seed in range(25):
        content = mutated(buffer.getvalue(), seed)
        yield Case(
            "torchscript", f"mutated {seed}", inspecting("model.pt", lambda content=content: content, "--input", "1x4")
        )  # type: ignore[misc]


# --- .pt2

EXPRESSIONS = (
    "9**9**9**9", "Pow(Integer(9), Pow(Integer(9), Integer(99999999)))", "s0**1000000000", "LShift(1, 10000000000000)",
    "PowByNatural(9, 99999999999)", "1" * 5000, "+".join(["s0"] * 2000), "(" * 900 + "s0" + ")" * 900, "Max(" * 300 + "s0" + ",1)" * 300,
    "__import__('os')", "s0.__class__", "lambda: 1", "Symbol('s0', evaluate=False)(1)", "floor(1/0)", "Mod(1, 0)", "FloorDiv(s0, 0)", "oo", "zoo*0",
    "-1", "", "s0 s1", "\x1b[31m",
)  # fmt: skip
TARGETS = (
    "torch.ops.aten._sparse_coo_tensor_unsafe.default", "torch.ops.aten._to_dense.default", "torch.ops.aten.set_.source_Storage",
    "torch.ops.aten.resize_.default", "torch.ops.aten._reshape_alias.default", "torch.ops.aten.from_file.default", "torch.ops.evil.run.default",
    "torch.ops.aten.embedding_bag.default", "torch.ops.aten.linear.out", "torch.ops.aten.linear", "torch.ops.aten.nothing.default", "torch.load",
    "_operator.call", "math.factorial", "torch.ops.higher_order.triton_kernel_wrapper_functional", "torch.ops.prim.device.default", "", "linear",
)  # fmt: skip


def program() -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(4, 4), (torch.ones(1, 4),)), buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def edited(member: str, edit: Callable[[Any], Any]) -> Callable[[], bytes]:
    def made() -> bytes:
        members = program()
        name = next(n for n in members if n.endswith(member))
        content = json.loads(members[name])
        return zipped({**members, name: json.dumps(edit(content) or content).encode()})

    return made


def mutate_json(value: Any, seed: int) -> Any:
    """`value` with one of its leaves of another kind."""
    rng = random.Random(seed)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, item in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            places.append((node, key))
            walk(item)

    walk(value)
    node, key = rng.choice(places)
    strange = (
        None,
        True,
        -1,
        HUGE,
        10**30,
        1.5,
        "",
        "x",
        "\x1b[31mx",
        "../../x",
        [],
        {},
        [[]],
        {"a": 1},
        [None],
        "é" * 100,
    )
    how = rng.randrange(6)
    if how == 0:
        del node[key]
    elif how == 1 and isinstance(node, dict):
        node[rng.choice(("x", "", "schema", "\x1b"))] = node.pop(key)
    else:
        node[key] = rng.choice(strange)
    return value


def set_size(content: Any, text: str) -> None:
    values = content["graph_module"]["graph"]["tensor_values"]
    next(iter(values.values()))["sizes"][0] = {"as_expr": {"expr_str": text, "hint": {"as_int": 1}}}


def set_target(content: Any, text: str) -> None:
    content["graph_module"]["graph"]["nodes"][0]["target"] = text


def set_meta(key: str, value: Any) -> Callable[[Any], None]:
    def edit(content: Any) -> None:
        for entry in content["config"].values():
            entry["tensor_meta"][key] = value

    return edit


METAS = {
    "sizes beyond": ("sizes", [{"as_int": HUGE}, {"as_int": 4}]),
    "sizes negative": ("sizes", [{"as_int": -4}]),
    "sizes of symbols": ("sizes", [{"as_expr": {"expr_str": "s0", "hint": None}}]),
    "strides beyond": ("strides", [{"as_int": HUGE}, {"as_int": 1}]),
    "strides of zero": ("strides", [{"as_int": 0}, {"as_int": 0}]),
    "offset beyond": ("storage_offset", {"as_int": HUGE}),
    "another type": ("dtype", 9),
    "no type": ("dtype", 999),
    "another device": ("device", {"type": "cuda", "index": 0}),
    "another layout": ("layout", 1),
}


def programs() -> Iterator[Case]:
    for i, text in enumerate(EXPRESSIONS):
        made = edited("models/model.json", lambda c, text=text: set_size(c, text))  # type: ignore[misc]
        yield Case("pt2", f"expression {i}", inspecting("model.pt2", made))
    for target in TARGETS:
        made = edited("models/model.json", lambda c, target=target: set_target(c, target))  # type: ignore[misc]
        yield Case("pt2", f"target {target}", inspecting("model.pt2", made))
    for name, (key, value) in METAS.items():
        yield Case("pt2", name, inspecting("model.pt2", edited("weights_config.json", set_meta(key, value))))
    for seed in range(40):
        made = edited("models/model.json", lambda c, seed=seed: mutate_json(c, seed))  # type: ignore[misc]
        yield Case("pt2", f"mutated program {seed}", inspecting("model.pt2", made))

    def deep() -> bytes:
        members = program()
        return zipped({**members, next(n for n in members if n.endswith("model.json")): b"[" * 1_000_000})

    yield Case("pt2", "deep JSON", inspecting("model.pt2", deep))
    content = zipped(program())
    for seed in range(15):
        yield Case("pt2", f"mutated {seed}", inspecting("model.pt2", lambda seed=seed: mutated(content, seed)))  # type: ignore[misc]


# --- safetensors

HEADERS: dict[str, bytes] = {
    "overlap": b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"v":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}',
    "beyond": b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,160000]}}',
    "backwards": b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}',
    "negative": b'{"w":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}',
    "another size": b'{"w":{"dtype":"F32","shape":[4000000],"data_offsets":[0,16]}}',
    "overflow": b'{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
    "unknown type": b'{"w":{"dtype":"X9","shape":[4],"data_offsets":[0,16]}}',
    "twice": b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "no JSON": b"{{{{{{{{{{{{{{{{",
    "deep": b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "metadata of numbers": b'{"__metadata__":{"a":1}}',
    "nothing": b"{}",
    "escape": b'{"\\u001b[31mw":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "float8": b'{"w":{"dtype":"F8_E4M3","shape":[16],"data_offsets":[0,16]}}',
    "scalar": b'{"w":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
}


def safetensors() -> Iterator[Case]:
    for name, header in HEADERS.items():
        content = struct.pack("<Q", len(header)) + header + bytes(16)
        yield Case("safetensors", name, _filled("model.safetensors", content))
    for length in (0, 1, 2**63, 2**64 - 1, 99_000_000):
        yield Case(
            "safetensors",
            f"length {length}",
            _filled("model.safetensors", struct.pack("<Q", length) + b"{}" + bytes(16)),
        )


def _filled(name: str, content: bytes) -> Callable[[Path], tuple[str, ...]]:
    def make(folder: Path) -> tuple[str, ...]:
        (folder / name).write_bytes(content)
        (folder / "its_code.py").write_text(CODE)
        return ("inspect", name, "--code", "its_code.py", "--input", "1x4")

    return make


# --- ONNX


def value(name: str, kind: int = TensorProto.FLOAT, shape: Any = (1, 4)) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: Any, initializers: Any = (), inputs: Any = None, outputs: Any = None, rank: int = 2, **more: Any
) -> Any:
    inputs = [value("x")] if inputs is None else inputs
    graph = helper.make_graph(nodes, "g", inputs, outputs or [value("y", shape="abcde"[:rank])], list(initializers))
    made = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("local", 1)], ir_version=10, **more
    )
    return made


def node(kind: str, *inputs: str, outputs: Any = ("y",), **attributes: Any) -> Any:
    return helper.make_node(kind, list(inputs), list(outputs), **attributes)


def constant(name: str, array: Any) -> Any:
    return numpy_helper.from_array(np.asarray(array), name)


def nested(levels: int) -> Any:
    inner = helper.make_graph([node("Identity", "x", outputs=["o0"])], "g0", [], [value("o0")])
    for i in range(1, levels):
        other = helper.make_graph([node("Identity", "x", outputs=[f"e{i}"])], f"e{i}", [], [value(f"e{i}")])
        branch = node("If", "c", outputs=[f"o{i}"], then_branch=inner, else_branch=other)
        inner = helper.make_graph([branch], f"g{i}", [], [value(f"o{i}")])
    made = helper.make_graph(
        list(inner.node), "m", [value("x"), value("c", TensorProto.BOOL, [])], [value(f"o{levels - 1}")]
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def functions(doubling: int, recursive: bool = False) -> Any:
    made = []
    for i in range(doubling):
        name = f"f{i - 1}" if i else ("f0" if recursive else "Identity")
        domain = "local" if i or recursive else ""
        body = [
            helper.make_node(name, ["a"], ["b"], domain=domain),
            helper.make_node(name, ["b"], ["c"], domain=domain),
        ]
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
        made.append(helper.make_function("local", f"f{i}", ["a"], ["c"], body, opsets))
    return model([helper.make_node(f"f{doubling - 1}", ["x"], ["y"], domain="local")], functions=made)


def loop(trips: int, grows: bool = False) -> Any:
    step = node("Concat", "v", "v", outputs=["w"], axis=0) if grows else node("Add", "v", "one", outputs=["w"])
    body = helper.make_graph(
        [step, node("Identity", "k", outputs=["keep"])], "body",
        [value("i", TensorProto.INT64, []), value("k", TensorProto.BOOL, []), value("v", shape=None)],
        [value("keep", TensorProto.BOOL, []), value("w", shape=None)])  # fmt: skip
    given = [
        constant("n", np.int64(trips)),
        constant("t", np.array(True)),
        constant("one", np.ones((1, 4), np.float32)),
    ]
    return model([node("Loop", "n", "t", "x", body=body)], given)


def lying(**changes: Any) -> Any:
    made = constant("w", np.ones((4, 4), np.float32))
    for key, found in changes.items():
        if key == "dims":
            del made.dims[:]
            made.dims.extend(found)
        else:
            setattr(made, key, found)
    return model([node("MatMul", "x", "w")], [made])


def outside(**entries: str) -> Any:
    made = TensorProto(name="w", data_type=1, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, text in entries.items():
        made.external_data.add(key=key, value=text)
    return model([node("MatMul", "x", "w")], [made])


def big(name: str, *shape: int) -> Any:
    return constant(name, np.array(shape, np.int64))


GRAPHS: dict[str, Callable[[], Any]] = {
    "if 5 deep": lambda: nested(5),
    "if 12 deep": lambda: nested(12),
    "if 30 deep": lambda: nested(30),
    "functions that double": lambda: functions(40),
    "function of itself": lambda: functions(1, True),
    "endless loop": lambda: loop(2**62),
    "growing loop": lambda: loop(2**62, True),
    "dims beyond": lambda: lying(dims=[HUGE, 4]),
    "dims negative": lambda: lying(dims=[-4, 4]),
    "dims overflow": lambda: lying(dims=[2**62, 2**62]),
    "many dims": lambda: lying(dims=[1] * 500),
    "type unknown": lambda: lying(data_type=99),
    "type of text": lambda: lying(data_type=8),
    "raw too short": lambda: lying(raw_data=b"abc"),
    "outside, absolute": lambda: outside(location="/etc/passwd"),
    "outside, above": lambda: outside(location="../../../etc/passwd"),
    "outside, a device": lambda: outside(location="/dev/zero"),
    "outside, a link": lambda: outside(location="link"),
    "outside, a pipe": lambda: outside(location="pipe"),
    "outside, a folder": lambda: outside(location="folder"),
    "outside, missing": lambda: outside(location="none"),
    "outside, nameless": lambda: outside(),
    "outside, short": lambda: outside(location="short"),
    "outside, offset": lambda: outside(location="whole", offset="99999999999", length="64"),
    "outside, length": lambda: outside(location="whole", length="99999999999"),
    "outside, negative": lambda: outside(location="whole", offset="-4", length="64"),
    "outside, text": lambda: outside(location="whole", offset="abc"),
    "outside, escape": lambda: outside(location="\x1b[31mx"),
    "huge constant of shape": lambda: model([node("ConstantOfShape", "s")], [big("s", HUGE)], [], rank=1),
    "large constant of shape": lambda: model([node("ConstantOfShape", "s")], [big("s", 1 << 31)], [], rank=1),
    "huge expand": lambda: model([node("Expand", "x", "s")], [big("s", HUGE, 1, 4)], rank=3),
    "huge tile": lambda: model([node("Tile", "x", "s")], [big("s", HUGE, 1)]),
    "huge range": lambda: model([node("Range", "a", "b", "c")], [constant("a", np.int64(0)), constant("b", np.int64(HUGE)), constant("c", np.int64(1))], [], [value("y", TensorProto.INT64, "a")]),
    "huge pad": lambda: model([node("Pad", "x", "s")], [big("s", 0, HUGE, 0, 0)]),
    "huge resize": lambda: model([node("Resize", "x", "", "", "s", mode="nearest")], [big("s", HUGE, 4)]),
    "huge one-hot": lambda: model([node("Cast", "x", outputs=["i"], to=7), node("OneHot", "i", "d", "v")], [constant("d", np.int64(HUGE)), constant("v", np.array([0, 1], np.float32))], rank=3),
    "huge random": lambda: model([node("RandomNormal", shape=[HUGE])], [], [], rank=1),
    "eye": lambda: model([node("ConstantOfShape", "s", outputs=["z"]), node("EyeLike", "z")], [big("s", 1 << 20, 1 << 20)], []),
    "gather beyond": lambda: model([node("Gather", "x", "i", axis=1)], [constant("i", np.array([10**9]))]),
    "gather nd beyond": lambda: model([node("GatherND", "x", "i")], [constant("i", np.array([[10**9, 10**9]]))], rank=1),
    "scatter beyond": lambda: model([node("ScatterElements", "x", "i", "x")], [constant("i", np.full((1, 4), 10**9))]),
    "slice": lambda: model([node("Slice", "x", "a", "b")], [big("a", -(2**62)), big("b", 2**62)]),
    "reshape": lambda: model([node("Reshape", "x", "s")], [big("s", HUGE, -1)]),
    "split": lambda: model([node("Split", "x", "s", outputs=["y", "z"], axis=1)], [big("s", -5, 9)]),
    "einsum": lambda: model([node("Einsum", "x", equation="ij->" + "i" * 5000)]),
    "custom domain": lambda: model([helper.make_node("Evil", ["x"], ["y"], domain="evil")]),
    "unknown op": lambda: model([node("Evil", "x")]),
    "a cycle": lambda: model([node("Add", "x", "b", outputs=["a"]), node("Add", "a", "x", outputs=["b"]), node("Identity", "b")]),
    "itself": lambda: model([node("Add", "x", "y")]),
    "no output": lambda: model([node("Relu", "x", outputs=["z"])]),
    "two of one name": lambda: model([node("Relu", "x"), node("Relu", "x")]),
    "no input": lambda: model([node("Relu", "nothing")]),
    "attribute of another kind": lambda: model([node("Softmax", "x", axis="text")]),
    "axis beyond": lambda: model([node("Softmax", "x", axis=10**9)]),
    "kernel": lambda: model([node("MaxPool", "x", kernel_shape=[2**31, 2**31])], (), [value("x", shape=[1, 1, 4, 4])], rank=4),
    "pads": lambda: model([node("MaxPool", "x", kernel_shape=[2, 2], pads=[2**40] * 4)], (), [value("x", shape=[1, 1, 4, 4])], rank=4),
    "dilations": lambda: model([node("Conv", "x", "w", dilations=[2**40, 2**40])], [constant("w", np.ones((1, 1, 2, 2), np.float32))], [value("x", shape=[1, 1, 4, 4])], rank=4),
    "group of zero": lambda: model([node("Conv", "x", "w", group=0)], [constant("w", np.ones((1, 1, 2, 2), np.float32))], [value("x", shape=[1, 1, 4, 4])], rank=4),
    "huge input": lambda: model([node("Relu", "x")], (), [value("x", shape=[1, HUGE])]),
    "large input": lambda: model([node("Relu", "x")], (), [value("x", shape=[1, 1 << 31])]),
    "negative input": lambda: model([node("Relu", "x")], (), [value("x", shape=[1, -4])]),
    "input of text": lambda: model([node("Identity", "x")], (), [value("x", TensorProto.STRING)], [value("y", TensorProto.STRING, "ab")]),
    "input of no type": lambda: model([node("Identity", "x")], (), [value("x", 99)]),
    "escape in a name": lambda: model([node("Relu", "\x1b]0;evil\x07x")], (), [value("\x1b]0;evil\x07x")]),
    "newline in a name": lambda: model([node("Relu", "a\nerror: b")], (), [value("a\nerror: b")]),
    "long name": lambda: model([node("Relu", "x" * 1_000_000)], (), [value("x" * 1_000_000)]),
    "markup in a name": lambda: model([node("Relu", "[link=http://evil]x")], (), [value("[link=http://evil]x")]),
    "many nodes": lambda: model([node("Relu", f"a{i}" if i else "x", outputs=[f"a{i + 1}"]) for i in range(20_000)] + [node("Relu", "a20000")]),
    "sequence": lambda: model([node("SequenceConstruct", "x", "x")]),
    "nothing": lambda: model([]),
}  # fmt: skip


def graphs() -> Iterator[Case]:
    def write(folder: Path, made: Any) -> None:
        (folder / "model.onnx").write_bytes(made.SerializeToString() if not isinstance(made, bytes) else made)
        (folder / "link").symlink_to("/etc/passwd")
        (folder / "folder").mkdir()
        (folder / "short").write_bytes(b"abc")
        (folder / "whole").write_bytes(bytes(64))
        os.mkfifo(folder / "pipe")

    for name, made in GRAPHS.items():

        def inspected(folder: Path, made: Any = made) -> tuple[str, ...]:
            write(folder, made())
            return ("inspect", "model.onnx")

        def exported(folder: Path, made: Any = made) -> tuple[str, ...]:
            write(folder, made())
            return (
                "export",
                "model.onnx",
                "--target",
                "x86",
                "--format",
                "onnx",
                "--precision",
                "fp32",
                "--out",
                "out",
            )

        yield Case("onnx", f"inspect: {name}", inspected)
        yield Case("onnx", f"export: {name}", exported)
    base = lying().SerializeToString()
    for seed in range(30):

        def changed(folder: Path, seed: int = seed) -> tuple[str, ...]:
            write(folder, mutated(base, seed))
            return (
                ("inspect", "model.onnx"),
                ("export", "model.onnx", "--target", "x86", "--format", "onnx", "--out", "out"),
            )[seed % 2]

        yield Case("onnx", f"mutated {seed}", changed)


# --- Data


def data_of(name: str, content: Callable[[], bytes]) -> Callable[[Path], tuple[str, ...]]:
    def make(folder: Path) -> tuple[str, ...]:
        (folder / "net.py").write_text(NET)
        (folder / name).write_bytes(content())
        return ("inspect", "net.py:make", "--data", name)

    return make


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def npy(header: str, data: bytes = b"") -> bytes:
    padded = header.encode() + b" " * 10 + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + data


ARRAYS: dict[str, Callable[[], bytes]] = {
    "objects": lambda: npz(x=np.array([{}, []], object)),
    "text": lambda: npz(x=np.array(["a", "b"])),
    "dates": lambda: npz(x=np.array(["2020-01-01"], "datetime64[D]")),
    "records": lambda: npz(x=np.zeros(3, [("a", "f4")])),
    "a number": lambda: npz(x=np.float32(1)),
    "complex": lambda: npz(x=np.zeros((2, 3, 16, 16), complex)),
    "shape beyond": lambda: zipped({"x.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}", b"abc")}),
    "shape negative": lambda: zipped({"x.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", b"abcd")}),
    "header of code": lambda: zipped({"x.npy": npy("__import__('os')")}),
    "deep header": lambda: zipped({"x.npy": npy("(" * 9000)}),
    "long header": lambda: zipped({"x.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1)}),
    "no header": lambda: zipped({"x.npy": b""}),
    "zeros": lambda: bomb("x.npy", 8 << 30),
    "escape in a name": lambda: npz(**{"\x1b[31mx": np.zeros((2, 3, 16, 16), np.float32)}),
    "nothing": lambda: npz(),
}  # fmt: skip


def arrays() -> Iterator[Case]:
    for name, made in ARRAYS.items():
        yield Case("data", name, data_of("data.npz", made))
    base = npz(**samples(4))
    for seed in range(10):
        yield Case("data", f"mutated {seed}", data_of("data.npz", lambda seed=seed: mutated(base, seed)))  # type: ignore[misc]


# --- Artifacts and bundles


def artifacts(bundle: Path, count: int, first: int = 0) -> Iterator[Case]:
    """Mutated files of each format, manifests and golden files, `count` of each less the `first`, by each command in turn.

    A mutated file lies in a bundle that says it is the right one, and beside it on its own.
    """
    for seed in range(first, count):
        for suffix in (".onnx", ".tflite", ".pte"):

            def changed(folder: Path, seed: int = seed, suffix: str = suffix) -> None:
                content = _whole(bundle)
                content["artifacts"] = [entry for entry in content["artifacts"] if entry["file"] == f"model{suffix}"]
                data = mutated((bundle / f"model{suffix}").read_bytes(), seed)
                content["artifacts"][0]["sha256"] = hashlib.sha256(data).hexdigest()
                _fill(folder / "b", bundle, content, {f"model{suffix}": data})
                (folder / f"m{suffix}").write_bytes(data)

            command = COMMANDS[seed % 3]
            named = "b" if command == "verify" or seed % 2 else f"m{suffix}"
            yield Case("artifact", f"{suffix} {seed} {command}", _then(changed, (command, named)))

        def manifest(folder: Path, seed: int = seed) -> None:
            _fill(folder / "b", bundle, mutate_json(_whole(bundle), seed), {})

        def golden(folder: Path, seed: int = seed) -> None:
            held = dict(np.load(bundle / "golden.npz"))
            name = random.Random(seed).choice(sorted(held))
            strange = (
                np.array([{}], object), np.array("text"), np.float32(1), held[name][:1], held[name].astype("int8"),
                held[name][..., None], np.full_like(held[name], np.nan), np.zeros((0, 4), np.float32), held[name].astype(complex), None,
            )  # fmt: skip
            held[name] = strange[seed % len(strange)]
            if held[name] is None:
                del held[name]
            data, content = npz(**held), _whole(bundle)
            content["golden"]["sha256"] = hashlib.sha256(data).hexdigest()
            _fill(folder / "b", bundle, content, {"golden.npz": data})

        yield Case("manifest", str(seed), _then(manifest, (COMMANDS[seed % 3], "b")))
        yield Case("golden", str(seed), _then(golden, (COMMANDS[1 + seed // 10 % 2], "b")))


def _whole(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "edgekit.json").read_text())


def _fill(folder: Path, bundle: Path, content: Any, changed: dict[str, bytes]) -> None:
    """Makes a bundle like `bundle` with another manifest, and with other files where `changed` has them."""
    shutil.copytree(bundle, folder)
    for name, data in changed.items():
        (folder / name).write_bytes(data)
    (folder / "edgekit.json").write_text(json.dumps(content))


def _then(make: Callable[[Path], None], args: tuple[str, ...]) -> Callable[[Path], tuple[str, ...]]:
    def made(folder: Path) -> tuple[str, ...]:
        make(folder)
        return args

    return made


def cases() -> list[Case]:
    """Every file but those of `artifacts`."""
    return [*pickles(), *scripts(), *programs(), *safetensors(), *graphs(), *arrays()]


def imported() -> None:
    """Imports what the commands need, once for all copies, and lets them time files briefly."""
    import onnxruntime  # noqa: F401
    import torch._export.converter
    import torch._export.serde.serialize
    import torch.export.pt2_archive._package

    from edgekit.artifacts import summary  # noqa: F401
    from edgekit.measuring import schedule
    from edgekit.runtimes import Timing, ort  # noqa: F401

    schedule.ROUNDS = schedule.MOST_ROUNDS = 1
    schedule.TIMING = Timing(warmup_runs=1, seconds=0.0, min_runs=5, max_runs=5)
    torch.set_num_threads(1)


def main() -> None:
    """Runs the files and says which end as they must not."""
    import edgekit

    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="every file, and mutated artifacts and manifests")
    parser.add_argument("--only", help="a part of the family's name")
    parser.add_argument("--mutations", type=int, default=500, help="of each format, of manifests and of golden files")
    parser.add_argument("--first", type=int, default=0, help="leave out so many of them")
    given = parser.parse_args()
    imported()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        chosen = cases() if given.full else cases()[::7]
        if given.full and given.mutations:
            exported = edgekit.export(network(), target="x86", precision="int8", data=samples(), out=place, name="net")
            chosen += list(artifacts(exported.path, given.mutations, given.first))
        chosen = [case for case in chosen if not given.only or given.only in case.family]
        outcomes = []
        for number, case in enumerate(chosen):
            outcomes.append(run(case, place / f"case{number}"))
            problem = outcomes[-1].problem
            if problem:
                print(f"{case.family}: {case.name}: {problem}\n{outcomes[-1].said[-2000:]}", flush=True)
        bad = sum(outcome.problem is not None for outcome in outcomes)
        slowest = max(outcomes, key=lambda outcome: outcome.seconds)
        largest = max(outcomes, key=lambda outcome: outcome.peak)
        print(
            f"{len(outcomes)} runs, {bad} wrong; slowest {slowest.case.name}: {slowest.seconds:.1f} s; "
            f"largest {largest.case.name}: {largest.peak / 1e9:.2f} GB"
        )
    sys.exit(bool(bad))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()

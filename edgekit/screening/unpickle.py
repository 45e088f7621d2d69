"""Read what torch.save wrote without running anything that the file asks for.

torch's own weights-only unpickler does the work; this module decides which names it may look up. A name in the
file is never imported: it is looked up among classes that exist already, and must be one of

- torch's defaults (tensors, storages, dtypes),
- a class defined in `torch.nn.modules.*` that is an `nn.Module`, or a plain activation function,
- an `nn.Module`, dataclass or enum of the code that the user named with `--code`,
- training bookkeeping that is no part of a network (NumPy scalars, `argparse.Namespace`, …): an inert stand-in.

Everything else stops the load with the list of names.
"""

from __future__ import annotations

import dataclasses
import enum
import io
import pickle
import pickletools
import sys
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edgekit.errors import MOST_SHOWN, EdgeKitError
from edgekit.screening import limits

if TYPE_CHECKING:
    from edgekit.util.user_code import UserCode

# The pickle that opens every file of torch.save's format before 1.6.
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_WRAPPERS = ("torch.nn.parallel.data_parallel.DataParallel", "torch.nn.parallel.distributed.DistributedDataParallel")
_ACTIVATIONS = (
    ("torch.nn.functional", ("relu", "relu6", "silu", "leaky_relu", "elu", "selu", "mish", "hardswish")),
    ("torch._C._nn", ("gelu", "silu", "softplus")),
)  # fmt: skip
BOOKKEEPING = frozenset({
    "numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar", "numpy.dtype", "numpy.ndarray",
    "numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct", "numpy.dtypes.Float64DType",
    "numpy.dtypes.Float32DType", "numpy.dtypes.Int64DType", "argparse.Namespace", "pathlib.PosixPath",
    "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
    "datetime.datetime", "datetime.date", "datetime.timedelta", "collections.defaultdict",
})  # fmt: skip


class Inert:
    """Stands in for bookkeeping: takes any arguments and any state, keeps nothing, does nothing."""

    def __new__(cls, *_args: object) -> Inert:
        """An empty object."""
        return super().__new__(cls)

    def __setstate__(self, _state: object) -> None:
        """Forget the state."""


def read_pickle(path: Path, code: UserCode | None) -> tuple[Any, list[str]]:
    """Load a file of torch.save's zip or legacy format to the CPU with `weights_only=True`.

    Returns the object and the bookkeeping names that were replaced by inert stand-ins. Raises EdgeKitError with the
    names that the file asks for where one is not allowed, or where the file is damaged.
    """
    import torch

    asked = globals_of(path)
    known = set(torch._weights_only_unpickler._get_allowed_globals())
    allowed: list[Any] = []
    inert, refused = [], []
    for name in sorted(asked - known):
        found = resolve(name, code)
        if found is not None:
            allowed.append((found, name))
        elif name in BOOKKEEPING:
            inert.append(name)
            # A class of its own for each name: the unpickler tells them apart by the class.
            allowed.append((type("Inert", (Inert,), {}), name))
        else:
            refused.append(name)
    if refused:
        raise refusal(str(path), refused, code)
    with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True), inert
        except pickle.UnpicklingError as error:
            raise EdgeKitError(
                f"{path} cannot be loaded without running code from it: {_reason(error)}",
                "load it where you trust it, and save model.state_dict() with torch.save",
            ) from error
        except Exception as error:
            raise EdgeKitError(
                f"{path} is damaged or cut short: {_reason(error)}", "copy or download the file again"
            ) from error


def read_tensors(path: Path, help: str) -> Any:
    """Load a file of torch.save's zip format that holds tensors alone; any other is an EdgeKitError with `help`."""
    import torch

    from edgekit.screening.watchdog import rehearse

    def loaded() -> Any:
        try:
            globals_of(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except EdgeKitError as error:
            raise EdgeKitError(error.what, help) from None
        except Exception as error:
            raise EdgeKitError(f"{path} is not a .pt file of plain tensors: {_reason(error)}", help) from None

    rehearse(loaded, str(path), limits.budget([path]))
    return loaded()


def refusal(what: str, names: list[str], code: UserCode | None) -> EdgeKitError:
    """The error that lists the names a file asks for, with advice for the likeliest reason."""
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    error = f"{what} asks for code that EdgeKit does not run: {shown}"
    if all(_is_user_class(name) for name in names):
        if code is None:
            return EdgeKitError(error, "if you trust it, name the code that defines them: --code FILE.py")
        return EdgeKitError(error, f"{code.text} does not define them; name the file that does with --code")
    return EdgeKitError(error, "only a file you trust should ask for these; save model.state_dict() and load that")


def _is_user_class(name: str) -> bool:
    root = name.partition(".")[0]
    return root == "__main__" or (root not in sys.stdlib_module_names and root != "torch")


def resolve(name: str, code: UserCode | None) -> Any | None:
    """The object that `module.qualname` in a pickle may stand for, or None. Imports nothing."""
    from torch import nn

    for module_name, functions in _ACTIVATIONS:
        if name in {f"{module_name}.{f}" for f in functions}:
            return getattr(sys.modules[module_name], name.rpartition(".")[2])
    if name.startswith("torch.nn.modules.") or name in _WRAPPERS:
        module_name, _, qualname = name.rpartition(".")
        found = vars(sys.modules.get(module_name, object)).get(qualname)
        if not isinstance(found, type) or not issubclass(found, nn.Module):
            return None
        return found if f"{found.__module__}.{found.__qualname__}" == name else None
    if code is None or name.partition(".")[0] in ("torch", "builtins"):
        return None
    return _user_class(name, code)


def _user_class(name: str, code: UserCode) -> type | None:
    """The class of the user's code that was pickled under `name`, be it as `__main__.Net` or under its module."""
    parts = name.split(".")
    for cut in range(1, len(parts)):  # pkg.mod.Outer.Inner: the module is any leading part
        module, qualname = ".".join(parts[:cut]), parts[cut:]
        owners = [code.module]
        if _is_beside(module, code):
            owners.insert(0, sys.modules[module])
        for owner in owners:
            found: object = owner
            for part in qualname:
                found = vars(found).get(part) if hasattr(found, "__dict__") else None
            if isinstance(found, type) and _holds_data(found, code):
                return found
    return None


def _is_beside(module: str, code: UserCode) -> bool:
    """Whether `module` is imported already and its file lies in the folder of the user's code."""
    origin = getattr(sys.modules.get(module), "__file__", None)
    return isinstance(origin, str) and Path(origin).resolve().is_relative_to(code.folder)


def _holds_data(found: type, code: UserCode) -> bool:
    """Whether a class is a network, or plain data of the user's own: made to be constructed from a file's values."""
    from torch import nn

    if issubclass(found, nn.Module):
        return not found.__module__.startswith("torch.")
    return (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)) and _is_beside(found.__module__, code)


def globals_of(path: Path) -> set[str]:
    """Every name that the pickles of a torch.save file ask for, read without unpickling."""
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(path):
                limits.check_archive(path)
                with zipfile.ZipFile(path) as archive:
                    return globals_in(archive, str(path))
            # magic, protocol, system information, the object; raw storages follow.
            legacy = file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC
            file.seek(0)
            return set().union(*(pickle_globals(file, str(path)) for _ in range(4 if legacy else 1)))
    except EdgeKitError:
        raise
    except Exception as error:
        raise EdgeKitError(
            f"{path} is damaged or cut short: {_reason(error)}", "copy or download the file again"
        ) from error


def globals_in(archive: zipfile.ZipFile, what: str) -> set[str]:
    """The names that the pickle of a torch.save archive asks for; its tensors are checked against their storages."""
    member = next(n for n in archive.namelist() if n.endswith("/data.pkl") or n == "data.pkl")
    content = archive.read(member)
    names = pickle_globals(io.BytesIO(content), what)
    folder = f"{member.removesuffix('data.pkl')}data/"
    check_tensors(content, {i.filename.removeprefix(folder): i.file_size for i in archive.infolist()}, what)
    return names


def pickle_globals(stream: IO[bytes], what: str) -> set[str]:
    """The names that the next pickle in `stream` looks up (GLOBAL, INST and STACK_GLOBAL), as `module.qualname`.

    Raises EdgeKitError, in which `what` names the file, for one of too many operations.
    """
    names: set[str] = set()
    strings: list[str] = []
    memo: dict[int, str | None] = {}
    last: str | None = None
    for number, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
        if number > limits.PICKLE_OPCODES:
            raise EdgeKitError(
                f"{what} holds a pickle of more than {limits.PICKLE_OPCODES:,} operations", limits.UNTRUSTED
            )
        if opcode.name in ("GLOBAL", "INST"):
            names.add(_python3(*str(arg).split(" ", 1)))
        elif opcode.name == "STACK_GLOBAL":
            names.add(_python3(*strings[-2:]) if len(strings) >= 2 else "?.?")
        elif opcode.name == "MEMOIZE" or opcode.name.endswith("PUT"):
            memo[len(memo) if arg is None else int(arg)] = last
            continue
        elif opcode.name.endswith("GET"):
            last = memo.get(int(arg)) if arg is not None else None
        else:
            last = arg if isinstance(arg, str) else None
        if last is not None:
            strings.append(last)
    return names


ITEM_BYTES = {
    "Bool": 1, "Byte": 1, "Char": 1, "Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4, "Long": 8, "Double": 8,
    "ComplexFloat": 8, "ComplexDouble": 16, "QInt8": 1, "QUInt8": 1, "QInt32": 4, "QUInt4x2": 1, "QUInt2x4": 1,
    "Untyped": 1,
}  # fmt: skip


class _Stub:
    """Stands in for whatever a pickle names, be it a class, a function or a value: takes everything, does nothing."""

    def __new__(cls, *_args: object, **_named: object) -> _Stub:
        return super().__new__(cls)

    def __setstate__(self, _state: object) -> None:
        pass

    def __setitem__(self, _key: object, _value: object) -> None:
        pass

    def append(self, _value: object) -> None:
        pass

    def extend(self, _values: object) -> None:
        pass

    def add(self, _value: object) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class _Storage:
    """The values of tensors: how many there are, in elements of `item` bytes."""

    room: int
    item: int


class _Tensors(pickle._Unpickler):
    """Goes through a pickle of torch without making anything that it names, and checks its tensors on the way."""

    def __init__(self, content: bytes, sizes: Mapping[str, int], what: str) -> None:
        super().__init__(io.BytesIO(content))
        self.sizes, self.what = sizes, what

    def find_class(self, module: str, name: str) -> type:
        if module == "torch._utils" and name.startswith(("_rebuild_tensor", "_rebuild_qtensor")):
            check = self._check
            return type(name, (_Stub,), {"__new__": lambda cls, *args: check(cls, *args)})
        return type(name.removesuffix("Storage"), (_Stub,), {"__module__": module})

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, count = pid[:5]
        item = ITEM_BYTES[kind.__name__]
        if isinstance(count, bool) or count < 0 or count * item > self.sizes[key]:
            raise EdgeKitError(
                f"{self.what} gives storage {key} {count} values, more than it holds of them", limits.UNTRUSTED
            )
        return _Storage(self.sizes[key] // item, item)

    def _check(self, cls: type[_Stub], storage: _Storage, offset: int, size: Any, stride: Any, *rest: Any) -> _Stub:
        limits.check_extent(f"a tensor of {self.what}", size, stride, offset, storage.room)
        return _Stub.__new__(cls)


def check_tensors(content: bytes, sizes: Mapping[str, int], what: str) -> None:
    """Raises EdgeKitError where a tensor in a pickle of torch is larger than what is stored for it.

    `sizes` are the bytes of the storages by their keys. torch takes both as they are told, and reads beyond the end.
    Whatever is wrong with the pickle otherwise is left to torch, which does not read on there either.
    """
    try:
        _Tensors(content, sizes, what).load()
    except EdgeKitError:
        raise
    except Exception as error:
        raise EdgeKitError(
            f"{what} is damaged or cut short: {_reason(error)}", "copy or download the file again"
        ) from error


def _python3(module: str, name: str) -> str:
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _reason(error: BaseException) -> str:
    """What went wrong, without torch's advice on how to switch its safety off."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2]
    if any(word in text.partition("\n")[0] for word in ("weights_only", "Weights only", "safe_globals")):
        return "it asks for more than tensors"
    return (text.strip().splitlines() or [type(error).__name__])[0][:MOST_SHOWN]

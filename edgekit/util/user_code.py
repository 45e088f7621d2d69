"""Import the Python code that the user names: `FILE.py[:name]` or `package.module[:name]`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from edgekit.errors import EdgeKitError

_modules_of: dict[Path, dict[str, ModuleType]] = {}  # by folder, those that gave way to others of the same names
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
# Names of factories and classes that do not tell which model they make, and what comes before one that does.
_PLAIN_NAME = re.compile(
    r"((build|create|make|get|new|load)_?)?(my_?)?(model|net|network|module|factory|main)?", re.IGNORECASE
)
_MAKES = re.compile(r"(build|create|make|get|new|load)_(?=\w)", re.IGNORECASE)


@dataclass(frozen=True)
class UserCode:
    """An imported file or module, the name in it that the user asked for (or None), and the text as it was given."""

    module: ModuleType
    name: str | None
    text: str

    @property
    def folder(self) -> Path:
        """The folder that the code is imported from."""
        return Path(self.module.__file__ or ".").resolve().parent

    def get(self) -> object:
        """The object called `name`; EdgeKitError listing what there is if the code has no such name."""
        assert self.name is not None
        if not hasattr(self.module, self.name):
            there = sorted(k for k, v in vars(self.module).items() if callable(v) and not k.startswith("_"))
            raise EdgeKitError(
                f"{self.text.rpartition(':')[0]} has no {self.name!r}",
                f"it has: {', '.join(there) or 'nothing to call'}",
            )
        return getattr(self.module, self.name)


def is_code(text: str) -> bool:
    """Whether `text` has the form `FILE.py[:name]` or `package.module:name` (a path that exists is a file first)."""
    head, name = _split(text)
    if head.endswith(".py"):
        return True
    return name is not None and _MODULE.fullmatch(head) is not None and not Path(text).exists()


def model_name(text: str) -> str:
    """A name for what the code `text` makes: that of the factory where it tells one, else of the file or module.

    `models.py:lstm` is `lstm`, `nets.py:make_unet` is `unet`, and `net.py:make_model` is `net`.
    """
    head, name = _split(text)
    if name is not None and not _PLAIN_NAME.fullmatch(name):
        return _MAKES.sub("", name, count=1)
    return Path(head).stem if head.endswith(".py") else head.rpartition(".")[2]


def check_code(text: str) -> None:
    """Raise EdgeKitError where `text` names a file that is not there, or is no name of code; runs nothing."""
    head, _ = _split(text)
    if head.endswith(".py"):
        if not Path(head).is_file():
            raise EdgeKitError(f"{head} does not exist", "name a Python file: FILE.py or FILE.py:name")
    elif not _MODULE.fullmatch(head):
        raise EdgeKitError(f"cannot read {text!r} as code", "write FILE.py, FILE.py:name or package.module:name")


def import_code(text: str) -> UserCode:
    """Import `FILE.py[:name]` or `package.module[:name]` by running it, as the user asked by naming it.

    A file is imported with its own folder first on `sys.path`, a module with the current folder first. Raises
    EdgeKitError where it is missing, or where it fails: with the file, the line and the message.
    """
    head, name = _split(text)
    check_code(text)
    if head.endswith(".py"):
        return UserCode(_import_file(Path(head).resolve(), head), name, text)
    with _on_path(Path.cwd()):
        if not _findable(head):
            raise EdgeKitError(f"there is no Python module named {head!r}", "name it as FILE.py:name, or install it")
        with running(head):
            return UserCode(importlib.import_module(head), name, text)


@contextmanager
def running(what: str, folder: Path | None = None) -> Iterator[None]:
    """Turn what user code raises inside into an EdgeKitError with file, line and message; `folder` is importable."""
    try:
        if folder is None:
            yield
        else:
            with _on_path(folder):
                yield
    except EdgeKitError:
        raise
    except (Exception, SystemExit) as error:
        where = _where(error)
        said = str(error).strip().splitlines()
        kind = type(error).__name__
        raise EdgeKitError(
            f"{what} failed{where}: {kind}{': ' + said[0] if said else ''}", "mend that code, or name other code"
        ) from error


def _split(text: str) -> tuple[str, str | None]:
    head, colon, name = text.rpartition(":")
    if colon and name.isidentifier():
        return head, name
    return text, None


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Lets code import from `folder`, and get its own modules where another folder has some of the same names."""
    entry = str(folder)
    sys.path.insert(0, entry)
    _switch_to(folder.resolve())
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def _switch_to(folder: Path) -> None:
    """Puts the modules of `folder` in the place of those that came by the same names from other folders of users."""
    importlib.invalidate_caches()
    _modules_of.setdefault(folder, {})
    others = {str(other): kept for other, kept in _modules_of.items() if other != folder}
    for head in {name.partition(".")[0] for name in sys.modules}:
        home = _home(sys.modules.get(head))
        if home not in others or not ((folder / f"{head}.py").is_file() or (folder / head / "__init__.py").is_file()):
            continue
        for name in [name for name in sys.modules if name.partition(".")[0] == head]:
            others[home][name] = sys.modules.pop(name)
    for name, module in _modules_of[folder].items():
        sys.modules.setdefault(name, module)


def _home(module: ModuleType | None) -> str | None:
    """The folder that a module was imported from; that of a package is the one around it."""
    path = getattr(module, "__file__", None)
    if not isinstance(path, str):
        return None
    folder, name = os.path.split(path)
    return os.path.dirname(folder) if name == "__init__.py" else folder  # noqa: PTH120


def _findable(name: str) -> bool:
    """Whether `name` is a module, without importing more than its parent packages."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and not name.startswith(error.name):
            raise EdgeKitError(f"importing {name} failed: there is no module {error.name!r}") from error
        return False


def _import_file(path: Path, shown: str) -> ModuleType:
    """Run a file as a module; one that was run before and has not changed since is not run again."""
    stamp = (str(path), path.stat().st_mtime_ns)
    kept = [module for modules in _modules_of.values() for module in modules.values()]
    for module in [*sys.modules.values(), *kept]:
        if getattr(module, "_edgekit_stamp", None) == stamp:
            return module
    # A file called torch.py or json.py must not take the place of the module that others import.
    name = (
        path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"edgekit_user_{len(sys.modules)}"
    )
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with running(shown, path.parent):
            spec.loader.exec_module(module)
    except EdgeKitError:
        sys.modules.pop(name, None)
        raise
    module._edgekit_stamp = stamp  # type: ignore[attr-defined]
    return module


def _where(error: BaseException) -> str:
    """` (FILE, line N)` of the user's own innermost frame, or an empty string."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    ours = str(Path(__file__).parents[1])
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        library = "site-packages" in frame.filename or frame.filename.startswith(("<", ours, sys.base_prefix + "/lib"))
        if not library:
            return f" ({frame.filename}, line {frame.lineno})"
    return ""

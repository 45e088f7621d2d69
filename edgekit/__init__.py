"""EdgeKit: compress a trained PyTorch model, export it to phones and boards, and prove what it is worth."""

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what __getattr__ finds, for type checkers
    from edgekit.api import compare, export, profile, prune, verify
    from edgekit.compression.qat_training import Qat
    from edgekit.errors import EdgeKitError

# ONNX Runtime tells its makers of each session, and keeps a name for this machine, unless this is set before it starts.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# In a checkout `quant`, `exporters`, `runtimes` and `examples` lie beside this folder; a wheel maps them in.
if (Path(__file__).parents[1] / "pyproject.toml").is_file():
    __path__.append(str(Path(__file__).parents[1]))

__version__ = "0.1.0"

# Public name → the module that holds it, imported when the name is first used (PEP 562): torch alone takes a second.
_PUBLIC = {
    "export": "api",
    "compare": "api",
    "profile": "api",
    "verify": "api",
    "prune": "api",
    "Qat": "compression.qat_training",
    "EdgeKitError": "errors",
}
__all__ = ["EdgeKitError", "Qat", "compare", "export", "profile", "prune", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'edgekit' has no attribute {name!r}")
    return getattr(import_module(f"edgekit.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

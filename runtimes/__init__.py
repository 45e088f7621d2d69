"""Runtimes: one module per runtime, one per device transport, and the worker that runs them."""

from .devices import DEVICES, open_device
from .run import RunResult, Timing, run_artifact
from .table import RUNTIMES, format_of, runtime_for

__all__ = ["DEVICES", "RUNTIMES", "RunResult", "Timing", "format_of", "open_device", "run_artifact", "runtime_for"]

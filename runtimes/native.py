"""The job of the C++ runner: the same facts as the worker's, for a .pte file on a device without Python."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import EdgeKitError

from . import pte_runner
from .devices.device import Device
from .session import TensorInfo, checked_feeds, numbered

BROKEN = "check that the file is whole and was made for this runtime's version, or export it again"
FULL = ("No space left", "Disk quota", "File too large")
# The bundle is some 20 MB: a device that runs several jobs takes it once.
_bundles: weakref.WeakKeyDictionary[Device, str] = weakref.WeakKeyDictionary()


def files(here: Path, path: Path, job: Mapping[str, Any], feeds: Sequence[np.ndarray]) -> dict[str, Path]:
    """Write the job's files into the folder `here`; what to push, by name."""
    words: list[object] = ["threads", job["threads"], "runs", len(feeds[0])]
    words += ["inputs", len(feeds)]
    pushed = {"model.pte": path}
    for i, feed in enumerate(feeds):
        words += [feed.dtype.name, feed.ndim - 1, *feed.shape[1:]]
        pushed[f"in_{i}.bin"] = here / f"in_{i}.bin"
        np.ascontiguousarray(feed, feed.dtype.newbyteorder("<")).tofile(pushed[f"in_{i}.bin"])
    timing = job["timing"]
    words += ["count", job["count"], "trace", job["trace"]]
    words += ["memory", job["memory_bytes"], "stall", job["stall_s"]]
    words += ["timing", 0 if timing is None else 1]
    if timing is not None:
        words += [timing["warmup_runs"], timing["seconds"], timing["min_runs"], timing["max_runs"]]
    pushed["job.txt"] = here / "job.txt"
    pushed["job.txt"].write_text(" ".join(map(str, words)) + "\n")
    return pushed


def command(device: Device, there: str) -> list[str]:
    """The command for the job in the folder `there`; pushes the runner to a device that does not have it yet.

    Raises EdgeKitError where there is no runner for the machine.
    """
    assert device.runner is not None
    if device not in _bundles:
        _bundles[device] = device.push(pte_runner.bundle(device.runner))
    return pte_runner.command(_bundles[device], there)


def result(here: Path, job: Mapping[str, Any], feeds: Sequence[np.ndarray]) -> dict[str, Any]:
    """The runner's result.json in the worker's form. Raises EdgeKitError for what the runner says went wrong."""
    said = json.loads((here / "result.json").read_text())
    if not said["ok"]:
        raise _error(said["kind"], said["detail"], job, feeds)
    try:
        names = [
            numbered(job[kind], len(said[kind]), kind.removesuffix("s")) if job[kind] or said[kind] else ()
            for kind in ("inputs", "outputs")
        ]
    except ValueError as error:
        raise EdgeKitError(f"{job['runtime']} cannot load {job['label']}: {error}", BROKEN) from error
    for kind, given in zip(("inputs", "outputs"), names, strict=True):
        said[kind] = [{"name": name, **info} for name, info in zip(given, said[kind], strict=True)]
    # Nothing is imported: the libraries are linked, and their start belongs to the process.
    return {**said, "import_ms": 0.0, "version": pte_runner.release()}


def outputs(here: Path, said: Mapping[str, Any], runs: int) -> tuple[np.ndarray, ...]:
    """The outputs, (runs, *shape) each, out of out_<i>.bin."""
    return tuple(
        np.fromfile(here / f"out_{i}.bin", np.dtype(info["dtype"]).newbyteorder("<"))
        .astype(info["dtype"], copy=False)
        .reshape(runs, *info["shape"])
        for i, info in enumerate(said["given"])
    )


def _error(kind: str, detail: Any, job: Mapping[str, Any], feeds: Sequence[np.ndarray]) -> EdgeKitError:
    runtime, label = job["runtime"], job["label"]
    if kind == "load":
        return EdgeKitError(f"{runtime} cannot load {label}: {detail}", BROKEN)
    if kind == "run":
        return EdgeKitError(f"{runtime} failed while running {label}: {detail}", BROKEN)
    if kind == "write":
        help_ = "free some space there, or name another folder: add ?dir=/path to the device"
        if any(words in detail for words in FULL):
            return EdgeKitError(f"the device's disk is full, or a limit there is too low: {detail}", help_)
        return EdgeKitError(f"the outputs of {label} cannot be written: {detail}", help_)
    if kind == "feeds":
        try:
            names = numbered(job["inputs"], len(detail), "input")
            infos = [TensorInfo(n, i["dtype"], tuple(i["shape"])) for n, i in zip(names, detail, strict=True)]
            if len(infos) != len(feeds):
                wanted = ", ".join(f"{info.name}:{info}" for info in infos)
                return EdgeKitError(f"{label} takes {len(infos)} inputs ({wanted}), not {len(feeds)}")
            checked_feeds(infos, {info.name: feed[0] for info, feed in zip(infos, feeds, strict=True)})
        except ValueError as error:
            return EdgeKitError(f"{label} cannot be fed: {error}")
    raise RuntimeError(f"the runner says {kind}: {detail}")

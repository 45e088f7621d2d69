"""Verify a bundle: replay its golden inputs and compare with what was recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.artifacts import bundles
from edgekit.artifacts.artifact import Artifact
from edgekit.compression import compress
from edgekit.errors import EdgeKitError
from edgekit.judging import verdicts
from edgekit.judging.results import Replay
from edgekit.measuring import running
from edgekit.metrics import parity
from edgekit.util.progress import Progress, Silent

if TYPE_CHECKING:
    import numpy as np

    from edgekit.runtimes.devices.device import Device


SAME_MACHINE = ("local:", "python:")  # devices that are this machine


def verify(
    bundle: str | Path | bundles.Bundle,
    *,
    device: str = "local:",
    timeout: float | None = None,
    progress: Progress | None = None,
) -> tuple[Replay, ...]:
    """Replays a bundle's golden inputs on `device` and compares with the outputs that were recorded at export.

    A file whose hash has changed is not run. Raises EdgeKitError for a folder that is no bundle, and for a device
    that does not answer.
    """
    opened = bundles.read(bundle.path if isinstance(bundle, bundles.Bundle) else Path(bundle))
    with running.opened(device, timeout=timeout, timed=False) as there:
        try:
            golden = bundles.read_golden(opened)
        except EdgeKitError as error:
            return tuple(Replay(artifact, None, error.what) for artifact in opened.artifacts)
        replays = []
        for artifact, entry in zip(opened.artifacts, opened.manifest["artifacts"], strict=True):
            with (progress or Silent()).step(f"Replaying {artifact.path.name}"):
                same = device.startswith(SAME_MACHINE) and opened.made_here
                replays.append(_replay(artifact, entry, golden, opened.manifest["qparams"], there, same))
        return tuple(replays)


def _replay(
    artifact: Artifact,
    entry: Mapping[str, Any],
    golden: Mapping[str, np.ndarray],
    qparams: Mapping[str, Any],
    device: Device,
    same_machine: bool,
) -> Replay:
    try:
        bundles.check_hash(artifact.path, entry["sha256"])
        feeds = [golden[f"input/{spec.name}"] for spec in artifact.inputs]
        outputs = running.run(artifact, feeds, device=device).outputs
        recorded = [golden[f"{artifact.format}/{spec.name}"] for spec in artifact.outputs]
        before = [golden[f"original/{spec.name}"] for spec in artifact.outputs]
        rounded = [found.max_abs for found in parity.parities(*running.aligned(before, recorded, artifact))]
        floors = rounded if artifact.precision == "fp32" else ()  # what was right then is no difference now
        near = parity.parities(*running.aligned(recorded, outputs, artifact), floors=floors)
    except EdgeKitError as error:
        return Replay(artifact, None, error.what)
    scales = compress.output_scales(qparams, artifact.outputs)
    allowed = verdicts.steps_allowed(artifact.format, same_machine)
    return Replay(artifact, parity.worst(near), verdicts.reproduced(artifact.precision, near, scales, allowed))

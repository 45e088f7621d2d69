"""Artifacts as people name them: files, bundles and their folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgekit.artifacts import bare, bundles
from edgekit.artifacts.artifact import Artifact
from edgekit.errors import EdgeKitError
from edgekit.loading import pruned_mark


def expand(artifacts: Sequence[str | Path | bundles.Bundle]) -> list[Artifact]:
    """Turns bundles into their files, unchanged since the export, and paths of files into artifacts."""
    found: list[Artifact] = []
    for item in artifacts:
        if isinstance(item, bundles.Bundle) or bundles.is_bundle(Path(item)):
            bundle = item if isinstance(item, bundles.Bundle) else bundles.read(Path(item))
            for artifact, entry in zip(bundle.artifacts, bundle.manifest["artifacts"], strict=True):
                bundles.check_hash(artifact.path, entry["sha256"])
                found.append(artifact)
        else:
            found.append(identify(Path(item)))
    if not found:
        raise EdgeKitError("no artifacts to compare", "name files or bundle folders after the model")
    return list(dict.fromkeys(found))


def identify(path: Path) -> Artifact:
    """Returns the file at `path` as an artifact, as the bundle around it tells, or else as the file itself does."""
    if not path.is_file():
        raise EdgeKitError(f"no artifact at {path}", "name a .pte, .onnx or .tflite file, or a bundle folder")
    if (path.parent / bundles.MANIFEST).is_file():
        bundle = bundles.read(path.parent)
        for artifact, entry in zip(bundle.artifacts, bundle.manifest["artifacts"], strict=True):
            if artifact.path.name == path.name:
                bundles.check_hash(path, entry["sha256"])
                return artifact
    return replace(bare.bare(path), pruned=pruned_mark.fingerprint_of(path.parent))

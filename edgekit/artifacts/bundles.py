"""The bundle: a folder with the exported files, `edgekit.json` that describes them, and golden inputs and outputs."""

from __future__ import annotations

import base64
import io
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.artifacts.artifact import Artifact
from edgekit.artifacts.manifest import problem
from edgekit.errors import EdgeKitError, reason
from edgekit.screening import limits
from edgekit.types import LAYOUTS, SUFFIXES, Layout, State, TensorSpec
from edgekit.util import atomic_files

if TYPE_CHECKING:
    import numpy as np

MANIFEST = "edgekit.json"
GOLDEN = "golden.npz"
FILES = {MANIFEST, GOLDEN, *(f"model{suffix}" for suffix in SUFFIXES.values())}  # all that a bundle ever holds
GOLDEN_SAMPLES = 8
KEEPS_STATE = ("executorch",)  # formats whose files hold the state in themselves
SCHEMA = 1
VERSIONED = (
    "edgekit",
    "torch",
    "torchao",
    "executorch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "ai-edge-litert",
    "numpy",
)


@dataclass(frozen=True, repr=False)
class Bundle:
    """An exported bundle on disk."""

    path: Path
    manifest: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, for {self.manifest['target']}: {contents_of(self.manifest)})"

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """The bundle's files."""
        inputs, outputs = (_specs(self.manifest[key]) for key in ("inputs", "outputs"))
        precision = self.manifest["precision"]
        pruned = str(self.manifest["model"].get("pruned", {}).get("fingerprint") or "") or None
        state = self.state
        return tuple(
            Artifact(
                self.path / entry["file"],
                entry["format"],
                entry.get("precision", precision),
                inputs,
                outputs,
                _layout(entry),
                pruned,
                state=() if entry["format"] in KEEPS_STATE else state,
                target=str(self.manifest.get("target") or "") or None,
            )
            for entry in self.manifest["artifacts"]
        )

    @property
    def state(self) -> tuple[State, ...]:
        """What the files take and give beside their inputs and outputs, from call to call."""
        found = []
        for entry in self.manifest.get("state", ()):
            (spec,) = _specs([{**entry, "name": entry["input"]}])
            found.append(State(spec, entry["output"], base64.b64decode(entry["initial"]) or bytes(spec.nbytes)))
            if len(found[-1].initial) != spec.nbytes:
                raise ValueError(f"the state '{spec.name}' has an initial value of another size")
        return tuple(found)

    @property
    def made_here(self) -> bool:
        """Whether it was exported on a processor like this one's; bundles that do not say were taken for that."""
        return self.manifest.get("made_on", this_machine()) == this_machine()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of this export."""
        return tuple(self.manifest["notes"])


def precision_of(entries: Sequence[Mapping[str, Any]]) -> str:
    """Returns the precision that a bundle is called by: that of its files, or of those that are not fp32."""
    found = [str(entry["precision"]) for entry in entries]
    return next((precision for precision in found if precision != "fp32"), found[0])


def file_name(format: str) -> str:
    """Returns the name of a format's file inside a bundle."""
    return f"model{SUFFIXES[format]}"


def versions() -> dict[str, str]:
    """Returns the installed version of every package that has a part in an export."""
    from importlib.metadata import PackageNotFoundError, version

    from edgekit import __version__

    found = {"edgekit": __version__}
    for name in VERSIONED[1:]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def this_machine() -> str:
    """Returns this machine's architecture and, where the system tells it, the name of its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{platform.machine()} {name}".strip()


def recipe_of(artifact: Artifact) -> Mapping[str, Any]:
    """Returns the recipe that the bundle around a file tells of, empty where there is none."""
    if not (artifact.path.parent / MANIFEST).is_file():
        return {}
    recipe = read(artifact.path.parent).manifest.get("recipe")
    return recipe if isinstance(recipe, dict) else {}


def calibrated_on(artifact: Artifact) -> frozenset[str]:
    """Returns the digests of the samples that a file was calibrated on, as the bundle around it tells, or none."""
    told = recipe_of(artifact).get("calibration")
    digests = told.get("digests") if isinstance(told, dict) else None
    return frozenset(map(str, digests)) if isinstance(digests, list) else frozenset()


def describe(
    folder: Path,
    *,
    model: Mapping[str, Any],
    target: str,
    precision: str,
    recipe: Mapping[str, Any],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    state: Sequence[State],
    preprocessing: Mapping[str, Any] | None,
    labels: Sequence[str],
    qparams: Mapping[str, Any],
    artifacts: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
) -> None:
    """Writes the manifest of the files in `folder`: sizes and hashes are taken from the files themselves."""
    entries = [
        {
            **entry,
            "size_bytes": (folder / entry["file"]).stat().st_size,
            "sha256": atomic_files.sha256(folder / entry["file"]),
        }
        for entry in artifacts
    ]
    atomic_files.write_json(
        folder / MANIFEST,
        {
            "schema": SCHEMA,
            "model": dict(model),
            "target": target,
            "precision": precision,
            "recipe": dict(recipe),
            "versions": versions(),
            "made_on": this_machine(),
            "inputs": [asdict(spec) for spec in inputs],
            "outputs": [asdict(spec) for spec in outputs],
            **({"state": [_described(part) for part in state]} if state else {}),
            "layout": "NCHW",
            "preprocessing": preprocessing,
            "labels": list(labels),
            "qparams": dict(qparams),
            "artifacts": entries,
            "golden": {"file": GOLDEN, "sha256": atomic_files.sha256(folder / GOLDEN)},
            "notes": list(notes),
        },
    )


def replaced(folder: Path, manifest: str, name: str, identity: Mapping[str, Any], new: str = "") -> tuple[str, ...]:
    """Returns a note where what EdgeKit wrote into `folder` before is replaced by another result of the same model.

    `identity` is the model's (see `identity.identity`), and `new` what is about to be written, as `contents_of` says
    it. Raises EdgeKitError where the folder holds the result of another model: two of one name never replace each
    other.
    """
    try:
        before = json.loads((folder / manifest).read_text("utf-8"))
        model = before["model"] if isinstance(before["model"], dict) else {"name": before["model"]}
        known = model.get("identity") or before.get("original")
        old = contents_of(before)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return (f"replaced a damaged result in {folder}",)
    if not isinstance(known, Mapping):
        return (f"replaced a result in {folder} that does not say which model it is of",)
    same_source = identity["source"] is not None and known.get("source") == identity["source"]
    same_weights = known.get("weights") == identity["weights"]
    # A module that Python hands over has no source: one of the same layers is taken for another training of it.
    both_objects = identity["source"] is None and known.get("source") is None
    if not (same_source or same_weights or (both_objects and known.get("structure") == identity["structure"])):
        raise EdgeKitError(
            f"{folder} holds the result of another model that is called {model.get('name')} too",
            f"give this one a name of its own: --name {name}-2; or choose another --out, or move that folder away",
        )
    if not same_weights:
        return (f"replaced what {folder} held of the same model with other weights",)
    return (f"replaced the {old} of the same model in {folder}",) if old != new else ()


def contents_of(manifest: Mapping[str, Any]) -> str:
    """Returns precision and formats of a bundle in words: `int8 bundle (onnx, tflite)`; nothing for other results."""
    if "artifacts" not in manifest:
        return ""
    formats = ", ".join(sorted(entry["format"] for entry in manifest["artifacts"]))
    return f"{manifest['precision']} bundle ({formats})"


def write_golden(
    folder: Path,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    feeds: Sequence[np.ndarray],
    results: Mapping[str, Sequence[np.ndarray]],
) -> None:
    """Writes golden pairs: `input/<name>` arrays (runs, *shape) and `<format or original>/<output name>` ones."""
    import numpy as np

    arrays = {f"input/{spec.name}": array for spec, array in zip(inputs, feeds, strict=True)}
    for source, values in results.items():
        arrays |= {f"{source}/{spec.name}": array for spec, array in zip(outputs, values, strict=True)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    atomic_files.write(folder / GOLDEN, buffer.getvalue())


def read_golden(bundle: Bundle) -> dict[str, np.ndarray]:
    """Reads the golden pairs; raises EdgeKitError where the file is missing, damaged or not whole."""
    import numpy as np

    path = bundle.path / GOLDEN
    check_hash(path, bundle.manifest["golden"]["sha256"])
    try:
        limits.check_archive(path, limits.ARRAYS_GROWTH)
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
    except EdgeKitError:
        raise
    except Exception as error:  # whatever numpy and zipfile raise for what is no archive of arrays
        raise EdgeKitError(f"{path} is damaged: {reason(error)}", "export the model again") from None
    first = bundle.artifacts[0]
    wanted = {f"input/{spec.name}" for spec in first.inputs} | {
        f"{source}/{spec.name}"
        for source in ("original", *(artifact.format for artifact in bundle.artifacts))
        for spec in first.outputs
    }
    if wanted - arrays.keys():
        raise EdgeKitError(f"{path} lacks {min(wanted - arrays.keys())}", "export the model again")
    runs = {arrays[name].shape[:1] for name in wanted}
    fits = all(
        (array.dtype.name, array.shape[1:]) == (spec.dtype, spec.shape)
        for spec, array in ((spec, arrays[f"input/{spec.name}"]) for spec in first.inputs)
    )
    numbers = all(arrays[name].dtype.kind in "fiub" for name in wanted)
    if len(runs) != 1 or runs & {(), (0,)} or not fits or not numbers:
        raise EdgeKitError(f"{path} does not hold runs of this bundle's inputs and outputs", "export the model again")
    return arrays


def check_hash(path: Path, expected: str) -> None:
    """Raises EdgeKitError where a bundle's file is missing or is not the one that was exported."""
    if not path.is_file():
        raise EdgeKitError(f"{path} is missing from the bundle", "export it again")
    if atomic_files.sha256(path) != expected:
        raise EdgeKitError(f"{path} has changed since it was exported", "export it again, or restore the file")


def is_bundle(path: Path) -> bool:
    """Whether `path` is a bundle folder or its manifest."""
    return (path / MANIFEST).is_file() or (path.name == MANIFEST and path.is_file())


def read(path: Path) -> Bundle:
    """Opens a bundle; raises EdgeKitError for a folder without a manifest, or one that cannot be read."""
    folder = path.parent if path.name == MANIFEST else path
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise EdgeKitError(
            f"{folder} is not an EdgeKit bundle: it has no {MANIFEST}", "name the folder that export wrote"
        )
    try:
        if manifest.stat().st_size > limits.MANIFEST_BYTES:
            raise ValueError(f"it has {manifest.stat().st_size:,} bytes")
        content = json.loads(manifest.read_text("utf-8"))
        known = content.get("schema") if isinstance(content, dict) else None
        if isinstance(known, int) and known != SCHEMA:
            raise EdgeKitError(
                f"{manifest} has schema {known}, this EdgeKit reads {SCHEMA}", "export with this version"
            )
        wrong = problem(content)
        if wrong is not None:
            raise ValueError(wrong)
        bundle = Bundle(folder, content)
        names = [entry["file"] for entry in content["artifacts"]]
        _ = bundle.artifacts
    except (ValueError, RecursionError) as error:
        raise EdgeKitError(f"{manifest} is damaged: {reason(error)}", "export the model again") from None
    except OSError as error:
        raise EdgeKitError(f"cannot read {manifest}: {error.strerror}", "check who may read it") from None
    strange = [name for name in names if name not in FILES]
    if strange or not names:
        what = f"a bundle has no file '{strange[0]}'" if strange else "it names no files"
        raise EdgeKitError(f"{manifest} is damaged: {what}", "export the model again")
    return bundle


def _described(state: State) -> dict[str, Any]:
    """Returns the manifest's form; the initial value is base64 of little-endian numbers, empty where all are zero."""
    initial = base64.b64encode(state.initial).decode() if any(state.initial) else ""
    spec = state.input
    return {"input": spec.name, "output": state.output, "dtype": spec.dtype, "shape": spec.shape, "initial": initial}


def _layout(entry: Mapping[str, Any]) -> Layout:
    given = entry.get("layout", "NCHW")  # bundles of before there was a choice are NCHW
    for layout in LAYOUTS:
        if layout.upper() == given:
            return layout
    raise ValueError(f"unknown layout '{given}'")


def _specs(entries: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(e["name"], e["dtype"], tuple(e["shape"])) for e in entries)

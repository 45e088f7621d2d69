"""Preflight checks: what is wrong or missing in a command, found before torch is imported and any work begins.

Each function runs all of its checks and raises one error for all that they find. What costs more than a look at the
first bytes of a file is left to the work itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import targets
from edgekit.artifacts import bundles
from edgekit.errors import Checks, EdgeKitError, UsageError
from edgekit.loading.openers import check_module
from edgekit.pruning import saved_model
from edgekit.util import atomic_files
from edgekit.util.user_code import check_code, is_code, model_name

if TYPE_CHECKING:
    from edgekit.compression.qat_training import Qat

BASELINE_DEVICES = ("cpu", "cuda")
NO_DATA_INT8 = (
    "add --data with some 100 real samples (an .npz with x, a folder of images, FILE.py:function), or choose "
    "--precision fp16, which needs none"
)
CODE_HELP = "name the file that defines its class: --code FILE.py, or FILE.py:factory"
# What a pickle asks for that holds tensors in plain containers, and no module.
_PLAIN = re.compile(
    r"torch\._utils\._rebuild_\w+|torch(\.storage)?\.\w*Storage|torch\.[a-z]\w*|torch\.Size|collections\.\w+"
)


def check_export(
    model: Any,
    *,
    target: str = "android",
    formats: str | Sequence[str] | None = None,
    precision: str | None = None,
    data: Any = None,
    inputs: Any = (),
    code: str | None = None,
    out: str | Path = ".",
    name: str | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    tflite_layout: str = "nchw",
    max_drop: float | None = None,
    sensitivity: bool = False,
    qat: Qat | None = None,
    prune: float | None = None,
) -> None:
    """Checks what `export.export` is given; raises EdgeKitError with all that is wrong or missing."""
    checks = Checks()
    row = checks.run(targets.find, target)
    chosen = checks.run(targets.find_formats, formats, row or next(iter(targets.TARGETS.values())))
    known = checks.run(targets.find_precision, precision) if precision is not None else None
    if chosen is not None:
        checks.run(find_layouts, tflite_layout, chosen)
    train = qat.train if qat is not None else None
    kind = _check_model(checks, model, code, has_inputs(inputs) or data is not None or train is not None)
    _check_samples(checks, data, mean, std)
    _check_inputs(checks, inputs)
    if train is not None:
        checks.run(check_data, train, "--train")
    if known is not None and targets.PRECISIONS[known] and data is None and qat is None:
        checks.errors.append(
            EdgeKitError(
                f"{known} needs data to calibrate on: EdgeKit does not guess activation ranges",
                NO_DATA_INT8 if kind != "onnx" else "an ONNX file is exported at fp32 or fp16: leave --precision out",
            )
        )
    if known is not None or precision is None:
        _check_training(
            checks, known or _default(data, qat, max_drop, sensitivity), kind, data, qat, max_drop, sensitivity
        )
    _check_name(checks, name)
    checks.run(atomic_files.check_folder, Path(out) / f"{name or model_label(model)}-{target}", bundles.FILES)
    checks.finish()


def check_prune(
    model: Any,
    *,
    data: Any = None,
    train: Any = None,
    formats: str | Sequence[str] | None = None,
    precision: str | None = None,
    inputs: Any = (),
    code: str | None = None,
    out: str | Path = ".",
    name: str | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    **options: Any,
) -> None:
    """Checks the sources, names and places that `pruning.prune` is given; `pruning.options.check` does the rest."""
    checks = Checks()
    checks.run(targets.find_formats, formats, next(iter(targets.TARGETS.values())))
    if precision is not None:
        checks.run(targets.find_precision, precision)
    _check_model(checks, model, code, has_inputs(inputs) or data is not None or train is not None)
    _check_samples(checks, data if data is not None else train, mean, std, "--data" if data is not None else "--train")
    if data is not None and train is not None:
        checks.run(check_data, train, "--train")
    _check_inputs(checks, inputs)
    _check_name(checks, name)
    checks.run(atomic_files.check_folder, Path(out) / f"{name or model_label(model)}-pruned", saved_model.FOLDER)
    checks.finish()


def check_compare(
    model: Any,
    artifacts: Iterable[Any],
    *,
    data: Any,
    inputs: Any = (),
    code: str | None = None,
    metric: Any = "top1",
    device: str = "local:",
    baseline_device: str = "cpu",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    **options: Any,
) -> None:
    """Checks what `compare.compare` is given; raises EdgeKitError with all that is wrong or missing."""
    from edgekit.runtimes.devices import opener

    checks = Checks()
    _check_model(checks, model, code, True)
    for artifact in artifacts:
        checks.run(check_artifact, artifact)
    _check_samples(checks, data, mean, std)
    _check_inputs(checks, inputs)
    checks.run(_check_metric, metric)
    checks.run(opener, device)
    if baseline_device not in BASELINE_DEVICES:
        checks.errors.append(UsageError(f"unknown baseline device '{baseline_device}'", "choose cpu or cuda"))
    checks.finish()


def check_profile(artifact: Any, *, device: str = "local:", ops: bool = False, trace: str | Path | None = None) -> None:
    """Checks what `profile.profile` is given; raises EdgeKitError with all that is wrong."""
    from edgekit.runtimes.devices import opener

    checks = Checks()
    checks.run(check_artifact, artifact)
    checks.run(opener, device)
    if trace is not None and not ops:
        checks.errors.append(EdgeKitError("a trace holds the times of the ops, which were not asked for", "add --ops"))
    if trace is not None:
        checks.run(atomic_files.check_writable, Path(trace))
    checks.finish()


def check_inspect(model: str, *, data: Any = None, inputs: Any = (), code: str | None = None) -> None:
    """Checks what `inspect` is given, where it is no exported file."""
    checks = Checks()
    _check_model(checks, model, code, has_inputs(inputs) or data is not None)
    _check_samples(checks, data, (), ())
    _check_inputs(checks, inputs)
    checks.finish()


def check_artifact(artifact: Any) -> None:
    """Raises EdgeKitError where there is neither a file nor a folder at a path."""
    if isinstance(artifact, (str, Path)) and not Path(artifact).exists():
        raise EdgeKitError(f"no artifact at {artifact}", "name a .pte, .onnx or .tflite file, or a bundle folder")


def check_data(source: Any, option: str = "--data") -> None:
    """Raises EdgeKitError where a path of samples names nothing that is there."""
    from edgekit.data.sources import HELP

    if not isinstance(source, (str, Path)) or (Path(source).exists() and Path(source).suffix != ".py"):
        return
    text = str(source)
    if not is_code(text):
        raise EdgeKitError(f"no data at {text}", HELP if option == "--data" else HELP.replace("--data", option))
    check_code(text)
    if text.endswith(".py"):
        raise EdgeKitError(f"{text} names a file but no function in it", f"write {option} {text}:function")


def model_label(model: Any) -> str:
    """Returns the name that a model gets where none is given: of its file, its factory or its class."""
    if not isinstance(model, (str, Path)):
        return type(model).__name__
    return model_name(str(model)) if is_code(str(model)) else Path(model).stem


def find_layouts(tflite_layout: str, formats: Sequence[str]) -> dict[str, Any]:
    """Returns the layout of each format's images; raises EdgeKitError for an unknown one, or one without a file."""
    from edgekit.types import LAYOUTS

    if tflite_layout not in LAYOUTS:
        raise UsageError(f"unknown TFLite layout '{tflite_layout}'", f"choose one of {', '.join(LAYOUTS)}")
    if tflite_layout != "nchw" and "tflite" not in formats:
        raise EdgeKitError(
            f"the TFLite layout {tflite_layout} is for a file that is not exported", "add tflite to --format"
        )
    return {format: tflite_layout if format == "tflite" else "nchw" for format in formats}


def _check_model(checks: Checks, model: Any, code: str | None, has_shapes: bool) -> str | None:
    """Returns the form of a model's file (see `openers.sniff`), None where it is none or something is wrong."""
    if not isinstance(model, (str, Path)):
        checks.run(check_module, model)
        return None
    if code is not None:
        checks.run(check_code, code)
    if is_code(str(model)):
        checks.run(check_code, str(model))
        return None
    return checks.run(_check_file, Path(model), code, has_shapes)


def _check_file(path: Path, code: str | None, has_shapes: bool) -> str:
    from edgekit.loading.openers import sniff

    kind = sniff(path)
    if code is None and (kind == "safetensors" or (kind == "torch" and _is_weights(path))):
        shapes = "" if has_shapes else "; where its first layer does not tell the shape of its input, give that too: "
        more = "" if has_shapes else "--input 1x3x224x224, or samples by --data"
        raise EdgeKitError(f"{path} holds weights only, not the network they belong to", f"{CODE_HELP}{shapes}{more}")
    return kind


def _is_weights(path: Path) -> bool:
    """Whether a file of torch.save holds tensors in plain containers, by the names that its pickle asks for."""
    from edgekit.screening.unpickle import BOOKKEEPING, globals_of

    names = globals_of(path)
    return any("._rebuild_" in name for name in names) and all(
        _PLAIN.fullmatch(name) or name in BOOKKEEPING for name in names
    )


def _check_samples(
    checks: Checks, data: Any, mean: Sequence[float], std: Sequence[float], option: str = "--data"
) -> None:
    from edgekit.data.sources import check_normalization

    checks.run(check_normalization, mean, std)
    if data is not None:
        checks.run(check_data, data, option)
    elif mean:
        checks.errors.append(
            EdgeKitError("--mean and --std normalize data, and none are given", "add --data, or leave them out")
        )


def _check_inputs(checks: Checks, inputs: Any) -> None:
    from edgekit.loading.model import given_inputs, parse_spec

    for _, given in given_inputs(inputs):
        if isinstance(given, str):
            checks.run(parse_spec, given)


def _check_training(
    checks: Checks,
    precision: str,
    kind: str | None,
    data: Any,
    qat: Qat | None,
    max_drop: float | None,
    sensitivity: bool,
) -> None:
    if qat is not None:
        from edgekit.compression import qat_training

        has_data = data is not None or qat.train is not None
        checks.run(qat_training.check, qat, precision, sensitivity or max_drop is not None, kind == "onnx", has_data)
    if max_drop is not None or sensitivity:
        from edgekit.compression import mixed_precision

        checks.run(mixed_precision.check, precision, max_drop, sensitivity)


def _default(data: Any, *asks_for_int8: Any) -> str:
    """The precision where none is given: int8 with data, or where an option of it is; else one that needs none."""
    return "int8" if data is not None or any(asks_for_int8) else "fp16"


def has_inputs(inputs: Any) -> bool:
    """Whether shapes or samples of inputs are given; arrays have no truth of their own."""
    from edgekit.loading.model import given_inputs

    return bool(given_inputs(inputs))


def _check_metric(metric: Any) -> None:
    from edgekit.metrics.table import METRICS

    if not isinstance(metric, str):
        if not callable(metric):
            raise EdgeKitError(f"a {type(metric).__name__} is given as the metric", "give a name, or a function")
    elif metric not in METRICS and is_code(metric):
        check_code(metric)


def _check_name(checks: Checks, name: str | None) -> None:
    if name is not None and (not name.strip() or Path(name).name != name or name in (".", "..")):
        checks.errors.append(EdgeKitError(f"'{name}' is no name of a folder", "give a plain name: --name lstm"))


def numbers(text: str | None) -> tuple[float, ...]:
    """Parses comma-separated numbers; raises EdgeKitError for anything else."""
    if text is None:
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise EdgeKitError(f"'{text}' is not a list of numbers", "write them as 0.485,0.456,0.406") from None

"""Mixed precision: how much each layer loses in int8, and which layers stay in float so that the accuracy holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekit.artifacts import bundles
from edgekit.artifacts.artifact import Artifact
from edgekit.compression import compress
from edgekit.data import batch_axis, sources
from edgekit.errors import EdgeKitError
from edgekit.measuring import running
from edgekit.measuring.evaluation import Chunk, Evaluation, score
from edgekit.metrics import table
from edgekit.metrics.accuracy import Accuracy, accuracy_of
from edgekit.util.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import torch

    from edgekit.loading.model import Model
    from edgekit.metrics.scores import Scores
    from edgekit.quant.ptq.recipes import Calibrated, Compressed
    from edgekit.quant.ptq.sensitivity import Layer, Simulation

PRECISION = "int8"  # the one whose layers can be told apart: all others keep activations in float
METRIC = table.METRICS["top1"]
MOST_NAMED = 3
NO_LABELS = "give labels: y in an .npz, class folders, or targets from FILE.py:function"


@dataclass(frozen=True)
class Tuned:
    """What became of a network, and what was measured of it.

    `layers` are all, the most sensitive first (empty where they were not measured); `float_layers` those that stayed
    in float. `accuracy` is the quantized graph's, measured in torch on `samples` ("calibration" or "evaluation").
    """

    compressed: Compressed
    layers: tuple[Layer, ...]
    float_layers: tuple[Layer, ...]
    accuracy: Accuracy | None
    samples: str | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns what the manifest's recipe says of it."""
        found: dict[str, Any] = {"float_layers": [layer.to_dict() for layer in self.float_layers]}
        if self.layers:
            found["sensitivity"] = [layer.to_dict() for layer in self.layers]
        if self.accuracy is not None:
            found["accuracy"] = {**self.accuracy.to_dict(), "samples": self.samples}
        return found


def check(precision: str, max_drop: float | None, sensitivity: bool) -> None:
    """Raises EdgeKitError where --max-drop or --sensitivity is asked of a precision that has no layers to choose."""
    asked = "--max-drop" if max_drop is not None else "--sensitivity" if sensitivity else None
    if asked is not None and precision != PRECISION:
        raise EdgeKitError(
            f"{asked} looks at layers with int8 activations, and {precision} has none",
            f"add --precision {PRECISION}, or leave {asked} out",
        )
    if max_drop is not None and max_drop < 0:
        raise EdgeKitError(f"a largest drop of {max_drop:g} points cannot be reached", "give 0 or more: --max-drop 0.5")


def tune(original: Model, source: sources.Data, progress: Progress, max_drop: float | None, sensitivity: bool) -> Tuned:
    """Quantizes `original` to int8, and keeps the fewest layers in float with which it loses at most `max_drop` points.

    Layers go to float in the order of their sensitivity; how many is searched. The search goes by the drop that was
    measured, not by the bound of its interval: of a few hundred samples the bound is a point or more, and would push
    every network into float. Raises EdgeKitError where there are no labels to measure with, and where half of the
    layers in float do not suffice.
    """
    calibration = compress.Calibration(source, original.inputs)
    with compress.quickest_threads(original):
        if max_drop is None:
            calibrated, simulation = _calibrated(original, calibration, progress, ())
            layers = _layers(simulation, calibration, original, progress)
            return Tuned(_converted(calibrated), layers, (), None, None, ())
        scale = _scale(original, source, max_drop, progress)
        calibrated, simulation = _calibrated(original, calibration, progress, ())
        first = scale.measure(simulation, (), "every layer in int8")
        layers = ()
        if sensitivity or first.drop > max_drop:
            layers = _layers(simulation, calibration, original, progress)
        if first.drop <= max_drop:
            return Tuned(_converted(calibrated), layers, (), first, scale.samples, (_holds(first, max_drop),))
        return _mixed(original, calibration, scale, simulation, layers, first, progress)


def _mixed(
    original: Model,
    calibration: compress.Calibration,
    scale: _Scale,
    simulation: Simulation,
    layers: tuple[Layer, ...],
    first: Accuracy,
    progress: Progress,
) -> Tuned:
    """Searches how many of `layers`, the most sensitive ones, have to stay in float."""
    from edgekit.quant.ptq.float_heads import fewest

    limit, most = scale.max_drop, (len(layers) + 1) // 2
    tried: dict[int, Accuracy] = {}

    def drop(count: int) -> float:
        tried[count] = scale.measure(simulation, layers[:count], f"{count} of {len(layers)} layers in float")
        return tried[count].drop

    count = fewest(most, drop, limit)
    while count is not None:
        # The ranges behind a layer in float are other ones: what was found on the old ranges is measured on the new.
        calibrated, again = _calibrated(original, calibration, progress, layers[:count])
        result = scale.measure(again, layers[:count], f"{count} of {len(layers)} layers in float")
        if result.drop <= limit:
            notes = (_reached(first, result, limit, layers, count), *scale.caution)
            return Tuned(_converted(calibrated), layers, layers[:count], result, scale.samples, notes)
        tried[count] = result
        count = count + 1 if count < most else None
    best = min((first, *tried.values()), key=lambda a: a.drop)
    raise EdgeKitError(
        f"int8 loses {first.drop:.2f} points on {first.n:,} samples, and with up to half of its {len(layers)} layers "
        f"in float still {best.drop:.2f}: a drop of at most {limit:g} is not reached; the most sensitive layers are "
        f"{named(layers[:MOST_NAMED])}",
        "calibrate on more samples like those that the model will see, allow a larger --max-drop, or choose "
        "--precision fp16",
    )


@dataclass(frozen=True)
class _Scale:
    """What quantized networks are measured on: labeled samples, and which of them the original gets right."""

    evaluation: Evaluation
    right: Scores
    samples: str
    max_drop: float
    progress: Progress

    @property
    def caution(self) -> tuple[str, ...]:
        """What to know of figures on samples that a choice was made on."""
        if self.samples == "calibration":
            return ()
        return (
            "the layers in float were chosen on the evaluation samples, which flatters a comparison on them a little: "
            "labeled calibration samples (calib_x and calib_y) keep the two apart",
        )

    def measure(self, simulation: Simulation, in_float: Sequence[Layer], name: str) -> Accuracy:
        """Returns the accuracy with all units but those of `in_float` quantized."""
        import numpy as np
        import torch

        quantized = frozenset(simulation.units) - {layer.node for layer in in_float}
        runs = -(-self.evaluation.count // self.evaluation.batch)
        with self.progress.step(f"Measuring accuracy: {name}", runs) as advance:

            def run(chunk: Chunk) -> list[np.ndarray]:
                logits = []
                for number in range(chunk.runs):
                    batch = tuple(torch.from_numpy(feed[number]) for feed in chunk.feeds)
                    logits.append(simulation.outputs(batch, quantized)[0].numpy())
                    advance()
                return [np.stack(logits)]

            return accuracy_of(METRIC, self.right, score(self.evaluation, run, METRIC))


def _scale(original: Model, source: sources.Data, max_drop: float, progress: Progress) -> _Scale:
    """Finds the samples to measure on.

    Labeled calibration samples are preferred where they are apart from the evaluation's and one of them weighs at
    most half of the drop allowed: the evaluation then stays unseen until compare. Otherwise it is the evaluation set.
    """
    with progress.step("Running the original"):
        if source.separate:
            found = Evaluation(source, original, source.calibration)
            right = _right(original, found) if found.target is not None else None
            if right is not None and len(right) * max_drop >= 200:
                return _Scale(found, right, "calibration", max_drop, progress)
        found = Evaluation(source, original)
        if found.target is None:
            raise EdgeKitError("--max-drop needs labels to measure what int8 loses, and the data has none", NO_LABELS)
        return _Scale(found, _right(original, found), "evaluation", max_drop, progress)


def _right(original: Model, evaluation: Evaluation) -> Scores:
    return score(evaluation, lambda chunk: running.run_module(original.module, chunk.feeds), METRIC)


def _calibrated(
    original: Model, calibration: compress.Calibration, progress: Progress, in_float: Sequence[Layer]
) -> tuple[Calibrated, Simulation]:
    from edgekit.quant.ptq.recipes import calibrate
    from edgekit.quant.ptq.sensitivity import Simulation

    with progress.step(f"Calibrating {PRECISION}"):
        keep = frozenset(layer.node for layer in in_float)
        calibrated = calibrate(original.module, original.example, calibration, keep)
        return calibrated, Simulation(calibrated.original, calibrated.prepared)


def _converted(calibrated: Calibrated) -> Compressed:
    from edgekit.quant.ptq.recipes import convert

    return convert(calibrated)


def _layers(
    simulation: Simulation, calibration: compress.Calibration, original: Model, progress: Progress
) -> tuple[Layer, ...]:
    from edgekit.quant.ptq.sensitivity import SAMPLES, sensitivity

    batches = spread(calibration, -(-SAMPLES // batch_axis.batch_of(original.inputs)))
    with progress.step("Measuring the sensitivity of each layer", len(batches)) as advance:
        return sensitivity(simulation, batches, advance)


def spread(batches: Iterable[tuple[torch.Tensor, ...]], count: int) -> list[tuple[torch.Tensor, ...]]:
    """Returns at least `count` batches out of a stream of any length, where it has them, evenly spread and few held."""
    kept: list[tuple[torch.Tensor, ...]] = []
    step = 1
    for index, batch in enumerate(batches):
        if index % step:
            continue
        kept.append(batch)
        if len(kept) == 2 * count:
            kept, step = kept[::2], 2 * step
    return kept


def most_sensitive(artifact: Artifact) -> tuple[str, ...]:
    """Returns the MOST_NAMED most sensitive layers that are int8 in a file, as the bundle around it tells, or none."""
    in_float = layers_in_float(artifact)
    try:
        entries = [
            entry for entry in bundles.recipe_of(artifact).get("sensitivity", ()) if entry["node"] not in in_float
        ]
        return tuple(f"{_label(entry)} at {entry['sqnr_db']:.1f} dB" for entry in entries[:MOST_NAMED])
    except (KeyError, TypeError, ValueError):  # written by another version
        return ()


def layers_in_float(artifact: Artifact) -> frozenset[str]:
    """Returns the nodes that `max_drop` kept in float in a file, as the bundle around it tells, or none."""
    try:
        return frozenset(entry["node"] for entry in bundles.recipe_of(artifact).get("float_layers", ()))
    except (KeyError, TypeError):  # written by another version
        return frozenset()


def _label(entry: Mapping[str, Any]) -> str:
    return f"{entry['path']} ({entry['op']})" if entry["path"] else str(entry["op"])


def named(layers: Sequence[Layer]) -> str:
    """Returns the layers as one line names them, with what each loses alone."""
    return ", ".join(f"{layer.label} at {layer.sqnr_db:.1f} dB" for layer in layers)


def _holds(result: Accuracy, limit: float) -> str:
    return f"accuracy drop {_points(result)}, within {limit:g} with every layer in int8"


def _reached(first: Accuracy, result: Accuracy, limit: float, layers: Sequence[Layer], count: int) -> str:
    return (
        f"accuracy drop {first.drop:.2f} → {_points(result)}, within {limit:g} with {count} of {len(layers)} layers in "
        f"float: {named(layers[:count])}"
    )


def _points(result: Accuracy) -> str:
    low, high = result.ci95
    return f"{result.drop:.2f} points (95 % interval {low:+.2f} to {high:+.2f}, {result.n:,} samples)"

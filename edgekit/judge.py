"""JUDGE: metrics, intervals and verdicts, all computed on the host from the runtimes' own outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgekit.errors import EdgeKitError
from edgekit.results import Accuracy, Artifact, Culprit, Latency, Parity, Rung, Verdict

if TYPE_CHECKING:
    import numpy as np

METRICS = {"top1": 1, "top5": 5}  # name → how many of the highest scores may hold the label
ANOTHER_MODEL = "name the model that the file was exported from, or export it again"
DEFAULT_MAX_DROP = 1.0  # points
FP32_MAX_REL = 1e-4
FP16_MIN_SQNR_DB = 30.0
INT8_SQNR_SLACK_DB = 6.0  # an error at most twice that of the quantized graph in torch
INT8_SQNR_ENOUGH_DB = 60.0  # asked of no int8 file, however near its graph comes
POOR_SQNR_DB = 10.0  # below, the error has a third of the outputs' size
ONNX_STEPS_ELSEWHERE = 3  # EfficientNet-Lite0, 50 layers deep, moves by 2 between x86-64 and ARM64, ResNet-20 by 1
MIN_SPEEDUP = 0.97  # below, int8 is slower than fp32 beyond what timing leaves open


def parity(reference: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> Parity:
    """Compares outputs with reference outputs: one array per model output, samples along axis 0.

    Integer outputs are compared as they are; outputs with NaN are as far from the reference as can be. Raises
    EdgeKitError where the number or the shapes of outputs differ, or where the reference itself holds NaN.
    """
    import numpy as np

    if len(reference) != len(outputs):
        raise EdgeKitError(f"the file gives {len(outputs)} outputs, the original {len(reference)}", ANOTHER_MODEL)
    sqnr, max_abs, max_rel, cosine = math.inf, 0.0, 0.0, 1.0
    for ref, out in zip(reference, outputs, strict=True):
        if ref.shape != out.shape:
            shapes = ("x".join(map(str, array.shape)) for array in (out, ref))
            raise EdgeKitError("an output of the file is {}, the original's is {}".format(*shapes), ANOTHER_MODEL)
        a, b = ref.astype(np.float64).reshape(len(ref), -1), out.astype(np.float64).reshape(len(out), -1)
        if not np.isfinite(a).all():
            raise EdgeKitError(
                "the original model's own outputs hold NaN or infinite values", "check its weights and --data"
            )
        if not np.isfinite(b).all():
            return Parity(-math.inf, math.inf, math.inf, -1.0, 0.0, len(ref))
        error, signal = float(((b - a) ** 2).sum()), float((a**2).sum())
        if error:
            sqnr = min(sqnr, 10 * math.log10(signal / error) if signal else -math.inf)
            largest = float(np.abs(b - a).max())
            scale = float(np.abs(a).max())
            max_abs, max_rel = max(max_abs, largest), max(max_rel, largest / scale if scale else math.inf)
            norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            products = (a * b).sum(axis=1)
            cosine = min(cosine, float(np.divide(products, norms, out=np.ones_like(norms), where=norms > 0).mean()))
    return Parity(sqnr, max_abs, max_rel, cosine, _agreement(reference[0], outputs[0]), len(reference[0]))


def _agreement(reference: np.ndarray, output: np.ndarray) -> float | None:
    if reference.ndim != 2 or reference.shape[1] < 2:
        return None
    return float((reference.argmax(axis=1) == output.argmax(axis=1)).mean())


def check_metric(metric: str) -> None:
    """Raises EdgeKitError for a metric that EdgeKit does not know."""
    if metric not in METRICS:
        raise EdgeKitError(f"unknown metric '{metric}'", f"choose one of {', '.join(METRICS)}")


def correct(metric: str, logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Returns which samples are right, as booleans: `logits` (N, classes), `target` (N,) class indices.

    A sample with NaN among its scores is wrong. Raises EdgeKitError where the shapes or the labels do not fit a
    classifier.
    """
    import numpy as np
    import torch
    from torchmetrics.functional.classification import multiclass_accuracy

    k = METRICS[metric]
    if logits.ndim != 2 or len(logits) != len(target) or logits.shape[1] <= k:
        raise EdgeKitError(
            f"{metric} needs one row of more than {k} class scores per sample, the model's first output is "
            f"{'x'.join(map(str, logits.shape))} for {len(target)} samples",
            "leave the labels out to compare outputs by SQNR and cosine",
        )
    if target.ndim != 1 or not np.issubdtype(target.dtype, np.integer):
        shape = "x".join(map(str, target.shape))
        raise EdgeKitError(
            f"labels must be one class index per sample, not {target.dtype} of shape {shape}", "give y as integers (N,)"
        )
    classes = logits.shape[1]
    if target.min() < 0 or target.max() >= classes:
        raise EdgeKitError(
            f"labels run from {target.min()} to {target.max()}, but the model has {classes} classes",
            "labels are class indices from 0",
        )
    hits = multiclass_accuracy(
        torch.from_numpy(logits.astype(np.float64))[:, :, None],
        torch.from_numpy(target.astype(np.int64))[:, None],
        num_classes=classes,
        top_k=k,
        average="micro",
        multidim_average="samplewise",
    )
    return (hits.numpy() == 1) & ~np.isnan(logits).any(axis=1)


def accuracy(metric: str, original: np.ndarray, artifact: np.ndarray) -> Accuracy:
    """Compares paired outcomes (booleans per sample) of the original and the artifact.

    The interval of the drop is Agresti and Min's for matched pairs (Statistics in Medicine 24, 2005): Wald's with
    half an observation added to each cell, which holds its 95 % down to no discordant pair at all.
    """
    n = len(original)
    lost, won = float((original & ~artifact).sum()), float((artifact & ~original).sum())
    total = n + 2
    lost, won = lost + 0.5, won + 0.5
    center = (lost - won) / total
    margin = 1.959964 * math.sqrt(max(lost + won - (lost - won) ** 2 / total, 0)) / total
    interval = (100 * (center - margin), 100 * (center + margin))
    return Accuracy(metric, n, float(artifact.mean()), float(original.mean()), interval)


def faithful(precision: str, to_original: Parity, graph_to_original: Parity) -> str | None:
    """Returns why an exported file is not faithful to what was exported, or None where it is.

    fp32 must be within 1e-4 of the original's largest output; fp16 above 30 dB; int8 within 6 dB of what the
    quantized graph itself reaches in torch (integer runtimes round differently from one another).
    """
    if not math.isfinite(to_original.max_abs):
        return "gives NaN or infinite values"
    if precision == "fp32" and to_original.max_rel > FP32_MAX_REL:
        return (
            f"differs from the original by {to_original.max_rel:.1e} of its largest output (limit {FP32_MAX_REL:.0e})"
        )
    if precision == "fp16" and to_original.sqnr_db < FP16_MIN_SQNR_DB:
        return f"has an SQNR of {to_original.sqnr_db:.1f} dB to the original (limit {FP16_MIN_SQNR_DB:.0f})"
    graph = min(graph_to_original.sqnr_db, INT8_SQNR_ENOUGH_DB)
    if precision.startswith("int8") and to_original.sqnr_db < graph - INT8_SQNR_SLACK_DB:
        return f"has an SQNR of {to_original.sqnr_db:.1f} dB to the original, the quantized graph {graph:.1f} dB"
    return None


def loss(precision: str, graph_to_original: Parity) -> tuple[str, ...]:
    """Returns a note where quantizing alone, whatever the format, moved the outputs far from the original's."""
    if graph_to_original.sqnr_db >= POOR_SQNR_DB:
        return ()
    return (
        f"{precision} is far from the original: its SQNR is {graph_to_original.sqnr_db:.1f} dB; "
        "measure the accuracy with edgekit compare before it is used",
    )


def verdict(
    precision: str,
    result: Accuracy | None,
    latency: Latency | None,
    fp32: Latency | None,
    parity: Parity,
    max_drop: float | None,
    suspects: Sequence[str] | None = None,
    sensitive: Sequence[str] = (),
) -> Verdict:
    """Says whether an artifact is worth shipping: accuracy by its interval's bound, speed by the runtime's fp32.

    A rejection for speed names the `suspects`, what in the file does not run in int8 (None where that is not known);
    one for accuracy the most `sensitive` layers, or how to find them.
    """
    limit = DEFAULT_MAX_DROP if max_drop is None else max_drop
    rejects: list[str] = []
    doubts: list[str] = []
    reasons: list[str] = []
    if not math.isfinite(parity.max_abs):
        rejects.append("outputs hold NaN or infinite values")
    elif precision == "fp32" and parity.max_rel > FP32_MAX_REL:
        rejects.append(f"differs from the original by {parity.max_rel:.1e} of its largest output")
    if result is None:
        if precision != "fp32":
            doubts.append("no labels: accuracy was not measured")
    else:
        low, high = result.ci95
        interval = f"{result.drop:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}"
        if low > limit:
            rejects.append(f"accuracy drop {interval} is above {limit:g}{_lossy(precision, sensitive)}")
        elif high > limit:
            doubts.append(
                f"accuracy drop {interval} does not exclude more than {limit:g}; {_more_samples(result, limit)}"
            )
        else:
            reasons.append(f"accuracy drop {interval}")
    if fp32 is not None and latency is not None:
        ratio = fp32.p50 / latency.p50
        line = f"{ratio:.2f}x the speed of fp32 in the same runtime"
        # Weight-only int8 is for size; int8 arithmetic has to pay in speed.
        if ratio < MIN_SPEEDUP and precision in ("int8", "int8-dynamic"):
            rejects.append(line + _slow(suspects))
        else:
            reasons.append(line)
    if rejects:
        return Verdict("reject", tuple(rejects + doubts))
    return Verdict("inconclusive", tuple(doubts + reasons)) if doubts else Verdict("ship", tuple(reasons))


def explained(verdict: Verdict, artifact: Artifact, ladder: Sequence[Rung]) -> Verdict:
    """Returns a rejection where the parity ladder breaks at `artifact`, and else `verdict` as it is."""
    broken = next((rung for rung in ladder if rung.problem and rung.path == artifact.path), None)
    if broken is None:
        return verdict
    before = verdict.reasons if verdict.word == "reject" else ()
    where = f" from {broken.culprit.op} '{broken.culprit.node}' on" if isinstance(broken.culprit, Culprit) else ""
    return Verdict("reject", (f"it is not what was exported{where}: it {broken.problem}", *before))


def _lossy(precision: str, sensitive: Sequence[str]) -> str:
    if precision != "int8":
        return ""
    if sensitive:
        return f"; the most sensitive layers: {', '.join(sensitive)}"
    return "; edgekit export --sensitivity shows the layers to blame, --max-drop keeps them in float"


def _slow(suspects: Sequence[str] | None) -> str:
    if suspects is None:
        return ""
    return (
        f": {'; '.join(suspects)}" if suspects else "; every op of it runs in int8: this machine is no faster at that"
    )


def _more_samples(result: Accuracy, limit: float) -> str:
    """Estimates how many samples would make the interval exclude `limit`, at the drop seen so far."""
    margin = (result.ci95[1] - result.ci95[0]) / 2
    room = limit - result.drop
    if room <= 0:
        return "more samples would tell"
    return f"about {max(math.ceil(result.n * (margin / room) ** 2) - result.n, 1):,} more samples would tell"


def steps_allowed(format: str, same_machine: bool) -> int:
    """Returns how many steps of its scale an int8 output may move: more for ONNX Runtime on another processor.

    Its kernels requantize in float, each processor's in an order of its own, and the roundings add up along the
    network; XNNPACK, which runs .pte and .tflite files, computes the same integers everywhere.
    """
    return ONNX_STEPS_ELSEWHERE if format == "onnx" and not same_machine else 1


def reproduced(precision: str, near: Parity, step: float, steps: int = 1) -> str | None:
    """Returns why replayed outputs are not the recorded ones, or None where they are.

    Floating-point files must be within 1e-4 (fp16: 1e-2) of the largest output, int8 ones within `steps` of `step`
    (the scale of the coarsest output, 0 where outputs are not quantized: then within 1 % of the largest).
    """
    if precision == "int8" and step:
        if near.max_abs > step * (steps + 0.001):
            return (
                f"outputs differ from the recorded ones by {near.max_abs / step:.1f} steps of the output's scale "
                f"(limit {steps})"
            )
        return None
    limit = FP32_MAX_REL if precision == "fp32" else 1e-2
    return (
        f"outputs differ from the recorded ones by {near.max_rel:.1e} (limit {limit:g})"
        if near.max_rel > limit
        else None
    )

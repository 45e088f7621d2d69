"""The parity ladder on files with planted defects: each is rejected, and the rung and the op are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import flatbuffers
import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from kit import invoke, network, quick, samples
from onnx import numpy_helper

from edgekit.artifacts import intermediate_outputs
from edgekit.artifacts.artifact import Artifact, Culprit
from edgekit.artifacts.bundles import Bundle
from edgekit.commands import compare
from edgekit.judging import parity_ladder, verdicts
from edgekit.judging.results import Rung, Verdict
from edgekit.loading import with_data
from edgekit.measuring import running
from edgekit.measuring.evaluation import whole
from edgekit.metrics.parity import Parity
from edgekit.runtimes import open_device
from edgekit.util.progress import Silent

SECOND_CONV = 1  # its weights are (16, 8, 3, 3), no other tensor's are


def scaled(array: np.ndarray) -> np.ndarray:
    return 2 * array


def permuted(array: np.ndarray) -> np.ndarray:
    """The first two output channels have changed places."""
    return array[[1, 0, *range(2, len(array))]]


def spoil_onnx(model: onnx.ModelProto, change: Callable[[np.ndarray], np.ndarray], scale: bool) -> None:
    """Changes the second convolution's weights, or their scales."""
    name = [n for n in model.graph.node if n.op_type == "Conv"][SECOND_CONV].input[1]
    makers = {name: n for n in model.graph.node for name in n.output}
    if name in makers:  # weights held as codes behind a DequantizeLinear
        name = makers[name].input[1 if scale else 0]
    [stored] = [tensor for tensor in model.graph.initializer if tensor.name == name]
    array = change(numpy_helper.to_array(stored))
    stored.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))


def spoil_tflite(path: Path, change: Callable[[np.ndarray], np.ndarray], scale: bool) -> bytes:
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    graph = model.subgraphs[0]
    [tensor] = [t for t in graph.tensors if t.shape is not None and list(t.shape) == [16, 3, 3, 8]]
    if scale:
        tensor.quantization.scale = change(np.asarray(tensor.quantization.scale, "float32"))
    else:
        buffer = model.buffers[tensor.buffer]
        dtype = {schema.TensorType.FLOAT32: "float32", schema.TensorType.INT8: "int8"}[tensor.type]
        codes = np.frombuffer(bytes(buffer.data), dtype).reshape(tuple(tensor.shape))
        buffer.data = np.frombuffer(np.ascontiguousarray(change(codes)).tobytes(), "uint8")
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def spoil_pte(path: Path, change: Callable[[np.ndarray], np.ndarray], scale: bool) -> bytes:
    weight = network()[2].weight.detach().permute(0, 2, 3, 1).contiguous().numpy()
    content = path.read_bytes()
    assert content.count(weight.tobytes()) == 1 and not scale
    return content.replace(weight.tobytes(), np.ascontiguousarray(change(weight)).tobytes())


# defect → format, precision, what is changed, whether of the scales, kind of the op that is to blame
DEFECTS = {
    "onnx fp32 doubled": ("onnx", "fp32", scaled, False, "Conv"),
    "onnx fp32 permuted": ("onnx", "fp32", permuted, False, "Conv"),
    "onnx int8 scale doubled": ("onnx", "int8", scaled, True, "Conv"),
    "onnx int8 permuted": ("onnx", "int8", permuted, False, "Conv"),
    "tflite fp32 doubled": ("tflite", "fp32", scaled, False, "CONV_2D"),
    "tflite fp32 permuted": ("tflite", "fp32", permuted, False, "CONV_2D"),
    "tflite int8 scale doubled": ("tflite", "int8", scaled, True, "CONV_2D"),
    "tflite int8 permuted": ("tflite", "int8", permuted, False, "CONV_2D"),
    "executorch fp32 doubled": ("executorch", "fp32", scaled, False, None),
    "executorch fp32 permuted": ("executorch", "fp32", permuted, False, None),
}


def planted(defect: str, bundles: dict[str, Bundle], folder: Path) -> Artifact:
    format, precision, change, scale, _ = DEFECTS[defect]
    healthy = next(a for a in bundles[precision].artifacts if a.format == format)
    path = folder / f"{defect.replace(' ', '-')}{healthy.path.suffix}"
    if format == "onnx":
        model = onnx.load(healthy.path)
        spoil_onnx(model, change, scale)
        onnx.save(model, path)
    else:
        path.write_bytes({"tflite": spoil_tflite, "executorch": spoil_pte}[format](healthy.path, change, scale))
    return Artifact(path, format, precision, healthy.inputs, healthy.outputs)


@pytest.fixture(scope="module")
def ladder(bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rung]:
    """One ladder for the healthy files and every defect: the graphs are made once."""
    folder = tmp_path_factory.mktemp("planted")
    artifacts = [a for bundle in bundles.values() for a in bundle.artifacts]
    artifacts += [planted(defect, bundles, folder) for defect in DEFECTS]
    original, source = with_data.load(network(), data=samples(), inputs=(), code=None, mean=(), std=())
    assert source is not None
    evaluation = whole(source, original)
    rungs = parity_ladder.explain(original, source, artifacts, evaluation.feeds, open_device("local:"), True, Silent())
    return {rung.name: rung for rung in rungs}


def test_healthy_files_stand(ladder: dict[str, Rung], bundles: dict[str, Bundle]) -> None:
    healthy = [f"{a.path.name} {a.precision}" for bundle in bundles.values() for a in bundle.artifacts]
    assert list(ladder)[: 2 + len(healthy)] == ["exported graph", "int8 graph", *healthy]
    for name in ("exported graph", "int8 graph", *healthy):
        assert ladder[name].problem is None and ladder[name].culprit is None, name
    assert ladder["model.onnx int8"].against == "int8 graph" and ladder["model.onnx fp32"].against == "exported graph"


def test_a_rung_is_compared_with_what_it_stands_on(ladder: dict[str, Rung]) -> None:
    """A file adds less to the int8 graph than that loses, and its own distance to the original is told beside."""
    graph, file = ladder["int8 graph"], ladder["model.onnx int8"]
    assert graph.to_original.sqnr_db == pytest.approx(graph.parity.sqnr_db, abs=0.1)
    assert file.parity.sqnr_db > graph.to_original.sqnr_db + 10
    assert abs(file.to_original.sqnr_db - graph.to_original.sqnr_db) < verdicts.INT8_SQNR_SLACK_DB
    told = file.to_dict()
    assert told["against"] == "int8 graph"
    assert told["to_original"] == file.to_original.to_dict() != told["parity"]


def test_int8_files_of_an_onnx_original_have_no_graph_to_stand_on(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """They stand, unless they are far from the original; and no op of another file's is named."""
    healthy = next(a for a in bundles["int8"].artifacts if a.format == "onnx")
    reference = next(a for a in bundles["fp32"].artifacts if a.format == "onnx")
    far = planted("onnx int8 scale doubled", bundles, tmp_path)
    model = onnx.load(far.path)
    spoil_onnx(model, lambda array: 10 * array, True)
    onnx.save(model, far.path)
    original, source = with_data.load(reference.path, data=samples(), inputs=(), code=None, mean=(), std=())
    assert source is not None
    feeds = whole(source, original).feeds
    good, plain, bad = parity_ladder.explain(
        original, source, [healthy, reference, far], feeds, open_device("local:"), True, Silent()
    )
    for rung in (good, plain):
        assert rung.problem is None and rung.against == "original" and rung.parity == rung.to_original
    assert bad.problem is not None and "no graph of that precision" in bad.problem and bad.culprit is None


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_rejected_and_its_op_named(
    defect: str, ladder: dict[str, Rung], bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    format, precision, *_, op = DEFECTS[defect]
    artifact = planted(defect, bundles, tmp_path)
    rung = ladder[f"{artifact.path.name} {precision}"]
    assert rung.problem is not None
    verdict = verdicts.explained(Verdict("ship", ()), Artifact(rung.path, format, precision), tuple(ladder.values()))
    assert verdict.word == "reject" and "not what was exported" in verdict.reasons[0]
    if op is None:
        assert rung.culprit == intermediate_outputs.UNTAPPED
        return
    assert isinstance(rung.culprit, Culprit) and rung.culprit.op == op
    # It is the second convolution, and not the first.
    copy = tmp_path / f"tapped{artifact.path.suffix}"
    convolutions = [tap.node for tap in intermediate_outputs.tapped(artifact.path, format, copy) if tap.op == op]
    assert rung.culprit.node == convolutions[SECOND_CONV]


@pytest.mark.parametrize("format", intermediate_outputs.TAPPERS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_tapped_copy_computes_the_same(
    format: str, precision: str, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    artifact = next(a for a in bundles[precision].artifacts if a.format == format)
    copy = tmp_path / f"copy{artifact.path.suffix}"
    found = intermediate_outputs.tapped(artifact.path, format, copy)
    feeds = [samples()["x"][:2, None]]
    values = running.run(Artifact(copy, format, precision, artifact.inputs), feeds).outputs
    assert len(values) == len(found) > 4
    output = running.run(artifact, feeds).outputs[0]
    last = next(v for tap, v in zip(found, values, strict=True) if v.shape == output.shape and v.dtype == "float32"
                and not any(tap.tensor in other.reads for other in found))  # fmt: skip
    np.testing.assert_allclose(last, output, rtol=1e-5, atol=1e-5 * np.abs(output).max())


def test_command_line(
    bundles: dict[str, Bundle], workshop: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    quick(monkeypatch)
    artifact = planted("onnx fp32 permuted", bundles, tmp_path)
    result = tmp_path / "result.json"
    model, data = f"{workshop / 'net.py'}:make", workshop / "data.npz"
    ran = invoke(capfd, "compare", model, artifact.path, "--data", data, "--explain", "--json", result)
    assert ran.code == 0, ran.err
    assert "the first rung that diverges: onnx-fp32-permuted.onnx fp32" in ran.out
    assert "the first op that differs: Conv" in ran.out and "reject" in ran.out
    values = json.loads(result.read_text())
    assert values["first_divergence"] == "onnx-fp32-permuted.onnx fp32"
    assert values["artifacts"][0]["verdict"] == "reject"
    assert [rung["ok"] for rung in values["ladder"]] == [True, False]
    assert values["ladder"][1]["op"]["op"] == "Conv"


def test_without_explain_there_is_no_ladder(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(parity_ladder, "explain", lambda *args: pytest.fail("nobody asked"))
    artifact = next(a for a in bundles["fp32"].artifacts if a.format == "onnx")
    comparison = compare.compare(network(), [artifact.path], data=samples())
    assert comparison.to_dict()["ladder"] is None and comparison.first_divergence is None


def tap(name: str, *reads: str) -> intermediate_outputs.Tap:
    return intermediate_outputs.Tap("Op", name, name, reads)


def test_an_op_after_the_defect_is_not_blamed() -> None:
    rng = np.random.default_rng(0)
    expected = [rng.standard_normal((2, 8)) for _ in range(4)]
    chain = [tap("a", "x"), tap("b", "a"), tap("other", "x"), tap("c", "b", "other")]
    values = [array.copy() for array in expected]
    values[1] += 0.5
    values[3] -= 0.5
    culprit = intermediate_outputs.first_difference(chain, values, chain, expected)
    assert isinstance(culprit, Culprit) and culprit.node == "b"
    assert intermediate_outputs.first_difference(chain, expected, chain, expected) == intermediate_outputs.SAME_OPS
    renamed = [tap(f"{t.node}'") for t in chain]
    assert intermediate_outputs.first_difference(renamed, values, chain, expected) == intermediate_outputs.OTHER_OPS
    values[0][0, 0] = np.nan
    culprit = intermediate_outputs.first_difference(chain, values, chain, expected)
    assert isinstance(culprit, Culprit) and culprit.node == "a" and culprit.to_dict()["sqnr_db"] is None


def test_a_device_that_differs_is_rejected() -> None:
    path = Path("model.tflite")
    near = Parity(20.0, 0.3, 0.1, 1.0, None, 8)
    rung = Rung("model.tflite int8 on adb:1", "model.tflite int8 here", near, near, "outputs differ", path=path)
    assert verdicts.explained(Verdict("ship", ()), Artifact(path, "tflite", "int8"), (rung,)).word == "reject"
    other = Artifact(Path("other.tflite"), "tflite", "int8")
    assert verdicts.explained(Verdict("ship", ()), other, (rung,)).word == "ship"


def test_damaged_files_are_told(tmp_path: Path) -> None:
    for format in intermediate_outputs.TAPPERS:
        path = tmp_path / f"damaged.{format}"
        path.write_bytes(b"\x20\0\0\0TFL3" + bytes(99))
        with pytest.raises(intermediate_outputs.EdgeKitError, match="cannot be read"):
            intermediate_outputs.tapped(path, format, tmp_path / "out")

"""The pipeline through its Python API: what is exported, measured and judged, against numpy and torch eager."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from kit import SHAPE, network, quick, samples
from onnx import helper
from PIL import Image
from rich.console import Console

import edgekit
from edgekit.artifacts.bare import precision_of
from edgekit.artifacts.bundles import Bundle
from edgekit.commands import compare
from edgekit.commands.given import identify
from edgekit.compression import emit
from edgekit.errors import EdgeKitError
from edgekit.judging.results import Comparison
from edgekit.measuring import running, schedule
from edgekit.measuring.run_cache import Journal
from edgekit.reports import tables

FORMATS = ["executorch", "onnx", "tflite"]


@pytest.fixture(scope="module")
def compared(bundles: dict[str, Bundle]) -> Comparison:
    """fp32 and int8 bundles against the module; no fp32 file is to be exported for it."""
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        patch.setattr(emit, "emitting", lambda *args: pytest.fail("an fp32 file was given, yet another is exported"))
        return edgekit.compare(network(), [bundles["fp32"], bundles["int8"].path], data=samples())


def eager(x: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return network()(torch.from_numpy(x)).numpy()


def test_every_format_and_precision_is_compared(compared: Comparison) -> None:
    found = [(m.artifact.precision, m.artifact.format) for m in compared.artifacts]
    assert found == [(precision, format) for precision in ("fp32", "int8") for format in FORMATS]


def test_accuracy_is_that_of_numpy_on_eager_outputs(compared: Comparison) -> None:
    data = samples()
    expected = float((eager(data["x"]).argmax(1) == data["y"]).mean())
    assert expected == 0.75
    assert compared.baseline.accuracy == expected
    assert compared.baseline.samples == len(data["y"])
    for m in compared.artifacts:
        assert m.accuracy.n == len(data["y"])
        assert m.accuracy.baseline == expected
        assert m.accuracy.drop == pytest.approx(100 * (expected - m.accuracy.value))
        assert abs(m.accuracy.value - expected) <= (0 if m.artifact.precision == "fp32" else 0.1)


def test_fp32_files_equal_eager_and_int8_files_come_near(compared: Comparison) -> None:
    for m in compared.artifacts:
        assert m.parity.samples == 40
        if m.artifact.precision == "fp32":
            assert m.parity.max_rel < 1e-4
            assert m.parity.agreement == 1
        else:
            assert 25 < m.parity.sqnr_db < 80
            assert m.parity.agreement >= 0.9


def test_speedups_are_ratios_of_medians(compared: Comparison) -> None:
    fp32 = {m.artifact.format: m for m in compared.artifacts if m.artifact.precision == "fp32"}
    for m in compared.artifacts:
        assert len(m.latency.samples) == 5
        assert m.speedup == m.baseline_latency.p50 / m.latency.p50
        assert m.latency.p50 == np.median(m.latency.samples)
        if m.artifact.precision == "int8":
            assert m.fp32_latency == fp32[m.artifact.format].latency
            assert m.speedup_fp32 == m.fp32_latency.p50 / m.latency.p50
        else:
            assert m.fp32_latency is None and m.speedup_fp32 is None


def test_files_without_their_bundle_are_compared_by_what_they_hold(
    bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No labels either: agreement, cosine and SQNR are what there is, and int8 is not judged."""
    quick(monkeypatch)
    files = [shutil.copy(bundles[p].path / f"model{s}", tmp_path / f"{p}{s}")
             for p in bundles for s in (".onnx", ".tflite")]  # fmt: skip
    result = edgekit.compare(network(), files, data={"x": samples()["x"][:5]})
    assert [m.artifact.precision for m in result.artifacts] == ["fp32", "fp32", "int8", "int8"]
    assert result.baseline.accuracy is None
    for m in result.artifacts:
        assert m.accuracy is None
        assert m.parity.agreement == 1
        assert m.parity.cosine > 0.99
        assert m.parity.sqnr_db > 25
        assert not m.within(100)
        if m.artifact.precision == "int8":
            assert m.speedup_fp32 is not None
            assert m.verdict.word != "ship"
            assert "no labels: accuracy was not measured" in m.verdict.reasons


def test_a_bare_pte_is_known_for_what_it_is(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    for precision, bundle in bundles.items():
        bare = identify(Path(shutil.copy(bundle.path / "model.pte", tmp_path / f"{precision}.pte")))
        assert (bare.format, bare.precision) == ("executorch", precision)
        assert [(spec.dtype, spec.shape) for spec in bare.inputs] == [("float32", (1, *SHAPE))]


def test_an_onnx_file_of_other_names_and_an_open_batch_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch.onnx.export writes it, not EdgeKit."""
    quick(monkeypatch)
    program = torch.onnx.export(
        network(), (torch.zeros(2, *SHAPE),), dynamo=True, verbose=False, input_names=["image"],
        output_names=["scores"], dynamic_shapes=({0: torch.export.Dim("n")},),
    )  # fmt: skip
    onnx.save(program.model_proto, tmp_path / "theirs.onnx")
    result = edgekit.compare(network(), [tmp_path / "theirs.onnx"], data=samples(6))
    assert result.artifacts[0].parity.max_rel < 1e-4
    assert result.artifacts[0].accuracy.drop == 0


@pytest.mark.parametrize("batch", [1, 4])
def test_any_batch_size_feeds_a_bundle_of_another(batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle for batches of 4 is judged on 6 samples that come one at a time, or five and one."""
    quick(monkeypatch)
    data = samples(6)
    bundle = edgekit.export(
        network(), target="x86", formats=["onnx"], precision="fp32", inputs=[f"{batch}x3x16x16"], out=tmp_path,
        name="net",
    )  # fmt: skip
    assert bundle.artifacts[0].inputs[0].shape == (batch, *SHAPE)
    cuts = [(0, 5), (5, 6)] if batch == 4 else [(0, 6)]
    pairs = [(torch.from_numpy(data["x"][a:b]), data["y"][a:b]) for a, b in cuts]
    result = edgekit.compare(network(), [bundle], data=pairs)
    assert result.artifacts[0].accuracy.n == 6
    assert result.artifacts[0].accuracy.value == (eager(data["x"]).argmax(1) == data["y"]).mean()
    assert result.artifacts[0].parity.samples == 6
    assert result.artifacts[0].parity.max_rel < 1e-4


def test_outputs_without_the_batch_in_front_are_compared_whole() -> None:
    sequence = np.zeros((3, 7, 1, 5))  # three runs of (time, batch, features)
    assert running.flat([sequence], 1)[0].shape == (3, 7, 1, 5)
    assert running.flat([np.zeros((3, 4, 5))], 4)[0].shape == (12, 5)
    assert running.flat([np.zeros(3)], 4)[0].shape == (3,)


def test_the_callers_module_and_threads_stay_as_they_are() -> None:
    module, threads = network(), torch.get_num_threads()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    running.run_module(module, [np.zeros((2, 1, *SHAPE), np.float32)])
    assert torch.get_num_threads() == threads
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_profile_measures_a_file(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    result = edgekit.profile(bundles["int8"].path / "model.tflite")
    assert (result.runtime, result.artifact.precision) == ("litert", "int8")
    assert 0 < result.latency.p50 < 1000
    assert result.to_dict()["latency_ms"]["n"] == 5


def test_profile_takes_an_open_batch_as_one_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    for name, open_axes, message in (("batch", (0,), None), ("size", (0, 2), "no random inputs for x:float32")):
        axes = tuple({axis: torch.export.Dim(f"d{axis}", min=2, max=64) for axis in open_axes} for _ in range(1))
        program = torch.onnx.export(
            network(), (torch.zeros(4, *SHAPE),), dynamo=True, verbose=False, input_names=["x"], dynamic_shapes=axes
        )
        onnx.save(program.model_proto, tmp_path / f"{name}.onnx")
        if message is None:
            result = edgekit.profile(tmp_path / f"{name}.onnx")
            assert f"{name}.onnx takes any batch: it was measured with one sample" in result.notes
            continue
        with pytest.raises(EdgeKitError, match=message):
            edgekit.profile(tmp_path / f"{name}.onnx")


def test_weights_in_another_file_are_run_and_counted(
    bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    given = bundles["fp32"].path / "model.onnx"

    def saved(location: str) -> Path:
        model = onnx.load(given)
        onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location=location, size_threshold=100)
        return tmp_path / "m.onnx"

    result = edgekit.compare(network(), [saved("weights.bin")], data=samples(6))
    assert result.artifacts[0].parity.max_rel < 1e-4
    assert result.artifacts[0].artifact.size_bytes == pytest.approx(given.stat().st_size, rel=0.1)
    with pytest.raises(EdgeKitError, match=r"lie in numpy.py, a name of code"):
        edgekit.profile(saved("numpy.py"))
    (tmp_path / "numpy.py").unlink()
    with pytest.raises(EdgeKitError, match=r"lie in numpy.py, which is missing"):
        edgekit.profile(tmp_path / "m.onnx")
    (tmp_path / "inside").mkdir()
    with pytest.raises(EdgeKitError, match="which EdgeKit does not follow"):
        edgekit.profile(saved("inside/weights.bin"))


def test_files_of_one_name_are_told_apart(
    bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    quick(monkeypatch)
    twins = [tmp_path / folder / "model[a].onnx" for folder in ("one", "two")]
    for twin in twins:
        twin.parent.mkdir()
        shutil.copy(bundles["int8"].path / "model.onnx", twin)
    result = edgekit.compare(network(), [*twins, bundles["int8"].path / "model.tflite"], data=samples(6))
    Console(width=250).print(tables.comparison_report(result))
    shown = capfd.readouterr().out
    assert all(f"{name} int8" in shown for name in ("one/model[a].onnx", "two/model[a].onnx", "model.tflite"))
    assert "int8/model.tflite" not in shown and "android/model.tflite" not in shown


def test_a_generator_is_read_once_for_all_that_asks(tmp_path: Path) -> None:
    pairs = ((image[None], None) for image in samples(12)["x"])
    bundle = edgekit.export(network(), precision="fp32", formats="onnx", data=pairs, prune=0.3, out=tmp_path)
    assert bundle.artifacts[0].pruned


def test_images_channels_last_are_told_even_where_the_data_needs_their_size(tmp_path: Path) -> None:
    (tmp_path / "data" / "0").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "data" / "0" / "a.png")
    bundle = edgekit.export(
        network(), precision="fp32", formats="tflite", tflite_layout="nhwc", inputs=["1x3x16x16"], out=tmp_path
    )
    bare = shutil.copy(bundle.path / "model.tflite", tmp_path / "bare.tflite")
    with pytest.raises(EdgeKitError, match=r"images channels-last \(NHWC\), and nothing beside it says so"):
        edgekit.compare(network(), [bare], data=tmp_path / "data")


@pytest.mark.parametrize(
    ("medians", "processes", "said"),
    [
        ([1.0, 1.001, 1.002, 1.001, 1.0], 5, None),  # known at once
        ([1.0, 1.4, *[1.0] * 8], 10, None),  # one of them was disturbed
        ([1.0, 1.4] * 5, 10, "the p50 leaves out 50 % of the runs"),
        ([1.0 + 0.1 * (7 * i % 20) for i in range(20)], schedule.MOST_ROUNDS, "p50 may be off by"),  # never known
    ],
)
def test_profile_measures_until_its_p50_is_known(
    medians: list[float],
    processes: int,
    said: str | None,
    bundles: dict[str, Bundle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The processes are real, and their times given."""
    most = schedule.MOST_ROUNDS
    quick(monkeypatch)
    monkeypatch.setattr(schedule, "MOST_ROUNDS", most)
    run, given = Journal.run, iter(medians)
    monkeypatch.setattr(Journal, "run", lambda *a, **o: replace(run(*a, **o), latency_ms=(next(given),) * 5))
    result = edgekit.profile(bundles["int8"].path / "model.tflite")
    assert len(result.latency.processes) == processes
    notes = [text for text in result.notes if "p50" in text]
    assert len(notes) == (said is not None) and all(said in text for text in notes)


def test_a_slow_file_is_profiled_in_three_processes(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long they take: of fewer, a disturbed one could not be told."""
    rounds, most = schedule.ROUNDS, schedule.MOST_ROUNDS
    quick(monkeypatch)
    monkeypatch.setattr(schedule, "ROUNDS", rounds)
    monkeypatch.setattr(schedule, "MOST_ROUNDS", most)
    monkeypatch.setattr(schedule, "LONGEST_S", 0.0)
    result = edgekit.profile(bundles["int8"].path / "model.tflite")
    assert len(result.latency.processes) == rounds == 3


def test_an_x86_bundle_is_not_judged_by_the_times_of_an_arm(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are measured and shown, with the processor's name."""
    quick(monkeypatch)
    monkeypatch.setattr(compare, "processor_of", lambda device: ("aarch64", "an ARM"))
    files = [next(a.path for a in bundles[p].artifacts if a.format == "onnx") for p in ("fp32", "int8")]
    result = edgekit.compare(network(), files, data=samples())
    assert any("those of an ARM and no part of the verdicts" in note for note in result.notes)
    for m in result.artifacts:
        assert m.latency is not None and not m.on_target and m.artifact.target == "x86"
        told = m.to_dict()
        assert (told["processor"], told["on_target"], told["target"]) == ("an ARM", False, "x86")
        assert not any("speed of fp32" in reason for reason in m.verdict.reasons)
        assert "latency not measured on the target (x86): --device local:" in m.verdict.reasons


STORED = {
    "fp32": ({"float32": 4000, "int64": 80_000}, "fp32"),
    "one int8 constant": ({"float32": 4000, "int8": 1}, "fp32"),
    "half of it stayed in float": ({"float32": 4000, "int8": 990}, "fp32"),
    "most of it is int8": ({"float32": 4000, "int8": 1010}, "int8"),
    "scales and biases": ({"int8": 1000, "float32": 64, "int32": 9000}, "int8"),
    "uint8": ({"uint8": 1000, "float32": 64}, "int8"),
    "int4": ({"int4": 1000, "int8": 200, "float32": 4000}, "int4"),
    "uint4": ({"uint4": 1000, "float16": 500}, "int4"),
    "fp16": ({"float16": 2000, "float32": 100}, "fp16"),
    "bfloat16": ({"bfloat16": 2000}, "fp16"),
    "double": ({"float64": 2000}, "fp32"),
    "no weights": ({"int64": 8}, "fp32"),
}


@pytest.mark.parametrize("case", STORED)
def test_a_bare_file_has_the_precision_of_most_of_its_weights(case: str) -> None:
    assert precision_of(STORED[case][0]) == STORED[case][1]


@pytest.mark.parametrize(("dtype", "precision"), [("UINT8", "int8"), ("UINT4", "int4"), ("INT4", "int4")])
def test_a_bare_onnx_file_of_few_bits_is_no_fp32_file(dtype: str, precision: str, tmp_path: Path) -> None:
    kind = getattr(onnx.TensorProto, dtype)
    weight = helper.make_tensor("w", kind, (16, 8), [i % 8 for i in range(128)])
    rest = [helper.make_tensor("s", onnx.TensorProto.FLOAT, (), [0.1]), helper.make_tensor("z", kind, (), [4])]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["v"]),
        helper.make_node("MatMul", ["x", "v"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (("x", (1, 16)), ("y", (1, 8))))
    graph = helper.make_graph(nodes, "g", [x], [y], [weight, *rest])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), tmp_path / "few.onnx")
    assert identify(tmp_path / "few.onnx").precision == precision

"""The Python API: what people pass, the words of its errors, its types and its reprs."""

from __future__ import annotations

import ast
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import SHAPE, network, quick, samples
from torch._inductor.runtime.cache_dir_utils import cache_dir

import edgekit
from edgekit.api import in_python, in_words, quiet
from edgekit.artifacts.bundles import Bundle
from edgekit.data import sources
from edgekit.data.python_samples import Batched, as_source
from edgekit.errors import EdgeKitError
from edgekit.measuring.latency import Latency
from edgekit.measuring.op_times import OpTime, OpTimes

X = np.random.default_rng(0).standard_normal((70, 3)).astype(np.float32)
Y = np.arange(70) % 4
ROWS = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter([(x, int(y)) for x, y in zip(X, Y, strict=True)])


# What people have → whether it has labels.
GIVEN: dict[str, tuple[Any, bool]] = {
    "a pair of arrays": ((X, Y), True),
    "a pair of tensors": ((torch.from_numpy(X), torch.from_numpy(Y)), True),
    "a pair without labels": ((X, None), False),
    "an array": (X, False),
    "a tensor": (torch.from_numpy(X), False),
    "a Dataset": (ROWS, True),
    "a stream": (Stream(), True),
    "a DataLoader": (torch.utils.data.DataLoader(ROWS, batch_size=16), True),
    "unbatched pairs": ([(x, y) for x, y in zip(X, Y.tolist(), strict=True)], True),
    "batched pairs": ([(X[:50], Y[:50]), (X[50:], Y[50:])], True),
    "a dict": ({"x": X, "y": Y}, True),
    "a pair of named inputs": (({"x": X}, Y), True),
    "a pair of a tuple": (((X,), Y), True),
}


@pytest.mark.parametrize("case", GIVEN)
def test_samples_of_every_form_are_read_whole(case: str) -> None:
    given, labeled = GIVEN[case]
    source = sources.load(as_source(given))
    for _ in range(2):  # it can be read again
        batches = list(source.evaluation)
        assert np.array_equal(np.concatenate([next(iter(b.inputs.values())) for b in batches]), X)
        if labeled:
            assert np.array_equal(np.concatenate([b.target for b in batches]), Y)
        else:
            assert all(b.target is None for b in batches)


def test_samples_of_several_inputs_are_batched() -> None:
    pairs = [({"a": X[i], "b": X[i, :1]}, 0) for i in range(3)]
    [(inputs, target)] = list(Batched(pairs))
    assert inputs["a"].shape == (3, 3) and inputs["b"].shape == (3, 1) and target.tolist() == [0, 0, 0]
    with pytest.raises(EdgeKitError, match="samples differ in shape"):
        list(Batched([(X[0], 0), (X[0, :2], 0)]))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("choose --precision fp16, which needs none", 'choose precision="fp16", which needs none'),
        ("use --precision int8, which", 'use precision="int8", which'),
        ("add --data with some 100", "add data=... with some 100"),
        ("such as --input 1x3x224x224, or --data", 'such as inputs=["1x3x224x224"], or data=...'),
        ("leave onnx out with --format", "leave onnx out with formats=..."),
        ("export with --format onnx,tflite", 'export with formats="onnx,tflite"'),
        ("--code net.py:make", 'code="net.py:make"'),
        ("add --rounds 3, or --max-drop 0.5", "add rounds=3, or max_drop=0.5"),
        ("add --ops", "add ops=True"),
        ("--name lstm-2", 'name="lstm-2"'),
        ("nothing to say", "nothing to say"),
    ],
)
def test_errors_speak_of_keyword_arguments(said: str, words: str) -> None:
    assert in_words(said) == words


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: edgekit.export(torch.nn.Linear), "Linear is a class"),
        (lambda: edgekit.export(network().state_dict()), "dict of weights"),
        (lambda: edgekit.export(3), "a int is given as the model"),
        (lambda: edgekit.export(network(), data=5), "a int is given as data"),
        (lambda: edgekit.export(network(), inputs=[5]), "a int is given as an input"),
        (lambda: edgekit.compare(network(), [], data=X, metric=5), "a int is given as the metric"),
    ],
)
def test_what_is_no_model_no_data_or_no_metric(call: Any, what: str) -> None:
    with pytest.raises(EdgeKitError, match=what) as caught:
        call()
    assert "--" not in str(caught.value)


def test_a_bundle_is_taken_where_files_are(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    quick(monkeypatch)
    capfd.readouterr()
    x, y = samples(8)["x"], samples(8)["y"]
    result = edgekit.compare(
        network(), bundles["fp32"], data=(x, y), metric=lambda out, target: out.argmax(1) == target
    )
    assert len(result.artifacts) == 3
    expected = (network()(torch.from_numpy(x)).argmax(1).numpy() == y).mean()
    assert result.baseline.accuracy == pytest.approx(expected)
    assert [replay.problem for replay in edgekit.verify(bundles["fp32"])] == [None] * 3
    profiles = edgekit.profile(bundles["fp32"])
    assert [profile.artifact.format for profile in profiles] == ["executorch", "onnx", "tflite"]
    assert capfd.readouterr() == ("", "")  # libraries say nothing
    assert len(repr(result)) < 8000


def test_tensors_stand_for_shapes_and_samples(tmp_path: Path) -> None:
    x = torch.from_numpy(samples(2)["x"])
    made = edgekit.export(network(), inputs=(x,), precision="fp32", formats="onnx", out=tmp_path, name="net")
    assert made.artifacts[0].inputs[0].shape == (2, *SHAPE)
    assert repr(made) == f"Bundle('{tmp_path}/net-android', for android: fp32 bundle (onnx))"


def test_reprs_are_short() -> None:
    latency = Latency(((1.0,) * 5000, (2.0,) * 5000), 1)
    assert repr(latency) == "Latency(p50 1.5 ms, 10,000 runs, 1 thread)"
    times = OpTimes(tuple(OpTime("Conv", f"c{i}", 1.0) for i in range(500)), 3, 9, 500.0, 400.0)
    assert len(repr(times)) < 100


def test_libraries_are_quiet_and_get_their_voice_back(recwarn: pytest.WarningsRecorder) -> None:
    logger = logging.getLogger("torch")
    before = logger.level
    with quiet():
        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
        assert logger.level == logging.ERROR
    assert logger.level == before and not recwarn


def test_torch_leaves_no_folder_in_that_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    used = Path(in_python(cache_dir)())
    assert used.parent == tmp_path
    assert list(tmp_path.iterdir()) == []
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_type_checkers_see_every_public_name() -> None:
    """Names that __getattr__ finds are imported where only type checkers look."""
    tree = ast.parse(Path(edgekit.__file__).read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    names = {alias.name for node in ast.walk(blocks[0]) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names == set(edgekit.__all__)
    assert set(edgekit.__all__) <= set(dir(edgekit))
    assert all(getattr(edgekit, name) is not None for name in edgekit.__all__)

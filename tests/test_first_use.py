"""What a first-time user meets: the first command, what it says is missing, names, and bundles that are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from kit import NET, environment, invoke
from onnx import TensorProto, helper
from torch import nn

import edgekit
from edgekit.artifacts import bare, bundles
from edgekit.commands import preflight
from edgekit.errors import EdgeKitError, SeveralErrors, UsageError, reason
from edgekit.loading import example_inputs
from edgekit.loading.model import load, parse_spec
from edgekit.loading.model_summary import inspect_model
from edgekit.measuring.feeds import profile_feeds, random_feeds
from edgekit.quant.pruning import dependency_graph
from edgekit.quant.ptq.recipes import RECIPES
from edgekit.reports import pruned
from edgekit.reports.tables import summarized
from edgekit.targets import PRECISIONS
from edgekit.types import TensorSpec
from edgekit.util.user_code import model_name


def lenet(pad: int = 2) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=pad), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(400, 10),
    )  # fmt: skip


class Patches(nn.Module):
    """A patch embedding with a table of positions, as a vision transformer has it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 16, stride=16)
        self.position = nn.Parameter(torch.zeros(1, 49, 8))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.patches(image).flatten(2).transpose(1, 2) + self.position


class Words(nn.Module):
    """A text model as most libraries sign it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.types, self.head = nn.Embedding(100, 8), nn.Embedding(2, 8), nn.Linear(8, 3)

    def forward(self, input_ids, token_type_ids, attention_mask):  # type: ignore[no-untyped-def]
        rows = self.head(self.words(input_ids) + self.types(token_type_ids)) * attention_mask[..., None]
        return rows.sum(1) / attention_mask.sum(1, keepdim=True)


class Cell(nn.Module):
    """Its state is a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 8)

    def forward(self, x, state):  # type: ignore[no-untyped-def]
        hidden, cell = self.cell(x, state)
        return hidden, (hidden, cell)


class Noisy(nn.Module):
    def __init__(self, draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.draw = nn.Linear(4, 4), draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.draw(self.layer(x))


# Shapes that the layers tell: a model → its inputs, None where there is doubt, and then what the help suggests.
SHAPES: dict[str, tuple[nn.Module, list[str] | str]] = {
    "linear": (nn.Sequential(nn.Linear(13, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), ["input:float32[1,13]"]),
    "LeNet": (lenet(), ["input:float32[1,1,28,28]"]),
    "LeNet without padding": (lenet(0), ["input:float32[1,1,32,32]"]),
    "stride": (nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Flatten(), nn.Linear(8 * 256, 5)),
               ["input:float32[1,3,32,32]"]),
    "an unusual size": (nn.Sequential(nn.Conv2d(2, 1, 3), nn.Flatten(), nn.Linear(35 * 35, 2)),
                        ["input:float32[1,2,37,37]"]),
    "a signal": (nn.Sequential(nn.Conv1d(9, 4, 5), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4 * 62, 6)),
                 ["input:float32[1,9,128]"]),
    "patches": (Patches(), ["image:float32[1,3,112,112]"]),
    "embedding": (nn.Sequential(nn.Embedding(50, 8), nn.GRU(8, 4, batch_first=True)), ["input:int64[1,32]"]),
    "embedding of a length": (nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(160, 3)),
                              ["input:int64[1,20]"]),
    "text": (Words(), ["input_ids:int64[1,32]", "token_type_ids:int64[1,32]", "attention_mask:int64[1,32]"]),
    "any size": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
                 "--input 1x3x224x224"),
    "flattened images": (nn.Sequential(nn.Flatten(), nn.Linear(784, 4)), "--input 1x784 or 1x1x28x28"),
    "rows of features": (nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
                         "--input 1x16x6"),
    "recurrent": (nn.LSTM(40, 8, batch_first=True), "--input 1x16x40"),
    "a video": (nn.Conv3d(3, 4, 3), "--input 1x3x16x112x112"),
    "no weights": (nn.ReLU(), "--input 1x3x224x224"),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_are_those_of_the_layers_where_they_leave_no_doubt(case: str) -> None:
    module, expected = SHAPES[case]
    if isinstance(expected, str):
        with pytest.raises(EdgeKitError, match="shapes of the inputs") as caught:
            load(module.eval())
        assert expected in str(caught.value.help)
        return
    model = load(module.eval())
    assert list(map(str, model.inputs)) == expected
    assert any("inferred" in note for note in model.notes)
    with torch.no_grad():
        assert module(*model.example) is not None


@pytest.mark.parametrize("write", ["trace", "script"])
def test_torchscript_tells_its_shapes(write: str, tmp_path: Path) -> None:
    module = lenet().eval()
    made = torch.jit.trace(module, torch.randn(2, 1, 28, 28)) if write == "trace" else torch.jit.script(module)
    made.save(tmp_path / "m.pt")
    batch = 2 if write == "trace" else 1
    assert load(tmp_path / "m.pt").inputs[0].shape == (batch, 1, 28, 28)


@pytest.mark.parametrize("inputs", [["x:1x4", "1x8", "1x8"], ["1x4", "state.0:1x8", "state.1:1x8"],
                                    (torch.ones(1, 4), (torch.ones(1, 8), torch.ones(1, 8)))])  # fmt: skip
def test_an_argument_that_is_a_tuple(inputs: Any) -> None:
    module = Cell().eval()
    model = load(module, inputs=inputs)
    assert [spec.name for spec in model.inputs] == ["x", "state_0", "state_1"]
    x, h, c = model.example
    torch.testing.assert_close(model.module(x, h, c)[0], module(x, (h, c))[0])


def test_example_inputs_are_plausible() -> None:
    model = load(Words().eval(), inputs=["int64[2,16]"] * 3)
    ids, types, mask = (tensor.numpy() for tensor in model.example)
    assert ids.max() > 40 and ids.min() >= 0 and len(np.unique(ids)) > 10
    assert set(np.unique(types)) == {0, 1}
    assert mask.all()
    assert model.ranges == ((0, 100), (0, 2), (1, 2))
    feeds = random_feeds(model.inputs, ranges=model.ranges)
    assert feeds[0].max() < 100 and feeds[0].shape == (8, 2, 16) and feeds[2].all()


class Attended(nn.Module):
    """What is padding is True in its mask: all of it gives no numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.attention = nn.Embedding(30, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens, mask):  # type: ignore[no-untyped-def]
        rows = self.words(tokens.long())
        return self.attention(rows, rows, rows, key_padding_mask=mask)[0]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(4, 8, batch_first=True)

    def forward(self, x, lengths):  # type: ignore[no-untyped-def]
        rows = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.layer(rows)[1]


def test_masks_and_lengths_are_those_that_give_numbers() -> None:
    model = load(Attended().eval(), inputs=["int32[1,7]", "bool[1,7]"])
    assert not model.example[1].any() and model.example[0].any()
    model = load(Packed().eval(), inputs=["x:1x9x4", "lengths:int64[1]"])
    assert model.example[1].tolist() == [9]


@pytest.mark.parametrize(
    ("spec", "filled"),
    [
        ("image:uint8[1,3,8,8]", (0, 256)), ("x:float32[1,3]", None), ("src_key_padding_mask:bool[1,4]", (0, 1)),
        ("attention_mask:float32[1,4]", (1, 2)), ("flag:bool[1]", (1, 2)), ("kind:int64[1,4]", (0, 2)),
    ],
)  # fmt: skip
def test_what_names_and_types_tell(spec: str, filled: tuple[int, int] | None) -> None:
    assert example_inputs.ranges([parse_spec(spec)]) == (filled,)


def test_tables_of_an_onnx_graph_bound_its_indices(tmp_path: Path) -> None:
    table = helper.make_tensor("table", TensorProto.FLOAT, (50, 4), np.zeros(200, np.float32))
    nodes = [helper.make_node("Cast", ["ids"], ["long"], to=TensorProto.INT64),
             helper.make_node("Gather", ["table", "long"], ["rows"])]  # fmt: skip
    ids = helper.make_tensor_value_info("ids", TensorProto.INT32, [1, 6])
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, [1, 6, 4])
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", [ids], [rows], [table]),
                          opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx",
    )  # fmt: skip
    model = load(tmp_path / "m.onnx")
    assert model.ranges == ((0, 50),) and len(set(model.example[0].flatten().tolist())) > 3
    assert profile_feeds(bare.bare(tmp_path / "m.onnx"))[0].max() > 2


RANDOM = {
    "a VAE": (lambda x: x + torch.randn_like(x), "randn_like"),
    "functional dropout": (lambda x: nn.functional.dropout(x), "bernoulli"),
    "a choice": (lambda x: x[:, torch.randperm(4)], "randperm"),
    "NumPy": (lambda x: x * float(np.random.rand()), "random numbers"),
}


@pytest.mark.parametrize("case", RANDOM)
def test_a_model_that_draws_random_numbers_is_told(case: str, tmp_path: Path) -> None:
    draw, named = RANDOM[case]
    module = Noisy(draw).eval()
    found = load(module, inputs=["1x4"]).random
    assert found is not None and named in found
    if case != "NumPy":
        assert "test_first_use.py line" in found
    with pytest.raises(EdgeKitError, match="draws random numbers") as caught:
        edgekit.export(module, inputs=["1x4"], precision="fp32", formats="onnx", out=tmp_path)
    assert "of a VAE the mean" in str(caught.value.help)


def test_what_is_random_and_does_not_reach_the_outputs_is_fine() -> None:
    assert load(Noisy(lambda x: x + 0 * torch.randn_like(x)).eval(), inputs=["1x4"]).random is None


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("models.py:lstm", "lstm"), ("models.py:Mlp", "Mlp"), ("nets/unet.py:make", "unet"), ("net.py:Net", "net"),
        ("net.py:build_model", "net"), ("net.py:make_resnet18", "resnet18"), ("pkg.nets:get_vit", "vit"),
        ("pkg.nets:create", "nets"), ("net.py", "net"),
    ],
)  # fmt: skip
def test_a_model_is_named_after_its_factory_where_that_says_more(source: str, name: str) -> None:
    assert model_name(source) == name


def test_precisions_are_those_of_the_recipes() -> None:
    assert {name: recipe.needs_data for name, recipe in RECIPES.items()} == PRECISIONS


SAME = {"source": "s", "weights": "w", "structure": "t"}
OTHER = {"source": "o", "weights": "v", "structure": "u"}
OBJECT = {"source": None, "weights": "w", "structure": "t"}
# What lies there, what comes → what is said; None for nothing, "" for a refusal.
REPLACED = {
    "the same": (SAME, "int8", SAME, "int8", None),
    "another precision": (SAME, "fp32", SAME, "int8", "replaced the fp32 bundle"),
    "trained further": (SAME, "int8", {**SAME, "weights": "x"}, "int8", "other weights"),
    "another source of the same weights": (SAME, "int8", {**SAME, "source": "z"}, "fp16", "replaced the int8"),
    "another model": (SAME, "int8", OTHER, "int8", ""),
    "another factory of the same layers": (SAME, "int8", {**OTHER, "structure": "t"}, "int8", ""),
    "an object trained further": (OBJECT, "int8", {**OBJECT, "weights": "x"}, "int8", "other weights"),
    "another object": (OBJECT, "int8", {**OBJECT, "weights": "x", "structure": "y"}, "int8", ""),
    "of before": (None, "int8", SAME, "int8", "does not say"),
}


@pytest.mark.parametrize("case", REPLACED)
def test_what_replaces_a_bundle(case: str, tmp_path: Path) -> None:
    before, old, after, new, said = REPLACED[case]

    def manifest(identity: Any, precision: str) -> dict[str, Any]:
        return {"model": {"name": "m", "identity": identity}, "precision": precision, "artifacts": [{"format": "onnx"}]}

    (tmp_path / "edgekit.json").write_text(json.dumps(manifest(before, old)))
    contents = bundles.contents_of(manifest(after, new))
    if said == "":
        with pytest.raises(EdgeKitError, match="another model") as caught:
            bundles.replaced(tmp_path, "edgekit.json", "m", after, contents)
        assert "--name m-2" in str(caught.value.help)
        return
    notes = bundles.replaced(tmp_path, "edgekit.json", "m", after, contents)
    assert (said is None and notes == ()) or (said is not None and said in notes[0])


# What is wrong → how many errors are told at once, words of each, and whether a value is unknown to its option.
CHECKS: dict[str, tuple[dict[str, Any], list[str], bool]] = {
    "everything": (
        {"model": "none.pt", "target": "toaster", "precision": "int3", "formats": "coreml", "data": "none.npz",
         "inputs": ["3xx5"], "mean": (0.5,), "out": "/proc/x", "tflite_layout": "nhcw", "name": "a/b"},
        ["toaster", "int3", "coreml", "none.pt", "none.npz", "3xx5", "mean", "/proc/x", "a/b"], True),
    "weights alone, int8": (
        {"model": "w.pt", "precision": "int8"}, ["holds weights only", "int8 needs data"], False),
    "weights alone": ({"model": "w.safetensors"}, ["holds weights only"], False),
    "code that is not there": ({"model": "w.pt", "code": "none.py"}, ["none.py does not exist"], False),
    "a class": ({"model": nn.Linear}, ["Linear is a class"], False),
    "a dict": ({"model": {"weight": 1}}, ["dict of weights"], False),
    "a function's file": ({"model": "net.py:make", "data": "none.py:f"}, ["none.py does not exist"], False),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKS)
def test_all_that_is_wrong_is_told_at_once(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "epoch": 3}, "w.pt")
    save_file(nn.Linear(2, 2).state_dict(), "w.safetensors")
    given, words, unknown = CHECKS[case]
    with pytest.raises(EdgeKitError) as caught:
        preflight.check_export(**given)
    errors = caught.value.errors if isinstance(caught.value, SeveralErrors) else (caught.value,)
    told = [str(error) for error in errors]
    assert all(any(word in text for text in told) for word in words), told
    assert any(isinstance(error, UsageError) for error in errors) == unknown
    if "weights alone" in case:
        assert "--code FILE.py" in told[0] and "--input" in told[0]


def test_preflight_checks_import_nothing_heavy(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    code = (
        "import sys\nfrom edgekit.cli.app import app\n"
        "try:\n    app(['export', 'w.pt', '--target', 'toaster', '--data', 'none.npz', '--precision', 'int8'])\n"
        "except SystemExit as end:\n    print('CODE', end.code)\n"
        "print('HEAVY', [m for m in ('torch', 'onnx', 'onnxruntime', 'executorch') if m in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "HEAVY []" in ran.stdout and "CODE 2" in ran.stdout
    assert ran.stderr.count("error:") == 3, ran.stderr


def test_the_first_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """A whole module and no other option: files that are proven, and the command for int8."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 3)), "model.pt")
    ran = invoke(capfd, "export", "model.pt", "--target", "android", "--json", "out.json")
    assert ran.code == 0, ran.err
    manifest = json.loads(Path("out.json").read_text())
    assert [entry["format"] for entry in manifest["artifacts"]] == ["executorch", "onnx", "tflite"]
    assert manifest["precision"] == "int8-dynamic"
    assert all(entry["parity"]["sqnr_db"] > 20 for entry in manifest["artifacts"])
    assert "for int8: edgekit export model.pt --target android --precision int8 --data DATA" in " ".join(
        ran.out.split()
    )
    torch.save(nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 2)), "other.pt")
    Path("other.pt").rename("model.pt")
    ran = invoke(capfd, "export", "model.pt", "--target", "android", "--format", "onnx", "--precision", "fp32")
    assert ran.code == 0 and "other weights" in ran.out  # the same path is the same model
    (tmp_path / "b").mkdir()
    torch.save(nn.Linear(4, 2), "b/model.pt")
    ran = invoke(capfd, "export", "b/model.pt", "--target", "android", "--format", "onnx", "--precision", "fp32")
    assert ran.code == 1 and "another model" in ran.err and "--name model-2" in ran.err
    ran = invoke(capfd, "export", "b/model.pt", "--target", "android", "--format", "onnx", "--name", "small")
    assert ran.code == 0 and Path("small-android/model.onnx").is_file()
    for command in ("inspect", "profile"):
        ran = invoke(capfd, command, "small-android", "--json", "-")
        assert ran.code == 0, ran.err
        assert len(json.loads(ran.out)["artifacts"]) == 1


def test_a_format_that_cannot_hold_the_model_is_left_out_and_told(tmp_path: Path) -> None:
    """Of the formats that nobody asked for; one that was asked for is an error."""
    node = helper.make_node("Relu", ["x"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    graph = helper.make_graph([node], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    made = edgekit.export(tmp_path / "m.onnx", target="android", out=tmp_path)
    assert [artifact.format for artifact in made.artifacts] == ["onnx", "tflite"]
    assert any(note.startswith("model.pte was left out") for note in made.notes)
    assert not (made.path / "model.pte").exists()
    with pytest.raises(EdgeKitError, match="ExecuTorch starts from a PyTorch model"):
        edgekit.export(tmp_path / "m.onnx", target="android", formats="executorch,onnx", out=tmp_path / "asked")


def test_an_error_of_torchscript_is_told_by_its_last_line() -> None:
    script = torch.jit.script(nn.Linear(3, 2))
    with pytest.raises(RuntimeError) as caught:
        script(torch.ones(1, 4))
    assert "mat1 and mat2 shapes cannot be multiplied" in reason(caught.value)
    script = "Traceback of TorchScript (most recent call last):\n    x = x[:, ::step]\n        ~~~~~~~~ <--- HERE\n"
    assert reason(RuntimeError(f"{script}RuntimeError: ")) == "RuntimeError: in 'x = x[:, ::step]'"
    assert reason(RuntimeError(f"{script}ValueError: a rate")) == "ValueError: a rate"
    assert reason(ValueError("first\nsecond")) == "first" and reason(ValueError()) == "ValueError"


def test_alike_notes_are_one_line() -> None:
    alike = [f"TFLite: transpose of 'val_{i}' ({i}x3x{i}) stays" for i in range(8)]
    long = "ExecuTorch: outside the XNNPACK delegate run " + ", ".join(f"{i} op_{'abcdefgh'[i % 8]}" for i in range(60))
    shown = summarized([*alike, "another", long])
    assert len(shown) == 3
    assert "7 more like it" in shown[0] and "--verbose" in shown[0] and "val_0" in shown[0]
    assert shown[1] == "another"
    assert len(shown[2]) < 260 and "--verbose" in shown[2]


@pytest.mark.parametrize("text", ["left:1x1x28x28", "left:float32[1,1,28,28]"])
def test_a_short_shape_may_have_a_name(text: str) -> None:
    assert parse_spec(text) == TensorSpec("left", "float32", (1, 1, 28, 28))


def test_weights_of_torchscript_and_of_attention_are_told_for_what_they_are(tmp_path: Path) -> None:
    module = lenet().eval()
    torch.jit.trace(module, torch.randn(1, 1, 28, 28)).save(tmp_path / "m.pt")
    found = inspect_model(load(tmp_path / "m.pt"))
    assert (found.parameters, found.buffers) == (sum(p.numel() for p in module.parameters()), 0)
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    attention.add_module("spare", nn.Linear(3, 3))
    calls = {layer.path: layer.calls for layer in inspect_model(load(attention, inputs=["1x5x8"])).layers}
    assert calls["self_attn.out_proj"] is None and calls["spare"] == 0 and calls["linear1"] == 1


def test_a_sample_that_is_part_of_more_counts_alone(tmp_path: Path) -> None:
    many = torch.randn(500, 4)
    program = torch.export.export(nn.Linear(4, 2).eval(), (many[:1],))
    torch.export.save(program, tmp_path / "m.pt2")
    peaks = [inspect_model(load(tmp_path / "m.pt2", inputs=given)).activation_peak_bytes for given in ([], ["1x4"])]
    assert peaks[0] == peaks[1] < 100


class Reshaped(nn.Module):
    """Its forward has the width of its first layer in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.last = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.second(self.first(x).view(-1, 16))
        return self.last(self.third(rows.view(-1, 16)).relu())


def test_a_pruning_names_the_line_with_the_width_built_in_and_says_it_once(tmp_path: Path) -> None:
    found = dependency_graph.structure(load(Reshaped().eval(), inputs=["2x4"]).module, (torch.randn(2, 4),))
    reasons = [why for why in found.kept.values() if "built in" in why]
    assert len(reasons) == 2 and all("test_first_use.py line" in why and "mat1" not in why for why in reasons)
    assert pruned._shared(["a", None, "b", "a"]) == {"a": "(1)"}

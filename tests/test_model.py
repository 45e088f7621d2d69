"""Every form of model file is loaded as torch itself wrote it, and computes what eager PyTorch computes."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

from edgekit.errors import EdgeKitError
from edgekit.loading.model import Model, load, parse_spec
from edgekit.measuring.running import run_module
from edgekit.types import TensorSpec

SHAPE = "2x3x8x8"

NET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()

class Net(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.block = Block()
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(self.block(x).mean((2, 3)))

class Wide(Net):
    def __init__(self, width):
        super().__init__()
"""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / f"net_{tmp_path.name}.py"
    path.write_text(NET)
    return path


@pytest.fixture
def net(code: Path) -> nn.Module:
    """A Net with lived-in batch statistics, as a script would have trained it."""
    model = load(f"{code}:Net", inputs=[SHAPE]).module.inner
    model.block.bn.running_mean.uniform_(-1, 1)
    model.block.bn.running_var.uniform_(0.5, 2)
    return model


def write(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    return path


def assert_same(model: Model, eager: nn.Module, exportable: bool = True) -> None:
    """The loaded module gives eager's outputs, its specs are true, and torch.export takes it."""
    expected = eager.eval()(*model.example)
    expected = expected if isinstance(expected, tuple) else (expected,)
    got = model.module(*model.example)
    for a, b, spec in zip(got, expected, model.outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert spec.shape == tuple(a.shape) and spec.dtype == str(a.dtype).removeprefix("torch.")
    assert [tuple(t.shape) for t in model.example] == [s.shape for s in model.inputs]
    assert not any(p.requires_grad for p in model.module.parameters())
    assert not any(m.training for m in model.module.modules())
    model.module.eval()
    if exportable:
        program = torch.export.export(model.module, model.example)
        for a, b in zip(program.module()(*model.example), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# Writers: (model, path, example) -> None, for each form that needs --code or not.
def save_module(model, path, _x):
    torch.save(model, path)


def save_state_dict(model, path, _x):
    torch.save(model.state_dict(), path)


def save_legacy(model, path, _x):
    torch.save({"state_dict": model.state_dict()}, path, _use_new_zipfile_serialization=False)


def save_checkpoint(model, path, _x):
    optimizer = torch.optim.Adam(model.parameters())
    training = {"epoch": 3, "loss": torch.tensor(0.5), "optimizer": optimizer.state_dict(), "best": np.float64(0.9)}
    torch.save({**training, "model": model.state_dict()}, path)


def save_data_parallel(model, path, _x):
    torch.save({"model_state_dict": nn.DataParallel(model).state_dict()}, path)


def save_safetensors(model, path, _x):
    from safetensors.torch import save_file

    save_file(model.state_dict(), path)


def save_script(model, path, _x):
    torch.jit.script(model).save(path)


def save_trace(model, path, x):
    torch.jit.trace(model, x).save(path)


def save_exported(model, path, x):
    torch.export.save(torch.export.export(model, (x,)), path)


def save_onnx(model, path, x):
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, external_data=False)


FORMS = {
    "module": (save_module, True),
    "state_dict": (save_state_dict, True),
    "checkpoint": (save_checkpoint, True),
    "safetensors": (save_safetensors, True),
    "torchscript": (save_script, False),
    "pt2": (save_exported, False),
    "onnx": (save_onnx, False),
}
VARIANTS = {"legacy": (save_legacy, True), "data_parallel": (save_data_parallel, True), "traced": (save_trace, False)}
VARIANT_FORM = {"legacy": "checkpoint", "data_parallel": "checkpoint", "traced": "torchscript"}


@pytest.mark.parametrize("form", [*FORMS, *VARIANTS])
def test_every_form(form: str, tmp_path: Path, code: Path, net: nn.Module) -> None:
    save, needs_code = {**FORMS, **VARIANTS}[form]
    path = tmp_path / "trained.bin"  # the suffix tells nothing
    save(net.eval(), path, torch.randn(2, 3, 8, 8))
    model = load(path, code=str(code) if needs_code else None, inputs=[SHAPE])
    assert (model.name, model.form) == ("trained", VARIANT_FORM.get(form, form))
    assert [str(s) for s in model.inputs] == ["x:float32[2,3,8,8]"]
    assert (model.onnx is not None) == (form == "onnx")
    assert_same(model, net, exportable=form != "onnx")


def test_the_table_of_forms_is_complete() -> None:
    from edgekit.loading.openers import _OPENERS

    torch_save = {"module", "state_dict", "checkpoint"}
    assert set(FORMS) == torch_save | set(_OPENERS) - {"torch"}


def test_factories_and_objects(code: Path, net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(f"{code}:Net", inputs=[SHAPE]).form == "factory"
    monkeypatch.chdir(code.parent)
    by_module = load(f"{code.stem}:Net", inputs=[SHAPE])
    assert (by_module.form, by_module.name) == ("factory", code.stem)
    net.train().requires_grad_(True)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    model = load(net, inputs=[SHAPE])
    assert model.form == "object" and net.training and all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert "was in training mode: switched to eval mode" in model.notes
    assert_same(model, net)


def test_module_pickled_in_a_script(tmp_path: Path, code: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(NET + f"\nif __name__ == '__main__':\n    torch.save(Net(), {str(tmp_path / 'm.pt')!r})\n")
    subprocess.run([sys.executable, str(script)], check=True)
    with pytest.raises(EdgeKitError, match=r"__main__\.Net") as refused:
        load(tmp_path / "m.pt", inputs=[SHAPE])
    assert "--code FILE.py" in refused.value.help
    model = load(tmp_path / "m.pt", code=str(script), inputs=[SHAPE])
    assert_same(model, model.module.inner)


def test_whole_torch_modules_need_no_code(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
    eager = nn.Sequential(nn.Linear(4, 8), layer, nn.LSTM(8, 3, batch_first=True)).eval()
    torch.save(nn.DataParallel(eager), tmp_path / "m.pt")
    model = load(tmp_path / "m.pt", inputs=["1x5x4"])
    assert "taken out of its DataParallel wrapper" in model.notes
    got = model.module(*model.example)
    want, (hidden, cell) = eager(*model.example)
    for a, b in zip(got, (want, hidden, cell), strict=True):
        torch.testing.assert_close(a, b)
    assert [s.name for s in model.outputs] == ["output_0", "output_1_0", "output_1_1"]


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "ema", "params", "whatever"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_checkpoint_keys_and_prefixes(key: str, prefix: str, tmp_path: Path, code: Path, net: nn.Module) -> None:
    weights = {prefix + k: v for k, v in net.state_dict().items()}
    torch.save({"epoch": 1, key: weights}, tmp_path / "c.pt")
    model = load(tmp_path / "c.pt", code=str(code), inputs=[SHAPE])
    assert model.form == "checkpoint"
    assert f"took the weights under {key!r}" in model.notes and "ignored in the checkpoint: epoch" in model.notes
    assert any(repr(prefix) in n for n in model.notes) == bool(prefix)
    torch.testing.assert_close(model.module(*model.example)[0], net(*model.example))


def test_lightning_style_checkpoint_with_more_than_the_model(tmp_path: Path, code: Path, net: nn.Module) -> None:
    weights = {f"model.{k}": v for k, v in net.state_dict().items()} | {"loss.weight": torch.ones(5)}
    torch.save({"state_dict": weights, "global_step": 3}, tmp_path / "c.ckpt")
    model = load(tmp_path / "c.ckpt", code=str(code), inputs=[SHAPE])
    assert any("loss.weight" in n for n in model.notes)
    torch.testing.assert_close(model.module(*model.example)[0], net(*model.example))


def test_a_part_of_another_model_is_not_taken_for_the_model(tmp_path: Path, net: nn.Module) -> None:
    torch.save(net.state_dict(), tmp_path / "w.pt")
    part = write(tmp_path / "part.py", "from torch import nn\ndef head() -> nn.Module:\n    return nn.Linear(4, 5)\n")
    with pytest.raises(EdgeKitError, match="are not those of head"):
        load(tmp_path / "w.pt", code=f"{part}:head", inputs=["1x4"])


IO = """
from typing import NamedTuple
import torch
from torch import nn

class Both(NamedTuple):
    boxes: torch.Tensor
    scores: torch.Tensor

class Dicts(nn.Module):
    def forward(self, x):
        return {"logits": x + 1, "aux": None, "features": [x * 2, {"deep": x * 3}]}

class Named(nn.Module):
    def forward(self, x):
        return Both(x + 1, x * 2)

class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)

    def forward(self, input_ids, token_type_ids=None, *, attention_mask=None):
        y = self.embedding(input_ids)
        return y if attention_mask is None else y * attention_mask[..., None]

class OneDict(nn.Module):
    def forward(self, batch):
        return batch["left"] - batch["right"]

class Many(nn.Module):
    def forward(self, *xs):
        return torch.cat(xs, 1), xs[0] + 1

class Echo(nn.Module):
    def forward(self, x):
        return {"x": x + 1}
"""


@pytest.mark.parametrize(
    ("name", "inputs", "expected_in", "expected_out"),
    [
        ("Dicts", ["1x2"], ["x:float32[1,2]"], ["logits", "features_0", "features_1_deep"]),
        ("Named", ["1x2"], ["x:float32[1,2]"], ["boxes", "scores"]),
        ("Text", ["int64[1,3]"], ["input_ids:int64[1,3]"], ["output"]),
        (
            "Text",
            ["attention_mask:float32[1,3]", "input_ids:int64[1,3]"],
            ["input_ids:int64[1,3]", "attention_mask:float32[1,3]"],
            ["output"],
        ),
        ("Many", ["1x2", "1x3"], ["input_0:float32[1,2]", "input_1:float32[1,3]"], ["output_0", "output_1"]),
        ("Echo", ["1x2"], ["x:float32[1,2]"], ["x_out"]),
    ],
)
def test_inputs_and_outputs(name: str, inputs: list[str], expected_in, expected_out, tmp_path: Path) -> None:
    path = write(tmp_path / f"io_{tmp_path.name}.py", IO)
    model = load(f"{path}:{name}", inputs=inputs)
    assert [str(s) for s in model.inputs] == expected_in
    assert [s.name for s in model.outputs] == expected_out
    for tensor in model.example:
        assert tensor.any()  # zeros are all padding
    program = torch.export.export(model.module, model.example)
    for a, b in zip(program.module()(*model.example), model.module(*model.example), strict=True):
        torch.testing.assert_close(a, b)
    if name == "Dicts":
        assert "outputs that are None left out: aux" in model.notes


def test_one_dict_of_inputs(tmp_path: Path) -> None:
    path = write(tmp_path / f"io_{tmp_path.name}.py", IO)
    samples = {"left": np.ones((2, 3), np.float32), "right": np.full((2, 3), 5, np.float32)}
    model = load(f"{path}:OneDict", example=samples)
    assert [s.name for s in model.inputs] == ["left", "right"]
    assert model.module(*model.example)[0].eq(-4).all()
    torch.export.export(model.module, model.example)


def test_real_samples_are_the_example(code: Path) -> None:
    samples = np.random.default_rng(0).normal(size=(3, 3, 8, 8))
    model = load(f"{code}:Net", example={"x": samples})
    assert model.inputs == (TensorSpec("x", "float32", (3, 3, 8, 8)),)
    assert any("float64, cast to float32" in n for n in model.notes)
    np.testing.assert_allclose(model.example[0], samples, rtol=1e-6)
    both = load(f"{code}:Net", inputs=["2x3x8x8"], example=[samples.astype(np.float32)])
    np.testing.assert_array_equal(both.example[0], samples[:2].astype(np.float32))
    filled = load(f"{code}:Net", inputs=["5x3x8x8"], example=[samples.astype(np.float32)])
    np.testing.assert_array_equal(filled.example[0][3], filled.example[0][0])
    with pytest.raises(EdgeKitError, match="but --input says"):
        load(f"{code}:Net", inputs=["2x3x9x9"], example=[samples])


def test_example_without_samples_is_reproducible(code: Path) -> None:
    first, second = (load(f"{code}:Net", inputs=[SHAPE]).example[0] for _ in range(2))
    assert torch.equal(first, second) and first.std() > 0.5


def test_shapes_of_the_file_are_used(tmp_path: Path, net: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8)
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.export.save(torch.export.export(net, (x,), dynamic_shapes={"x": {0: batch}}), tmp_path / "m.pt2")
    model = load(tmp_path / "m.pt2")
    assert torch.equal(model.example[0], x)
    assert_same(model, net)
    assert_same(load(tmp_path / "m.pt2", inputs=["7x3x8x8"]), net)
    torch.onnx.export(
        net, (x,), tmp_path / "m.onnx", dynamic_shapes={"x": {0: batch}}, verbose=False, external_data=True
    )
    model = load(tmp_path / "m.onnx")
    assert model.inputs[0].shape == (1, 3, 8, 8) and any("taken as 1" in n for n in model.notes)
    assert_same(model, net, exportable=False)
    assert load(tmp_path / "m.onnx", inputs=["4x3x8x8"]).outputs[0].shape == (4, 5)


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_samples_are_cut_to_the_batch_of_the_file(suffix: str, tmp_path: Path, net: nn.Module) -> None:
    path, x = tmp_path / f"m.{suffix}", torch.randn(4, 3, 8, 8)
    if suffix == "pt2":
        torch.export.save(torch.export.export(net, (x,)), path)
    else:
        torch.onnx.export(net, (x,), path, verbose=False)
    model = load(path, example=[x[:1].numpy()])
    assert model.inputs[0].shape == (4, 3, 8, 8)
    with pytest.raises(EdgeKitError, match="but the file says"):
        load(path, example=[x[:1, :, :4].numpy()])


def test_exported_program_with_keyword_nested_and_optional_inputs(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, pair, flag, *, scale):
            return {"sum": pair["a"] + pair["b"], "scaled": (pair["a"] * scale, None)}

    pair = {"a": torch.randn(2, 3), "b": torch.randn(2, 3)}
    program = torch.export.export(Odd(), (pair, None), {"scale": torch.randn(1)})
    torch.export.save(program, tmp_path / "m.pt2")
    model = load(tmp_path / "m.pt2")
    assert [s.name for s in model.inputs] == ["pair_a", "pair_b", "scale"]
    assert [s.name for s in model.outputs] == ["sum", "scaled_0"]
    torch.testing.assert_close(model.module(*model.example)[0], pair["a"] + pair["b"])
    torch.export.export(model.module, model.example)


def test_exported_program_with_symbolic_shapes_and_branches(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                y = x * 2
            return torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,)) + y + x.shape[0]

    half = torch.export.Dim("half", min=1, max=8)
    program = torch.export.export(Branches(), (torch.ones(4, 2),), dynamic_shapes={"x": {0: 2 * half}})
    torch.export.save(program, tmp_path / "m.pt2")
    for inputs in ([], ["6x2"]):
        model = load(tmp_path / "m.pt2", inputs=inputs)
        torch.testing.assert_close(model.module(*model.example)[0], Branches()(*model.example))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(dtype: torch.dtype, tmp_path: Path, code: Path, net: nn.Module) -> None:
    torch.save(net.to(dtype), tmp_path / "m.pt")
    model = load(tmp_path / "m.pt", code=str(code), inputs=[SHAPE])
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    assert any(f"{str(dtype).removeprefix('torch.')} weights cast to float32" in n for n in model.notes)
    assert_same(model, net.float())


def test_channels_last_and_tied_weights(code: Path, net: nn.Module, tmp_path: Path) -> None:
    model = load(net.to(memory_format=torch.channels_last), inputs=[SHAPE])
    assert all(p.is_contiguous() for p in model.module.parameters())
    assert any("channels_last" in n for n in model.notes)
    assert_same(model, net)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    tied[1].weight = tied[0].weight
    inner = load(tied, inputs=["1x4"]).module.inner
    assert inner[0].weight is inner[1].weight


def test_the_right_class_is_found_among_several(tmp_path: Path, net: nn.Module) -> None:
    torch.save(net.state_dict(), tmp_path / "w.pt")
    more = NET + "\nclass Small(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    more += "        self.fc = nn.Linear(4, 5)\n"
    path = write(tmp_path / f"several_{tmp_path.name}.py", more)
    assert type(load(tmp_path / "w.pt", code=str(path), inputs=[SHAPE]).module.inner).__name__ == "Net"
    path.write_text(more + "\nclass Twin(Net):\n    pass\n")
    with pytest.raises(EdgeKitError, match="fit several models") as ambiguous:
        load(tmp_path / "w.pt", code=str(path), inputs=[SHAPE])
    assert "Twin" in ambiguous.value.what and ":Net" in ambiguous.value.help


def test_a_factory_is_found_and_other_functions_are_not_called(tmp_path: Path, net: nn.Module) -> None:
    torch.save(net.state_dict(), tmp_path / "w.pt")
    source = (
        NET.replace("classes=5", "classes")
        + "\ndef make_net():\n    return Net(5)\n\ndef train():\n    raise SystemExit(9)\n"
    )
    path = write(tmp_path / f"factory_{tmp_path.name}.py", source)
    model = load(tmp_path / "w.pt", code=str(path), inputs=[SHAPE])
    torch.testing.assert_close(model.module(*model.example)[0], net.eval()(*model.example))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import nothing_of_this_name", "line 1): ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("x = 1\ny = x / 0", "line 2): ZeroDivisionError: division by zero"),
        ("def f(:\n  pass", "line 1): SyntaxError"),
        ("import sys\nsys.exit('usage: train.py DATA')", "line 2): SystemExit: usage: train.py DATA"),
        ("def make():\n    raise ValueError('no such size')", "line 2): ValueError: no such size"),
        ("def make():\n    return 3", "returned a int, not a torch.nn.Module"),
        ("def make(size):\n    return 3", "needs arguments: size"),
        ("make = 3", "is a int"),
        ("other = 3", "has no 'make'"),
    ],
)
def test_failing_user_code(source: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"bad_{tmp_path.name}.py", source)
    with pytest.raises(EdgeKitError) as failed:
        load(f"{path}:make", inputs=["1x2"])
    assert said in failed.value.what


def lfs(path: Path, _whole: bytes) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 123\n")


def put(content: bytes):
    return lambda path, _whole: path.write_bytes(content)


BAD_FILES = {
    "missing": (lambda path, _whole: None, "does not exist"),
    "folder": (lambda path, _whole: path.mkdir(), "is a folder"),
    "empty": (put(b""), "is empty"),
    "cut": (lambda path, whole: path.write_bytes(whole[: len(whole) // 2]), "damaged or cut short"),
    "html": (put(b"<!DOCTYPE html><html>login</html>"), "is a web page"),
    "lfs": (lfs, "Git LFS pointer"),
    "text": (put(b"epoch,loss\n1,0.5\n"), "is text, not a model"),
    "keras": (put(b"\x89HDF\r\n\x1a\n" + bytes(32)), "HDF5"),
    "tflite": (put(b"\x1c\x00\x00\x00TFL3" + bytes(32)), "a TFLite file"),
    "pte": (put(b"\x1c\x00\x00\x00ET12" + bytes(32)), "an ExecuTorch file"),
    "npz": (lambda path, _whole: np.savez(path.open("wb"), x=np.zeros(3)), "an .npz file"),
    "noise": (put(bytes(range(1, 255))), "not a model file of a known form"),
    "protobuf": (put(b"\x08\x07\x12\x04abcd"), "not a valid ONNX model"),
    "safetensors cut": (put(b"\x40\x00\x00\x00\x00\x00\x00\x00{"), "cut short"),
    "safetensors bad": (put(b"\x02\x00\x00\x00\x00\x00\x00\x00{]"), "damaged"),
    "number": (lambda path, _whole: torch.save(3, path), "holds a int"),
    "no weights": (
        lambda path, _whole: torch.save({"epoch": 3, "lr": 0.1}, path),
        "no weights: its keys are epoch, lr",
    ),
    "two": (
        lambda path, _whole: torch.save({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, path),
        "several sets of weights: 'a', 'b'",
    ),
    "legacy cut": (
        lambda path, _whole: (
            torch.save({"w": torch.ones(1000)}, path, _use_new_zipfile_serialization=False),
            path.write_bytes(path.read_bytes()[:2000]),
        ),
        "damaged or cut short",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case: str, tmp_path: Path, code: Path, net: nn.Module) -> None:
    write_bad, said = BAD_FILES[case]
    torch.save(net.state_dict(), tmp_path / "whole.pt")
    path = tmp_path / "model.pt"
    write_bad(path, (tmp_path / "whole.pt").read_bytes())
    with pytest.raises(EdgeKitError) as bad:
        load(path, code=str(code), inputs=[SHAPE])
    assert said in bad.value.what and "model.pt" in bad.value.what
    assert bad.value.help


def test_an_onnx_file_of_text_is_refused(tmp_path: Path) -> None:
    texts = [helper.make_tensor_value_info(name, onnx.TensorProto.STRING, [1]) for name in "xy"]
    lower = helper.make_node("StringNormalizer", ["x"], ["y"], case_change_action="LOWER")
    onnx.save(helper.make_model(helper.make_graph([lower], "g", texts[:1], texts[1:])), tmp_path / "text.onnx")
    with pytest.raises(EdgeKitError, match=r"of /.*text\.onnx is of type .*, which torch has no tensors of"):
        load(tmp_path / "text.onnx")


@pytest.mark.parametrize("save", [save_script, save_exported, save_safetensors, save_onnx])
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_cut_files_of_every_form(save, keep: float, tmp_path: Path, code: Path, net: nn.Module) -> None:
    path = tmp_path / "m.bin"
    save(net.eval(), path, torch.randn(2, 3, 8, 8))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(EdgeKitError):
        load(path, code=str(code), inputs=[SHAPE])


def test_weights_without_code(tmp_path: Path, net: nn.Module) -> None:
    torch.save(net.state_dict(), tmp_path / "w.pt")
    with pytest.raises(EdgeKitError, match=r"weights only .9 tensors: block\.conv\.weight") as bare:
        load(tmp_path / "w.pt", inputs=[SHAPE])
    assert "--code" in bare.value.help


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("fc.bias"), "missing: fc.bias"),
        (lambda w: w.update({"block.extra": torch.ones(1)}), "unexpected: block.extra"),
        (lambda w: w.update({"fc.weight": torch.ones(7, 4)}), "fc.weight is [7, 4] in the file, [5, 4] in Net"),
        (lambda w: w["fc.weight"].fill_(float("nan")), "w.pt contains NaN"),
        (lambda w: w["block.bn.running_var"].fill_(float("inf")), "w.pt contains Inf"),
    ],
)
@pytest.mark.parametrize("name", ["", ":Net"])
def test_wrong_weights(change, said: str, name: str, tmp_path: Path, code: Path, net: nn.Module) -> None:
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    change(weights)
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(EdgeKitError) as wrong:
        load(tmp_path / "w.pt", code=f"{code}{name}", inputs=[SHAPE])
    assert said in wrong.value.what and "Traceback" not in str(wrong.value)


def test_infinite_masks_are_fine() -> None:
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((2,), float("-inf")))

        def forward(self, x):
            return (x + self.mask).softmax(-1) if False else x.clamp(min=self.mask.amin())

    assert load(Masked(), inputs=["1x2"]).outputs[0].shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "inputs", "said"),
    [
        ("Net", [], "inputs of .* are not known; its inputs: x"),
        ("Net", ["1x1x8x8"], "does not run on x:float32.1,1,8,8.: .*to have 3 channels"),
        ("Net", ["int64[1,3,8,8]"], "does not run on"),
        ("Net", ["y:float32[1,3,8,8]"], "has no input 'y'; its inputs: x"),
        ("Net", ["1x3x8x8", "1x2"], r"has 1 input \("),
    ],
)
def test_wrong_inputs(name: str, inputs: list[str], said: str, code: Path) -> None:
    with pytest.raises(EdgeKitError, match=said) as wrong:
        load(f"{code}:{name}", inputs=inputs)
    assert "--input" in wrong.value.help or "input" in wrong.value.help


def test_missing_inputs_and_outputs_that_are_no_tensors() -> None:
    class Two(nn.Module):
        def forward(self, image, mask, scale=None):
            return image * mask, {"size": 3}

    with pytest.raises(EdgeKitError, match=r"needs the inputs mask as well; its inputs: image, mask, \[scale\]"):
        load(Two(), inputs=["1x2"])
    with pytest.raises(EdgeKitError, match="returns an int as 'output_1_size'"):
        load(Two(), inputs=["1x2", "1x2"])


class Told(nn.Module):
    """A model whose forward is one expression."""

    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.function = function

    def forward(self, x):
        return self.function(self.layer(x))


class Hooked(nn.Module):
    """A copy of it writes what its hook keeps into the original."""

    def __init__(self):
        super().__init__()
        self.layer, self.kept = nn.Linear(2, 2), {}
        self.layer.register_forward_hook(lambda module, args, out: self.kept.update(out=out))

    def forward(self, x):
        self.layer(x)
        return self.kept["out"]


def under_autocast(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ x.mT


@pytest.mark.parametrize(
    ("model", "said", "help"),
    [
        (Told(lambda x: x.to("cuda:99")), r"\(test_model.py line \d+\)", "x.device"),
        (Told(lambda x: torch.autograd.grad(x.sum(), x)[0]), r"\(test_model.py line \d+\)", "without torch.autograd"),
        (Hooked(), r"KeyError 'out' \(test_model.py line \d+\)", "hooks that write into"),
        (Told(under_autocast), "returns bfloat16 as 'output'", "autocast"),
        (Told(lambda x: torch.fft.fft(x)), "returns complex numbers as 'output'", "view_as_real"),
        (Told(lambda x: (x, x.to_sparse())), "returns a sparse, nested or quantized tensor as 'output_1'", "to_dense"),
    ],
)
def test_what_a_forward_needs_or_gives_that_no_file_has(model: nn.Module, said: str, help: str) -> None:
    with pytest.raises(EdgeKitError, match=said) as wrong:
        load(model, inputs=["2x2"])
    assert help in wrong.value.help


def test_gradients_that_only_fail_without_them() -> None:
    """What passes when the model is bound, and not where it runs as files do."""

    def steepest(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad((x**2).sum(), x)[0]

    loaded = load(Told(steepest), inputs=["2x2"])
    with pytest.raises(EdgeKitError, match=r"fails on batch 0 of the data: .*line \d+") as wrong:
        run_module(loaded.module, [np.ones((1, 2, 2), np.float32)])
    assert "without torch.autograd" in wrong.value.help


def test_a_static_program_on_another_shape(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "m.pt2")
    with pytest.raises(EdgeKitError, match=r"m.pt2 does not run on input:float32\[4,2\]"):
        load(tmp_path / "m.pt2", inputs=["4x2"])


def test_program_exported_in_training_mode(tmp_path: Path) -> None:
    program = torch.export.export(nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train(), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "m.pt2")
    with pytest.raises(EdgeKitError, match="exported in training mode"):
        load(tmp_path / "m.pt2")


def test_quantized_and_meta_weights_are_named() -> None:
    with pytest.raises(EdgeKitError, match="'weight' of Linear was never loaded"):
        load(nn.Linear(2, 2, device="meta"), inputs=["1x2"])
    with pytest.warns(), pytest.raises(EdgeKitError, match=r"quantized already .module '0'"):
        load(torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2))), inputs=["1x2"])


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.dropout = nn.Dropout()

    def forward(self, x: torch.Tensor, mask: torch.Tensor):
        return {"a": self.dropout(self.linear(x)), "b": mask}


@pytest.mark.parametrize("kind", ["scripted", "frozen", "half"])
def test_torchscript_with_names_and_types(kind: str, tmp_path: Path) -> None:
    eager = Pair().eval()
    script = torch.jit.script(Pair().train() if kind == "scripted" else eager)
    script.load_state_dict(eager.state_dict())
    script = torch.jit.freeze(script) if kind == "frozen" else script.half() if kind == "half" else script
    script.save(tmp_path / "m.pt")
    model = load(tmp_path / "m.pt", inputs=["2x3", "int64[2]"])
    assert [str(s) for s in model.inputs] == ["x:float32[2,3]", "mask:int64[2]"]
    assert [str(s) for s in model.outputs] == ["a:float32[2,4]", "b:int64[2]"]
    loose = {"rtol": 1e-2, "atol": 1e-2} if kind == "half" else {}
    torch.testing.assert_close(model.module(*model.example)[0], eager.float()(*model.example)["a"], **loose)
    torch.export.export(model.module, model.example)


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/hostname", "link.bin"])
def test_onnx_external_data_stays_in_its_folder(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    outside = tmp_path / "outside.bin"
    outside.write_bytes(np.ones(4, np.float32).tobytes())
    (folder / "link.bin").symlink_to(outside)
    weight = onnx.numpy_helper.from_array(np.ones(4, np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    vi = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [4]) for n in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", vi[:1], vi[1:], [weight])
    (folder / "m.onnx").write_bytes(onnx.helper.make_model(graph, ir_version=10).SerializeToString())
    with pytest.raises(EdgeKitError, match="outside its own folder"):
        load(folder / "m.onnx")


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("1x3x224x224", TensorSpec("", "float32", (1, 3, 224, 224))),
        ("7", TensorSpec("", "float32", (7,))),
        ("ids:int64[1, 128]", TensorSpec("ids", "int64", (1, 128))),
        ("int32[2]", TensorSpec("", "int32", (2,))),
        ("scale:float32[]", TensorSpec("scale", "float32", ())),
    ],
)
def test_parse_spec(text: str, spec: TensorSpec) -> None:
    assert parse_spec(text) == spec


@pytest.mark.parametrize(
    "text", ["", "1xNx3", "x:float32", "x:float99[1]", "x:float32[-1,3]", "x:float32[0]", "1,3,8", "0x3"]
)
def test_parse_spec_errors(text: str) -> None:
    with pytest.raises(EdgeKitError) as wrong:
        parse_spec(text)
    assert wrong.value.help


def test_import_is_light() -> None:
    heavy = "[m for m in ('torch', 'onnx', 'numpy', 'onnxruntime', 'safetensors') if m in sys.modules]"
    script = f"import edgekit.loading.model, json, sys; print(json.dumps({heavy}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []

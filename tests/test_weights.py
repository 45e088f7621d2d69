"""Checkpoints as trainers write them: every form × every wrapper loads what was trained, and tells what it left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgekit.errors import EdgeKitError
from edgekit.loading.model import Model, load

CODE = """
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
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(Block(), nn.Conv2d(4, 4, 1))
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.backbone(x).mean((2, 3)))


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = nn.Linear(4, 4)
        self.model = nn.Linear(4, 5)

    def forward(self, x):
        return self.model(self.module(x.mean((2, 3))[:, :1].expand(-1, 4)))


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 5)
        self.scale = 1.0

    def get_extra_state(self):
        return {"scale": self.scale}

    def set_extra_state(self, state):
        self.scale = state["scale"]

    def forward(self, x):
        return self.head(x.mean((2, 3))) * self.scale
"""
SHAPE = "2x3x8x8"
Weights = dict[str, Any]


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("code") / "wrapped_nets.py"
    path.write_text(CODE)
    return path


@pytest.fixture(scope="module")
def net(code: Path) -> nn.Module:
    torch.manual_seed(0)
    module = load(f"{code}:Net", inputs=[SHAPE]).module.inner
    for buffer in (module.backbone[0].bn.running_mean, module.backbone[0].bn.running_var):
        buffer.uniform_(0.5, 2)
    return module


def loaded(content: Any, code: Path, folder: Path, name: str = ":Net") -> Model:
    torch.save(content, folder / "weights.pt")
    return load(folder / "weights.pt", code=f"{code}{name}", inputs=[SHAPE])


def assert_trained(model: Model, net: nn.Module) -> None:
    torch.testing.assert_close(model.module(*model.example)[0], net(*model.example))


def inside(wrapper: str) -> Callable[[str], str]:
    """The wrapper behind the first part of a name, and behind the second, as it wraps layers rather than the whole."""

    def renamed(name: str) -> str:
        first, _, rest = name.partition(".")
        return f"{first}.{wrapper}.{rest}"

    return renamed


def inmost(wrapper: str) -> Callable[[str], str]:
    return lambda name: f"{name.rpartition('.')[0]}.{wrapper}.{name.rpartition('.')[2]}"


WRAPPERS: dict[str, Callable[[str], str]] = {
    "none": lambda name: name,
    **{f"{wrapper} before": lambda name, w=wrapper: f"{w}.{name}"
       for wrapper in ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "model", "net", "module.model",
                       "_orig_mod.module", "model._orig_mod")},
    **{f"{wrapper} inside": inside(wrapper)
       for wrapper in ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "model")},
    **{f"{wrapper} at the layer": inmost(wrapper) for wrapper in ("module", "_orig_mod", "_fsdp_wrapped_module")},
    "before and inside": lambda name: f"model.{inside('_orig_mod')(name)}",
    "twice inside": lambda name: inmost("_fsdp_wrapped_module")(inside("_orig_mod")(name)),
}  # fmt: skip


def parts(weights: Weights, prefix: str) -> Weights:
    return {
        name.removeprefix(f"{prefix}."): tensor for name, tensor in weights.items() if name.startswith(f"{prefix}.")
    }


# How the weights lie in a checkpoint → what is said beside that they were taken.
FORMS: dict[str, tuple[Callable[[Weights], Any], list[str]]] = {
    "state_dict": (lambda w: w, []),
    "Lightning": (
        lambda w: {"state_dict": w, "epoch": 3, "hyper_parameters": {"lr": 0.1}, "optimizer_states": [{}]},
        ["epoch, hyper_parameters, optimizer_states"]),
    "with an optimizer": (
        lambda w: {"model": w, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}},
        ["optimizer"]),
    "two levels": (lambda w: {"checkpoint": {"state_dict": w, "arch": "net"}, "step": 1}, ["checkpoint.arch", "step"]),
    "averaged beside": (
        lambda w: {"state_dict": w, "ema_state_dict": {k: v + 1 for k, v in w.items()}}, ["not 'ema_state_dict'"]),
    "unusual key": (lambda w: {"my_weights": w, "epoch": 1}, ["my_weights", "epoch"]),
    "many others": (
        lambda w: {"state_dict": w, **{f"field_{i}": i for i in range(12)}}, ["field_7 and 4 more"]),
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_and_wrappers(form: str, wrapper: str, net: nn.Module, code: Path, tmp_path: Path) -> None:
    make, said = FORMS[form]
    weights = {WRAPPERS[wrapper](name): tensor for name, tensor in net.state_dict().items()}
    model = loaded(make(weights), code, tmp_path)
    assert_trained(model, net)
    told = "; ".join(model.notes)
    assert all(words in told for words in said), told
    assert ("taken o" in told) == (wrapper != "none"), told


# Parts of one network under keys of their own → the class that they are loaded into, and what is said.
PARTS: dict[str, tuple[Callable[[Weights], Any], str]] = {
    "at the top": (lambda w: {"backbone": parts(w, "backbone"), "head": parts(w, "head"), "epoch": 2}, "epoch"),
    "below a key": (lambda w: {"model": {"backbone": parts(w, "backbone"), "head": parts(w, "head")}}, "'model'"),
    "nested to the layers": (
        lambda w: {"model": {"backbone": parts(w, "backbone"), "head": {"weight": w["head.weight"],
                                                                          "bias": w["head.bias"]}}, "lr": 0.1}, "lr"),
    "with wrappers": (
        lambda w: {"backbone": {f"module.{k}": v for k, v in parts(w, "backbone").items()}, "head": parts(w, "head")},
        "module"),
    "with another beside": (
        lambda w: {"backbone": parts(w, "backbone"), "head": parts(w, "head"), "critic": {"weight": torch.ones(3)}},
        "critic"),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
def test_parts_under_keys_of_their_own_are_joined(case: str, net: nn.Module, code: Path, tmp_path: Path) -> None:
    make, said = PARTS[case]
    model = loaded(make(dict(net.state_dict())), code, tmp_path)
    assert_trained(model, net)
    assert said in "; ".join(model.notes)


def test_a_part_alone_is_taken_where_the_class_is_that_part(net: nn.Module, code: Path, tmp_path: Path) -> None:
    part = tmp_path / "part.py"
    part.write_text("from torch import nn\n\n\ndef make():\n    return nn.Linear(4, 5)\n")
    weights = dict(net.state_dict())
    torch.save({"model": {"backbone": parts(weights, "backbone"), "head": parts(weights, "head")}}, tmp_path / "w.pt")
    model = load(tmp_path / "w.pt", code=f"{part}:make", inputs=["1x4"])
    assert torch.equal(model.module.inner.weight, weights["head.weight"])
    assert "took the weights under 'model.head', not 'model.backbone'" in model.notes


# Tensors beside those of the model → whether they may be training's alone.
BESIDE: dict[str, tuple[Weights, bool]] = {
    "auxiliary head": ({"aux_head.0.weight": torch.ones(3, 3), "aux_head.0.bias": torch.ones(3)}, True),
    "auxiliary head of a part": ({"backbone.aux_classifier.weight": torch.ones(3)}, True),
    "scalars of a loss": ({"similarity_weight": torch.ones(1), "similarity_bias": torch.ones(1)}, True),
    "a sixth layer": ({"backbone.2.weight": torch.ones(4, 4)}, False),
    "a gain in a block": ({"backbone.0.gamma": torch.ones(4)}, False),
    "a mask of a layer": ({"head.weight_mask": torch.ones(5, 4)}, False),
    "more than the model": ({f"decoder.{i}.weight": torch.ones(2) for i in range(20)}, False),
}


@pytest.mark.parametrize("case", BESIDE)
@pytest.mark.parametrize("name", ["", ":Net"])
def test_what_the_class_has_no_place_for(name: str, case: str, net: nn.Module, code: Path, tmp_path: Path) -> None:
    more, fine = BESIDE[case]
    content = {**net.state_dict(), **more}
    if not fine:
        with pytest.raises(EdgeKitError, match=f"unexpected: {next(iter(more))}"):
            loaded(content, code, tmp_path, name)
        return
    model = loaded(content, code, tmp_path, name)
    assert_trained(model, net)
    assert any(next(iter(more)).partition(".")[0] in note and "no place" in note for note in model.notes)


def test_names_that_look_like_wrappers_are_kept(code: Path, tmp_path: Path) -> None:
    """A class may call its own parts `module` and `model`."""
    own = load(f"{code}:Inner", inputs=[SHAPE]).module.inner
    for prefix in ("", "module.", "model.", "_orig_mod."):
        model = loaded({prefix + k: v for k, v in own.state_dict().items()}, code, tmp_path, ":Inner")
        torch.testing.assert_close(model.module(*model.example)[0], own(*model.example))


def test_the_code_may_be_what_is_wrapped(net: nn.Module, code: Path, tmp_path: Path) -> None:
    wrapped = tmp_path / "wrapped.py"
    wrapped.write_text(CODE + "\n\ndef make():\n    return nn.DataParallel(Net())\n")
    torch.save(net.state_dict(), tmp_path / "w.pt")
    model = load(tmp_path / "w.pt", code=f"{wrapped}:make", inputs=[SHAPE])
    assert_trained(model, net)


def test_extra_state_is_loaded_be_it_no_tensor(code: Path, tmp_path: Path) -> None:
    own = load(f"{code}:Counted", inputs=[SHAPE]).module.inner
    own.scale = 3.0
    model = loaded({"state_dict": own.state_dict()}, code, tmp_path, ":Counted")
    assert model.module.inner.scale == 3.0
    without = {k: v for k, v in own.state_dict().items() if k != "_extra_state"}
    model = loaded(without, code, tmp_path, ":Counted")
    assert model.module.inner.scale == 1.0
    assert any("has no _extra_state" in note for note in model.notes)


def test_a_copy_of_what_old_weight_norm_computed() -> None:
    with pytest.warns(FutureWarning):
        module = nn.utils.weight_norm(nn.Linear(4, 3)).eval()
    module(torch.ones(1, 4))
    model = load(module, inputs=["1x4"])
    torch.testing.assert_close(model.module(*model.example)[0], module(*model.example))


@pytest.mark.parametrize("at", ["itself", "a layer"])
def test_a_module_that_holds_itself_is_refused(at: str) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    (module if at == "itself" else module[1]).add_module("parent", module)
    with pytest.raises(EdgeKitError, match="contains itself") as caught:
        load(module, inputs=["1x2"])
    assert "list or a weakref" in caught.value.help

"""The user's own training function: how it is called, what it may do, and what goes wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import NET, invoke, samples, tree

import edgekit
from edgekit.errors import EdgeKitError
from edgekit.loading.model import load

WIDE = NET.replace("nn.Conv2d(3, 8", "nn.Conv2d(3, 32").replace("Conv2d(8,", "Conv2d(32,")
TRAIN = """
import torch


def train(student, teacher, samples):
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    for epoch in range(2):
        for inputs, target in samples:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(student(*inputs), target).backward()
            optimizer.step()


def fails(student, teacher, samples):
    raise ValueError("no such optimizer")


not_a_function = 3
"""


def wide() -> torch.nn.Module:
    scope: dict[str, Any] = {}
    exec(WIDE, scope)
    return scope["make"]().eval()


def data() -> dict[str, np.ndarray]:
    drawn = samples(96)
    return {"x": drawn["x"][:32], "y": drawn["y"][:32], "calib_x": drawn["x"][32:], "calib_y": drawn["y"][32:]}


def prune(out: Path, finetune: Any, **options: Any) -> Any:
    return edgekit.prune(wide(), **{"ratio": 0.5, "data": data(), "out": out, "finetune": finetune, **options})


def test_the_function_gets_the_networks_and_the_samples(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def train(student: Any, teacher: Any, samples: Any) -> None:
        seen["training"] = student.training, teacher.training
        seen["gradients"] = [any(p.requires_grad for p in net.parameters()) for net in (student, teacher)]
        seen["epochs"] = [[(inputs[0].clone(), target.clone()) for inputs, target in samples] for _ in range(2)]
        seen["batches"] = len(samples)
        seen["outputs"] = student(*next(iter(samples))[0]).shape, torch.is_grad_enabled()
        with torch.no_grad():
            student[6].bias += 1

    pruned = prune(tmp_path, train)
    assert seen["training"] == (True, False) and seen["gradients"] == [True, False]
    assert all(len(epoch) == seen["batches"] for epoch in seen["epochs"])
    assert seen["outputs"] == ((32, 10), True)
    first, second = (torch.cat([x for x, _ in epoch]) for epoch in seen["epochs"])
    assert not torch.equal(first, second)  # in another order
    assert {tuple(x.flatten().tolist()) for x in first} == {tuple(x.flatten().tolist()) for x in second}
    assert pruned.recovered.to_dict() == {"function": "train", "epochs": 3}
    assert tree(tmp_path) == ["Sequential-pruned", *(f"Sequential-pruned/{file}" for file in tree(pruned.path))]


def test_the_network_that_it_returns_is_taken(tmp_path: Path) -> None:
    def train(student: Any, teacher: Any, samples: Any) -> Any:
        averaged = copy.deepcopy(student)
        with torch.no_grad():
            averaged[6].bias.fill_(7.0)
        return averaged

    pruned = prune(tmp_path, train)
    assert bool((pruned.module.inner[6].bias == 7).all())
    assert not pruned.module.training and not any(p.requires_grad for p in pruned.module.parameters())


def test_the_command_takes_a_file(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "net.py").write_text(WIDE)
    (tmp_path / "mine.py").write_text(TRAIN)
    np.savez(tmp_path / "data.npz", **data())
    given = ("prune", f"{tmp_path / 'net.py'}:make", "--ratio", 0.5, "--data", tmp_path / "data.npz", "--out", tmp_path)
    ran = invoke(capfd, *given, "--finetune", f"{tmp_path / 'mine.py'}:train")
    assert ran.code == 0, ran.err
    assert "without fine-tuning" in ran.out
    ran = invoke(capfd, *given, "--finetune", f"{tmp_path / 'mine.py'}:fails")
    assert ran.code == 1
    assert "mine.py, line 15" in ran.err and "ValueError: no such optimizer" in ran.err


def test_a_diverging_training_keeps_the_last_good_epoch(tmp_path: Path) -> None:
    def train(student: Any, teacher: Any, samples: Any) -> None:
        for epoch in range(4):
            for _ in samples:
                pass
            with torch.no_grad():
                student[6].bias.fill_(float(epoch + 1) if epoch < 3 else float("nan"))

    with pytest.raises(
        EdgeKitError, match=r"diverged: train left values in 6.bias that are not finite; .*after epoch 3"
    ):
        prune(tmp_path, train, name="net")
    assert tree(tmp_path) == ["net-pruned.checkpoint.safetensors"]
    (tmp_path / "net.py").write_text(WIDE)
    kept = load(
        tmp_path / "net-pruned.checkpoint.safetensors", code=f"{tmp_path / 'net.py'}:make", inputs=["1x3x16x16"]
    )
    state = kept.module.state_dict()
    assert bool((state["inner.6.bias"] == 3).all()) and state["inner.0.weight"].shape[0] < 32


def grows(student: Any, teacher: Any, samples: Any) -> None:
    student.append(torch.nn.Linear(10, 10))


def other(student: Any, teacher: Any, samples: Any) -> Any:
    return teacher


def count(student: Any, teacher: Any, samples: Any) -> int:
    return 3


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "other layers": (grows, {}, "made another network of the student: 7.bias"),
    "the teacher": (other, {}, "made another network of the student"),
    "a number": (count, {}, "returned a int, not a module"),
    "two arguments": (lambda student, teacher: None, {}, "cannot be called with three arguments"),
    "no function": ("mine.py", {}, "names no function"),
    "no such function": ("mine.py:learn", {}, "has no 'learn'"),
    "no file": ("yours.py:train", {}, "yours.py does not exist"),
    "a constant": ("mine.py:not_a_function", {}, "is a int, not a function"),
    "epochs": (grows, {"epochs": 3}, "epochs=... is for EdgeKit's own training"),
    "resume": (grows, {"resume": True}, "resume=True goes on"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_functions_are_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function, options, words = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(TRAIN)
    with pytest.raises(EdgeKitError, match=words):
        prune(tmp_path / "out", function, **options)
    assert not (tmp_path / "out").exists()

"""The small models that the runtimes are tested with, exported once per test session."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conformance import INPUTS, OUTPUTS
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from jobs import processes_of, wait_for
from servers import Adbd, Sshd, missing_adbd, missing_sshd, skip

from edgekit.exporters.tflite import convert


class Pair(torch.nn.Module):
    """Two inputs of different dtypes and shapes, two outputs."""

    def forward(self, image: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = torch.relu(image + offset.to(torch.float32))
        return total, total.mean((2, 3))


def cnn(channels: int) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(channels, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 16, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 10),
    )


@pytest.fixture(scope="session")
def modules() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    return {"pair": Pair().eval(), "cnn": cnn(3).eval(), "gray": cnn(1).eval()}


@pytest.fixture(scope="session")
def files(modules: dict[str, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with <model>.pte, .onnx and .tflite, and the inputs and eager outputs in <model>.npz."""
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "pair": (torch.randn(1, 2, 4, 4, generator=generator), torch.tensor([3])),
        "cnn": (torch.randn(1, 3, 16, 16, generator=generator),),
        "gray": (torch.randn(1, 1, 16, 16, generator=generator),),
    }
    assert set(inputs) == set(modules) == set(INPUTS)
    for name, module in modules.items():
        program = torch.export.export(module, inputs[name])
        with torch.inference_mode():
            results = module(*inputs[name])
        results = results if isinstance(results, tuple) else (results,)
        arrays = dict(zip((*INPUTS[name], *OUTPUTS[name]), (*inputs[name], *results), strict=True))
        np.savez(folder / f"{name}.npz", **{key: tensor.numpy() for key, tensor in arrays.items()})

        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        (folder / f"{name}.pte").write_bytes(lowered.to_executorch().buffer)
        exported = torch.onnx.export(
            module,
            inputs[name],
            dynamo=True,
            verbose=False,
            input_names=list(INPUTS[name]),
            output_names=list(OUTPUTS[name]),
        )
        assert exported is not None
        onnx.save(exported.model_proto, folder / f"{name}.onnx")
        (folder / f"{name}.tflite").write_bytes(convert(exported.model_proto))
    return folder


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter with numpy and no runtime."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    for path in Path(np.__file__).parents[1].glob("numpy*"):
        (packages / path.name).symlink_to(path)
    return str(folder / "bin/python")


@pytest.fixture(scope="session")
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    if reason := missing_sshd():
        skip(reason)
    server = Sshd(tmp_path_factory.mktemp("ssh"))
    yield server
    server.stop()


@pytest.fixture
def sshd(ssh_server: Sshd, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    """The server, with its client first on the path; every test checks that nothing stays there."""
    monkeypatch.setenv("PATH", f"{ssh_server.bin}{os.pathsep}{os.environ['PATH']}")
    ssh_server.configure()
    yield ssh_server
    wait_for(lambda: not ssh_server.left_behind() and not processes_of(ssh_server.home))
    assert ssh_server.left_behind() == []
    assert not processes_of(ssh_server.home)


@pytest.fixture(scope="session")
def adb_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adbd]:
    if reason := missing_adbd():
        skip(reason)
    server = Adbd(tmp_path_factory.mktemp("adb"))
    yield server
    server.stop()

""".pte files, run by ExecuTorch in a process of its own."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from executorch.backends.xnnpack._passes.decompose_cat import DecomposeConcatenate
from int8_nets import CASES, Batches, build, flat, quantized, sqnr
from torch.fx.traceback import NodeSource

from edgekit.artifacts.int8_coverage import missing_kernels
from edgekit.artifacts.pte_file import DTYPES
from edgekit.artifacts.summary import inspect_artifact
from edgekit.errors import EdgeKitError
from edgekit.exporters.executorch.lower import to_executorch
from edgekit.quant.ptq.recipes import float32, half_compute
from edgekit.runtimes import run_artifact
from edgekit.types import ITEM_BITS

# network → the ops that stay outside the delegate
UNDELEGATED: dict[str, set[str]] = {
    "conv_relu6_bn": set(),
    "residual": set(),
    "concat": set(),
    "squeeze_excite": set(),
    "transposed": set(),
    "split": set(),
    "same_padding": set(),
    "asymmetric_pad": set(),
    "dead": set(),
    "head": set(),
    "conv1d": set(),
    "norm_behind": set(),
    "transposed_1d": set(),
    "prelu": set(),
    "two_inputs": {"quantized_decomposed::embedding_byte"},
}


def run(data: bytes, batch: tuple[torch.Tensor, ...], folder: Path) -> list[torch.Tensor]:
    path = folder / "model.pte"
    path.write_bytes(data)
    return [torch.from_numpy(y[0]) for y in run_artifact(path, [x[None].numpy() for x in batch]).outputs]


@torch.no_grad()
@pytest.mark.parametrize("name", UNDELEGATED)
def test_int8_files_compute_what_the_converted_graph_does(name: str, tmp_path: Path) -> None:
    case = quantized(name)
    lowered = to_executorch(case.program)
    assert lowered.undelegated.keys() == UNDELEGATED[name]
    if not UNDELEGATED[name]:
        assert lowered.delegates == 1
    batch = case.batches[0]
    for expected, got in zip(flat(case.program.module()(*batch)), run(lowered.data, batch, tmp_path), strict=True):
        assert sqnr(expected, got) > 35


@torch.no_grad()
@pytest.mark.parametrize("name", ["residual", "two_outputs"])
def test_half_precision(name: str, tmp_path: Path) -> None:
    module, batch = build(name), next(iter(Batches(CASES[name])))
    lowered = to_executorch(half_compute(module, batch))
    for expected, got in zip(flat(module(*batch)), run(lowered.data, batch, tmp_path), strict=True):
        assert got.dtype == torch.float32 and got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_int8_pads_stay_int8(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(to_executorch(quantized("asymmetric_pad").program).data)
    ops = inspect_artifact(path).ops
    assert ops["StaticConstantPad"] >= 1
    assert ops["Convert"] == 2  # into int8 at the input, out of it at the output, and nowhere between


class Upsampled(torch.nn.Module):
    """Has what ExecuTorch looks for with models of its own: bilinear upsampling, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.interpolate(self.conv(x), scale_factor=2, mode="bilinear")
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


class Assorted(torch.nn.Module):
    """Has what other passes look for: mixed types, numbers for tensors, views, copies, indices, and a branch."""

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
        branch = torch.cond(x.sum() > 0, lambda x: torch.relu(x * 2).t(), lambda x: (x + 1).t(), (x[0],))
        pooled = torch.nn.functional.max_pool2d(x[None], 2)
        return branch, x * 2 + i, i / 2, x.max(1)[0], pooled, x.to(torch.int32) // 2, torch.where(x > 0, 1.5, x)


class Shuffled(torch.nn.Module):
    """Has convolutions of an image alone, and between channels in another order; pads by other modes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3, padding="same", groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(torch.nn.functional.pad(x, (1, 0, 0, 1), value=0.5))
        x = x.view(2, 2, *x.shape[1:]).transpose(0, 1).reshape(1, 4, *x.shape[1:])
        return torch.nn.functional.pad(self.second(x), (1, 1, 1, 1), mode="reflect")


OTHERS = {
    "upsampled": (Upsampled, (torch.ones(1, 3, 8, 8),)),
    "shuffled": (Shuffled, (torch.ones(3, 8, 8),)),
    "assorted": (Assorted, (torch.ones(3, 8, 8), torch.arange(8))),
    "recurrent": (lambda: torch.nn.LSTM(4, 4, batch_first=True), (torch.ones(1, 3, 4),)),
}


LEAN = ["residual", "concat", "squeeze_excite", "transposed", "asymmetric_pad", "conv1d", "two_inputs"]


@torch.no_grad()
@pytest.mark.parametrize("name", [*LEAN, *OTHERS])
def test_lean_passes_make_the_same_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in OTHERS:
        make, inputs = OTHERS[name]
        program = float32(make().eval(), inputs).program
    else:
        program = quantized(name).program
    before, weights = str(program), set(program.state_dict)
    lean_file = to_executorch(program).data
    assert (str(program), set(program.state_dict)) == (before, weights)
    assert not hasattr(NodeSource, "__deepcopy__")
    monkeypatch.setattr("edgekit.exporters.executorch.lower.lean", nullcontext)
    monkeypatch.setattr("edgekit.exporters.executorch.lower.spell_as_core", lambda program: None)
    assert to_executorch(program).data == lean_file


class SelfAttention(torch.nn.Module):
    """torch's own layer, which selects, squeezes and calls scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@torch.no_grad()
def test_attention_is_one_delegate(tmp_path: Path) -> None:
    module, x = SelfAttention().eval(), torch.randn(1, 5, 16)
    lowered = to_executorch(float32(module, (x,)).program)
    assert lowered.delegates == 1 and not lowered.undelegated
    torch.testing.assert_close(run(lowered.data, (x,), tmp_path)[0], module(x), rtol=1e-5, atol=1e-5)


class TwoStates(torch.nn.Module):
    """A convolution of images and a layer of a state (2, batch, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, last = state[0], state[1]
        return self.convolution(x), torch.stack([self.linear(first).sigmoid() * last, first])


def test_examples_may_lie_otherwise_in_memory(tmp_path: Path) -> None:
    x, state = torch.randn(1, 3, 8, 8), torch.randn(2, 1, 4)
    module = TwoStates().eval()
    example = (x.to(memory_format=torch.channels_last), state.as_strided((2, 1, 4), (4, 8, 1)))
    assert example[1].stride() != state.stride()
    lowered = to_executorch(float32(module, example).program)
    for found, expected in zip(run(lowered.data, (x, state), tmp_path), module(x, state), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Unsupported(torch.nn.Module):
    """Sorts stably, which no kernel of ExecuTorch does, beside what one does outside the delegate."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.sort(dim=1, stable=True).values, torch.erf(x)


def test_kernels_that_a_file_needs() -> None:
    lowered = to_executorch(float32(Unsupported().eval(), (torch.randn(2, 3),)).program)
    assert lowered.kernels == ("aten::erf.out", "aten::sort.values_stable")
    assert missing_kernels(lowered.kernels) == ["aten::sort.values_stable"]
    assert lowered.libraries == ("portable_kernels",)
    embedded = to_executorch(quantized("two_inputs").program)
    assert "quantized_decomposed::embedding_byte.out" in embedded.kernels
    assert not missing_kernels(embedded.kernels)
    assert embedded.libraries == ("xnnpack_backend", "quantized_kernels")


def test_an_error_of_a_pass_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(row: DecomposeConcatenate, module: torch.fx.GraphModule) -> None:
        raise IndexError("no such index\nand more")

    monkeypatch.setattr(DecomposeConcatenate, "call", fail)
    with pytest.raises(EdgeKitError, match=r"^ExecuTorch cannot lower this model: no such index\n  help"):
        to_executorch(quantized("concat").program)


class Spectrum(torch.nn.Module):
    """Has complex values between its ops."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.fft.rfft(x))


def test_complex_values_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(to_executorch(float32(Spectrum().eval(), (torch.randn(2, 8),)).program).data)
    assert inspect_artifact(path).ops  # what it holds is told, whatever the types of its values
    assert set(DTYPES.values()) <= ITEM_BITS.keys()

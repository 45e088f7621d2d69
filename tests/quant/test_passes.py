"""Graph passes: each leaves what eager torch computes, and the pattern that it is there for is gone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgekit.quant.graph import passes
from edgekit.quant.graph.passes import aten, capture, drop_implied_clips, q

IMAGE = (2, 4, 6, 6)


class Lambda(nn.Module):
    """A function of itself and the inputs, with named layers, parameters and buffers."""

    def __init__(self, function: Callable[..., object], **members: object) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, torch.Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, *inputs: torch.Tensor) -> object:
        return self.function(self, *inputs)


class Case(NamedTuple):
    """A module, the ops its canonical graph consists of, in order, and its input shapes."""

    make: Callable[[], nn.Module]
    ops: str
    shapes: Sequence[tuple[int, ...]] = (IMAGE,)


def fn(function: Callable[..., object], ops: str, *shapes: tuple[int, ...], **members: Callable[[], object]) -> Case:
    return Case(lambda: Lambda(function, **{k: m() for k, m in members.items()}), ops, shapes or (IMAGE,))


def seq(ops: str, *layers: Callable[[], nn.Module], shape: tuple[int, ...] = IMAGE) -> Case:
    return Case(lambda: nn.Sequential(*(layer() for layer in layers)), ops, (shape,))


def norm(rank: int, width: int = 5, **options: object) -> Callable[[], nn.Module]:
    """A BatchNorm of `width` channels with statistics and parameters of its own."""

    def make() -> nn.Module:
        made = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](width, **options)
        if made.running_mean is not None:
            made.running_mean.normal_()
            made.running_var.uniform_(0.1, 3)
        if made.affine:
            nn.init.normal_(made.weight)
            nn.init.normal_(made.bias)
        return made

    return make


def conv(
    outputs: int = 5, kernel: int = 3, rank: int = 2, inputs: int = 4, **options: object
) -> Callable[[], nn.Module]:
    return lambda: (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](inputs, outputs, kernel, **options)


def pad(*amounts: int, value: float = 0.0, mode: str = "constant") -> Callable[[Lambda, torch.Tensor], torch.Tensor]:
    return lambda m, x: m.conv(F.pad(x, amounts, mode, value) if mode == "constant" else F.pad(x, amounts, mode))


def weight(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape))


CASES: dict[str, Case] = {
    # in-place operations whose results and inputs are read later
    "relu_inplace": fn(lambda m, x: x.relu_() + 1, "relu add"),
    "relu_inplace_input_read": fn(lambda m, x: (x.relu_(), x + 1)[1], "relu add"),
    "add_inplace_of_view": fn(
        lambda m, x: (y := x * 2, y[:, 1:].add_(3), y.sum(1))[2], "mul slice add slice_scatter sum"
    ),
    "relu6_inplace_returned": fn(lambda m, x: F.relu6(x, inplace=True), "hardtanh"),
    "inplace_before_other_read": fn(
        lambda m, x: (y := m.conv(x), z := F.relu_(y), z + y)[2], "conv2d relu add", conv=conv()
    ),
    # clamps
    "relu6": seq("hardtanh", nn.ReLU6),
    "hardtanh": seq("hardtanh", nn.Hardtanh),
    "clamp": fn(lambda m, x: x.clamp(-0.5, 0.25), "hardtanh"),
    "clamp_names": fn(lambda m, x: torch.clamp(x, max=1, min=0), "hardtanh"),
    "clamp_of_integers": fn(lambda m, x: x.argmax(1).clamp(-1, 0.25), "argmax clamp"),
    "clamp_min_zero": fn(lambda m, x: torch.clamp_min(x, 0), "relu"),
    "clamp_only_min": fn(lambda m, x: x.clamp(min=0.0), "relu"),
    "clamp_to_infinity": fn(lambda m, x: x.clamp(0, math.inf), "relu"),
    "clamp_from_minus_infinity": fn(lambda m, x: x.clamp(-math.inf, 0.5), "hardtanh"),
    "clamp_min_other": fn(lambda m, x: x.clamp(min=0.5), "clamp"),
    "clamp_only_max": fn(lambda m, x: x.clamp(max=0.5), "clamp"),
    "clamp_crossed": fn(lambda m, x: x.clamp(1, -1), "clamp"),
    "clamp_tensor": fn(lambda m, x: torch.clamp(x, m.low), "clamp", low=lambda: torch.zeros(6)),
    "clamp_integers": fn(lambda m, x: x.argmax(-1).clamp(1, 3), "argmax clamp"),
    # hard activations
    "hard_sigmoid": seq("conv2d hardtanh", conv(), nn.Hardsigmoid),
    "hard_sigmoid_linear": seq("linear hardtanh", lambda: nn.Linear(4, 5, bias=False), nn.Hardsigmoid, shape=(3, 4)),
    "hard_sigmoid_alone": seq("hardsigmoid", nn.Hardsigmoid),
    "hard_sigmoid_and_read": fn(
        lambda m, x: (y := m.conv(x)) * F.hardsigmoid(y), "conv2d hardsigmoid mul", conv=conv()
    ),
    # no-ops
    "dropout": seq("relu", nn.Dropout, nn.ReLU, nn.Dropout2d),
    "dropout_alone": seq("clone", nn.Dropout),
    "pad_of_nothing": fn(lambda m, x: F.relu(F.pad(x, (0, 0, 0, 0))), "relu"),
    "clone_read_twice": fn(lambda m, x: (y := x.clone()) * F.relu(y), "relu mul"),
    # batch norms
    "bn_conv1d": seq("conv1d", conv(rank=1), norm(1), shape=(2, 4, 9)),
    "bn_conv2d": seq("conv2d", conv(), norm(2)),
    "bn_conv2d_no_bias": seq("conv2d", conv(bias=False, stride=2, padding=1), norm(2)),
    "bn_conv2d_groups": seq("conv2d", conv(inputs=5, groups=5), norm(2), shape=(2, 5, 6, 6)),
    "bn_conv3d": seq("conv3d", conv(rank=3), norm(3), shape=(1, 4, 5, 5, 5)),
    "bn_not_affine": seq("conv2d", conv(), norm(2, affine=False)),
    "bn_linear": seq("linear", lambda: nn.Linear(4, 5), norm(1), shape=(3, 4)),
    "bn_linear_no_bias": seq("linear", lambda: nn.Linear(4, 5, bias=False), norm(1), shape=(3, 4)),
    "bn_same_padding": seq("pad conv2d", conv(kernel=2, padding="same"), norm(2)),
    "bn_linear_over_length": seq("linear conv1d", lambda: nn.Linear(4, 5), norm(1), shape=(3, 5, 4)),
    "bn_shared_conv": fn(
        lambda m, x: m.a(m.conv(x)) + m.b(m.conv(x)), "conv2d conv2d add", conv=conv(), a=norm(2), b=norm(2)
    ),
    "bn_conv_read_twice": fn(lambda m, x: (y := m.conv(x)) + m.bn(y), "conv2d conv2d add", conv=conv(), bn=norm(2)),
    "bn_twice": fn(lambda m, x: m.bn(m.bn(m.conv(x))), "conv2d", conv=conv(), bn=norm(2)),
    "bn_after_relu": seq("conv2d relu conv2d", conv(), nn.ReLU, norm(2)),
    "bn_after_relu_1d": seq("conv1d relu conv1d", conv(rank=1), nn.ReLU, norm(1), shape=(2, 4, 9)),
    "bn_after_relu_3d": seq("conv3d relu BN getitem", conv(rank=3), nn.ReLU, norm(3), shape=(1, 4, 5, 5, 5)),
    "bn_before_linear": seq(
        "linear relu linear",
        lambda: nn.Linear(4, 5),
        nn.ReLU,
        norm(1),
        lambda: nn.Linear(5, 3, bias=False),
        shape=(3, 4),
    ),
    "bn_before_others": seq(
        "linear relu BN getitem sigmoid", lambda: nn.Linear(4, 5), nn.ReLU, norm(1), nn.Sigmoid, shape=(3, 4)
    ),
    "bn_before_relu": fn(
        lambda m, x: m.conv(F.relu(m.bn(F.relu(x)))),
        "relu conv2d relu conv2d",
        (2, 5, 6, 6),
        conv=conv(inputs=5),
        bn=norm(2),
    ),
    "bn_alone": seq("BN getitem", norm(2), shape=(2, 5, 3, 3)),
    "bn_of_batch": seq("conv2d BN getitem", conv(), norm(2, track_running_stats=False)),
    "bn_computed_weight": fn(lambda m, x: m.bn(F.conv2d(x, m.w * 2)), "conv2d", w=weight(5, 4, 3, 3), bn=norm(2)),
    "bn_computed_mean": fn(
        lambda m, x: F.batch_norm(m.conv(x), m.mean + 1, m.mean.abs() + 1),
        "conv2d",
        conv=conv(),
        mean=lambda: torch.randn(5),
    ),
    "bn_transposed": seq("conv_transpose2d", lambda: nn.ConvTranspose2d(4, 5, 2), norm(2)),
    "bn_transposed_groups": seq(
        "conv_transpose2d relu", lambda: nn.ConvTranspose2d(4, 10, 2, groups=2, bias=False), norm(2, width=10), nn.ReLU
    ),
    "bn_transposed_1d": seq(
        "unsqueeze conv_transpose2d relu squeeze",
        lambda: nn.ConvTranspose1d(4, 5, 3, stride=2, padding=1, output_padding=1),
        norm(1),
        nn.ReLU,
        shape=(2, 4, 9),
    ),
    "bn_transposed_3d": seq("conv_transpose3d", lambda: nn.ConvTranspose3d(4, 5, 2), norm(3), shape=(1, 4, 3, 3, 3)),
    # transposed convolutions of sequences
    "transposed_1d": seq(
        "unsqueeze conv_transpose2d squeeze",
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, dilation=2, groups=2),
        shape=(2, 4, 9),
    ),
    "transposed_1d_unbatched": seq(
        "unsqueeze unsqueeze conv_transpose2d hardtanh squeeze squeeze",
        lambda: nn.ConvTranspose1d(4, 6, 3),
        nn.ReLU6,
        shape=(4, 9),
    ),
    "transposed_1d_of_weights": fn(
        lambda m, x: F.conv_transpose1d(x, x[:, :, :3].transpose(0, 1)),
        "slice transpose unsqueeze unsqueeze conv_transpose2d squeeze",
        (4, 4, 9),
    ),
    "bn_name_taken": fn(
        lambda m, x: m.bn(m.conv(x)) * m.conv2d_weight, "conv2d mul", conv=conv(), bn=norm(2), conv2d_weight=weight(1)
    ),
    # pads before convolutions
    "pad": fn(pad(1, 1, 2, 2), "conv2d", conv=conv()),
    "pad_defaults": fn(lambda m, x: F.conv2d(F.pad(x, (1, 1, 2, 2)), m.w), "conv2d", w=weight(5, 4, 3, 3)),
    "pad_conv1d": fn(pad(2, 2), "conv1d", (2, 4, 9), conv=conv(rank=1)),
    "pad_on_padding": fn(pad(1, 1, 1, 1), "conv2d", conv=conv(padding=(2, 1), stride=2, dilation=2)),
    "pad_two_readers": fn(
        lambda m, x: m.a(y := F.pad(x, (1, 1, 1, 1))) + m.b(y), "conv2d conv2d add", a=conv(), b=conv()
    ),
    "pad_other_reader": fn(
        lambda m, x: m.conv(y := F.pad(x, (1, 1, 1, 1))).sum() + y.sum(), "pad conv2d sum sum add", conv=conv()
    ),
    "pad_is_output": fn(lambda m, x: (m.conv(y := F.pad(x, (1, 1, 1, 1))), y), "pad conv2d", conv=conv()),
    "pad_asymmetric": fn(pad(0, 1, 0, 1), "pad conv2d", conv=conv()),
    "pad_value": fn(pad(1, 1, 1, 1, value=0.5), "pad conv2d", conv=conv()),
    "pad_negative": fn(pad(-1, -1, 1, 1), "slice conv2d", conv=conv()),
    "pad_channels": fn(pad(1, 1, 1, 1, 0, 1), "pad conv2d", conv=conv(inputs=5)),
    "pad_reflect": fn(pad(1, 1, 1, 1, mode="reflect"), "pad conv2d", conv=conv()),
    "pad_replicate": fn(pad(1, 1, 1, 1, mode="replicate"), "pad conv2d", conv=conv()),
    "padding_mode": seq("pad conv2d", conv(padding=1, padding_mode="reflect")),
    "padding_same": seq(
        "conv2d relu conv2d", conv(padding="same"), nn.ReLU, conv(inputs=5, padding="same", dilation=2)
    ),
    "padding_same_even": seq("pad conv2d", conv(kernel=(2, 3), padding="same")),
    "padding_same_functional": fn(lambda m, x: F.conv2d(x, m.w, padding="same"), "conv2d", w=weight(5, 4, 3, 3)),
    "padding_valid": fn(lambda m, x: F.conv2d(x, m.w, padding="valid"), "conv2d", w=weight(5, 4, 3, 3)),
    "padding_same_1d": seq("conv1d", conv(rank=1, padding="same", bias=False), shape=(2, 4, 9)),
    "padding_same_3d": seq("conv3d", conv(rank=3, padding="same"), shape=(1, 4, 5, 5, 5)),
    # pools over the whole image
    "global_pool": seq("mean", lambda: nn.AdaptiveAvgPool2d(1)),
    "global_pool_full_window": seq("mean", lambda: nn.AvgPool2d(6)),
    "global_mean": fn(lambda m, x: x.mean((-1, 2)), "mean view"),
    "global_mean_kept": fn(lambda m, x: x.mean((2, 3), keepdim=True), "mean"),
    "partial_mean": fn(lambda m, x: x.mean((1, 2)), "mean"),
    "global_pool_divisor": seq("mean", lambda: nn.AvgPool2d(6, divisor_override=36)),
    "global_pool_other_divisor": seq("mean mul", lambda: nn.AvgPool2d(6, divisor_override=9)),
    "global_pool_padded": seq("avg_pool2d", lambda: nn.AvgPool2d(6, 3, 2), shape=(2, 4, 4, 4)),
    "global_pool_part": seq("avg_pool2d", lambda: nn.AvgPool2d(4)),
    "global_pool_to_two": seq("avg_pool2d", lambda: nn.AdaptiveAvgPool2d(2)),
    "global_pool_unbatched": seq("view mean view", lambda: nn.AdaptiveAvgPool2d(1), shape=(4, 6, 6)),
    # splits
    "chunk": fn(lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1), "slice slice cat"),
    "split_uneven": fn(lambda m, x: torch.cat(x.split(4, -1), 2 - 3), "slice slice cat"),
    "split_sizes": fn(lambda m, x: x.split([1, 3], 1)[1], "slice"),
    "split_default_dim": fn(lambda m, x: x.split(1)[1], "slice"),
    # strided slices of images
    "strided": fn(lambda m, x: x[:, :, ::2, ::3], "conv2d"),
    "strided_once": fn(lambda m, x: F.relu(x[..., ::2]), "conv2d relu"),
    "strided_twice": fn(lambda m, x: x[:, :, ::2][:, :, ::2], "conv2d"),
    "strided_and_read": fn(lambda m, x: ((y := x[:, :, ::2])[..., ::2], y), "conv2d conv2d"),
    "strided_part": fn(lambda m, x: x[:, :, 1::2], "slice"),
    "strided_end": fn(lambda m, x: x[:, :, :4:2], "slice"),
    "strided_channels": fn(lambda m, x: x[:, ::2], "slice"),
    "strided_integers": fn(lambda m, x: x.argsort(1)[:, :, ::2], "argsort slice"),
    # images without a batch
    "lone": seq("unsqueeze conv2d relu conv2d squeeze", conv(), nn.ReLU, conv(inputs=5), shape=(4, 9, 9)),
    "lone_pool": seq("unsqueeze conv2d squeeze view max_pool2d view", conv(), lambda: nn.MaxPool2d(2), shape=(4, 9, 9)),
    "lone_same": seq("unsqueeze conv3d squeeze", conv(rank=3, padding="same"), shape=(4, 5, 5, 5)),
    # others
    "flatten": seq("conv2d view linear", conv(), nn.Flatten, lambda: nn.Linear(80, 3)),
    "output_is_input": fn(lambda m, x: (x, F.relu(x)), "relu"),
    "zero_branch": fn(lambda m, x: F.relu(x) + torch.zeros_like(x), "relu"),
    # recurrent cells
    "cell": fn(
        lambda m, x, h: m.cell(x, h),
        "unsqueeze unsqueeze gru getitem select",
        (2, 4),
        (2, 5),
        cell=lambda: nn.GRUCell(4, 5),
    ),
    # attention
    "attention": fn(
        lambda m, x: F.scaled_dot_product_attention(x, x, x + 1), "add mul transpose matmul softmax matmul"
    ),
    "attention_causal": fn(
        lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3),
        "mul transpose matmul add softmax matmul",
    ),
    "attention_masked": fn(
        lambda m, x, y: F.scaled_dot_product_attention(x, x, x, attn_mask=y),
        "mul transpose matmul amax gt clamp add softmax matmul where",
        IMAGE,
        (6, 6),
    ),
    "attention_masked_by_input": fn(
        lambda m, x, y: F.scaled_dot_product_attention(x, x, x, attn_mask=y > 1),
        "gt mul transpose matmul where amax ge add softmax matmul where",
        IMAGE,
        (4, 6, 6),
    ),
    "attention_masked_by_infinity": fn(
        lambda m, x, y: F.scaled_dot_product_attention(x, x, x, attn_mask=y.masked_fill(y < 1, -math.inf)),
        "lt masked_fill mul transpose matmul amax gt clamp add softmax matmul where",
        IMAGE,
        (4, 6, 6),
    ),
    "attention_by_a_constant": fn(
        lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.mask.log()),
        "mul transpose matmul add softmax matmul",
        mask=lambda: torch.ones(6, 6).tril(),
    ),
    "attention_hidden_rows": fn(
        lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.mask.log()),
        "mul transpose matmul add softmax matmul where",
        mask=lambda: torch.ones(6, 6).tril(-1),
    ),
    "attention_hidden_rows_by_bool": fn(
        lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.mask),
        "mul transpose matmul add softmax matmul where",
        mask=lambda: torch.ones(2, 1, 6, 6).tril(-2).bool(),
    ),
    "attention_smallest": fn(
        lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=x * 0 + torch.finfo(torch.float32).min),
        "mul add mul transpose matmul amax gt clamp add softmax matmul where",
        (2, 4, 6, 6),
    ),
    "attention_grouped": fn(
        lambda m, x, y: F.scaled_dot_product_attention(x, y, y, is_causal=True, enable_gqa=True),
        "unsqueeze expand reshape unsqueeze expand reshape mul transpose matmul add softmax matmul",
        IMAGE,
        (2, 2, 6, 6),
    ),
    "several_outputs": fn(lambda m, x: {"a": [F.relu(x), x.clamp(0, 1)], "b": x.mean()}, "relu hardtanh mean"),
    "shared_weight": fn(
        lambda m, x: F.relu(m.conv(x)) + m.conv(F.relu(x)), "conv2d relu relu conv2d add", conv=conv(padding=1)
    ),
    "conv_transpose": seq("conv_transpose2d", lambda: nn.ConvTranspose2d(4, 5, 3, stride=2, output_padding=1)),
    "two_inputs": fn(lambda m, x, y: x + y, "add", IMAGE, (6,)),
}


def names(graph: torch.fx.Graph) -> list[str]:
    short = {"_native_batch_norm_legit": "BN", "_native_batch_norm_legit_no_training": "BN", "constant_pad_nd": "pad"}
    called = [n.target.__name__.split(".")[0] for n in graph.nodes if n.op == "call_function"]
    return [short.get(name, name) for name in called]


def leaves(outputs: object) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(outputs)


@pytest.mark.parametrize("name", CASES)
def test_canonical_graph_computes_what_eager_does(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    module = case.make().eval()
    example = tuple(torch.randn(shape) for shape in case.shapes)
    other = tuple(torch.randn(shape) for shape in case.shapes)
    with torch.no_grad():
        graph = capture(module, tuple(x.clone() for x in example))
        assert sorted(names(graph.graph)) == sorted(case.ops.split())
        for inputs in (example, other):
            kept = tuple(x.clone() for x in inputs)
            got = leaves(graph(*inputs))
            assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True)), "the inputs were changed"
            for a, b in zip(got, leaves(module(*kept)), strict=True):
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_every_pass_has_a_case_that_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = {run.__name__ for run in passes.PASSES}
    for name in (
        "dropout",
        "chunk",
        "clamp",
        "padding_same",
        "global_pool",
        "global_mean",
        "attention",
        "zero_branch",
        "bn_conv2d",
        "pad",
        "strided",
        "hard_sigmoid",
        "bn_computed_weight",
        "transposed_1d",
        "bn_after_relu",
        "cell",
        "pad_negative",
        "lone",
    ):
        case = CASES[name]
        with monkeypatch.context() as patch:
            patch.setattr(passes, "PASSES", ())
            raw = capture(case.make().eval(), tuple(torch.randn(shape) for shape in case.shapes))
        for run in passes.PASSES:
            before = str(raw.graph)
            run(raw)
            if str(raw.graph) != before:
                idle.discard(run.__name__)
    assert not idle


class ChannelsLast(nn.Module):
    """Asks for the order of memory that its last views rely on, in each way that torch has."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        spelled = (
            x.to(memory_format=torch.channels_last),
            x.clone(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last) * torch.ones_like(x, memory_format=torch.channels_last),
            x.half().to(torch.float32, memory_format=torch.channels_last),
            y.to(memory_format=torch.channels_last_3d).flatten(0, 1),
        )
        return tuple(z.permute(0, 2, 3, 1).view(len(z), -1, z.shape[1]) for z in spelled)


def test_values_have_the_order_of_memory_that_torch_gives_them() -> None:
    example = (torch.randn(2, 3, 4, 5), torch.randn(2, 1, 3, 4, 5))
    captured = capture(ChannelsLast().eval(), example)
    nodes = [node for node in captured.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert not any("channels_last" in str((*node.args, node.kwargs)) for node in nodes)
    for ours, theirs in zip(captured(*example), ChannelsLast()(*example), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_folding_keeps_the_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = CASES["bn_conv2d"].make().eval().to(dtype)
    x = torch.randn(IMAGE).to(dtype)
    with torch.no_grad():
        result = capture(module, (x,))(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result, module(x), rtol=1e-2 if dtype == torch.float16 else 1e-10, atol=1e-2)


def test_the_module_itself_is_left_alone() -> None:
    module = CASES["bn_conv2d"].make().eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    capture(module, (torch.randn(IMAGE),))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def clip_graph(clip: str, bounds: tuple[float, float], scale: float, zero_point: int) -> torch.fx.GraphModule:
    """x → clip → quantize → dequantize."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(aten.relu.default, (x,))
    if clip == "hardtanh":
        node = graph.call_function(aten.hardtanh.default, (x, *bounds))
        graph.erase_node(node.prev)
    qparams = (scale, zero_point, -128, 127, torch.int8)
    node = graph.call_function(q.quantize_per_tensor.default, (node, *qparams))
    graph.output(graph.call_function(q.dequantize_per_tensor.default, (node, *qparams)))
    return torch.fx.GraphModule({}, graph)


BOUNDS = [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (-math.inf, 3.0), (0.5, 6.0), (-3.0, 3.0), (0.0, 0.0), (-6.0, -1.0)]


@pytest.mark.parametrize("bounds", BOUNDS)
def test_implied_clips_go_and_others_stay(bounds: tuple[float, float]) -> None:
    """Held against the codes of a dense grid, for the ranges that calibration finds, and around them."""
    generator = torch.Generator().manual_seed(0)
    dropped = kept = 0
    for trial in range(60):
        if trial % 2:  # the range of values that were clipped: what calibration sees
            low, high = (0.0 if math.isinf(b) else b for b in bounds)
            high = max(high, 4.0 * math.isinf(bounds[1]), 0.0) * (0.4 + 0.6 * torch.rand(1, generator=generator).item())
            scale = float(torch.tensor(max(high - min(low, 0.0), 1e-3) / 255))
            zero_point = min(max(-128 - round(min(low, 0.0) / scale), -128), 127)
        else:
            scale = float(torch.rand(1, generator=generator) * 0.1 + 1e-4)
            zero_point = int(torch.randint(-128, 128, (1,), generator=generator))
        model = clip_graph("relu" if bounds == BOUNDS[0] else "hardtanh", bounds, scale, zero_point)
        edges = torch.tensor([b for b in bounds if math.isfinite(b)])
        x = torch.cat(
            [torch.linspace(-12, 12, 4001), torch.linspace(-1.5, 1.5, 4001) * 255 * scale, edges, edges + scale / 2]
        )
        expected = model(x)
        clipped = len(names(model.graph))
        drop_implied_clips(model)
        gone = len(names(model.graph)) < clipped
        assert torch.equal(model(x), expected)
        bare = model(x) if gone else clip_graph("hardtanh", (-math.inf, math.inf), scale, zero_point)(x)
        implied = torch.equal(bare, expected)
        assert gone == implied, (scale, zero_point)
        dropped, kept = dropped + gone, kept + (not gone)
    assert kept
    assert dropped or bounds[0] > 0 or bounds[1] <= 0


def test_a_clip_with_a_reader_in_float_stays() -> None:
    model = clip_graph("relu", (0, math.inf), 0.1, -128)
    clip = next(n for n in model.graph.nodes if n.target == aten.relu.default)
    out = next(n for n in model.graph.nodes if n.op == "output")
    out.args = ((out.args[0], clip),)
    drop_implied_clips(model)
    assert names(model.graph) == ["relu", "quantize_per_tensor", "dequantize_per_tensor"]

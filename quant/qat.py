"""Quantization-aware training: a network learns its weights and its int8 scales with the rounding in its forward pass.

The graph is the canonical one that post-training quantization starts from: BatchNorm is folded into the layers before
it, so its statistics are frozen from the first step on. Activation ranges start from calibration, weight scales from
the largest weights; both are then learned as in "Learned Step Size Quantization" (Esser et al., 2020), by their
logarithms: a step of the optimizer is then relative to the scale, and no scale can become negative. Zero points stay.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import FakeQuantizeBase
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationSpec, QuantizationSpecBase

from edgekit.errors import EdgeKitError
from edgekit.quant.graph.passes import aten, capture, is_attribute, q
from edgekit.quant.ptq.observers import KnownScale
from edgekit.quant.ptq.quantizer import WEIGHTED, EdgeQuantizer
from edgekit.quant.ptq.recipes import Batch, Calibrated, evened, observe

RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
SAME = 1e-3  # of the largest output: what two ways to compute the same float network may differ by


class LearnedFakeQuantize(FakeQuantizeBase):
    """Rounds a tensor to int8 and back, by a scale that is learned: `log_scale`, one or one per channel of `ch_axis`.

    Until `freeze` it only shows tensors to its observer; from then on the observer is out of use.
    """

    quant_min: int
    quant_max: int
    is_dynamic: bool
    eps: float
    ch_axis: int
    kept: torch.Tensor | None

    def __init__(self, observer: Any, **options: Any) -> None:
        super().__init__()
        self.activation_post_process = observer(**options)
        for name in ("dtype", "qscheme", "quant_min", "quant_max", "is_dynamic", "eps", "ch_axis"):
            if hasattr(self.activation_post_process, name):
                setattr(self, name, getattr(self.activation_post_process, name))
        self.observing = True
        self.log_scale: nn.Parameter | None = None
        self.zero = 0
        self.register_buffer("kept", None)  # where weights are not zero: pruned ones are not to come back
        self.largest = math.inf  # of `log_scale`: no range is wider than all that calibration saw

    def freeze(self) -> None:
        """Takes over the range that the observer has found, and starts to quantize."""
        self.observing = False
        if self.kept is not None:
            self.kept = self.kept.clone()  # else it could only be used for inference
        if self.is_dynamic:
            return
        observer = self.activation_post_process
        scale, zero_point = observer.calculate_qparams()
        self.log_scale = nn.Parameter(scale.log())
        if not isinstance(observer, KnownScale):
            self.zero = int(zero_point)
            seen = (observer.high - observer.low) / (self.quant_max - self.quant_min)
            self.largest = math.log(max(seen, float(scale)))

    def scale(self) -> torch.Tensor:
        """Returns the scales as they are now (float32)."""
        assert self.log_scale is not None
        with torch.no_grad():
            self.log_scale.clamp_(max=self.largest)
        return self.log_scale.exp()

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns scales (float32) and zero points (int64), one element each or one per channel."""
        scale = self.scale().detach()
        return scale, torch.full_like(scale, self.zero, dtype=torch.int64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x` as int8 can hold it."""
        if self.observing:
            if isinstance(self.activation_post_process, KnownScale) and not bool(x.all()):
                self.kept = x != 0
            return self.activation_post_process(x)
        if self.is_dynamic:
            scale, zero = q.choose_qparams.tensor(x.detach(), self.quant_min, self.quant_max, self.eps, torch.int8)
            return fake_quantize(x, scale.float(), self.quant_min - zero, self.quant_max - zero)
        x = x if self.kept is None else x * self.kept
        scale = self.scale()
        if scale.requires_grad:  # Esser et al., section 2.2: else scales outweigh weights in the norm of the gradient
            factor = (x.numel() / scale.numel() * self.quant_max) ** -0.5
            scale.register_hook(lambda gradient: gradient * factor)
        if scale.numel() > 1:
            scale = scale.reshape([-1 if axis == self.ch_axis else 1 for axis in range(x.ndim)])
        return fake_quantize(x, scale, self.quant_min - self.zero, self.quant_max - self.zero)


class _Rounding(torch.autograd.Function):
    """Rounding to steps of `scale` within `low` … `high`, with the gradients of Esser et al., equations 3 and 5."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, low: Any, high: Any) -> torch.Tensor:
        steps = x * scale.reciprocal()
        codes = steps.round().clamp_(low, high)
        ctx.save_for_backward(codes, codes - steps, scale)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, error, scale = ctx.saved_tensors
        (gradient,) = gradients
        inside = error.abs() <= 0.5
        of_scale = None
        if ctx.needs_input_grad[1]:
            of_scale = (gradient * torch.where(inside, error, codes)).sum_to_size(scale.shape)
        return gradient * inside, of_scale, None, None


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, low: Any, high: Any) -> torch.Tensor:
    """Returns round(x / scale), clipped to `low` … `high`, times `scale`; differentiable in `x` and `scale`.

    `scale` has one element, or is shaped to broadcast over `x`.
    """
    return _Rounding.apply(x, scale, low, high)


class QatQuantizer(EdgeQuantizer):
    """Annotates as EdgeQuantizer does, with fake quantizers that learn in the place of observers."""

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotates every node once."""
        super().annotate(model)
        for node in model.graph.nodes:
            found = node.meta.get("quantization_annotation")
            if found is not None:
                found.input_qspec_map = {source: _learned(spec) for source, spec in found.input_qspec_map.items()}
                found.output_qspec = _learned(found.output_qspec)
        return model


def _learned(spec: QuantizationSpecBase | None) -> QuantizationSpecBase | None:
    if not isinstance(spec, QuantizationSpec):
        return spec
    observer = spec.observer_or_fake_quant_ctr
    return replace(spec, observer_or_fake_quant_ctr=LearnedFakeQuantize.with_args(observer=observer))


def prepare(
    module: nn.Module, example: Batch, batches: Iterable[Batch], keep_float: frozenset[str] = frozenset()
) -> Calibrated:
    """Returns `module` with fake quantizers that have taken over the ranges found on `batches`, ready to be trained.

    Channels are evened out as for post-training quantization; weights are those of `module`, not rounded. Raises
    EdgeKitError where there are no batches.
    """
    graph, original, keep_float, notes = evened(module, example, batches, keep_float)
    _own_parameters(graph, {name for name, _ in module.named_buffers()})
    prepared = prepare_qat_pt2e(graph, QatQuantizer(keep_float=keep_float))
    observe(prepared, batches)
    for quantizer in quantizers(prepared).values():
        quantizer.freeze()
    return Calibrated(original, prepared, example, notes)


def _own_parameters(graph: GraphModule, fixed: Collection[str]) -> None:
    """Makes parameters, that no other module shares, of all that can be trained in `graph`.

    These are the parameters of the original, and weights and biases that passes have changed, which are buffers. Those
    named in `fixed` are buffers of the original.
    """
    learned = {name for name, _ in graph.named_parameters(remove_duplicate=False)}
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in WEIGHTED:
            learned |= {c.target for c in node.args[1:3] if is_attribute(c) and c.target not in fixed}
    own: dict[torch.Tensor, nn.Parameter] = {}
    for name in sorted(learned):
        path, _, last = name.rpartition(".")
        owner = graph.get_submodule(path)
        value = getattr(owner, last)
        own.setdefault(value, nn.Parameter(value.detach().clone()))
        delattr(owner, last)
        owner.register_parameter(last, own[value])


def quantizers(prepared: nn.Module) -> dict[str, LearnedFakeQuantize]:
    """Returns the fake quantizers of a prepared network by name; those that several nodes share once."""
    return {name: child for name, child in prepared.named_modules() if isinstance(child, LearnedFakeQuantize)}


class Student(nn.Module):
    """A graph that is called like the original, without modes, as it was captured in eval mode.

    A network with one output returns it alone where `single` is set, and else a tuple.
    """

    def __init__(self, graph: GraphModule, single: bool = False) -> None:
        super().__init__()
        self.graph, self.single = graph, single

    def train(self, mode: bool = True) -> Student:
        """Only remembers the mode: nothing in the graph depends on it."""
        self.training = mode
        return self

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Takes and returns float32 tensors, in batches of any size."""
        outputs = self.graph(*inputs)
        return outputs[0] if self.single and len(outputs) == 1 else outputs


def pupil(prepared: Calibrated, module: nn.Module, samples: Batch) -> tuple[Student, Student] | None:
    """Returns the network to train, on the weights of `prepared`, and its float original; both take any batch.

    None where that is not so: the graphs, with the numbers that depend on the batch computed from their inputs, do not
    give for all `samples` at once what `module` gives for each batch of them.
    """
    batch = prepared.example[0].shape[0]
    if len(samples[0]) <= batch or len(samples[0]) % batch or any(not out.ndim for out in module(*prepared.example)):
        return None
    chunks = [module(*chunk) for chunk in zip(*(tensor.split(batch) for tensor in samples), strict=True)]
    expected = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
    for wide in (_captured(module, samples), None):
        try:
            teacher = _opened(prepared.original, batch, wide, samples)
            graph = _opened(prepared.prepared, batch, wide, samples)
            with torch.no_grad():
                graph(*samples)
                got = teacher(*samples)
        except (_Fixed, RuntimeError):
            continue
        if all(_alike(a, b) for a, b in zip(expected, got, strict=True)):
            return Student(graph), Student(teacher)
    return None


def _captured(module: nn.Module, samples: Batch) -> GraphModule | None:
    try:
        return capture(module, samples)
    except Exception:  # whatever a forward with its batch built in raises
        return None


def _alike(expected: torch.Tensor, got: torch.Tensor) -> bool:
    expected, got = expected.double(), got.double()
    close = SAME * max(float(expected.abs().max()), 1e-6)
    return expected.shape == got.shape and torch.allclose(expected, got, rtol=0, atol=close)


class InBatches(nn.Module):
    """A program of one size of batch, called with batches of any size."""

    def __init__(self, program: ExportedProgram, batch: int) -> None:
        super().__init__()
        self.graph, self.batch = program.module(check_guards=False), batch

    def train(self, mode: bool = True) -> InBatches:
        """Only remembers the mode: nothing in the graph depends on it."""
        self.training = mode
        return self

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns a tuple of outputs, joined along their first axis; the last batch is filled up."""
        count = inputs[0].shape[0] if inputs[0].ndim else self.batch
        if count == self.batch:
            return tuple(self._called(inputs))
        parts = [self._called([self._whole(part) for part in batch]) for batch in self._cut(inputs)]
        return tuple(torch.cat(outputs)[:count] for outputs in zip(*parts, strict=True))

    def _cut(self, inputs: Sequence[torch.Tensor]) -> Iterable[Sequence[torch.Tensor]]:
        return zip(*(tensor.split(self.batch) for tensor in inputs), strict=True)

    def _whole(self, part: torch.Tensor) -> torch.Tensor:
        return torch.cat([part, part[:1].expand(self.batch - len(part), *part.shape[1:])])

    def _called(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        outputs = self.graph(*inputs)
        return outputs if isinstance(outputs, (tuple, list)) else [outputs]


class _Fixed(Exception):
    """A number in a graph depends on the batch in a way that is not known."""


def _opened(model: GraphModule, batch: int, wide: GraphModule | None, samples: Batch) -> GraphModule:
    """Returns `model`, of batches of `batch`, with the numbers that depend on the batch computed from its inputs.

    They are those in which `wide`, the same graph captured for `samples`, differs. Without `wide` they are taken to be
    the first sizes of what is reshaped or expanded.
    """
    graph = copy.deepcopy(model.graph)
    theirs = {node.name: node for node in wide.graph.nodes} if wide is not None else {}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        size = graph.call_function(aten.sym_size.int, (last, 0))
    literals = _Literals(size, batch, samples[0].shape[0])
    varying = {node for node in graph.nodes if node.op == "placeholder"}
    for node in list(graph.nodes):
        if node.op == "placeholder" or node is size:
            continue
        if any(source in varying for source in node.all_input_nodes):
            varying.add(node)
        with graph.inserting_before(node):
            if wide is None:
                if (node in varying and node.target in RESHAPES) or node.target == aten.expand.default:
                    node.args = (node.args[0], literals.first(node.args[1]), *node.args[2:])
            elif node.op == "call_function" and node.name in theirs:  # else it evens out channels, or rounds
                other = theirs[node.name]
                if other.target != node.target:
                    raise _Fixed
                node.args = literals.merged(node.args, other.args)
                node.kwargs = {key: literals.merged(value, other.kwargs[key]) for key, value in node.kwargs.items()}
    graph.lint()
    return GraphModule(model, graph)


@dataclass(frozen=True)
class _Literals:
    """Numbers in a graph for batches of `batch`, as multiples of the node `size`, the batch that it is given."""

    size: Node
    batch: int
    wide: int

    def first(self, sizes: Sequence[int]) -> list[Any]:
        """Returns sizes the first of which grows with the batch, if it can."""
        grows = sizes[0] > 0 and sizes[0] % self.batch == 0
        return [self._times(sizes[0] // self.batch) if grows else sizes[0], *sizes[1:]]

    def merged(self, mine: Any, other: Any) -> Any:
        """Returns an argument in which every number grows that is larger in `other`, of batches of `wide`."""
        if isinstance(mine, Node) or mine == other:
            return mine
        if isinstance(mine, (list, tuple)):
            if not isinstance(other, (list, tuple)) or len(mine) != len(other):
                raise _Fixed
            return type(mine)(self.merged(a, b) for a, b in zip(mine, other, strict=True))
        times, left = divmod(mine, self.batch) if type(mine) is int else (0, 1)
        if left or other != times * self.wide:
            raise _Fixed
        return self._times(times)

    def _times(self, count: int) -> Node:
        return self.size if count == 1 else self.size.graph.call_function(operator.mul, (self.size, count))


def trained(prepared: Calibrated, learned: Any) -> Calibrated:
    """Returns `prepared` with the weights and scales of `learned`, a trained copy of its `pupil`.

    Raises EdgeKitError where one of them is no number.
    """
    state = learned.graph.state_dict()
    broken = next((name for name, value in state.items() if not torch.isfinite(value).all()), None)
    if broken is not None:
        raise EdgeKitError(
            f"the training has left NaN or infinite values in '{broken}'", "train with a lower learning rate"
        )
    prepared.prepared.load_state_dict(state, strict=False)  # it may hold what its graph does not read
    prepared.prepared.requires_grad_(False)
    return prepared

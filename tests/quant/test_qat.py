"""Quantization-aware training: its arithmetic against torch's, what it learns, and that files hold just that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from int8_nets import CASES, Batches, build, conv, flat, sqnr
from kit import NET, interrupted_training, invoke, network, samples, tree
from torch import nn

import edgekit
from edgekit import Qat
from edgekit.artifacts import bundles, sparsity
from edgekit.artifacts.pte_file import XNN_TENSOR, Program
from edgekit.compression import qat_training
from edgekit.compression.training_samples import Memory
from edgekit.errors import EdgeKitError
from edgekit.loading import with_data
from edgekit.quant import qat
from edgekit.quant.graph.passes import attribute
from edgekit.quant.pruning import distillation
from edgekit.quant.pruning.allocation import divergence
from edgekit.quant.ptq.quantizer import WEIGHTED
from edgekit.quant.ptq.recipes import Calibrated, convert
from edgekit.util.progress import Silent

ANY_BATCH = ("residual", "head", "attention", "two_inputs", "two_outputs")


class Flat(nn.Module):
    """Gives a tuple, as loaded models do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.eval()

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(flat(self.inner(*inputs)))


class Depthwise(nn.Module):
    """Channels of very different size behind one scale, which nothing can even out: the worst of MobileNets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = conv(), conv(8, 8, groups=8), conv(8, 16, 1), nn.Linear(16, 4)
        self.register_buffer("fixed", torch.rand(16))
        with torch.no_grad():
            size = torch.logspace(-2, 0.5, 8)
            self.b.weight *= size.reshape(-1, 1, 1, 1)
            self.b.bias *= size
            self.c.weight /= size.reshape(1, -1, 1, 1)
            self.d.weight *= 100  # a random network hardly tells its inputs apart

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.relu6(self.b(nn.functional.relu6(self.a(x))))
        return self.d((nn.functional.hardswish(self.c(y)) * self.fixed.reshape(1, -1, 1, 1)).mean((2, 3)))


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def prepared(module: nn.Module, x: torch.Tensor) -> Calibrated:
    return qat.prepare(module, (x[:1],), [(part,) for part in x.split(1)])


def learn(module: nn.Module, x: torch.Tensor, plan: distillation.Plan, **options: Any) -> tuple[Calibrated, nn.Module]:
    found = prepared(module, x)
    pair = qat.pupil(found, module, (x[:3],))
    assert pair is not None
    return found, distillation.recover(*pair, Memory((x,), None, 16, ()), plan, **options).module


PLAN = distillation.Plan(10, 1e-3, weight_decay=0.0, features=0.0, augment=False)


@pytest.mark.parametrize("channels", [False, True])
def test_rounding_and_its_gradients_are_those_of_torch(channels: bool) -> None:
    """torch's kernels for learned scales; what they give for the zero point is left aside."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scale = (torch.tensor([0.01, 0.02, 0.005, 0.1]) if channels else torch.tensor([0.01])).requires_grad_()
    weight = torch.linspace(-1, 1, 24).reshape(6, 4)
    if channels:
        mine = qat.fake_quantize(x, scale.reshape(1, 4), -127, 127)
        other = torch._fake_quantize_learnable_per_channel_affine(x, scale, torch.zeros(4), 1, -127, 127, 1.0)
    else:
        mine = qat.fake_quantize(x, scale, -128 - 20, 127 - 20)
        other = torch._fake_quantize_learnable_per_tensor_affine(x, scale, torch.tensor([20.0]), -128, 127, 1.0)
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
    found = torch.autograd.grad((mine * weight).sum(), (x, scale))
    expected = torch.autograd.grad((other * weight).sum(), (x, scale))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["conv_relu6_bn", "concat", "squeeze_excite", "two_outputs"])
def test_what_is_trained_is_what_is_converted(name: str) -> None:
    module, batches = build(name), list(Batches(CASES[name]))
    found = qat.prepare(module, batches[0], batches)
    with torch.no_grad():
        for quantizer in qat.quantizers(found.prepared).values():
            quantizer.log_scale -= 0.1  # as training might
        expected = flat(found.prepared(*batches[0]))
        steps = [float(quantizer.scale().max()) for quantizer in qat.quantizers(found.prepared).values()]
        got = flat(convert(found).program.module(check_guards=False)(*batches[0]))
    for a, b in zip(expected, got, strict=True):
        differs = (a - b).abs()
        assert float(differs.max()) <= 2 * max(steps)
        assert float((differs > 1e-5).float().mean()) < 0.02


@pytest.mark.parametrize("name", ANY_BATCH)
@pytest.mark.parametrize("built_in", [False, True])
def test_any_batch_can_be_trained_with(name: str, built_in: bool) -> None:
    """A network of one sample is trained in batches, even where its graph has the batch built in."""
    case, module = CASES[name], Flat(build(name))
    one = [tuple(tensor[:1] for tensor in batch) for batch in Batches(case)]
    if built_in:
        module = torch.export.export(module, one[0]).module(check_guards=False)
    found = qat.prepare(module, one[0], one)
    many = tuple(torch.cat(parts) for parts in zip(*one, strict=True))
    pair = qat.pupil(found, module, tuple(tensor[:3] for tensor in many))
    assert pair is not None
    with torch.no_grad():
        for network, wanted in zip(pair, (found.prepared, module), strict=True):
            each = [wanted(*batch) for batch in one]
            for got, parts in zip(network(*many), zip(*each, strict=True), strict=True):
                torch.testing.assert_close(got, torch.cat(parts), rtol=1e-3, atol=0.1 if network is pair[0] else 1e-4)


def test_a_network_whose_batch_cannot_grow_is_told_so() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (x.reshape(2, -1).transpose(0, 1).reshape(2, -1),)

    x = torch.randn(6, 8)
    assert qat.pupil(qat.prepare(Fixed(), (x[:2],), [(x[:2],)]), Fixed(), (x,)) is None


def weights(calibrated: Calibrated) -> dict[str, tuple[torch.Tensor, qat.LearnedFakeQuantize]]:
    """Layer → its weight, and what rounds it."""
    graph = calibrated.prepared
    return {
        node.name: (attribute(graph, node.args[1].args[0]), graph.get_submodule(node.args[1].target))
        for node in graph.graph.nodes
        if node.target in WEIGHTED and node.args[1].op == "call_module"
    }


def test_training_brings_int8_nearer_to_the_original() -> None:
    module, x, unseen = Flat(Depthwise()), images(), images(2)
    found, learned = learn(module, x, PLAN)
    pair = qat.pupil(found, module, (x[:3],))
    assert pair is not None
    with torch.no_grad():
        before, after = (float(divergence(net(unseen), module(unseen))) for net in (pair[0], learned))
    assert after < 0.2 * before


def test_ranges_are_learned_and_never_outgrow_calibration() -> None:
    """A clip that the ranges imply is not computed, before the training and after it."""
    module, x = Flat(build("depthwise")), images()
    found, learned = learn(module, x, distillation.Plan(5, 0.03, weight_decay=0.0, features=0.0, augment=False))
    before = {name: q.scale().detach().clone() for name, q in qat.quantizers(found.prepared).items()}
    trained = qat.trained(found, learned)
    after = {name: q.scale() for name, q in qat.quantizers(trained.prepared).items()}
    assert all(not torch.equal(after[name], scale) for name, scale in before.items())
    assert all(float(q.scale().log().max()) <= q.largest + 1e-6 for q in qat.quantizers(trained.prepared).values())
    targets = {node.target for node in convert(trained).program.graph.nodes}
    assert torch.ops.aten.hardtanh.default not in targets and torch.ops.aten.relu.default not in targets


def test_the_original_its_buffers_and_pruned_weights_stay_as_they_are() -> None:
    module, x = Flat(Depthwise()), images()
    with torch.no_grad():
        module.inner.c.weight[:, ::2] = 0
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found, learned = learn(module, x, PLAN)
    trained = qat.trained(found, learned)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    kept = [buffer.flatten() for _, buffer in trained.prepared.named_buffers() if buffer.numel() == 16]
    assert any(torch.equal(buffer, module.inner.fixed) for buffer in kept)
    made = weights(trained)
    assert list(made) == ["conv2d", "conv2d_1", "conv2d_2", "linear"]
    assert not torch.equal(made["linear"][0], module.inner.d.weight)
    weight, quantizer = made["conv2d_2"]
    assert not weight[:, ::2].any() and weight[:, 1::2].all()
    with torch.no_grad():
        assert not quantizer(weight)[:, ::2].any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("qat")
    (made / "net.py").write_text(NET)
    drawn = samples(104)
    arrays = {"x": drawn["x"][:40], "y": drawn["y"][:40], "calib_x": drawn["x"][40:]}
    np.savez(made / "data.npz", **arrays)
    return made


def by_channel(codes: np.ndarray) -> list[list[int]]:
    """The codes of each output channel in ascending order: formats differ in theirs, and pad with zeros."""
    return [sorted(row[row != 0].tolist()) for row in codes.reshape(len(codes), -1)]


def in_onnx(path: Path) -> tuple[set[tuple[float, int]], list[tuple[np.ndarray, np.ndarray]]]:
    """The (scale, zero point) of every activation, and scales and codes of every weight, as the file holds them."""
    model = onnx.load(path)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    activations, found = set(), []
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale = held[node.input[1]]
        zero = held[node.input[2]] if len(node.input) > 2 else np.uint8(0)
        if node.input[0] not in held:
            activations.add((float(scale), int(zero) - (128 if zero.dtype == np.uint8 else 0)))
        elif held[node.input[0]].dtype == np.int8:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            found.append((scale, np.moveaxis(held[node.input[0]], axis, 0)))
    return activations, found


def in_tflite(path: Path) -> tuple[set[tuple[float, int]], list[tuple[np.ndarray, np.ndarray]]]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), experimental_preserve_all_tensors=True)
    interpreter.allocate_tensors()
    written = {index for op in interpreter._get_ops_details() for index in op["outputs"]}
    activations, found = set(), []
    for detail in interpreter.get_tensor_details():
        parameters = detail["quantization_parameters"]
        if detail["dtype"] != np.int8 or not len(parameters["scales"]):
            continue
        if detail["index"] in written:
            activations.add((float(parameters["scales"][0]), int(parameters["zero_points"][0])))
        elif len(detail["shape"]) > 1:
            codes = interpreter.get_tensor(detail["index"])
            found.append((parameters["scales"], np.moveaxis(codes, parameters["quantized_dimension"], 0)))
    return activations, found


def in_pte(path: Path) -> tuple[set[tuple[float, int]], list[tuple[np.ndarray, np.ndarray]]]:
    program = Program(path.read_bytes())
    segments = {n.text("key"): n.number("index") for n in program.root.tables("named_data", "key index")}
    activations, scales = set(), []
    for _, payload in program.delegates:
        for value in payload.root.tables("xvalues", "type value"):
            quantized = value.table("value", "tensor type params") if value.number("type", "<B") == 2 else None
            if quantized is None:
                continue
            tensor = quantized.table("tensor", XNN_TENSOR)
            dtype, constant = tensor.number("datatype", "<h"), tensor.number("constant_buffer_idx")
            if dtype == 3 and not constant:
                parameters = quantized.table("params", "scale zero_point")
                activations.add((parameters.number("scale", "<f"), parameters.number("zero_point", "<i")))
            elif dtype == 6:
                index = quantized.table("params", "scale channel_dim buffer count").number("buffer")
                key = payload.root.tables("constant_data", "offset size key")[index].text("key")
                scales.append(np.frombuffer(program._segment(segments[key]), np.float32))
    codes = [array for array in sparsity.weights(path) if array.dtype == np.int8]
    return activations, [(scale[: len(c)], c) for scale, c in zip(scales, codes, strict=True)]


def test_files_hold_what_was_trained(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Every scale, zero point and weight of all three files is that of the trained fake quantizers, to the bit."""
    activations: set[tuple[float, int]] = set()
    layers: dict[bytes, list[list[int]]] = {}
    trained = qat.trained

    def spy(*arguments: Any) -> Calibrated:
        result = trained(*arguments)
        for quantizer in qat.quantizers(result.prepared).values():
            scale, zero = (tensor.numpy() for tensor in quantizer.calculate_qparams())
            if scale.size == 1:
                activations.add((float(scale[0]), int(zero[0])))
        for weight, quantizer in weights(result).values():
            with torch.no_grad():
                shape = [-1, *[1] * (weight.ndim - 1)]
                codes = (quantizer(weight) / quantizer.scale().reshape(shape)).round().to(torch.int8)
            layers[quantizer.scale().detach().numpy().tobytes()] = by_channel(codes.numpy())
        return result

    monkeypatch.setattr(qat, "trained", spy)
    monkeypatch.setattr(qat_training, "_is_better", lambda *_: True)
    model, data = f"{folder / 'net.py'}:make", folder / "data.npz"
    options = ("--qat", "--epochs", 2, "--learning-rate", 0.01, "--train", data, "--out", tmp_path)
    ran = invoke(capfd, "export", model, "--target", "x86", "--precision", "int8", "--data", data, *options)
    assert ran.code == 0, ran.err
    bundle = bundles.read(tmp_path / "net-x86")
    assert len(layers) == 3 and len(activations) >= 4
    readers = {"onnx": in_onnx, "tflite": in_tflite, "executorch": in_pte}
    assert {artifact.format for artifact in bundle.artifacts} == set(readers)
    for artifact in bundle.artifacts:
        held, found = readers[artifact.format](artifact.path)
        assert held == activations, artifact.format
        assert {scale.tobytes(): by_channel(codes) for scale, codes in found} == layers, artifact.format
    recipe = bundle.manifest["recipe"]
    assert recipe["qat"]["samples"] == 40 and len(recipe["qat"]["losses"]) == 2
    assert any("QAT: 2 epochs on 40 samples" in note for note in bundle.notes)
    assert tree(tmp_path) == [bundle.path.name, *(f"{bundle.path.name}/{file}" for file in tree(bundle.path))]


def run(tmp_path: Path, model: Any = None, data: Any = None, **options: Any) -> qat_training.Trained:
    """Trains without exporting: on the samples of `data`, or on sixteen."""
    drawn = samples(24)["x"]
    data = data or {"x": drawn[:8], "calib_x": drawn[8:]}
    tmp_path.mkdir(exist_ok=True)
    model = network() if model is None else model
    original, source = with_data.load(model, data=data, inputs=(), code=None, mean=(), std=())
    assert source is not None
    plan = Qat(**{"epochs": None if "finetune" in options else 3, **options})
    return qat_training.train(original, source, plan, tmp_path / "checkpoint.pt", Silent())


def state(trained: qat_training.Trained) -> dict[str, torch.Tensor]:
    return dict(trained.compressed.program.state_dict)


def equal(one: qat_training.Trained, other: qat_training.Trained) -> bool:
    a, b = state(one), state(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with interrupted_training(2), pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    with pytest.raises(EdgeKitError, match="checkpoint of another training"):
        run(tmp_path, resume=True, seed=1)
    other = network()
    with torch.no_grad():
        other[6].bias += 1
    with pytest.raises(EdgeKitError, match="checkpoint of another training"):
        run(tmp_path, other, resume=True)
    assert any("--resume found nothing" in note for note in run(tmp_path / "none", resume=True).notes)
    assert equal(whole, run(tmp_path, resume=True))


def test_a_diverging_training_keeps_the_last_good_epoch(tmp_path: Path) -> None:
    with pytest.raises(EdgeKitError, match="training diverged in epoch") as caught:
        run(tmp_path, learning_rate=1e30, epochs=5)
    assert "lower --learning-rate" in str(caught.value.help)
    for path in tmp_path.iterdir():
        assert all(torch.isfinite(tensor).all() for tensor in torch.load(path, weights_only=True)["module"].values())


def test_a_graph_of_one_sample_learns_in_batches(tmp_path: Path) -> None:
    x = samples(1)["x"]
    program = torch.export.export(network(), (torch.from_numpy(x),))
    torch.export.save(program, tmp_path / "net.pt2")
    trained = run(tmp_path, tmp_path / "net.pt2", epochs=1)
    assert not any("batches of" in note for note in trained.notes)
    assert equal(trained, run(tmp_path, epochs=1))


def test_a_fixed_batch_is_trained_with_and_told(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.reshape(3, 16, 16).unsqueeze(0))

    trained = run(tmp_path, Fixed())
    assert any("batches of 1 alone" in note for note in trained.notes)


def teach(student: nn.Module, teacher: nn.Module, batches: Any) -> None:
    optimizer = torch.optim.AdamW(student.parameters(), 0.03)
    for inputs, _ in batches:
        optimizer.zero_grad()
        (student(*inputs) - teacher(*inputs)).square().mean().backward()
        optimizer.step()


def test_a_function_of_the_user_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qat_training, "_is_better", lambda *_: True)
    x = torch.from_numpy(samples(24)["x"][:1])
    outputs: list[torch.Tensor] = []

    def mine(student: nn.Module, teacher: nn.Module, batches: Any) -> None:
        assert len(batches) == 1 and not any(parameter.requires_grad for parameter in teacher.parameters())
        outputs.append(student(x).detach())
        teach(student, teacher, batches)
        outputs.append(student(x).detach())

    trained = run(tmp_path, finetune=mine)
    told = trained.to_dict()["qat"]
    assert told.pop("kept") is True and told.pop("right") is None
    assert told == {"samples": 16, "seed": 0, "function": "mine", "distances": list(trained.distances)}
    assert trained.distances[0] != trained.distances[1]
    with torch.no_grad():
        got = trained.compressed.program.module(check_guards=False)(x)[0]
    before, after = (float((got - output).abs().max()) for output in outputs)
    assert after < 1e-6 < before


def test_a_training_that_makes_it_worse_is_not_kept(tmp_path: Path) -> None:
    """What comes back is int8 without training, and both figures are told: by labels where there are any."""

    def ruin(student: nn.Module, teacher: nn.Module, batches: Any) -> None:
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn(parameter.shape))

    torch.manual_seed(0)
    plain = run(tmp_path / "plain", finetune=ruin)
    (note,) = [note for note in plain.notes if note.startswith("QAT: trained by")]
    assert not plain.kept and plain.right is None and plain.distances[0] < plain.distances[1]
    assert "int8 without it was kept" in note and f"{plain.distances[0]:.2g} → {plain.distances[1]:.2g}" in note
    assert "summary" not in plain.to_dict() and plain.to_dict()["qat"]["kept"] is False
    data = samples(24)
    given = {"x": data["x"], "y": data["y"], "calib_x": data["x"][:8]}
    labeled = run(tmp_path / "labeled", data=given, finetune=ruin)
    assert labeled.right is not None and labeled.right[0] > labeled.right[1] and labeled.right[2] == 24
    with torch.no_grad():
        for trained in (plain, labeled):
            x = torch.from_numpy(data["x"][:1])
            assert sqnr(network()(x), trained.compressed.program.module(check_guards=False)(x)[0]) > 20


@pytest.mark.parametrize(
    ("distances", "right", "better"),
    [
        ((2.0, 1.0), None, True),
        ((1.0, 1.0), None, False),
        ((1.0, float("nan")), None, False),
        ((2.0, 1.0), (9, 8, 10), False),
        ((1.0, 2.0), (8, 9, 10), True),
        ((1.0, 2.0), (8, 8, 10), False),
        ((2.0, 1.0), (8, 8, 10), True),
    ],
)
def test_labels_decide_before_distances(
    distances: tuple[float, float], right: tuple[int, int, int] | None, better: bool
) -> None:
    assert qat_training._is_better(distances, right) is better


BAD_FUNCTIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "another network": (lambda student, teacher, batches: nn.Linear(1, 1), "returned another network"),
    "an error": (lambda student, teacher, batches: 1 / 0, "ZeroDivisionError"),
    "no number": (lambda student, *rest: [p.data.fill_(float("nan")) for p in student.parameters()] and None, "NaN"),
}


@pytest.mark.parametrize("case", BAD_FUNCTIONS)
def test_what_a_function_does_wrong_is_told(case: str, tmp_path: Path) -> None:
    function, words = BAD_FUNCTIONS[case]
    with pytest.raises(EdgeKitError, match=words):
        run(tmp_path, finetune=function)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "float": ({"precision": "fp16"}, "fp16 has none"),
    "no samples": ({"data": None, "inputs": ["1x3x16x16"]}, "learns from samples, and none are given"),
    "layers in float": ({"max_drop": 0.5}, "qat=True trains all of them"),
    "epochs": ({"qat": Qat(epochs=0)}, "0 epochs train nothing"),
    "learning rate": ({"qat": Qat(learning_rate=0.0)}, "a learning rate of 0"),
    "two trainings": ({"qat": Qat(epochs=1, finetune=teach)}, "epochs=... is for EdgeKit's own"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_are_refused_and_leave_nothing(case: str, tmp_path: Path) -> None:
    options, words = REFUSED[case]
    given = {"target": "x86", "precision": "int8", "data": samples(8), "out": tmp_path, "qat": Qat(), **options}
    with pytest.raises(EdgeKitError, match=words):
        edgekit.export(network(), **given)
    assert tree(tmp_path) == []


@pytest.mark.parametrize("option", [("--epochs", 3), ("--seed", 0), ("--finetune", "mine.py:train"), ("--resume",)])
def test_options_of_a_training_that_is_not_asked_for(
    option: tuple[Any, ...], folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    model, data = f"{folder / 'net.py'}:make", folder / "data.npz"
    ran = invoke(capfd, "export", model, "--target", "x86", "--data", data, "--out", tmp_path, *option)
    assert ran.code == 1 and "--qat" in ran.err
    assert tree(tmp_path) == []

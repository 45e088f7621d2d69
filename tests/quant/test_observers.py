"""The activation observer against a brute-force search of the clipping range, and its bookkeeping."""

from __future__ import annotations

import math

import pytest
import torch

from edgekit.quant.ptq.observers import BINS, KnownScale, MSEObserver

COUNT = 4000
FRACTIONS = torch.logspace(math.log10(0.02), 0, 28, dtype=torch.float64).tolist()


def normal() -> torch.Tensor:
    return torch.randn(COUNT)


def exponential() -> torch.Tensor:
    return torch.empty(COUNT).exponential_()


def heavy_tailed() -> torch.Tensor:
    return normal() / (torch.randn(3, COUNT).square().mean(0)).sqrt()


SAMPLES = {
    "normal": normal,
    "normal_small": lambda: normal() * 0.02,
    "uniform": lambda: torch.rand(COUNT) * 2 - 0.5,
    "exponential": exponential,
    "relu": lambda: normal().relu(),
    "sparse": lambda: (normal() - 1.5).relu(),
    "relu6": lambda: (normal() * 3 + 2).clamp(0, 6),
    "swish": lambda: torch.nn.functional.silu(normal() * 2),
    "heavy_tailed": heavy_tailed,
    "outlier": lambda: torch.cat([normal(), torch.tensor([60.0])]),
    "negative": lambda: -exponential(),
    "shifted": lambda: normal() + 6,
    "two_peaks": lambda: torch.cat([normal() * 0.1, normal() * 0.1 + 4]),
}


def observe(*batches: torch.Tensor) -> MSEObserver:
    observer = MSEObserver()
    for batch in batches:
        assert observer(batch) is batch
    return observer


def qparams(observer: MSEObserver) -> tuple[float, int]:
    scale, zero_point = observer.calculate_qparams()
    assert scale.dtype == torch.float32 and scale.shape == zero_point.shape == (1,)
    return float(scale), int(zero_point)


def error(x: torch.Tensor, scale: float, zero_point: int) -> float:
    """The mean squared error of torch's own int8 quantization."""
    rounded = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -128, 127)
    return float((rounded.double() - x.double()).square().mean())


def least_error(x: torch.Tensor) -> float:
    """The least error of any range whose ends are fractions of the observed ones."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    errors = []
    for lower in {low * f for f in FRACTIONS}:
        for upper in {high * f for f in FRACTIONS}:
            scale = (upper - lower) / 255
            errors.append(error(x, scale, min(max(-128 - round(lower / scale), -128), 127)))
    return min(errors)


@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-37, 1e-30, 1e-20])
def test_values_too_small_for_a_scale_become_zero(size: float) -> None:
    x = normal() * size
    first, second = observe(x), observe(x * 2)
    first.merge(second)
    for observer in (first, second, observe(x, normal() * size * 1e6)):
        scale, zero_point = qparams(observer)
        assert scale == observer.eps and -128 <= zero_point <= 127
    assert qparams(observe(x, normal()))[0] == pytest.approx(qparams(observe(normal()))[0], rel=0.5)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_range_is_within_5_percent_of_the_best_error(name: str) -> None:
    torch.manual_seed(0)
    x = SAMPLES[name]()
    assert error(x, *qparams(observe(x))) <= 1.05 * least_error(x)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_range_holds_zero_exactly(name: str) -> None:
    torch.manual_seed(0)
    scale, zero_point = qparams(observe(SAMPLES[name]()))
    assert scale > 0 and -128 <= zero_point <= 127
    assert error(torch.zeros(3), scale, zero_point) == 0


@pytest.mark.parametrize("value", [3.3, -0.7, 255.0, 1e-2])
def test_a_constant_is_kept(value: float) -> None:
    x = torch.full((50,), value)
    assert math.sqrt(error(x, *qparams(observe(x)))) < abs(value) / 255


@pytest.mark.parametrize("batches", [(), (torch.zeros(9),), (torch.zeros(0), torch.zeros(2, 2))])
def test_nothing_but_zeros_gives_a_usable_scale(batches: tuple[torch.Tensor, ...]) -> None:
    scale, zero_point = qparams(observe(*batches))
    assert 0 < scale < 1
    assert error(torch.zeros(3), scale, zero_point) == 0


BAD = {
    "nan": math.nan,
    "infinity": math.inf,
    "minus_infinity": -math.inf,
    "least_float": torch.finfo(torch.float32).min,
    "largest_float": torch.finfo(torch.float32).max,
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_activation_leaves_the_range_alone(name: str) -> None:
    torch.manual_seed(0)
    x = normal()
    bad = torch.cat([x[:9], torch.tensor([BAD[name]]), x[9:]])
    assert qparams(observe(bad)) == qparams(observe(x))
    scale, _ = qparams(observe(torch.tensor([BAD[name]])))
    assert math.isfinite(scale) and scale > 0


@pytest.mark.parametrize("split", [1, 7, 1000])
def test_batches_and_their_order_do_not_matter(split: int) -> None:
    torch.manual_seed(0)
    x = heavy_tailed()
    whole = observe(x)
    for parts in (x.split(max(split, 20)), x.sort().values.split(100), x.sort(descending=True).values.split(100)):
        streamed = observe(*parts)
        assert (streamed.limit, streamed.low, streamed.high) == (whole.limit, whole.low, whole.high)
        # Values on the border of two bins can fall into either.
        assert (streamed.counts.cumsum(0) - whole.counts.cumsum(0)).abs().max() <= 0.002 * COUNT
        assert math.isclose(qparams(streamed)[0], qparams(whole)[0], rel_tol=0.05)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_that_saw_a_part_each_are_merged(order: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = heavy_tailed()
    parts = x[x.abs() < 0.5], x[x.abs() >= 0.5]  # their histograms reach less and more far
    first, second = (observe(parts[index]) for index in order)
    first.merge(second)
    whole = observe(x)
    assert (first.limit, first.low, first.high) == (whole.limit, whole.low, whole.high)
    assert first.counts.sum() == whole.counts.sum()
    assert (first.counts.cumsum(0) - whole.counts.cumsum(0)).abs().max() <= 0.002 * COUNT
    first.merge(MSEObserver())
    assert first.counts.sum() == whole.counts.sum()


def test_memory_is_bounded_and_no_value_is_lost() -> None:
    observer = MSEObserver()
    total = 0
    for exponent in range(-30, 30, 5):
        x = torch.full((10,), 1.7) * 2.0**exponent
        observer(x)
        total += len(x)
        assert observer.counts.shape == (BINS,)
        assert observer.counts.sum() == total
    tensors = [value for value in vars(observer).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.numel() for tensor in tensors) <= BINS


def test_zeros_cost_nothing() -> None:
    """They are always exact: a range must not be narrowed for their sake."""
    torch.manual_seed(0)
    x = normal()
    assert qparams(observe(torch.cat([x, torch.zeros(20 * COUNT)]))) == qparams(observe(x))


@pytest.mark.parametrize(("shape", "axis"), [((4, 3, 3, 3), 0), ((3, 4, 2, 2), 1), ((4, 7), 0)])
def test_known_scales_give_the_very_codes_back(shape: tuple[int, ...], axis: int) -> None:
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, shape)
    scale = torch.rand(shape[axis]) * 10.0 ** torch.randint(-6, 3, (shape[axis],))
    wide = scale.reshape([-1 if index == axis else 1 for index in range(len(shape))])
    observer = KnownScale(scale, ch_axis=axis)
    weight = codes * wide
    assert observer(weight) is weight
    scales, zero_points = observer.calculate_qparams()
    assert torch.equal(scales, scale) and not zero_points.any()
    again = torch.quantize_per_channel(weight, scales.double(), zero_points, observer.ch_axis, torch.qint8)
    assert torch.equal(again.int_repr(), codes.to(torch.int8))

"""Runs that become slower: told from noise, and said with what the device tells."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgekit.errors import EdgeKitError
from edgekit.measuring import steadiness
from edgekit.measuring.latency import Latency
from edgekit.runtimes import stopwatch

NOISE = np.random.default_rng(0).normal(1, 0.02, 300)
RUNS = {
    "level": (NOISE, None),
    "throttled": (NOISE * np.linspace(1, 1.5, 300), 1.32),
    "throttled once for all": (NOISE * np.where(np.arange(300) < 150, 1, 1.5), 1.5),
    "slightly slower": (NOISE * np.linspace(1, 1.08, 300), None),
    "disturbed in between": (NOISE * np.where(np.arange(300) // 100 == 1, 3, 1), None),
    "warming up": (NOISE * np.linspace(1.5, 1, 300), None),
    "three processes": ([1.0, 1.2, 1.5], 1.5),
    "three processes, one slow": ([1.0, 1.5, 1.2], None),
    "two": ([1.0, 2.0], None),
}


@pytest.mark.parametrize("case", RUNS)
def test_slowdown(case: str) -> None:
    samples, expected = RUNS[case]
    got = stopwatch.slowdown(samples)
    assert got == (None if expected is None else pytest.approx(expected, rel=0.05))


def latency(*factors: float, end: float = 1.0) -> Latency:
    """A process for each factor, whose runs take `end` times as long at last."""
    drift = np.linspace(1, end, len(NOISE))
    return Latency(tuple(tuple(NOISE * drift * factor) for factor in factors), 1)


def test_a_latency_is_slower_in_a_process_or_over_all_of_them() -> None:
    assert latency(1, 1, 1).slowdown is None
    assert latency(1, 1, 1, end=1.6).slowdown == pytest.approx(1.4, rel=0.05)
    assert latency(1, 1.2, 1.4).slowdown == pytest.approx(1.4)
    assert latency(1, 1.2, 1.4).to_dict()["slowdown"] == pytest.approx(1.4)


def device(facts: dict[str, Any] | None) -> Any:
    def probe() -> dict[str, Any]:
        if facts is None:
            raise EdgeKitError("gone")
        return facts

    return SimpleNamespace(probe=probe)


HEAT = {"cpu-thermal": 84.2, "battery": 31.0}
HOT = {"khz": [1_200_000, 2_400_000], "max_khz": [2_400_000] * 2, "temperatures_c": HEAT}
SAID = {
    "clock and heat": (HOT, " (a core at 1.2 of 2.4 GHz now, cpu-thermal at 84 °C)"),
    "heat alone": ({"temperatures_c": HEAT}, " (cpu-thermal at 84 °C)"),
    "cool": ({"temperatures_c": {"cpu": 41.0}}, ""),
    "nothing": ({}, ""),
    "no answer": (None, ""),
}


@pytest.mark.parametrize("case", SAID)
def test_what_is_said(case: str) -> None:
    facts, said = SAID[case]
    (note,) = steadiness.notes({"a": latency(1, 1, 1), "b": latency(1, 1, 1, end=1.6), "c": None}, device(facts))
    assert note.startswith("b became slower by 3")
    assert f"processor{said}; let it cool down" in note


def test_level_runs_need_no_note_and_ask_no_device() -> None:
    assert steadiness.notes({"a": latency(1, 1, 1), "b": None}, None) == ()  # type: ignore[arg-type]
    both = steadiness.notes({"a": latency(1, 1.2, 1.4), "b": latency(1, 1.3, 1.6)}, device({}))
    assert both[0].startswith("b became slower by 60 % while it was measured, and 1 more slowed down too")

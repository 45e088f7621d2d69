"""The p50 of runs that nothing slowed down: on a core that is shared, on a quiet one, and on a throttled one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from edgekit.measuring import outliers, schedule
from edgekit.measuring.latency import Latency

RUN_MS, SLOWED = 0.4, 1.4
PROCESS_MS = 600


class Machine:
    """A core whose neighbor works `busy` of the time, in bursts of 5 ms to 2 s, and whose processes differ by 1 %."""

    def __init__(self, seed: int, busy: float) -> None:
        self.rng = np.random.default_rng(seed)
        self.busy, self.slow, self.left = busy, False, 0.0

    def process(self) -> tuple[float, ...]:
        """The times of one process, in ms."""
        self.run(PROCESS_MS)  # starts, loads and warms up
        return tuple(self.rng.normal(1, 0.01) * self.run(PROCESS_MS))

    def run(self, ms: float) -> np.ndarray:
        """The times of the runs that fill so many milliseconds."""
        times: list[float] = []
        while sum(times) < ms:
            if self.left <= 0:
                self.slow = bool(self.busy) and not self.slow
                share = self.busy if self.slow else 1 - self.busy
                self.left = share * 2 * np.exp(self.rng.uniform(np.log(5), np.log(2000)))
            count = max(1, min(int(self.left / RUN_MS), 200))
            times += list(RUN_MS * (SLOWED if self.slow else 1) * self.rng.normal(1, 0.02, count))
            self.left -= count * RUN_MS
        return np.array(times)

    def profile(self) -> Latency:
        """As many processes as `edgekit profile` would run."""
        processes: list[tuple[float, ...]] = []
        while len(processes) < schedule.MOST_ROUNDS:
            processes.append(self.process())
            latency = outliers.undisturbed(Latency(tuple(processes), 1))
            if outliers.is_known(latency):
                break
        return latency


@pytest.mark.parametrize("busy", [0.0, 0.3, 0.6])
def test_two_p50_in_a_row_are_within_five_percent(busy: float) -> None:
    machine = Machine(0, busy)
    found = [machine.profile() for _ in range(20)]
    p50 = [latency.p50 for latency in found]
    assert p50 == pytest.approx([RUN_MS] * len(p50), rel=0.03)
    assert all(abs(b / a - 1) < 0.05 for a, b in pairwise(p50))
    if busy:
        plain = [Latency(latency.processes, 1).p50 for latency in found]
        assert max(abs(b / a - 1) for a, b in pairwise(plain)) > 0.05
        assert np.mean([latency.disturbed for latency in found]) == pytest.approx(busy, abs=0.2)
    else:
        assert np.median([len(latency.processes) for latency in found]) == outliers.FEWEST
        assert np.median([latency.disturbed for latency in found]) < 0.01


def test_the_medians_are_of_undisturbed_runs_and_the_tail_of_all() -> None:
    alone, shared = (1.0,) * 90, (1.0,) * 60 + (1.5,) * 30
    latency = outliers.undisturbed(Latency((alone, shared), 1))
    assert latency.undisturbed == (alone, (1.0,) * 60)
    assert latency.disturbed == pytest.approx(30 / 180)
    assert (latency.p50, latency.percentile(90)) == (1.0, 1.5)
    assert latency.to_dict()["disturbed"] == latency.disturbed


def test_a_throttled_file_keeps_all_of_its_runs() -> None:
    falling = tuple(np.linspace(1, 1.5, 300))
    latency = Latency((falling,) * 6, 1)
    assert outliers.undisturbed(latency) is latency
    assert latency.p50 == pytest.approx(1.25)


def test_one_process_that_is_faster_than_all_others_is_no_rule() -> None:
    latency = Latency(((1.0,) * 50, *((2.0 + 0.2 * i,) * 50 for i in range(5))), 1)
    assert outliers.undisturbed(latency) is latency
    assert not outliers.is_known(latency)


def test_few_processes_are_enough_on_a_quiet_machine_only() -> None:
    quiet, slow = (1.0,) * 50, (1.0,) * 20 + (1.4,) * 30
    known = [
        outliers.is_known(outliers.undisturbed(Latency((process,) * count, 1)))
        for process, count in [(quiet, 4), (quiet, 5), (slow, 5), (slow, 10)]
    ]
    assert known == [False, True, False, True]

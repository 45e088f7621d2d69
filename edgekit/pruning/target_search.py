"""Search for a target: how much has to go so that the exported files take no more than was asked, by trying it out.

A latency depends on shapes and not on weights, so candidates are exported before any training, and timed in turn with
the original. The one that keeps the most multiply-adds of those that are quick enough is trained then.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.artifacts.artifact import Artifact
from edgekit.errors import EdgeKitError
from edgekit.loading import pruned_mark
from edgekit.measuring import feeds, schedule
from edgekit.pruning import cost
from edgekit.pruning.options import Limit, Wanted
from edgekit.util import atomic_files

if TYPE_CHECKING:
    import numpy as np

    from edgekit.pruning.steps import Analysis, Job
    from edgekit.runtimes.devices.device import Device

ROUNDINGS = (8, 16)  # channels: the widths of the kernels' tiles, on ARM and with AVX-512
FIRST = 4  # ratios of the first look
NEAR = (0.04, 0.015)  # how far apart ratios are looked at on either side of the limit, one look after the other
FINALISTS = 3
DOUBT = 1.04  # how far above the limit a file is timed again, and again with more processes


@dataclass(frozen=True)
class Candidate:
    """One pruning that was tried: what was asked, what is left, and what its files take.

    `macs` and `parameters` are shares of the original's. `shares` are those of latency or size by format, and `load`
    the largest part of the limit that a file takes: up to 1 it is kept. `processes` timed each file.
    """

    ratio: float
    round_to: int
    macs: float
    parameters: float
    shares: Mapping[str, float]
    load: float
    processes: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {**self.__dict__, "shares": dict(self.shares)}


@dataclass(frozen=True)
class Found:
    """Every candidate, the one that was chosen, and why."""

    limit: Limit
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    reason: str

    @property
    def front(self) -> tuple[Candidate, ...]:
        """Those that no other beats: in what they keep or in what they take."""
        return tuple(c for c in self.candidates if not any(_dominates(other, c) for other in self.candidates))

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        front = self.front
        return {
            "target": {"kind": self.limit.kind, "asked": self.limit.text},
            "candidates": [{**c.to_dict(), "dominated": c not in front} for c in self.candidates],
            "chosen": self.chosen.to_dict(),
            "reason": self.reason,
        }


def _dominates(a: Candidate, b: Candidate) -> bool:
    return a.load <= b.load and a.macs >= b.macs and (a.load < b.load or a.macs > b.macs)


@dataclass
class _Built:
    """A candidate with its files."""

    candidate: Candidate
    artifacts: dict[str, Artifact]


@dataclass(frozen=True)
class Searched:
    """What was found, and the widths of the one that was chosen."""

    found: Found
    analysis: Analysis
    kept: Mapping[Any, int]


def search(
    job: Job, limit: Limit, wanted: Wanted, device: Device, folder: Path, checkpoint: Path, resume: bool
) -> Searched:
    """Searches with candidates in `folder`. What was found is kept beside `checkpoint`, from where `resume` reads it.

    Raises EdgeKitError where the limit is out of reach, and says how near one comes.
    """
    record = record_of(checkpoint)
    options = job.options.round_to, job.options.method, job.options.allocation
    lasting = replace(wanted, timeout=None)  # how long a job may stand still changes nothing that is found
    asked = repr((limit, lasting, options, pruned_mark.fingerprint(job.original.module)))
    looking = _Search(job, limit, wanted, device, folder)
    if resume and record.is_file():
        found = _read(record, asked, limit)
    else:
        found = looking.run()
        atomic_files.write_json(record, {"asked": asked, **found.to_dict()})
    return Searched(found, looking.analysis, looking.widths(found.chosen.ratio, found.chosen.round_to))


def record_of(checkpoint: Path) -> Path:
    """Where the result of a search lies while the training runs."""
    return checkpoint.with_suffix(".search.json")


def _read(record: Path, asked: str, limit: Limit) -> Found:
    try:
        held = json.loads(record.read_text("utf-8"))
        same = held["asked"] == asked
        read = [Candidate(**{k: v for k, v in c.items() if k != "dominated"}) for c in held["candidates"]]
        found = Found(limit, tuple(read), Candidate(**held["chosen"]), str(held["reason"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EdgeKitError(f"{record} is damaged: {error!r}", "leave --resume out") from None
    if not same:
        raise EdgeKitError(
            f"{record} is the search of another pruning",
            "give the model and the options it was started with, or leave --resume out",
        )
    return found


class _Search:
    def __init__(self, job: Job, limit: Limit, wanted: Wanted, device: Device, folder: Path) -> None:
        self.job, self.limit, self.wanted, self.device, self.folder = job, limit, wanted, device, folder
        self.progress = job.progress
        self.roundings = (job.options.round_to,) if job.options.round_to else ROUNDINGS
        self.analysis: Analysis = job.analyze(job.original.module, min(self.roundings))
        self.built: dict[tuple[int, ...], _Built] = {}
        self.feeds: Sequence[np.ndarray] = feeds.golden_feeds(job.original, job.source)[0]
        self.most = {r: 0.99 * self.analysis.most(r) for r in self.roundings}

    def run(self) -> Found:
        with self.progress.step(f"Exporting the original to {', '.join(self.wanted.formats)}"):
            self.originals = self._export(self.job.original, "original")
        first, most = self.roundings[0], self.most[self.roundings[0]]
        low = min(0.8 * (1 - self.limit.value), 0.7 * most) if self.limit.relative else 0.1 * most
        self._try([(low + (most - low) * i / (FIRST - 1), first) for i in range(FIRST)])
        self._check_reach()
        for step in NEAR:
            near = self._crossing()
            self._try([(near + d * step, r) for r in self.roundings for d in (-1, 0, 1)])
        chosen = self._final() if self.limit.kind == "latency" else self._best(list(self.built.values()))
        candidates = tuple(sorted((b.candidate for b in self.built.values()), key=lambda c: -c.macs))
        return Found(self.limit, candidates, chosen.candidate, self._reason(candidates, chosen.candidate))

    def widths(self, ratio: float, round_to: int) -> Mapping[Any, int]:
        """How many units each group keeps in a candidate."""
        return self.job.allocated(self.analysis, ratio, round_to)

    def _try(self, asked: Sequence[tuple[float, int]]) -> None:
        """Exports candidates of (ratio, rounding) that have not been tried, and measures them."""
        fresh: list[_Built] = []
        with self.progress.step("Exporting candidates", len(asked)) as advance:
            for ratio, round_to in asked:
                ratio = min(max(ratio, 0.01), self.most[round_to])
                kept = self.widths(ratio, round_to)
                key = tuple(kept.values())
                if key not in self.built:
                    self.built[key] = self._build(ratio, round_to, kept)
                    fresh.append(self.built[key])
                advance()
        if self.limit.kind == "latency" and fresh:
            self._time(fresh, 1)
        for built in self.built.values():
            if built.candidate.load > DOUBT * DOUBT or self.limit.kind == "size":
                self._forget(built)

    def _build(self, ratio: float, round_to: int, kept: Mapping[Any, int]) -> _Built:
        module = self.job.without(self.job.original.module, self.analysis, kept)
        artifacts = self._export(self.job.changed(module), f"{len(self.built)}")
        macs, parameters = self.job.left(self.analysis, kept, module)
        shares: dict[str, float] = {}
        load = 0.0
        if self.limit.kind == "size":
            costs = {format: (a.size_bytes, self.originals[format].size_bytes) for format, a in artifacts.items()}
            shares, load = self._shares(costs)
        return _Built(Candidate(ratio, round_to, macs, parameters, shares, load, 0), artifacts)

    def _export(self, model: Any, name: str) -> dict[str, Artifact]:
        into = self.folder / name
        into.mkdir()
        return cost.write(model, self.job.source, self.wanted, into)[0]

    def _forget(self, built: _Built) -> None:
        for artifact in built.artifacts.values():
            artifact.path.unlink(missing_ok=True)

    def _shares(self, costs: Mapping[str, tuple[float, float]]) -> tuple[dict[str, float], float]:
        """Shares of the original, and the largest part of the limit, of (candidate, original) by format."""
        shares = {format: new / old for format, (new, old) in costs.items()}
        return shares, max(new / self.limit.allowed(old) for new, old in costs.values())

    def _time(self, built: Sequence[_Built], rounds: int) -> None:
        """Times the files of `built` in turn with the original's."""
        todo = [*self.originals.values(), *(artifact for b in built for artifact in b.artifacts.values())]
        with self.progress.step(f"Timing {len(built)} candidates", rounds * len(todo)) as advance:
            costs = cost.race(todo, self.feeds, self.device, self.wanted.threads, rounds, advance)
        for b in built:
            pairs = {f: (costs[a].value, costs[self.originals[f]].value) for f, a in b.artifacts.items()}
            shares, load = self._shares(pairs)
            old = b.candidate
            b.candidate = Candidate(old.ratio, old.round_to, old.macs, old.parameters, shares, load, rounds)

    def _check_reach(self) -> None:
        quickest = min((b.candidate for b in self.built.values()), key=lambda c: c.load)
        if quickest.load > DOUBT:
            raise self._out_of_reach(quickest)
        if not self.limit.relative and self._load_of_original() <= 1:
            raise EdgeKitError(
                f"the original takes no more than {self.limit.what} as it is", "ask for less, or leave it as it is"
            )

    def _load_of_original(self) -> float:
        """The largest part of the limit that a file of the original takes."""
        if self.limit.relative:
            return 1 / self.limit.value
        some = next(iter(self.built.values())).candidate
        worst = max(some.shares, key=lambda format: some.shares[format])
        return some.load / some.shares[worst]

    def _out_of_reach(self, quickest: Candidate) -> EdgeKitError:
        worst = max(quickest.shares, key=lambda format: quickest.shares[format])
        option = f"--target-{self.limit.kind}"
        within = f"{min(quickest.shares[worst] + 0.03, 0.99):.2f}x"
        return EdgeKitError(
            f"{self.limit.what} is out of reach: with {100 * (1 - quickest.macs):.0f} % of the multiply-adds gone, "
            f"about the most that can go, {worst} still takes {quickest.shares[worst]:.2f} of the original's",
            f"give {option} {within} or more, fewer formats, or another --precision",
        )

    def _crossing(self) -> float:
        """The ratio at which the limit is just kept, linear between those that were tried."""
        points = [(0.0, self._load_of_original())]
        points += sorted((b.candidate.ratio, b.candidate.load) for b in self.built.values())
        for (before, above), (ratio, below) in itertools.pairwise(points):
            if above > 1 >= below:
                return before + (ratio - before) * (above - 1) / (above - below)
        return points[-1][0]

    def _best(self, built: Sequence[_Built]) -> _Built:
        """The one that keeps the most of those within the limit."""
        fitting = [b for b in built if b.candidate.load <= 1]
        if not fitting:
            raise self._out_of_reach(min((b.candidate for b in built), key=lambda c: c.load))
        return max(fitting, key=lambda b: (b.candidate.macs, b.candidate.parameters))

    def _final(self) -> _Built:
        """Times the finalists in as many processes as a comparison has; those a single process flattered fall out."""
        timed: list[_Built] = []
        while True:
            rest = [b for b in self.built.values() if b not in timed and b.candidate.load <= DOUBT]
            rest.sort(key=lambda b: -b.candidate.macs)
            finalists = rest[:FINALISTS]
            if not finalists:
                return self._best(timed)
            # The quickest of them is in, so that one round mostly settles it.
            spare = next((b for b in rest[FINALISTS:] if b.candidate.load <= 1 / DOUBT), None)
            self._time([*finalists, *([spare] if spare else [])], schedule.ROUNDS)
            timed += [*finalists, *([spare] if spare else [])]
            if any(b.candidate.load <= 1 for b in timed):
                return self._best(timed)

    def _reason(self, candidates: Sequence[Candidate], chosen: Candidate) -> str:
        worst = max(chosen.shares, key=lambda format: chosen.shares[format])
        fitting = sum(c.load <= 1 for c in candidates)
        gone, width = 100 * (1 - chosen.macs), chosen.round_to
        return (
            f"{gone:.0f} % of the multiply-adds go, channels stay in multiples of {width}; "
            f"{fitting} of {len(candidates)} candidates are within {self.limit.what}, and this one keeps the most "
            f"({chosen.shares[worst]:.2f}x in {worst}, its worst format)"
        )

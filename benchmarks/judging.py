"""What the intervals of a drop hold where a file loses some samples wholly: simulated data sets, metric by metric.

    python benchmarks/judging.py [--sets 1000] [METRIC...]

For each metric populations are made of which the file loses 0.5, 1, 3 and 10 % wholly, with and without a little noise
in the other outputs, and of which the true drop is 3 points. Data sets of 20, 50 and 400 samples are drawn of them.
Told are how many of their 95 % intervals hold the true drop and how many ship at a limit of 1 point. Of the rows with
3 % lost and with a drop of 3 at least 93 % shall be held, and of the latter at most 3 % shall ship (errors, whose drop
is in percent, have no such row): where not, the row says so, and the command ends with 1. mAP takes a tenth of the
sets. All of them take about an hour on one core.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import losses
from rich.console import Console

from edgekit.reports import tables

LOST = (0.005, 0.01, 0.03, 0.1)
SAMPLES = (20, 50, 400)
LEAST_HELD, MOST_SHIPPED, LIMIT = 0.93, 0.03, 1.0
DROP_OF_3 = "drop of 3"
SLOW = "map"  # a tenth of the sets, of a smaller population


def main() -> int:
    """Simulates, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", nargs="*", default=list(losses.MAKERS), metavar="METRIC")
    parser.add_argument("--sets", type=int, default=1000, help="data sets of each size")
    given = parser.parse_args()
    console = Console()
    figures = [f"{what} {n}" for n in SAMPLES for what in ("held", "ship")]
    rows = tables.table("metric", "noise", "lost", "true drop", *figures, "")
    failed = False
    for name in given.metrics:
        size, sets = (3000, max(given.sets // 10, 10)) if name == SLOW else (20_000, given.sets)
        for noisy in (False, True):
            made = {f"{100 * lost:g} %": losses.population(name, lost, noisy, size) for lost in LOST}
            if name not in ("mae", "rmse"):
                made[DROP_OF_3] = losses.of_drop(name, 3.0, noisy, size)
            for lost, people in made.items():
                found = [losses.simulated(people, n, sets, LIMIT) for n in SAMPLES]
                bad = any(
                    (held < LEAST_HELD and lost in ("3 %", DROP_OF_3)) or (ship > MOST_SHIPPED and lost == DROP_OF_3)
                    for held, ship in found
                )
                failed |= bad
                shares = [f"{100 * share:.1f}" for pair in found for share in pair]
                rows.add_row(
                    name, "yes" if noisy else "no", lost, f"{people.drop:.2f}", *shares, "MISSED" if bad else ""
                )
    console.print(rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

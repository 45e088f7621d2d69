"""A seeded choice of float ops at places of int8 networks: see `pte_islands.py`, which tries all pairs."""

from __future__ import annotations

import random

from pte_audit import Case, trial
from pte_islands import IMAGE_OPS, OPS, PLACES, pairs

SOME = 8  # pairs: two seconds each


def choice() -> list[Case]:
    """Pairs of different ops and places."""
    every, chosen = list(pairs()), {}
    for case in random.Random(0).sample(every, len(every)):
        place, op = case.name.split(": ")
        if not any(place in taken or op in taken for taken in chosen):
            chosen[place, op] = case
    return list(chosen.values())[:SOME]


def test_float_ops_at_places_of_int8_networks() -> None:
    cases = choice()
    assert len(cases) == SOME
    assert [verdict for verdict in trial(cases, "network") if verdict.verdict != "ok"] == []


def test_every_op_is_tried_at_every_place() -> None:
    names = {case.name for case in pairs()}
    assert len(names) > 1000
    assert all(f"{place}: {op}" in names for place in PLACES for op in OPS)
    assert all(f"chain: {op}" in names for op in IMAGE_OPS)

"""A seeded choice of the audit of the XNNPACK partitioner: see `pte_audit.py`, which tries all cases."""

from __future__ import annotations

import pytest
from pte_audit import TABLES, TOGETHER, Case, images, trial, trials

# What was computed otherwise, refused, or mixed layouts: each row of these is tried at every run.
ALWAYS: dict[str, tuple[str, ...]] = {
    "alone": (
        "prelu after linear",
        "prelu after linear 3",
        "prelu twice",
        "prelu of two inputs",
        "gelu tanh rank 3",
        "max values rank 4 3 keep=False",
        "max values rank 4 1 keep=True",
        "addmm constants factors",
        "addmm constants matrix",
        "bilinear False scale 1.3",
        "batch_norm1d rank 2",
        "batch_norm1d affine=False",
        "conv_transpose2d late",
        *(
            "conv3d unbatched",
            "conv3d same",
            "conv3d of two inputs",
            "conv_transpose3d unbatched",
            "bilinear layer (2, 6)",
        ),
        "conv3d 3 8 {'stride': 3, 'padding': 2, 'dilation': 1, 'groups': 4, 'bias': True}",
        "conv_transpose3d 3 8 {'stride': 2, 'padding': 1, 'dilation': 2, 'groups': 2, 'bias': True} extra=1",
        "view (2, 3, 4, 2) (1, 2, 3, 2, 2, 2, 1)",
    ),
    "behind": ("softmax rank 4 -1", "log_softmax rank 4 3", "gelu tanh rank 4", "max both rank 4 1 keep=False"),
    "int8": (
        *("act " + name for name in ("Mish", "Softplus", "LogSigmoid", "CELU 0.5", "Hardshrink", "where", "max rows")),
        *("act " + name for name in ("comparisons", "amax", "position rows", "attention", "Softmax -1", "swapped")),
        *("act unfold", "act sort", "act correlation int8", "act transposed correlation", "act computed addmm"),
        *("mean rank 4 all", "channels last", "clone channels last", "pad rank 4 [1, 2, 0, 1, 2, 0] 1.5"),
    ),
}


@pytest.mark.parametrize("context", ALWAYS)
def test_cases_that_were_wrong(context: str) -> None:
    cases = [case for table in TABLES for case in table() if case.name in ALWAYS[context]]
    assert len(cases) == len(ALWAYS[context])
    assert [v for v in trial(cases, context) if v.verdict != "ok"] == []


def test_a_seeded_choice() -> None:
    cases = trials(0.05, contexts=("alone",))["alone"][:TOGETHER]
    assert [v for v in trial(cases, "alone") if v.verdict != "ok"] == []


def test_every_table_has_cases() -> None:
    cases: list[Case] = [case for table in TABLES for case in table()]
    assert len(cases) > 1000 and sum(map(images, cases)) > 300
    assert all(next(iter(table())) for table in TABLES)

"""The tiny network of kit.py, exported once per precision for all tests that only read its bundles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from kit import NET, network, samples

import edgekit
from edgekit.artifacts.bundles import Bundle
from edgekit.measuring import baseline_cache

# Here and in what tests start: threads that wait for each other spin, and each process has a core of its own.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def baselines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept of originals is kept for this session alone."""
    folder = tmp_path_factory.mktemp("baselines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baseline_cache, "folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.py and data.npz."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "net.py").write_text(NET)
    np.savez(folder / "data.npz", **samples())
    return folder


@pytest.fixture(scope="session")
def bundles(workshop: Path) -> dict[str, Bundle]:
    """Bundles of the tiny network, by precision, with all three formats."""
    return {
        precision: edgekit.export(
            network(), target="x86", precision=precision, data=samples(), out=workshop / precision, name="net"
        )
        for precision in ("fp32", "int8")
    }

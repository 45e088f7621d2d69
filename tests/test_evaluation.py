"""Evaluation in chunks gives what all samples at once give, whatever the chunks; memory does not grow with samples."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from kit import SHAPE, network, quick, samples

import edgekit
from edgekit.artifacts.bundles import Bundle
from edgekit.commands import compare, export
from edgekit.compression import training_samples
from edgekit.data import sources
from edgekit.errors import EdgeKitError
from edgekit.loading.model import Model, load
from edgekit.measuring import baseline_cache, evaluation, running
from edgekit.measuring.evaluation import Chunk, Evaluation, evaluate
from edgekit.measuring.run_cache import Journal
from edgekit.metrics import parity, table
from edgekit.types import TensorSpec
from edgekit.util import memory as util_memory
from edgekit.util.disk_arrays import Spool

RNG = np.random.default_rng(0)
BATCH_BYTES = 4 * (np.prod(SHAPE) + 10)  # inputs and outputs of a sample


def model(batch: int = 1) -> Model:
    return load(network(), inputs=[f"{batch}x3x16x16"])


def stream(count: int, size: int = 7) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of `size` whose first value tells the sample."""
    for start in range(0, count, size):
        numbers = torch.arange(start, min(start + size, count))
        yield numbers[:, None, None, None].expand(-1, *SHAPE).float(), numbers % 10


@pytest.mark.parametrize("again", [False, True], ids=["once", "again"])
@pytest.mark.parametrize(("batch", "in_chunk"), [(1, 1), (1, 10), (4, 3), (3, 100), (64, 1)])
def test_chunks_hold_every_sample_once_and_in_order(batch: int, in_chunk: int, again: bool) -> None:
    data = sources.load(stream(50))
    found = Evaluation(data, model(batch), once=not again, largest=int(BATCH_BYTES * batch * in_chunk))
    for _ in range(1 + again):
        chunks = list(found)
        assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert all(chunk.runs == in_chunk for chunk in chunks[:-1])
        rows = np.concatenate([chunk.cut(chunk.feeds)[0][:, 0, 0, 0] for chunk in chunks])
        np.testing.assert_array_equal(rows, np.arange(50))
        np.testing.assert_array_equal(np.concatenate([chunk.target for chunk in chunks]), np.arange(50) % 10)
        assert [chunk.start for chunk in chunks] == list(np.cumsum([0, *(chunk.runs for chunk in chunks)])[:-1])
        assert found.count == 50
    np.testing.assert_array_equal(found.first[0][:, 0, 0, 0, 0], np.arange(50)[::batch][: min(in_chunk, 8)])


def test_a_generator_that_was_read_once_still_calibrates() -> None:
    data = sources.load(stream(2000, 100))
    assert sum(chunk.count for chunk in Evaluation(data, model(), once=True, largest=int(BATCH_BYTES * 300))) == 2000
    assert sum(map(len, data.calibration)) == 600  # whole batches of the first samples
    with pytest.raises(EdgeKitError, match="not kept"):
        list(data.evaluation)


@pytest.mark.parametrize("batches", [[(3, 2), (4, 3)], [(3, 3), (2, None)], [(3, None), (5, 5)]])
def test_labels_stay_with_their_samples(batches: list[tuple[int, int | None]]) -> None:
    """Batches of the model's own size have the labels of their samples, or none where one of them has none."""
    total = sum(count for count, _ in batches)
    labels, given, start = np.full(total, -1), [], 0
    for count, labeled in batches:
        if labeled == count:
            labels[start : start + count] = np.arange(start, start + count)
        target = torch.arange(start, start + count) if labeled == count else None
        given.append((torch.arange(start, start + count)[:, None].float(), target))
        start += count
    specs = (TensorSpec("x", "float32", (2, 1)),)
    for (x,), real, target in sources.batches(sources.load(given).evaluation, specs):
        expected = labels[x[:real, 0].astype(int)]
        assert (target is None) == bool((expected < 0).any())
        assert target is None or target.tolist() == expected.tolist()


def test_samples_with_and_without_labels_are_refused() -> None:
    given = [(torch.zeros(4, *SHAPE), torch.zeros(4, dtype=torch.long)), (torch.zeros(6, *SHAPE), None)]
    with pytest.raises(EdgeKitError, match="10 samples but 4 labels"):
        Evaluation(sources.load(given), model())


def test_parity_in_parts_is_that_of_all() -> None:
    ref, out = RNG.standard_normal((2, 40, 3, 5)) * np.array([100.0, 0.1])[:, None, None, None]
    out = ref + out
    sums = parity.ParitySums()
    for part in (slice(0, 1), slice(1, 30), slice(30, 40)):
        sums.add([ref[part]], [out[part]])
    (found,) = sums.parities()
    noise = out - ref
    a, b = ref.reshape(40, -1), out.reshape(40, -1)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert found.sqnr_db == pytest.approx(10 * np.log10((ref**2).sum() / (noise**2).sum()))
    assert found.max_abs == pytest.approx(np.abs(noise).max())
    assert found.max_rel == pytest.approx(np.abs(noise).max() / np.abs(ref).max())
    assert found.cosine == pytest.approx(cosines.mean())
    assert found.samples == 40


def test_an_output_that_is_not_finite_ends_the_scores() -> None:
    chunks = [Chunk((np.zeros((4, 1, 1), np.float32),), 1, 4, np.zeros(4, int), i * 4, i == 2) for i in range(3)]
    good = np.eye(4, 3, dtype=np.float32)[:, None]
    bad = np.where(np.arange(4)[:, None, None] == 2, np.nan, good)
    files: dict[Any, Any] = {"good": lambda chunk: [good], "bad": lambda chunk: [bad if chunk.start == 4 else good]}
    scores, tallies = evaluate(chunks, lambda chunk: [good], files, table.METRICS["top1"])  # type: ignore[arg-type]
    assert scores is not None and len(scores) == 12
    assert tallies["good"].scores() is not None and tallies["bad"].scores() is None
    assert tallies["bad"].parity.max_abs == np.inf and tallies["bad"].parity.samples == 12


def test_memory_does_not_grow_with_the_samples() -> None:
    """A generator's images, and outputs and targets as large as they are, read once: 5 and 50 MB of each."""
    peaks = []
    specs = (TensorSpec("x", "float32", (1, 3, 32, 32)),)
    original = Model(torch.nn.Identity(), "m", "object", specs, specs, (), (), None)  # type: ignore[arg-type]

    def images(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for _ in range(count // 20):
            yield np.ones((20, 3, 32, 32), np.float32), np.zeros((20, 3, 32, 32))

    def run(chunk: Chunk) -> list[np.ndarray]:
        return [chunk.feeds[0] * 2]

    for count in (20, 400, 4000):  # the first imports what is needed
        tracemalloc.start()
        found = Evaluation(sources.load(images(count)), original, once=True, largest=1 << 20)
        _, tallies = evaluate(found, run, {"file": run}, table.METRICS["mae"])  # type: ignore[dict-item]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found.count == tallies["file"].parity.samples == count  # type: ignore[index]
    assert peaks[2] < 1.1 * peaks[1] < 30 << 20, peaks


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of seven samples."""
    quick(monkeypatch)
    monkeypatch.setattr(evaluation, "CHUNK_BYTES", int(BATCH_BYTES * 7))


def test_a_comparison_in_chunks_is_the_same(
    bundles: dict[str, Bundle], in_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = samples()

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(given["y"]), 12):
            yield given["x"][start : start + 12], given["y"][start : start + 12]

    jobs = []
    run = running.run
    monkeypatch.setattr(
        running, "run", lambda artifact, feeds, **o: (jobs.append(len(feeds[0])), run(artifact, feeds, **o))[1]
    )
    found = []
    for largest in (int(BATCH_BYTES * 25), 1 << 30):
        monkeypatch.setattr(evaluation, "CHUNK_BYTES", largest)
        result = edgekit.compare(network(), [bundles["int8"].path / "model.onnx"], data=pairs(), cache=False)
        found.append((result.artifacts[0].parity.to_dict(), result.artifacts[0].accuracy, result.baseline.accuracy))
    assert jobs[:2] == [25, 15] and 40 in jobs
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    assert found[0][1:] == found[1][1:]


def test_a_comparison_goes_on_in_the_chunk_where_it_failed(
    bundles: dict[str, Bundle], in_chunks: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    original, data = model(), sources.load(samples())
    (artifact,) = [a for a in bundles["fp32"].artifacts if a.format == "onnx"]
    ran = []
    run = running.run

    def fails(artifact: Any, feeds: Any, **options: Any) -> Any:
        ran.append(len(feeds[0]))
        if len(ran) == 4:
            raise EdgeKitError("the connection was lost", "check the cable")
        return run(artifact, feeds, **options)

    monkeypatch.setattr(running, "run", fails)

    def all_of_it(resume: bool) -> int:
        device = edgekit.runtimes.open_device("local:")
        with Journal(resume) as journal:
            reference = baseline_cache.Reference(original, "cpu", 1, cache=False)
            top1, found = table.METRICS["top1"], Evaluation(data, original)
            arguments = (found, reference, [artifact], top1, [], device, 1, journal, export.Silent())
            _, tallies = compare.run_all(*arguments)
            assert tallies[artifact].parity.samples == 40
            return journal.reused

    with pytest.raises(EdgeKitError, match="connection was lost"):
        all_of_it(resume=False)
    assert all_of_it(resume=True) == 3
    assert ran == [7, 7, 7, 7, 7, 7, 5]


@pytest.mark.parametrize("in_memory", [1 << 30, 0], ids=["memory", "disk"])
def test_training_samples_are_the_same_in_memory_and_on_disk(in_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, labels and held-out samples are those of the order that the seeds give, images normalized."""
    monkeypatch.setattr(training_samples, "IN_MEMORY", in_memory)
    images = RNG.integers(0, 256, (2100, *SHAPE)).astype(np.uint8)
    labels = np.arange(2100) % 10
    data = sources.load({"x": images, "y": labels}, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    memory = training_samples.read(data.evaluation, model(), seed=3)
    assert isinstance(memory.inputs[0], training_samples.Stored)
    assert isinstance(memory.inputs[0].rows, np.ndarray) == bool(in_memory) and memory.inputs[0].rows.dtype == np.uint8
    mean, std = (np.array(v, np.float32).reshape(1, 3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    expected = torch.from_numpy((images * np.float32(1 / 255) - mean) / std)
    order = torch.randperm(2100, generator=torch.Generator().manual_seed(3))
    aside, rest = order[:96], order[96:]  # 5 % of them, in whole batches of 32
    assert len(memory) == 2004 and len(memory.held_out) == 3
    torch.testing.assert_close(torch.cat([x for (x,) in memory.held_out]), expected[aside], rtol=0, atol=1e-6)
    shuffled = rest[torch.randperm(2004, generator=torch.Generator().manual_seed(5))]
    for (x,), y in memory.epoch(torch.Generator().manual_seed(5)):
        picked, shuffled = shuffled[:32], shuffled[32:]
        torch.testing.assert_close(x, expected[picked], rtol=0, atol=1e-6)
        assert y is not None and y.tolist() == labels[picked].tolist()
    assert isinstance(memory.held_out, training_samples.HeldOut)
    assert [len(x) for (x,) in memory.held_out.cut(40)] == [40, 40]


def test_rows_on_disk_are_read_as_numpy_reads_them() -> None:
    spool = Spool()
    arrays = [RNG.integers(0, 9, (7, 2, 3)), RNG.random((5,)).astype(np.float32), np.zeros((4, 0)), np.array([True])]
    kept = [spool.put(array) for array in arrays]
    for rows, array in zip(kept, arrays, strict=True):
        assert (rows.shape, rows.ndim, rows.dtype, rows.nbytes) == (array.shape, array.ndim, array.dtype, array.nbytes)
        for index in (
            slice(None),
            slice(1, 3),
            np.array([0]),
            RNG.permutation(len(array)),
            np.arange(len(array))[::-1],
        ):
            np.testing.assert_array_equal(rows[index], array[index])


def test_a_large_model_is_lowered_format_by_format_to_the_same_files(
    bundles: dict[str, Bundle], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(util_memory, "LARGE", 0)
    alone = edgekit.export(network(), target="x86", precision="fp32", data=samples(), out=tmp_path, name="net")
    hashes = [{e["format"]: e["sha256"] for e in b.manifest["artifacts"]} for b in (alone, bundles["fp32"])]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 3
    assert [e["format"] for e in alone.manifest["artifacts"]] == [a.format for a in bundles["fp32"].artifacts]

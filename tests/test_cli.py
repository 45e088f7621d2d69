"""The command line: what it imports, prints, writes and returns."""

from __future__ import annotations

import io
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from kit import Ran, command, environment, invoke, quick, samples
from rich.console import Console

from edgekit.artifacts.bundles import Bundle
from edgekit.cli import app
from edgekit.commands import profile
from edgekit.quant.ptq.recipes import RECIPES
from edgekit.targets import TARGETS
from edgekit.util.progress import Terminal

COMMANDS = sorted(info.name or info.callback.__name__ for info in app.app.registered_commands)
HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "executorch", "scipy", "PIL", "torchmetrics")
# The keys that other programs read, as the design lists them.
ARTIFACT_KEYS = {
    "path", "format", "precision", "runtime", "device", "size_bytes", "accuracy", "parity", "latency_ms",
    "baseline_latency_ms", "speedup", "load_ms", "first_ms", "peak_rss_bytes", "verdict", "reasons",
}  # fmt: skip
ACCURACY_KEYS = {"metric", "n", "value", "baseline", "drop_points", "ci95_points"}
PARITY_KEYS = {"sqnr_db", "max_abs", "agreement"}
LATENCY_KEYS = {"p50", "p90", "p99", "n", "threads"}


def test_the_commands_are_those_of_the_design() -> None:
    assert {"export", "compare", "profile", "verify", "inspect", "doctor", "targets", "demo"} <= set(COMMANDS)


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_imports_nothing_heavy(name: str) -> None:
    code = (
        "import sys\nfrom edgekit.cli.app import app\n"
        f"try:\n    app({[*name.split(), '--help']!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert "HEAVY []" in ran.stdout
    assert "Usage:" in ran.stdout


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command("--help"), env=environment(), capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    print(f"edgekit --help: {statistics.median(seconds):.2f} s")
    assert statistics.median(seconds) < 1


def test_help_names_every_precision_and_target(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(invoke(capfd, "export", "--help").out.split())
    for name in (*RECIPES, *TARGETS):
        assert name in text, name


@pytest.mark.parametrize(
    "args",
    [("export",), ("export", "m.pt"), ("compare", "m.pt"), ("compare", "m.pt", "a.onnx"), ("nothing",),
     ("targets", "--none"), ("profile", "a.onnx", "--threads", "0"), ("compare", "--max-drop", "much")],
)  # fmt: skip
def test_wrong_usage_is_2(args: tuple[str, ...], capfd: pytest.CaptureFixture) -> None:
    ran = invoke(capfd, *args)
    assert ran.code == 2
    assert "Usage:" in ran.err


def test_targets(capfd: pytest.CaptureFixture) -> None:
    ran = invoke(capfd, "targets")
    assert ran.code == 0
    assert all(name in ran.out for name in TARGETS)
    assert list(json.loads(invoke(capfd, "targets", "--json", "-").out)) == list(TARGETS)


@pytest.fixture
def place(workshop: Path, bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with net.py, eight samples and a bundle of the int8 files for ONNX and TFLite."""
    shutil.copy(workshop / "net.py", tmp_path)
    np.savez(tmp_path / "data.npz", **samples(8))
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch)
    return tmp_path


def compare(capfd: pytest.CaptureFixture, bundles: dict[str, Bundle], *more: object) -> Ran:
    """fp32 and int8 of two formats."""
    files = [bundles[precision].path / f"model{suffix}" for suffix in (".onnx", ".tflite") for precision in bundles]
    return invoke(capfd, "compare", "net.py:make", *files, "--data", "data.npz", *more)


def test_compare_gives_the_keys_of_the_design(
    place: Path, bundles: dict[str, Bundle], capfd: pytest.CaptureFixture
) -> None:
    ran = compare(capfd, bundles, "--json", "-")
    assert ran.code == 0
    result = json.loads(ran.out)  # standard output is the JSON alone
    assert {"baseline", "artifacts"} <= result.keys()
    assert len(result["artifacts"]) == 4
    for artifact in result["artifacts"]:
        assert artifact.keys() >= ARTIFACT_KEYS
        assert artifact["accuracy"].keys() >= ACCURACY_KEYS
        assert artifact["parity"].keys() >= PARITY_KEYS
        assert artifact["latency_ms"].keys() >= LATENCY_KEYS
        assert artifact["baseline_latency_ms"].keys() >= LATENCY_KEYS
        low, high = artifact["accuracy"]["ci95_points"]
        assert low < artifact["accuracy"]["drop_points"] < high
        assert artifact["verdict"] in ("ship", "reject", "inconclusive")
        assert artifact["size_bytes"] == Path(artifact["path"]).stat().st_size
        assert artifact["peak_rss_bytes"] > 1e7
        assert artifact["load_ms"] > 0 and artifact["first_ms"] > 0
        assert artifact["speedup"] == artifact["baseline_latency_ms"]["p50"] / artifact["latency_ms"]["p50"]


@pytest.mark.parametrize(("points", "code"), [("1", 3), ("90", 0)])
def test_the_gate_asks_for_proof(
    points: str, code: int, place: Path, bundles: dict[str, Bundle], capfd: pytest.CaptureFixture
) -> None:
    """Eight samples cannot prove a drop of at most one point, however well the files do."""
    ran = invoke(
        capfd, "compare", "net.py:make", bundles["fp32"].path / "model.onnx", "--data", "data.npz",
        "--max-drop", points, "--json", "result.json",
    )  # fmt: skip
    assert ran.code == code
    assert ("gate failed" in ran.err) == (code == 3)
    assert "model.onnx" in ran.out
    assert json.loads((place / "result.json").read_text())["artifacts"][0]["accuracy"]["n"] == 8


def test_the_example_from_export_to_verify(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trained network that EdgeKit carries, at int8 in every format, beside the fp32 files."""
    quick(monkeypatch)
    example = app.example_folder()
    arrays = dict(np.load(example / "data.npz"))
    np.savez(tmp_path / "data.npz", **{**arrays, "x": arrays["x"][::4], "y": arrays["y"][::4]})
    given = ("--code", example / "model.py", "--data", tmp_path / "data.npz")
    for precision in ("fp32", "int8"):
        ran = invoke(
            capfd, "export", example / "model.pt", *given, "--target", "linux-arm64", "--precision", precision,
            "--out", tmp_path / precision,
        )  # fmt: skip
        assert ran.code == 0, ran.err
    folders = [tmp_path / precision / "model-linux-arm64" for precision in ("fp32", "int8")]
    ran = invoke(capfd, "compare", example / "model.pt", *folders, *given, "--json", "-")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert result["baseline"]["accuracy"] > 0.85
    found = [(a["precision"], a["format"]) for a in result["artifacts"]]
    assert found == [(p, f) for p in ("fp32", "int8") for f in ("executorch", "onnx", "tflite")]
    for artifact in result["artifacts"]:
        assert artifact["accuracy"]["n"] == 500
        assert artifact["accuracy"]["baseline"] == result["baseline"]["accuracy"]
        if artifact["precision"] == "fp32":
            assert artifact["parity"]["max_rel"] < 1e-4
        else:
            assert abs(artifact["accuracy"]["drop_points"]) <= 1
            assert artifact["size_bytes"] < 200_000
    ran = invoke(capfd, "verify", folders[1])
    assert ran.code == 0, ran.out


def test_profile_and_inspect(place: Path, bundles: dict[str, Bundle], capfd: pytest.CaptureFixture) -> None:
    model = bundles["int8"].path / "model.tflite"
    result = json.loads(invoke(capfd, "profile", model, "--json", "-").out)
    assert result["latency_ms"].keys() >= LATENCY_KEYS
    assert result["precision"] == "int8"
    assert invoke(capfd, "inspect", model).code == 0
    assert invoke(capfd, "inspect", "net.py:make", "--input", "1x3x16x16").code == 0


def test_verify_of_a_whole_bundle_is_0(bundles: dict[str, Bundle], capfd: pytest.CaptureFixture) -> None:
    ran = invoke(capfd, "verify", bundles["int8"].path, "--json", "-")
    assert ran.code == 0
    assert [replay["ok"] for replay in json.loads(ran.out)["artifacts"]] == [True] * 3


def test_results_can_go_to_a_device_and_through_a_link(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert invoke(capfd, "targets", "--json", "/dev/null").code == 0
    assert Path("/dev/null").is_char_device()
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    assert invoke(capfd, "targets", "--json", tmp_path / "link.json").code == 0
    assert (tmp_path / "link.json").is_symlink()
    assert list(json.loads((tmp_path / "real.json").read_text())) == list(TARGETS)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "profile", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        app.app(["profile", "a.onnx"])


FAILING = """
from edgekit.cli import app
from edgekit.commands import profile
from edgekit.errors import EdgeKitError

def fail(*args, **options):
    print("chatter")
    raise {error}

profile.profile = fail
app.main()
"""
ENDINGS = {  # what is raised → what is said at the end
    'EdgeKitError("what [/] it is", "help [red]me")': "error: what [/] it is\n  help: help [red]me\n",
    'KeyError("x")': "KeyError: 'x'\n",
}


@pytest.mark.parametrize("error", ENDINGS)
def test_errors_reach_the_terminal_and_chatter_does_not(error: str) -> None:
    """And markup in messages is printed, not obeyed."""
    run = [sys.executable, "-c", FAILING.format(error=error), "profile", "a.onnx"]
    ran = subprocess.run(run, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr.endswith(ENDINGS[error])
    assert "chatter" not in ran.stdout + ran.stderr
    assert ("Traceback" in ran.stderr) == (not error.startswith("EdgeKitError"))


def test_verbose_keeps_what_libraries_say(tmp_path: Path) -> None:
    ran = subprocess.run(command("targets", "--verbose"), cwd=tmp_path, env=environment(), check=True)
    assert ran.returncode == 0
    assert (tmp_path / "edgekit.log").is_file()


def test_a_reader_that_has_seen_enough_gets_no_traceback() -> None:
    shell = f"{' '.join(command('targets'))} | true"
    ran = subprocess.run(shell, shell=True, env=environment(), capture_output=True, text=True, check=True)
    assert ran.stderr == ""


def test_a_full_standard_output_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(command("targets"), env=environment(), stdout=full, stderr=subprocess.PIPE, check=False)
    assert ran.returncode == 1
    assert b"No space left on device" in ran.stderr
    assert b"Traceback" not in ran.stderr


def test_progress_prints_nothing_for_short_steps_off_a_terminal() -> None:
    file = io.StringIO()
    with Terminal(Console(file=file, force_terminal=False)).step("Short", 3) as advance:
        advance()
    assert file.getvalue() == ""


def test_progress_leaves_a_line_for_long_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    clock = iter([0.0, 2.5, 2.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with Terminal(Console(file=file, force_terminal=False)).step("Long"):
        pass
    assert file.getvalue() == "Long: 2.5 s\n"


def test_progress_gives_the_cursor_back_after_an_error() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)
    out = sys.stdout
    with pytest.raises(ValueError, match="inner"), Terminal(console).step("Step", 2) as advance:
        assert sys.stdout is out  # what libraries print is not drawn into the terminal
        advance()
        raise ValueError("inner")
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert file.getvalue().count(hide) == file.getvalue().count(show) == 1
    assert file.getvalue().index(show) > file.getvalue().index(hide)

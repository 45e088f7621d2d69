"""The command line: one function per command, which parses, calls once and prints."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from edgekit.errors import Checks, EdgeKitError, UsageError, single_errors

app = typer.Typer(
    name="edgekit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Compress PyTorch models, export them to ExecuTorch, ONNX and TFLite, and prove every file.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

LOG = Path("edgekit.log")
FREE_SPACE = "free some space there, or set TMPDIR to a folder with more"
GC_THRESHOLDS = (100_000, 20, 100)  # torch's modules and graphs are millions of objects that stay
# What goes wrong with a machine rather than with EdgeKit → what to do about it.
MACHINE_ERRORS = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EFBIG: "raise the limit on file sizes: ulimit -f",
    errno.EACCES: "check who may read and write it",
    errno.EPERM: "check who may read and write it",
    errno.EROFS: "choose a place that can be written to",
    errno.EMFILE: "raise the limit on open files: ulimit -n",
    errno.ENFILE: "close other programs",
    errno.ENOMEM: "close other programs",
    errno.EAGAIN: "close other programs: no more processes can be started",
    errno.EIO: "check the disk",
    errno.ENAMETOOLONG: "choose a shorter name",
}

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model file, FILE.py:factory or package.module:factory.")
]
CodeOption = Annotated[
    str | None,
    typer.Option(
        "--code", metavar="FILE.py|MODULE[:NAME]", help="Where the classes or the factory of a weights file live."
    ),
]
InputOption = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="SPEC", help="Input shape: 1x3x224x224 or name:float32[1,3,224,224]; repeatable."),
]
DataOption = Annotated[
    str | None, typer.Option("--data", metavar="DATA", help=".npz, .pt, folder of class folders, or FILE.py:function.")
]
NameOption = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="Name of the result's folder; else that of the file or factory."),
]
MeanOption = Annotated[
    str | None, typer.Option("--mean", metavar="M[,M,M]", help="Mean per channel of images scaled to 0..1.")
]
StdOption = Annotated[str | None, typer.Option("--std", metavar="S[,S,S]", help="Standard deviation per channel.")]
JsonOption = Annotated[
    str | None, typer.Option("--json", metavar="FILE|-", help="Write the results as JSON; - is standard output.")
]
ThreadsOption = Annotated[int, typer.Option("--threads", min=1, metavar="N", help="Threads of each runtime.")]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="URI",
        help="Where files run: local:, python:PATH, ssh://user@host, adb:SERIAL or qemu:arm64?cpu=cortex-a76.",
    ),
]
TimeoutOption = Annotated[
    float | None,
    typer.Option(
        "--timeout", min=1, metavar="SECONDS", help="End a runtime without progress for so long (20, emulated 600)."
    ),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on from what a command that failed has measured already.")
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", help=f"Show every note, and keep what the libraries say in {LOG}.")
]


@app.command()
def export(
    model: ModelArgument,
    target: Annotated[str, typer.Option("--target", metavar="NAME", help="android, ios, linux-arm64 or x86.")],
    format: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="F[,F]", help="Of executorch, onnx, tflite; else those that can hold the model."
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            metavar="P",
            help="fp32, fp16, int8, int8-dynamic or int8-weight-only; else int8 with --data, or the best without.",
        ),
    ] = None,
    data: DataOption = None,
    input: InputOption = None,
    code: CodeOption = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder that the bundle is written into.")] = Path(),
    name: NameOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    tflite_layout: Annotated[
        str, typer.Option("--tflite-layout", metavar="nchw|nhwc", help="Layout of images in the .tflite file.")
    ] = "nchw",
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            metavar="POINTS",
            min=0,
            help="int8: keep the fewest layers in float with which top-1 drops by at most this on labeled data.",
        ),
    ] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="int8: show what each layer costs when it alone is quantized.")
    ] = False,
    prune: Annotated[
        float | None,
        typer.Option(
            "--prune", metavar="SHARE", help="First take out that share of the multiply-adds and fine-tune: 0.3."
        ),
    ] = None,
    qat: Annotated[
        bool, typer.Option("--qat", help="int8: train with the rounding in the network, towards its fp32 outputs.")
    ] = False,
    train: Annotated[
        str | None,
        typer.Option("--train", metavar="DATA", help="--qat: samples to train on; else those for calibration."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", metavar="N", help="--qat: of training; else by the number of samples.")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", metavar="R", help="--qat: the highest of the one-cycle schedule (0.0003)."),
    ] = None,
    augment: Annotated[
        bool, typer.Option("--augment/--no-augment", help="--qat: train on shifted, mirrored and mixed images too.")
    ] = True,
    patience: Annotated[
        int | None,
        typer.Option("--patience", min=1, metavar="N", help="--qat: stop after N epochs without progress."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="--qat: of the training (0).")] = None,
    finetune: Annotated[
        str | None,
        typer.Option(
            "--finetune", metavar="FILE.py:NAME", help="--qat: your own training, NAME(student, teacher, samples)."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="--qat: go on from the checkpoint of a run that ended early.")
    ] = False,
    json: JsonOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Compress and export a model for a target, and check every file against the original."""
    with session(verbose, json) as ui:
        from edgekit.commands import preflight
        from edgekit.compression.qat_training import Qat

        training = Qat(train, epochs, learning_rate, augment, patience, seed or 0, resume, finetune)
        if not qat and (seed is not None or training != Qat()):
            ui.checks.errors.append(
                EdgeKitError("options of a training are given, and no --qat", "add --qat, or leave them out")
            )
        given: dict[str, Any] = {
            "target": target,
            "formats": format,
            "precision": precision,
            "data": data,
            "inputs": tuple(input or ()),
            "code": code,
            "out": out,
            "name": name,
            **ui.normalization(mean, std),
            "tflite_layout": tflite_layout,
            "max_drop": max_drop,
            "sensitivity": sensitivity,
            "qat": training if qat else None,
            "prune": prune,
        }
        ui.check(preflight.check_export, model, **given)
        from edgekit.commands import export as pipeline
        from edgekit.reports import tables

        bundle = pipeline.export(model, **given, progress=ui.progress)
        shown = tables.bundle_report(bundle, layers=sensitivity)
        ui.show(shown, {"path": str(bundle.path), **bundle.manifest})


@app.command()
def compare(
    model: ModelArgument,
    artifacts: Annotated[
        list[str], typer.Argument(metavar="ARTIFACT|BUNDLE...", help="Exported files or bundle folders.")
    ],
    data: Annotated[
        str, typer.Option("--data", metavar="DATA", help=".npz, .pt, folder of class folders, or FILE.py:function.")
    ],
    input: InputOption = None,
    code: CodeOption = None,
    metric: Annotated[
        str,
        typer.Option(
            "--metric",
            metavar="NAME|FILE.py:FUNCTION",
            help="top1, top5, f1, miou, map, cosine, mae, rmse, or your own: (outputs, target) → scores, one a sample.",
        ),
    ] = "top1",
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            metavar="POINTS",
            help="Gate: exit with 3 unless the drop is proven to be at most this (mae, rmse: percent of the error).",
        ),
    ] = None,
    device: DeviceOption = "local:",
    baseline_device: Annotated[
        str, typer.Option("--baseline-device", metavar="cpu|cuda", help="Where the original runs.")
    ] = "cpu",
    threads: ThreadsOption = 1,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, metavar="N", help="Processes that time each file, in turn (3).")
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Measure the original anew, whatever an earlier command measured of it.")
    ] = False,
    mean: MeanOption = None,
    std: StdOption = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the parity ladder: the first step and op where outputs diverge.")
    ] = False,
    timeout: TimeoutOption = None,
    resume: ResumeOption = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write what is shown as one HTML page, too.")
    ] = None,
    json: JsonOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Measure exported files against the original: accuracy, latency, memory, size."""
    with session(verbose, json) as ui:
        from edgekit.commands import preflight
        from edgekit.util import atomic_files

        if html is not None:
            ui.checks.run(atomic_files.check_writable, html)
        given: dict[str, Any] = {
            "data": data,
            "inputs": tuple(input or ()),
            "code": code,
            "metric": metric,
            "max_drop": max_drop,
            "device": device,
            "baseline_device": baseline_device,
            "threads": threads,
            "rounds": rounds,
            "cache": not no_cache,
            **ui.normalization(mean, std),
            "explain": explain,
            "timeout": timeout,
            "resume": resume,
        }
        ui.check(preflight.check_compare, model, artifacts, **given)
        from edgekit.commands import compare as commands_compare
        from edgekit.reports import tables
        from edgekit.reports.html import write

        comparison = commands_compare.compare(model, artifacts, **given, progress=ui.progress)
        shown = tables.comparison_report(comparison)
        ui.show(shown, comparison.to_dict())
        if html is not None:
            write(html, f"{model} and its exported files", shown)
        if max_drop is not None and any(not m.within(max_drop) for m in comparison.artifacts):
            ui.fail_gate(f"a drop of at most {max_drop:g}{comparison.unit} is not proven for every artifact")


@app.command()
def profile(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT|BUNDLE", help="A .pte, .onnx or .tflite file, or a bundle folder.")
    ],
    ops: Annotated[bool, typer.Option("--ops", help="Also time each op, by the runtime's own profiler.")] = False,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="With --ops: write a Chrome trace (JSON).")
    ] = None,
    device: DeviceOption = "local:",
    threads: ThreadsOption = 1,
    timeout: TimeoutOption = None,
    resume: ResumeOption = False,
    json: JsonOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Measure latency, load time and memory of an exported file, or of each file of a bundle."""
    with session(verbose, json) as ui:
        ui.check()
        from edgekit.commands import profile as commands_profile
        from edgekit.reports import tables

        given: dict[str, Any] = {"device": device, "threads": threads, "ops": ops, "timeout": timeout, "resume": resume}
        result = commands_profile.profile(artifact, trace=trace, **given, progress=ui.progress)
        if isinstance(result, tuple):
            whole = {"path": str(artifact), "artifacts": [profile.to_dict() for profile in result]}
            ui.show(tables.profiles_report(result), whole)
        else:
            ui.show(tables.profile_report(result), result.to_dict())


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that export wrote.")],
    device: DeviceOption = "local:",
    timeout: TimeoutOption = None,
    json: JsonOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Check a bundle's hashes and replay its golden inputs."""
    with session(verbose, json) as ui:
        ui.check()
        from edgekit.commands import verify as commands_verify
        from edgekit.reports import tables

        replays = commands_verify.verify(bundle, device=device, timeout=timeout, progress=ui.progress)
        ui.show(tables.replay_report(replays), {"artifacts": [replay.to_dict() for replay in replays]})
        if any(replay.problem for replay in replays):
            ui.fail_gate("the bundle is not what was exported")


@app.command()
def prune(
    model: ModelArgument,
    ratio: Annotated[
        float | None,
        typer.Option(
            "--ratio", metavar="SHARE", help="Share of the multiply-adds to remove, between 0 and 1: 0.5 halves them."
        ),
    ] = None,
    target_latency: Annotated[
        str | None,
        typer.Option(
            "--target-latency", metavar="T", help="Search for the ratio: 0.6x of the original file's p50, or 5ms."
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option("--target-size", metavar="S", help="Search for the ratio: 0.5x of the original file, or 800kB."),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            "--sparsity", metavar="P", help="Set weights to zero and keep all shapes: 0.8 of each layer, or 2:4."
        ),
    ] = None,
    block: Annotated[
        str | None, typer.Option("--block", metavar="OxI", help="--sparsity: zeros in blocks of outputs x inputs: 4x1.")
    ] = None,
    data: DataOption = None,
    train: Annotated[
        str | None,
        typer.Option("--train", metavar="DATA", help="Samples to fine-tune on; else those that calibration may read."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="M", help="l1, l2, fpgm, taylor or wanda; wanda with data, else l2."),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            "--allocation",
            metavar="A",
            help="What each layer loses: uniform, global or sensitivity; sensitivity with data, else global.",
        ),
    ] = None,
    schedule: Annotated[
        str, typer.Option("--schedule", metavar="S", help="one-shot, or cubic: in steps with a training after each.")
    ] = "one-shot",
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", help="Of the cubic schedule; epochs are shared out (4).")
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", metavar="N", help="Of fine-tuning; 0 for none; else by the number of samples."),
    ] = None,
    finetune: Annotated[
        str | None,
        typer.Option("--finetune", metavar="FILE.py:NAME", help="Your own training, NAME(student, teacher, samples)."),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", metavar="R", help="The highest of the one-cycle schedule.")
    ] = None,
    augment: Annotated[
        bool, typer.Option("--augment/--no-augment", help="Fine-tune on shifted, mirrored and mixed images too.")
    ] = True,
    patience: Annotated[
        int | None,
        typer.Option(
            "--patience", min=1, metavar="N", help="Stop after N epochs without progress on held-out samples."
        ),
    ] = None,
    round_to: Annotated[
        int | None,
        typer.Option(
            "--round-to",
            metavar="N",
            help="Channels are kept in multiples of N, from 2 N on; 8, and a search tries 8 and 16.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the fine-tuning.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint of a run that ended early.")
    ] = False,
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="F[,F]", help="Also export and time: executorch, onnx, tflite (all three)."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", metavar="P", help="Of the files: fp32 (default), fp16, int8, … ."),
    ] = None,
    device: DeviceOption = "local:",
    threads: ThreadsOption = 1,
    timeout: TimeoutOption = None,
    input: InputOption = None,
    code: CodeOption = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder that the result is written into.")] = Path(),
    name: NameOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    json: JsonOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Take out channels, or set weights to zero, and fine-tune what is left towards the original.

    One of --ratio, --target-latency, --target-size and --sparsity says how much.
    """
    with session(verbose, json) as ui:
        from edgekit.commands import preflight

        given: dict[str, Any] = {
            "ratio": ratio,
            "target_latency": target_latency,
            "target_size": target_size,
            "sparsity": sparsity,
            "block": block,
            "data": data,
            "train": train,
            "method": method,
            "allocation": allocation,
            "schedule": schedule,
            "steps": steps,
            "epochs": epochs,
            "finetune": finetune,
            "learning_rate": learning_rate,
            "augment": augment,
            "patience": patience,
            "round_to": round_to,
            "seed": seed,
            "formats": format,
            "precision": precision,
            "device": device,
            "threads": threads,
            "timeout": timeout,
            "inputs": tuple(input or ()),
            "code": code,
            "out": out,
            "name": name,
            **ui.normalization(mean, std),
            "resume": resume,
        }
        ui.check(preflight.check_prune, model, **given)
        from edgekit.commands import prune as pruning
        from edgekit.reports.pruned import pruning_report

        pruned = pruning.prune(model, **given, progress=ui.progress)
        ui.show(pruning_report(pruned), {"path": str(pruned.path), **pruned.to_dict()})


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|ARTIFACT|BUNDLE", help="A model in any form, an exported file, or a bundle."),
    ],
    input: InputOption = None,
    data: DataOption = None,
    code: CodeOption = None,
    json: JsonOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Show a model's layers, or an exported file's ops, delegates, inputs and outputs."""
    with session(verbose, json) as ui:
        from edgekit.artifacts import bundles as bundle
        from edgekit.artifacts import summary
        from edgekit.commands import preflight
        from edgekit.loading import model_summary
        from edgekit.reports.summary import render

        result: Any
        if bundle.is_bundle(Path(model)):
            ui.check()
            result = summary.inspect_bundle(bundle.read(Path(model)))
        elif Path(model).is_file() and summary.is_artifact(Path(model)):
            ui.check()
            result = summary.inspect_artifact(Path(model))
        else:
            ui.check(preflight.check_inspect, model, data=data, inputs=tuple(input or ()), code=code)
            from edgekit.loading import with_data

            loaded, _ = with_data.load(model, data=data, inputs=tuple(input or ()), code=code, mean=(), std=())
            result = model_summary.inspect_model(loaded, model)
        ui.show(render(result), result.to_dict())


@app.command()
def doctor(
    deep: Annotated[
        bool, typer.Option("--deep", help="Also import every dependency, each in a process of its own.")
    ] = False,
    device: Annotated[
        str | None, typer.Option("--device", metavar="URI", help="Show what this device is and has instead.")
    ] = None,
    json: JsonOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Show what works on this machine, and what to install."""
    with session(verbose, json) as ui:
        ui.check()
        if device is not None:
            from edgekit.doctor.device import diagnose_device
            from edgekit.reports.doctor import render_device

            found = diagnose_device(device)
            ui.show(render_device(found), found.to_dict())
            if not found.ok:
                raise EdgeKitError(found.verdict, "install what the table names")
            return
        from edgekit.doctor import packages
        from edgekit.reports.doctor import render

        diagnosis = packages.diagnose(deep=deep)
        ui.show(render(diagnosis), diagnosis.to_dict())
        if not diagnosis.ok:
            raise EdgeKitError("something that EdgeKit needs is missing or broken", "install what the table names")


@app.command()
def targets(json: JsonOption = None, verbose: VerboseOption = False) -> None:
    """List the deployment targets."""
    with session(verbose, json) as ui:
        ui.check()
        from dataclasses import asdict

        from edgekit.reports import tables
        from edgekit.targets import TARGETS

        ui.show(tables.targets_report(), {name: asdict(target) for name, target in TARGETS.items()})


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder that the bundle is written into.")] = Path(
        "edgekit-demo"
    ),
    json: JsonOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Export the Fashion-MNIST example at int8 and prove it: every step on a model that comes with EdgeKit."""
    with session(verbose, json) as ui:
        ui.check()
        from edgekit.commands import compare as commands_compare
        from edgekit.commands import export as pipeline
        from edgekit.reports import tables

        here = example_folder()
        given: dict[str, Any] = {
            "code": str(here / "model.py"),
            "data": str(here / "data.npz"),
            "progress": ui.progress,
        }
        bundle = pipeline.export(str(here / "model.pt"), name="fashion_mnist", target="android", out=out, **given)
        comparison = commands_compare.compare(str(here / "model.pt"), [bundle], **given)
        ui.show(tables.bundle_report(bundle))
        ui.show(tables.comparison_report(comparison), comparison.to_dict())


def example_folder() -> Path:
    """Returns the folder of the example that EdgeKit carries, in a checkout as in a wheel."""

    from importlib.resources import files

    return Path(str(files("edgekit.examples.fashion_mnist")))


class Terminal:
    """The user's own terminal: tables go to standard output, progress and errors to standard error."""

    def __init__(self, out: int, err: int, json_to: str | None, verbose: bool) -> None:
        from edgekit.reports.console import PlainConsole
        from edgekit.util.progress import Terminal as TerminalProgress
        from edgekit.util.progress import every_note

        every_note.set(verbose)
        self.json_to = json_to
        # With --json -, standard output is the JSON alone.
        # A terminal that has no sign for a character shows another one, after minutes of work.
        self.out, self.err = (
            PlainConsole(file=os.fdopen(number, "w", errors="replace", closefd=False), highlight=False)
            for number in (out, err)
        )
        if not self.out.is_terminal:
            self.out.width = max(self.out.width, 160)  # a pipe has no width of its own: do not wrap tables at 80
        self.progress = TerminalProgress(self.err)
        self.exit_code = 0
        self.checks = Checks()

    def check(self, check: Callable[..., None] | None = None, *args: Any, **options: Any) -> None:
        """Raises what `check` finds, together with what was found before it."""
        if check is not None:
            self.checks.run(check, *args, **options)
        self.checks.finish()

    def normalization(self, mean: str | None, std: str | None) -> dict[str, tuple[float, ...]]:
        """Returns the numbers of --mean and --std; what cannot be read is told by `check`."""
        from edgekit.commands.preflight import numbers

        return {"mean": self.checks.run(numbers, mean) or (), "std": self.checks.run(numbers, std) or ()}

    def show(self, renderable: Any, result: Any = None) -> None:
        """Prints a table for people, and writes `result` as JSON where --json asks for it."""
        if self.json_to != "-":
            self.out.print(renderable)
        if self.json_to is None or result is None:
            return
        if self.json_to == "-":
            self.out.file.write(json.dumps(result, indent=2, allow_nan=False) + "\n")
        else:
            from edgekit.util.atomic_files import write_json

            write_json(Path(self.json_to), result)

    def error(self, error: EdgeKitError) -> None:
        """Prints what went wrong and what to do, of each of several errors, and sets the exit code."""
        errors = single_errors(error)
        for one in errors:
            self.err.print(f"[bold red]error:[/bold red] {_plain(one.what)}", soft_wrap=True)
            if one.help:
                self.err.print(f"  [cyan]help:[/cyan] {_plain(one.help)}", soft_wrap=True)
        self.exit_code = 2 if any(isinstance(one, UsageError) for one in errors) else 1

    def fail_gate(self, why: str) -> None:
        """Makes the command end with exit code 3."""
        self.err.print(f"[bold red]gate failed:[/bold red] {_plain(why)}", soft_wrap=True)
        self.exit_code = 3


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


class _Terminated(KeyboardInterrupt):
    """A signal that ends a command as Ctrl-C does: everything is cleaned up on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def session(verbose: bool, json_to: str | None) -> Iterator[Terminal]:
    """Runs a command: keeps library chatter out of the terminal, and turns errors into exit codes.

    Libraries write to file descriptors 1 and 2 as well as through logging and warnings, so both descriptors lead
    to the log while the command runs. A bug's traceback still reaches the terminal.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = os.dup(1), os.dup(2)
    ui = Terminal(out, err, json_to, verbose)
    before = {number: signal.signal(number, _terminate) for number in _endings()}
    scratch = ExitStack()
    try:
        from edgekit.util.atomic_files import torch_cache

        scratch.enter_context(torch_cache())
        _redirect(LOG if verbose else Path(os.devnull), 1, 2)
        if json_to not in (None, "-"):
            from edgekit.util.atomic_files import check_writable

            ui.checks.run(check_writable, Path(json_to))  # now, and not after minutes of work
        yield ui
        ui.out.file.flush()
    except EdgeKitError as error:
        ui.error(error)
    except BrokenPipeError:  # who read the output has seen enough
        _redirect(Path(os.devnull), out)
        ui.exit_code = 1
    except (OSError, MemoryError, RuntimeError) as error:
        cause = mendable(error)
        if cause is None:
            raise
        ui.error(cause)
    except KeyboardInterrupt as stop:
        left = "; ".join(getattr(stop, "__notes__", ())) or "nothing was left behind"
        ui.err.print(f"[bold red]interrupted:[/bold red] {_plain(left)}", soft_wrap=True)
        ui.exit_code = 128 + (stop.number if isinstance(stop, _Terminated) else signal.SIGINT)
    finally:
        scratch.close()
        for number, handler in before.items():
            signal.signal(number, handler)
        for stream in (sys.stdout, sys.stderr, ui.out.file, ui.err.file):
            with suppress(OSError):
                stream.flush()
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.close(out)
        os.close(err)
    if ui.exit_code:
        raise typer.Exit(ui.exit_code)


def _redirect(path: Path, *descriptors: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor in descriptors:
        os.dup2(file, descriptor)
    os.close(file)


def _terminate(signum: int, frame: Any) -> None:
    raise _Terminated(signum)


def _endings() -> list[int]:
    """The signals that end a command: of a kill, and of a terminal that is closed, unless nohup has that ignored."""
    hangups = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # Windows has none
    return [signal.SIGTERM, *(number for number in hangups if signal.getsignal(number) != signal.SIG_IGN)]


def mendable(error: Exception) -> EdgeKitError | None:
    """Returns what the user can do about a failure of the machine; None for an error of any other kind."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return EdgeKitError("memory ran out", "close other programs, or give fewer or smaller samples")
    # numpy's short writes carry no number: "6144 requested and 992 written".
    number = errno.ENOSPC if str(error).endswith(" written") else getattr(error, "errno", None)
    if not isinstance(error, OSError) or number not in MACHINE_ERRORS:
        return None
    where = error.filename or f"a file (temporary ones lie in {tempfile.gettempdir()})"
    return EdgeKitError(f"cannot use {where}: {os.strerror(number)}", MACHINE_ERRORS[number])


def _open_standard_streams() -> None:
    """Puts the null device in the place of standard streams that are closed, where files would be opened instead."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def _print_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Prints the traceback of a bug; what a file brought into its text cannot speak to the terminal."""
    from edgekit.reports.console import visible

    sys.stderr.write(visible("".join(traceback.format_exception(kind, error, trace))))


def main() -> None:
    """Runs the command line."""
    _open_standard_streams()
    warnings.simplefilter("ignore")  # whatever the environment asks for: those of libraries say nothing to its user
    os.environ.pop("PYTHONWARNINGS", None)
    sys.excepthook = _print_traceback
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        app()
    finally:
        gc.freeze()  # what is left goes with the process: collecting torch's objects takes seconds

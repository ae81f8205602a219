"""The command line. PyTorch is imported by the command that needs it: --help comes at once."""

from __future__ import annotations

import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.table import Table

from fastlatent._terminal import (
    Download,
    Hidden,
    ImageSize,
    Lines,
    Live,
    Root,
    fail,
    interrupted,
    resume_command,
    widths,
)
from fastlatent.cli_infer import infer
from fastlatent.cli_plan import plan
from fastlatent.cli_sample import interpolate, sample
from fastlatent.cli_train import train

if TYPE_CHECKING:
    from fastlatent.comparison import Comparison, ModelResult, Progress
    from fastlatent.studies._run import Progress as StudyProgress

app = typer.Typer(
    name="fastlatent",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the `fastlatent` command."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastlatent {metadata.version('fastlatent')}")
        raise typer.Exit


@app.callback()
def fastlatent(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Train and query auto-decoders."""


@app.command()
def compare(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Option(
            help="digits, MNIST, FashionMNIST, CIFAR10, SVHN or CelebA; a .npy or .npz file; or a "
            "folder of images."
        ),
    ] = "digits",
    root: Root = None,
    download: Download = False,
    image_size: ImageSize = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("fastlatent-compare"),
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Samples in a batch.")] = 64,
    latent_dim: Annotated[int, typer.Option(help="Dimensions of a code.")] = 8,
    network: Annotated[str, typer.Option(help="mlp or conv.")] = "mlp",
    hidden: Hidden = None,
    lr: Annotated[float, typer.Option(help="Learning rate of decoder and encoder.")] = 1e-3,
    code_lr: Annotated[
        float, typer.Option(help="Learning rate of the auto-decoders' codes.")
    ] = 0.1,
    beta: Annotated[float, typer.Option(help="Weight of the variational models' KL.")] = 0.01,
    test_fraction: Annotated[
        float, typer.Option(help="Share of the samples that is held out.", show_default="1/6")
    ] = 1 / 6,
    seed: Annotated[int, typer.Option(help="Of split, weights, batches, noise and samples.")] = 0,
    studies: Annotated[
        list[str],
        typer.Option(
            "--study",
            metavar="NAME",
            help="Run a study too: sampling, kl, incremental, missing, dimension, cost, or all. "
            "May be given several times.",
        ),
    ] = (),  # type: ignore[assignment]
    study_seeds: Annotated[int, typer.Option(help="Seeds of each study, from --seed on.")] = 3,
    study_samples: Annotated[int, typer.Option(help="Samples that a study takes at most.")] = 2_000,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes for the studies.", show_default="one for each core, at most 8"
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted comparison in --out.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the comparison in --out.")
    ] = False,
    threads: Annotated[
        int, typer.Option(help="Threads to compute with; more pay for large networks only.")
    ] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Train four models with the same decoder on the same data and compare them.

    Auto-encoder, variational auto-encoder, auto-decoder and variational auto-decoder. Writes
    comparison.json, report.html and figures/*.png into --out. Ctrl-C keeps the finished models,
    and the finished jobs of the studies.
    """
    console = Console(quiet=quiet)
    view: _Lines | _Live = _Live(console) if sys.stdout.isatty() else _Lines(console)
    try:
        from fastlatent.comparison import compare

        with view:
            comparison = compare(
                data,
                out=out,
                root=root,
                download=download,
                image_size=image_size,
                test_fraction=test_fraction,
                network=network,
                hidden=None if hidden is None else widths(hidden),
                latent_dim=latent_dim,
                epochs=epochs,
                batch_size=batch_size,
                lr=lr,
                code_lr=code_lr,
                beta=beta,
                seed=seed,
                threads=threads,
                studies=studies,
                study_seeds=study_seeds,
                study_samples=study_samples,
                workers=workers,
                resume=resume,
                overwrite=overwrite,
                on_progress=view,
            )
    except KeyboardInterrupt:
        _interrupted(context, out, view.studies)
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError) as error:
        fail(error)
    _summary(console, comparison, out)


for _command in (train, infer, sample, interpolate, plan):
    app.command()(_command)


class _Clock:
    """Remaining time of the whole job, at the mean pace so far."""

    def __init__(self) -> None:
        self.start: float | None = None

    def left(self, done: float, total: float) -> float | None:
        """Seconds, or None before anything is done."""
        now = time.monotonic()
        if self.start is None:
            self.start = now
        return (now - self.start) * (total - done) / done if done > 0 else None


class _Studies:
    """How far the studies are: jobs that have ended, by study, and the time that remains."""

    def __init__(self) -> None:
        self.clock = _Clock()
        self.jobs: dict[str, tuple[int, int]] = {}

    def __call__(self, step: StudyProgress) -> float | None:
        """Take up a step; the seconds that remain, if they can be foretold."""
        self.jobs[step.study] = (step.done, step.total)
        return self.clock.left(step.run_done, step.run_total)


class _Lines(Lines):
    """Start, quarters and end of every model, tenths of the studies."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.clock = _Clock()
        self.studies = _Studies()

    def __call__(self, step: Progress | StudyProgress) -> None:
        if hasattr(step, "study"):
            self._of_study(step)
            return
        left = self.clock.left(step.done, step.total)
        name = _name(step.model)
        if step.stage == "training" and step.epoch == 0:
            self.print(f"{name}: training, {step.epochs} epochs")
        elif step.stage == "training":
            if step.epoch % max(1, step.epochs // 4) == 0:
                remaining = "" if left is None else f", {_duration(left)} left"
                self.print(
                    f"{name}: epoch {step.epoch} of {step.epochs}, error {step.mse:.3g}{remaining}"
                )
        elif step.stage == "inference":
            self.print(f"{name}: encoding the held-out samples")
        elif step.stage == "report":
            self.print("drawing the report")
        else:
            self.print(f"{name}: {step.stage}, {_result(step.result)}")

    def _of_study(self, step: StudyProgress) -> None:
        left = self.studies(step)
        kept = ", kept" if step.kept else ""
        if step.done == step.total:
            self.print(f"study {step.study}: all {step.total} jobs finished{kept}")
        total, done = step.run_total, step.run_done
        if not step.kept and 10 * done // total > 10 * (done - 1) // total:
            assert left is not None
            self.print(f"studies: {done} of {total} jobs, {_duration(left)} left")


class _Live(Live):
    """A bar over the whole job, with a line above it for every finished model."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            console,
            SpinnerColumn(),
            "{task.description}",
            BarColumn(bar_width=None),
            "{task.percentage:>3.0f}%",
            TextColumn("{task.fields[left]}", style="cyan"),
        )
        self.clock = _Clock()
        self.studies = _Studies()
        self.task = self.bar.add_task("preparing", total=None, left="")

    def __call__(self, step: Progress | StudyProgress) -> None:
        if hasattr(step, "study"):
            self._of_study(step)
            return
        left = self.clock.left(step.done, step.total)
        name = _name(step.model)
        words = {
            "training": f"{name}  epoch {step.epoch}/{step.epochs}",
            "inference": f"{name}  encoding held-out samples",
            "report": "drawing the report",
        }
        if step.result is not None:
            kept = " (kept)" if step.stage == "kept" else ""
            self.console.print(
                f"[green]✓[/] {name:<25}{_result(step.result)}{kept}", highlight=False
            )
        self.bar.update(
            self.task,
            description=words.get(step.stage, name),
            completed=step.done,
            total=step.total or None,
            left="" if left is None else f"{_duration(left)} left",
        )

    def _of_study(self, step: StudyProgress) -> None:
        left = self.studies(step)
        if step.done == step.total:
            kept = " (kept)" if step.kept else ""
            name = f"study {step.study}"
            self.console.print(
                f"[green]✓[/] {name:<25}{step.total} jobs finished{kept}", highlight=False
            )
        self.bar.update(
            self.task,
            description=f"studies  {step.study} {step.done}/{step.total}",
            completed=step.run_done,
            total=step.run_total or None,
            left="" if left is None else f"{_duration(left)} left",
        )


def _summary(console: Console, comparison: Comparison, out: Path) -> None:
    if console.quiet:
        return
    from fastlatent.figures import MODELS
    from fastlatent.report import headline, table
    from fastlatent.studies import load

    lines = table(comparison)
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    grid.add_column("")
    for look in MODELS.values():
        grid.add_column(look.short, justify="right")
    if console.width >= 120:
        grid.add_column("", style="dim")
    for line in lines:
        cells = [f"[bold green]{text}[/]" if best else text for text, best in line.cells]
        grid.add_row(line.name, *cells, *([line.explained] if console.width >= 120 else []))
    console.print()
    console.print(grid)
    console.print()
    console.print(headline(comparison), style="bold", highlight=False)
    for name, study in comparison.studies.items():
        section = load(name).section(study)
        console.print(f"{section.title}: {section.findings[0]}", highlight=False, markup=False)
    for name in ("report.html", "comparison.json"):
        console.print(str(out / name), highlight=False, soft_wrap=True)


def _result(result: ModelResult | None) -> str:
    assert result is not None
    return (
        f"training error {result.train_mse:.3g}, unseen {result.test_mse:.3g}, "
        f"{result.train_seconds:.1f} s"
    )


def _name(key: str) -> str:
    return key.replace("_", " ").replace("auto", "auto-")


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}" if whole >= 60 else f"{whole} s"


def _interrupted(context: typer.Context, out: Path, studies: _Studies) -> NoReturn:
    if not (out / "run.json").exists():
        interrupted("interrupted before anything was written")
    from fastlatent.comparison import finished_models

    finished = finished_models(out)
    kept = ", ".join(map(_name, finished)) or "none"
    jobs = "".join(
        f", {done} of {total} jobs of the study {name}"
        for name, (done, total) in studies.jobs.items()
    )
    interrupted(
        f"interrupted: {len(finished)} of 4 models are finished ({kept}){jobs} and kept",
        f"in {out}. To go on: {resume_command(context)}",
    )

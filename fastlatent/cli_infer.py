"""The command `fastlatent infer`: options, progress, interruption."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TimeRemainingColumn

from fastlatent._terminal import (
    Device,
    Download,
    ImageSize,
    Lines,
    Live,
    Root,
    fail,
    interrupted,
    resume_command,
)

if TYPE_CHECKING:
    from fastlatent.encode import Progress

_WORDS = {"reading": "reading the data", "fitting": "fitting codes", "report": "writing results"}


def infer(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a saved model.")],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A .npy file (NaN: not observed) or .npz file, a folder of images, or digits, "
            "MNIST, FashionMNIST, CIFAR10, SVHN or CelebA.",
        ),
    ],
    mask: Annotated[
        Path | None,
        typer.Option(help="A .npy file of bool in the data's shape, true where observed."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("fastlatent-infer"),
    init: Annotated[
        str | None,
        typer.Option(help="nearest, mean, zeros or prior.", show_default="nearest, or the encoder"),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="adam or lm (Levenberg-Marquardt).", show_default="adam")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="At most so many a sample.", show_default="200, with lm 100")
    ] = None,
    restarts: Annotated[
        int | None, typer.Option(help="Starts a sample; the best is kept.", show_default="1")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Adam's rate.", show_default="0.2 of the codes' standard deviation"),
    ] = None,
    tol: Annotated[
        float | None,
        typer.Option(help="Relative gain below which a sample stalls.", show_default="1e-3"),
    ] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="AE and VAE: optimise the encoder's codes.")
    ] = False,
    chunk_size: Annotated[int, typer.Option(help="Samples fitted and stored together.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of all random numbers.")] = 0,
    device: Device = "cpu",
    threads: Annotated[int, typer.Option(help="Threads to compute with.")] = 1,
    root: Root = None,
    download: Download = False,
    image_size: ImageSize = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted work in --out.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the results in --out.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Encode new samples with a saved model, from whatever part of them is observed.

    Writes codes.npy, reconstructions.npy, status.csv, summary.json and report.html into --out.
    Ctrl-C keeps the finished chunks; --resume goes on from there.
    """
    console = Console(quiet=quiet)
    view: _Lines | _Live = _Live(console) if sys.stdout.isatty() else _Lines(console)
    try:
        from fastlatent.encode import encode

        with view:
            summary = encode(
                run,
                data,
                out=out,
                mask=mask,
                refine=refine,
                init=init,
                method=method,
                steps=steps,
                restarts=restarts,
                lr=lr,
                tol=tol,
                chunk_size=chunk_size,
                seed=seed,
                device=device,
                threads=threads,
                resume=resume,
                overwrite=overwrite,
                root=root,
                download=download,
                image_size=image_size,
                on_progress=view,
            )
    except KeyboardInterrupt:
        _interrupted(context, out)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        fail(error)
    results = summary["results"]
    reasons = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in results["reasons"].items())
    console.print(f"{results['samples']} samples: {reasons}", highlight=False, soft_wrap=True)
    for name in ("observed", "missing"):
        if (error := results[f"{name}_mse"]) is not None:
            console.print(f"mean squared error of {name} values: {error:.3g}", highlight=False)
    for name in ("report.html", "summary.json"):
        console.print(str(out / name), highlight=False, markup=False, soft_wrap=True)


class _Lines(Lines):
    """Each stage, and fitting in tenths."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.stage, self.tenth = "", -1

    def __call__(self, step: Progress) -> None:
        tenth = 10 * step.done // step.total
        if step.stage == self.stage and (step.stage != "fitting" or tenth == self.tenth):
            return
        self.stage, self.tenth = step.stage, tenth
        done = f": {step.done} of {step.total} samples" if step.stage == "fitting" else ""
        self.print(f"{_WORDS[step.stage]}{done}")


class _Live(Live):
    """A bar for each stage."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            console,
            "{task.description}",
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, step: Progress) -> None:
        if step.stage not in self.tasks:
            self.tasks[step.stage] = self.bar.add_task(_WORDS[step.stage], total=step.total)
        self.bar.update(self.tasks[step.stage], completed=step.done)


def _interrupted(context: typer.Context, out: Path) -> NoReturn:
    from fastlatent.encode import finished_samples

    kept = finished_samples(out)
    if kept is None:
        interrupted("interrupted before anything was written")
    interrupted(
        f"interrupted: {kept[0]} of {kept[1]} samples are finished and kept",
        f"in {out}. To go on: {resume_command(context)}",
    )

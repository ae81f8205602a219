"""The commands `fastlatent sample` and `fastlatent interpolate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fastlatent._terminal import Device, Download, ImageSize, Root, fail, interrupted

Run = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a saved model.")]
Seed = Annotated[int, typer.Option(help="Of all random numbers.")]
Threads = Annotated[int, typer.Option(help="Threads to compute with.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the results in --out.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
End = typer.Argument(
    help="A training sample by its row or id; with --data a row of it; or a .npy file of unseen "
    "samples, new.npy:3 for one of several."
)


def sample(
    run: Run,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="prior, gaussian, mixture (of Gaussians), mixes or slerp (of neighbouring codes), "
            "flow.",
            show_default="prior, for AE and AD gaussian",
        ),
    ] = None,
    number: Annotated[int, typer.Option(help="Samples to draw.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("fastlatent-sample"),
    data: Annotated[
        str | None,
        typer.Option(
            help="Training data, as for compare: AE and VAE do not hold the codes that all but "
            "their default sampler are fitted to."
        ),
    ] = None,
    root: Root = None,
    download: Download = False,
    image_size: ImageSize = None,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = 1,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Draw new samples with a saved model.

    Writes images/*.png (of data that are no images samples.npy), codes.npy, grid.png and
    summary.json into --out.
    """

    def work() -> list[str]:
        from fastlatent.generate import generate

        summary = generate(
            run,
            out=out,
            sampler=sampler,
            number=number,
            data=data,
            root=root,
            download=download,
            image_size=image_size,
            seed=seed,
            device=device,
            threads=threads,
            overwrite=overwrite,
        )
        return [_drawn(summary), *_written(out, summary, "grid.png")]

    _report(work, quiet)


def interpolate(
    run: Run,
    a: Annotated[str, End],
    b: Annotated[str, End],
    steps: Annotated[int, typer.Option(help="Pictures, both ends included.")] = 10,
    mode: Annotated[
        str, typer.Option(help="linear, or slerp: along the arc around the codes' centre.")
    ] = "linear",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path(
        "fastlatent-interpolate"
    ),
    data: Annotated[
        str | None, typer.Option(help="Data, as for compare, whose rows A and B are.")
    ] = None,
    root: Root = None,
    download: Download = False,
    image_size: ImageSize = None,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = 1,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Decode the way between the codes of two samples.

    Writes strip.png, images/*.png (of data that are no images samples.npy), codes.npy and
    summary.json into --out.
    """

    def work() -> list[str]:
        from fastlatent.generate import interpolate

        summary = interpolate(
            run,
            a,
            b,
            out=out,
            steps=steps,
            mode=mode,
            data=data,
            root=root,
            download=download,
            image_size=image_size,
            seed=seed,
            device=device,
            threads=threads,
            overwrite=overwrite,
        )
        return [
            f"{summary['samples']} samples from {a} to {b}, {mode}",
            *_written(out, summary, "strip.png"),
        ]

    _report(work, quiet)


def _report(work: Callable[[], list[str]], quiet: bool) -> None:
    """Do the work, print what it says, turn its errors into those of a command."""

    try:
        lines = work()
    except KeyboardInterrupt:
        interrupted("interrupted: nothing was written")
    except (
        ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError, IndexError
    ) as error:  # fmt: skip
        fail(error)
    console = Console(quiet=quiet)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _drawn(summary: dict[str, Any]) -> str:
    sampler = summary["sampler"]
    words = {
        "prior": "drawn from the prior",
        "gaussian": "drawn from a Gaussian",
        "mixture": f"drawn from a mixture of {sampler.get('components')} Gaussians",
        "mixes": "mixed from neighbours",
        "slerp": "taken from arcs between neighbours",
        "flow": "drawn from a normalising flow",
    }[sampler["name"]]
    if sampler["name"] in ("gaussian", "mixture", "flow"):
        words += " fitted to the codes"
    if sampler["codes"] == "posterior draws":
        words += ", one draw from the posterior of each training sample"
    return f"{summary['samples']} samples, codes {words}"


def _written(out: Path, summary: dict[str, Any], picture: str) -> list[str]:
    names = (picture, "images" if summary["image"] else "samples.npy", "codes.npy")
    return [str(out / name) for name in names]

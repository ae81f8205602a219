"""The command `fastlatent train`: options, progress, interruption."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, TimeElapsedColumn

from fastlatent._terminal import (
    Device,
    Download,
    Hidden,
    ImageSize,
    LinearPath,
    Lines,
    Live,
    Mapped,
    Root,
    fail,
    interrupted,
    resume_command,
    widths,
)

if TYPE_CHECKING:
    from fastlatent.trainer import Alone, Progress

# plain lines, where there is no terminal: the first of a run, and one every so many seconds
_LINE_SECONDS = 10.0


def train(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="digits, patches, MNIST, FashionMNIST, CIFAR10, SVHN or CelebA; a .npy or .npz "
            "file; or a folder of images.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("fastlatent-train"),
    model: Annotated[str, typer.Option(help="ad, vad, ae or vae.")] = "ad",
    epochs: Annotated[int | None, typer.Option(help="Passes over the data, or")] = None,
    steps: Annotated[int | None, typer.Option(help="batches, or")] = None,
    time: Annotated[
        float | None, typer.Option(help="seconds of training. Whichever is over first.")
    ] = None,
    latent_dim: Annotated[int, typer.Option(help="Dimensions of a code.")] = 32,
    network: Annotated[str, typer.Option(help="mlp or conv.")] = "mlp",
    hidden: Hidden = None,
    linear_path: LinearPath = False,
    pca: Annotated[
        bool, typer.Option("--pca", help="Start the codes at the principal components.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Samples in a batch.")] = 1024,
    lr: Annotated[float, typer.Option(help="Learning rate of decoder and encoder.")] = 1e-3,
    code_lr: Annotated[float, typer.Option(help="Learning rate of the codes.")] = 0.02,
    schedule: Annotated[str, typer.Option(help="Of the rates: constant or cosine.")] = "constant",
    warmup: Annotated[int, typer.Option(help="Steps in which the rates rise.")] = 0,
    beta: Annotated[float, typer.Option(help="Weight of the variational models' KL.")] = 0.01,
    table_dtype: Annotated[str, typer.Option(help="Of the codes: fp32 or bf16.")] = "fp32",
    moment_dtype: Annotated[str, typer.Option(help="Of their moments: fp32 or bf16.")] = "fp32",
    rounding: Annotated[
        str, typer.Option(help="Of bf16 codes: stochastic or nearest.")
    ] = "stochastic",
    step_mode: Annotated[
        str, typer.Option(help="What a step of a code is: row, global or dense.")
    ] = "row",
    projection: Annotated[
        str | None, typer.Option(help="Keep an ad's codes in a ball or on a sphere.")
    ] = None,
    radius: Annotated[float, typer.Option(help="Of the projection.")] = 1.0,
    code_penalty: Annotated[float, typer.Option(help="Of an ad: c in c · |z|².")] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="Of the codes, decoupled.")] = 0.0,
    held_out: Annotated[
        int | None,
        typer.Option(help="Samples held out; 0: none.", show_default="1/6, at most 10,000"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of held-out samples, weights, batches, noise.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads to compute with.")] = 1,
    workers: Annotated[int, typer.Option(help="Threads that read data.")] = 1,
    impl: Annotated[str, typer.Option(help="auto, triton, cpu or reference.")] = "auto",
    device: Device = "cpu",
    log_steps: Annotated[int, typer.Option(help="Steps between lines of metrics.jsonl.")] = 50,
    evaluate_seconds: Annotated[
        float, typer.Option(help="Training between evaluations on held-out samples.")
    ] = 60.0,
    checkpoint_seconds: Annotated[
        float, typer.Option(help="Training between checkpoints.")
    ] = 300.0,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard logs too.")
    ] = False,
    root: Root = None,
    download: Download = False,
    image_size: ImageSize = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.")
    ] = False,
    mapped: Mapped = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds that a rank waits for another one (torchrun).")
    ] = 300.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors and warnings only.")] = False,
) -> None:
    """Train one model on data of any size, with checkpoints; `fastlatent infer OUT` uses it.

    Writes the model, summary.json, metrics.jsonl and checkpoints into --out. A run that was stopped
    or killed at any moment goes on with --resume and ends as if it had not been. Several processes
    share the work under `torchrun --nproc-per-node=2 -m fastlatent train`.
    """

    first = os.environ.get("RANK", "0") == "0"
    console = Console(quiet=quiet or not first, highlight=False, soft_wrap=True)
    view: _Lines | _Live = _Live(console) if sys.stdout.isatty() and first else _Lines(console)
    try:
        from fastlatent import trainer

        settings = trainer.Settings(
            mapped=mapped,
            model=model,
            latent_dim=latent_dim,
            network=network,
            hidden=None if hidden is None else tuple(widths(hidden)),
            linear_path=linear_path,
            epochs=epochs,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            code_lr=code_lr,
            schedule=schedule,
            warmup=warmup,
            table_dtype=table_dtype,
            moment_dtype=moment_dtype,
            rounding=rounding,
            step_mode=step_mode,
            projection=projection,
            radius=radius,
            code_penalty=code_penalty,
            weight_decay=weight_decay,
            beta=beta,
            pca=pca,
            held_out=held_out,
            seed=seed,
            threads=threads,
            impl=impl,
            device=device,
        )
        with view, _shown_warnings(), _ranks(device, timeout) as group:
            summary = trainer.train(
                data,
                out,
                settings,
                seconds=time,
                resume=resume,
                overwrite=overwrite,
                log_steps=log_steps,
                evaluate_seconds=evaluate_seconds,
                checkpoint_seconds=checkpoint_seconds,
                workers=workers,
                tensorboard=tensorboard,
                root=root,
                download=download,
                image_size=image_size,
                group=group,
                on_progress=view,
            )
    except KeyboardInterrupt:
        _interrupted(context, out)
    except (
        *(ValueError, TypeError, OSError, ImportError),
        *(RuntimeError, ArithmeticError, MemoryError),
    ) as error:
        fail(error)
    for line in _summary(summary):
        console.print(line, markup=False)
    console.print(str(out), markup=False)


@contextmanager
def _ranks(device: str, timeout: float) -> Iterator[Alone | None]:
    """The processes that torchrun has started, or None."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield None
        return
    from fastlatent import distributed

    with distributed.joined(device, timeout):
        yield distributed.Ranks()


class _Lines(Lines):
    """One every ten seconds of training."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.next = 0.0

    def __call__(self, at: Progress) -> None:
        if at.seconds < self.next and at.step != at.total:
            return
        self.next = at.seconds + _LINE_SECONDS
        self.print(f"step {_steps(at)}, epoch {at.epoch:.2f}, {_figures(at)}")


class _Live(Live):
    """Without an end that is known, the bar moves to and fro."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            console,
            "step {task.description}",
            BarColumn(bar_width=None),
            "{task.fields[figures]}",
            TimeElapsedColumn(),
        )
        self.task = self.bar.add_task("0", total=None, figures="")

    def __call__(self, at: Progress) -> None:
        self.bar.update(
            self.task,
            description=_steps(at),
            completed=at.step,
            total=at.total,
            figures=_figures(at),
        )


def _steps(at: Progress) -> str:
    return f"{at.step:,}" if at.total is None else f"{at.step:,} of {at.total:,}"


def _figures(at: Progress) -> str:
    unseen = "" if at.test_mse is None else f", unseen {at.test_mse:.3g}"
    return f"{at.samples_per_second:,.0f} samples/s, error {at.mse:.3g}{unseen}"


def _summary(summary: dict[str, Any]) -> list[str]:
    results, data = summary["results"], summary["data"]
    lines = [
        f"{results['steps']:,} steps, {results['epochs']:.2f} epochs over {data['samples']:,} "
        f"samples in {results['seconds']:,.0f} s"
    ]
    if results["samples_per_second"]:
        lines[0] += f": {results['samples_per_second']:,.0f} samples/s"
    if "test_mse" in results:
        lines.append(
            f"mean squared error of a value of unseen samples: {results['test_mse']:.4g}, "
            f"{results['test_error']:.3%} of their variance"
        )
    shares = [("waiting for data", "waiting_share"), ("latent table", "table_share")]
    told = [f"{name} {results[key]:.1%}" for name, key in shares if results[key] is not None]
    if told:
        lines.append(f"shares of the time: {', '.join(told)}")
    lines.append(f"peak resident memory: {results['peak_resident_bytes'] / 2**30:.2f} GiB")
    return lines


@contextmanager
def _shown_warnings() -> Iterator[None]:
    """Warnings as lines on stderr, without the place in the code that they come from."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True)

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        errors.print(f"warning: {message}", style="yellow", markup=False)

    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _interrupted(context: typer.Context, out: Path) -> NoReturn:
    from fastlatent.checkpoint import Checkpoints
    from fastlatent.trainer import CHECKPOINTS

    steps = Checkpoints(out / CHECKPOINTS).steps()
    if not steps:
        interrupted("interrupted before the first checkpoint")
    interrupted(
        f"interrupted: the checkpoint of step {steps[-1]} is in {out}.",
        f"To go on: {resume_command(context)}",
    )

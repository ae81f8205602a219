"""The command `fastlatent plan`: how much memory a training run takes, without running it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fastlatent._terminal import Device, Hidden, LinearPath, Mapped, fail, widths

if TYPE_CHECKING:
    from fastlatent.memory import MemoryPlan


def plan(
    samples: Annotated[str, typer.Option(help="Samples, rows of the table: 1000000 or 1e8.")],
    dim: Annotated[int, typer.Option(help="Dimensions of a code.")] = 32,
    model: Annotated[str, typer.Option(help="ad, vad, ae or vae.")] = "ad",
    dtype: Annotated[str, typer.Option(help="Of the table: fp32, bf16, fp16 or fp64.")] = "fp32",
    moments: Annotated[
        str | None,
        typer.Option(help="Of Adam's moments: fp32, bf16, fp64.", show_default="the table's"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples in a batch.")] = 1024,
    data_shape: Annotated[
        str | None,
        typer.Option(help="Of a sample, such as 3,8,8; without it only the table is planned."),
    ] = None,
    data_bytes: Annotated[
        str, typer.Option(help="Bytes of data kept in memory; memory-mapped files take none.")
    ] = "0",
    network: Annotated[str, typer.Option(help="mlp or conv.")] = "mlp",
    hidden: Hidden = None,
    linear_path: LinearPath = False,
    pca: Annotated[
        bool, typer.Option("--pca", help="Start the codes at the data's principal components.")
    ] = False,
    device: Device = "cpu",
    mapped: Mapped = False,
    ranks: Annotated[int, typer.Option(help="Processes on this machine.")] = 1,
    out: Annotated[Path, typer.Option(help="A folder on the disk of the mapped files.")] = Path(),
) -> None:
    """Show how much memory a training run takes, and whether this machine has it.

    Ends with 0 if the run fits and with 1 if it does not; then the layouts that fit are named.
    """

    try:
        from fastlatent.memory import plan as planned

        found = planned(
            _count("samples", samples),
            dim,
            model=model,
            dtype=dtype,
            moments=moments,
            batch_size=batch_size,
            data_shape=None if data_shape is None else _sizes(data_shape),
            data_bytes=_count("data_bytes", data_bytes),
            network=network,
            hidden=None if hidden is None else widths(hidden),
            linear_path=linear_path,
            pca=pca,
            device=device,
            mapped=mapped,
            ranks=ranks,
            directory=out,
        )
    except (ValueError, RuntimeError) as error:
        fail(error)
    Console().print(*render(found), sep="\n\n", highlight=False, soft_wrap=True)
    try:
        found.check()
    except MemoryError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"error: {error}", style="red", markup=False
        )
        raise typer.Exit(1) from None


def render(plan: MemoryPlan) -> list[Any]:
    """A plan as a table, and in a line for each place what is needed and what is free."""
    from fastlatent.memory import size

    settings = plan.settings
    grid = Table(
        title=f"{settings['samples']:,} samples, {settings['dim']} dimensions, {plan.layout}",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
        padding=(0, 2, 0, 0),
    )
    for name, justify in (("", "left"), ("bytes", "right"), ("", "right"), ("", "left")):
        grid.add_column(name, justify=justify)  # type: ignore[arg-type]
    for part in plan.parts:
        grid.add_row(part.name, f"{part.bytes:,}", size(part.bytes), f"{part.place}  {part.detail}")
    lines = []
    for place in plan.places:
        need, free = plan.total(place), plan.machine.free(place)
        verdict = "[green]fits[/]" if place not in plan.lacking() else "[red]too much[/]"
        if free is not None:
            lines.append(f"{place}: {size(need)} of {size(free)} that are free, {verdict}")
    return [grid, "\n".join(lines)]


def _count(name: str, text: str) -> int:
    """A whole number, also written as 1e8."""
    try:
        value = float(text)
        if value == int(value):
            # a float has not all digits of a long number
            return int(text) if text.strip().isdigit() else int(value)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{name} must be a whole number such as 1000000 or 1e8; got {text!r}")


def _sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"data_shape must be sizes such as 3,8,8; got {text!r}") from None

"""What the commands share: options, progress, how an error ends one or Ctrl-C does."""

from __future__ import annotations

import shlex
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import ProgressColumn

Root = Annotated[
    Path | None, typer.Option(help="Folder of the torchvision sets.", show_default="data")
]
Download = Annotated[
    bool, typer.Option("--download", help="Download a missing torchvision set into --root.")
]
ImageSize = Annotated[
    int | None, typer.Option(help="Side that the images of a folder are brought to.")
]
Hidden = Annotated[
    str | None,
    typer.Option(
        help="Widths of an mlp's hidden layers, from code to sample.", show_default="128,128"
    ),
]
LinearPath = Annotated[
    bool, typer.Option("--linear-path", help="Add a linear map to the mlp decoder.")
]
Mapped = Annotated[
    bool, typer.Option("--mapped", help="Keep the table in files; it may exceed the memory.")
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


class Lines(AbstractContextManager["Lines"]):
    """Progress as plain lines. Called with each step, a command's own class prints some."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __exit__(self, *exception: object) -> None:
        return None

    def print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class Live(AbstractContextManager["Live"]):
    """Progress as a bar, gone at the end. Called with each step, a command's own class moves it."""

    def __init__(self, console: Console, *columns: str | ProgressColumn) -> None:
        self.console = console
        self.bar = Bar(*columns, console=console, transient=True, expand=True)

    def __enter__(self) -> Live:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()


def fail(error: Exception) -> NoReturn:
    """One line on stderr, exit code 2."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"error: {' '.join(text.split())}", style="red", markup=False
    )
    raise typer.Exit(2)


def interrupted(*lines: str) -> NoReturn:
    """The lines on stderr, the exit code of Ctrl-C."""
    for line in lines:
        Console(stderr=True, highlight=False, soft_wrap=True).print(line, markup=False)
    raise typer.Exit(130)


def resume_command(context: typer.Context) -> str:
    """The command with the arguments and options that were given, but to resume."""
    words = ["fastlatent", context.command.name or ""]
    for parameter in context.command.params:
        source: Any = context.get_parameter_source(parameter.name)
        value = context.params.get(parameter.name)
        if source is None or source.name != "COMMANDLINE":
            continue
        if parameter.name in ("resume", "overwrite"):
            continue
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif value is True:
            words.append(parameter.opts[0])
        else:
            for part in value if isinstance(value, list | tuple) else (value,):
                words += [parameter.opts[0], str(part)]
    return shlex.join([*words, "--resume"])


def widths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"hidden must be numbers such as 128,128; got {text!r}") from None

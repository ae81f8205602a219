"""What the commands share: how an error ends one, and how an interrupted one goes on."""

from __future__ import annotations

import shlex
from typing import Any, NoReturn

import typer
from rich.console import Console


def fail(error: Exception) -> NoReturn:
    """One line on stderr, exit code 2."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"error: {' '.join(text.split())}", style="red", markup=False
    )
    raise typer.Exit(2)


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

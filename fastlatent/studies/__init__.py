"""The studies of auto-encoders against auto-decoders, one module each, imported on first use.

A study answers one question about the four models on any data set. Its module holds

    TITLE, QUESTION         of its section in the report
    ALONE                   optional, True: its jobs run one after another, because a clock counts
    cells(data, settings)   its units of work, as dicts of JSON-able arguments
    measure(data, settings, seed, **arguments) -> Measured      one unit, for one seed
    collect(results, about) -> a Study                          all units and seeds together
    section(study) -> Section                                   what the report shows and says

and the class of its result, `KlStudy` in the module kl. `fastlatent.studies._run.run` does the
rest.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlatent.studies._section import Record

NAMES = ("sampling", "kl", "incremental", "missing", "dimension", "cost")


def load(name: str) -> ModuleType:
    """The module of a study.

    Raises:
        ValueError: an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"unknown study {name!r}: known are {', '.join(NAMES)}, and all")
    return importlib.import_module(f"fastlatent.studies.{name}")


def read(name: str, content: dict[str, Any]) -> Record:
    """A study's result from its entry in comparison.json, pictures left out.

    Raises:
        ValueError: an unknown name.
        KeyError: an entry that lacks a field.
    """
    return getattr(load(name), f"{name.capitalize()}Study").from_json(content)


def chosen(names: str | Sequence[str]) -> tuple[str, ...]:
    """The studies that are meant, "all" of them or by name, each once and in the order of `NAMES`.

    Raises:
        ValueError: an unknown name.
    """
    wanted = {names} if isinstance(names, str) else set(names)
    if "all" in wanted:
        return NAMES
    for name in sorted(wanted):
        load(name)
    return tuple(name for name in NAMES if name in wanted)

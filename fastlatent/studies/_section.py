"""What a study shows and says: figures with their spread, a picture, sentences, a table."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from scipy.special import stdtrit

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Record:
    """A frozen dataclass that turns into JSON and back, by the types of its fields.

    Fields may be numbers, strings, None, dicts with string keys, tuples of one type and other
    records. A field with metadata {"json": False} stays out and needs a default.
    """

    def to_json(self) -> dict[str, Any]:
        return {f.name: _encode(getattr(self, f.name)) for f in _json_fields(type(self))}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Raises KeyError where a field is missing; keys of no field are left aside."""
        hints = typing.get_type_hints(cls)
        return cls(**{f.name: _decode(hints[f.name], content[f.name]) for f in _json_fields(cls)})


@dataclass(frozen=True)
class Estimate(Record):
    """A figure over several seeds.

    Attributes:
        mean: of the seeds.
        low, high: 95 % confidence interval of the mean by Student's t distribution; both are the
            mean for one seed.
        minimum, maximum: over the seeds.
        n: number of seeds.
    """

    mean: float
    low: float
    high: float
    minimum: float
    maximum: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Raises ValueError for no values, or one that is not finite."""
        array = np.asarray(values, dtype=np.float64)
        if array.ndim != 1 or len(array) == 0 or not np.isfinite(array).all():
            raise ValueError(f"values must be finite numbers, at least one; got {values!r}")
        n, mean = len(array), float(array.mean())
        half = 0.0
        if n > 1:
            half = float(stdtrit(n - 1, 0.975) * array.std(ddof=1) / math.sqrt(n))
        return cls(mean, mean - half, mean + half, float(array.min()), float(array.max()), n)

    def text(self, digits: int = 3) -> str:
        """The mean and, in brackets, the range of the seeds: "0.0123 (0.0120–0.0126)"."""
        low, high = significant(self.minimum, digits), significant(self.maximum, digits)
        return f"{significant(self.mean, digits)} ({low}–{high})"


@dataclass(frozen=True)
class Table:
    """A small table: the first column names the row."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """The part of the report that a study fills.

    Attributes:
        title, question: the study's.
        findings: sentences as measured, the most important one first. Every number in them is a
            number of the study's JSON, rounded (`unstated` checks it).
        figure: the picture that makes the point (see `fastlatent.figures.panels`).
        caption: what the picture shows, in words.
        table: figures with mean and spread.
        notes: how it was measured, with the sources of formulas; what could not be measured on
            these data, and why.
    """

    title: str
    question: str
    findings: tuple[str, ...]
    figure: Figure
    caption: str
    table: Table
    notes: tuple[str, ...] = ()


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, never fewer than its whole part has."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    rounded = float(f"{value:.{digits - 1}e}")
    places = digits - 1 - math.floor(math.log10(abs(rounded)))
    if places > 7:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    return f"{value:,.{max(places, 0)}f}".replace("-", "−")


def beyond(ratio: Estimate, level: float = 1.0, margin: float = 0.02) -> int:
    """-1 or 1 where the 95 % interval and, by the margin, the mean lie below or above; else 0."""
    if ratio.high < level and ratio.mean < level * (1 - margin):
        return -1
    return int(ratio.low > level and ratio.mean > level * (1 + margin))


def percent(share: float, places: int = 0) -> str:
    """A share as "12 %"."""
    return f"{100 * share:.{places}f}\N{NO-BREAK SPACE}%".replace("-", "−")


_NUMBER = re.compile(r"(?<![\w.])(\d[\d,]*(?:\.\d+)?(?:e[+−-]?\d+)?)(\s*%)?(?!-?\w)")


def unstated(text: str, content: Any) -> list[str]:
    """The numbers in a text that are, as rounded there, no number of a JSON tree.

    Signs are left aside; "12 %" is found as 0.12. Keys of the tree and strings that are numbers
    count as its numbers; digits in words such as 2-D or β2 are none of the text's.
    """
    known = [abs(number) for number in _numbers(content)]
    missing = []
    for found in _NUMBER.finditer(text):
        token = found[1].replace(",", "").replace("−", "-")
        mantissa, _, exponent = token.partition("e")
        places = len(mantissa.partition(".")[2]) - int(exponent or 0)
        # half a unit of the last place written, and the rounding of the division by 100
        half = 0.5000001 * 10.0**-places
        scale = 100.0 if found[2] else 1.0
        if not any(abs(scale * number - float(token)) <= half for number in known):
            missing.append(found[0])
    return missing


def _numbers(content: Any) -> Iterator[float]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _numbers(key)
            yield from _numbers(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _numbers(value)
    elif isinstance(content, str):
        try:
            yield float(content)
        except ValueError:
            return
    elif content is not None and not isinstance(content, bool):
        yield float(content)


def _json_fields(kind: type) -> Iterator[dataclasses.Field[Any]]:
    return (f for f in dataclasses.fields(kind) if f.metadata.get("json", True))


def _encode(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, dict):
        return {str(key): _encode(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(part) for part in value]
    return value


def _decode(kind: Any, value: Any) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _decode(next(part for part in parts if part is not types.NoneType), value)
    if origin is dict:
        return {key: _decode(parts[1], part) for key, part in value.items()}
    if origin is tuple:
        kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(_decode(k, part) for k, part in zip(kinds, value, strict=True))
    if isinstance(kind, type) and issubclass(kind, Record):
        return kind.from_json(value)
    return value

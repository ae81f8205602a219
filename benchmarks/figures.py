"""Draws the README's figures from the committed results: `python -m benchmarks.figures`.

Writes docs/figures/scaling.png; nothing in it is drawn by hand.
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from benchmarks.readme import ROOT, load
from fastlatent import figures
from fastlatent._files import write

FIGURES = ROOT / "docs" / "figures"
PROVIDERS = {
    "fastlatent": figures.MODELS["autodecoder"].light,
    "torch SparseAdam": figures.MODELS["variational_autoencoder"].light,
    "torch fused Adam": figures.MODELS["autoencoder"].light,
}


def scaling(results: dict[str, Any]) -> bytes:
    """Step time against N, D and B as a PNG; results of test_bench_scaling."""
    picture, axes = figures.panels(3)
    for place, key, title, sources in (
        (axes[0], "rows", "rows N", ("test_scaling_rows[", "test_scaling_rows_dense[")),
        (axes[1], "dimensions", "dimensions D", ("test_scaling_dimensions[",)),
        (axes[2], "batch", "batch B", ("test_scaling_batch[",)),
    ):
        for provider, colour in PROVIDERS.items():
            points = _points(results, sources, key, provider)
            if points:
                _curve(place, points, provider, colour)
        place.set_xscale("log")
        place.set_yscale("log")
        figures.plain_ticks(place)
        sizes = sorted(
            {result[key] for name, result in results.items() if name.startswith(sources)}
        )
        place.set_xticks(sizes, [_short(value) for value in sizes])
        place.xaxis.set_minor_locator(NullLocator())
        figures.label(place, f"a step against the {title}", title, "ms")
    lines, names = axes[0].get_legend_handles_labels()
    picture.legend(
        lines, names, loc="outside upper left", ncols=3, frameon=False, fontsize=8.5, borderpad=0
    )
    return figures.png(picture)


def _points(
    results: dict[str, Any], sources: tuple[str, ...], key: str, provider: str
) -> dict[int, tuple[float, float, float]]:
    """Quartiles in ms by size; a provider that is in several benchmarks is taken from the first."""
    points: dict[int, tuple[float, float, float]] = {}
    for source in sources:
        for name, result in results.items():
            if name.startswith(source) and provider in result["median_ms"]:
                low, middle, high = result["quartiles_ms"][provider]
                points.setdefault(result[key], (low, middle, high))
    return dict(sorted(points.items()))


def _short(value: int) -> str:
    power = len(str(value)) - 1
    return f"$10^{power}$" if value == 10**power and power > 3 else str(value)


def _curve(
    axes: Axes, points: dict[int, tuple[float, float, float]], name: str, colour: str
) -> None:
    sizes = list(points)
    low, middle, high = zip(*points.values(), strict=True)
    axes.fill_between(sizes, low, high, color=colour, alpha=0.2, lw=0)
    axes.plot(sizes, middle, "o-", color=colour, ms=4, lw=1.6, label=name)


def main() -> None:
    content = load("bench_scaling")
    FIGURES.mkdir(parents=True, exist_ok=True)
    write(FIGURES / "scaling.png", scaling(content["results"]))


if __name__ == "__main__":
    main()

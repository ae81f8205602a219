"""The pictures of a comparison, drawn with matplotlib's Agg and SVG canvases and never with pyplot.

Every figure uses the colours of `MODELS` and `INKS` only. `svg` replaces them by the CSS variables
that the report's style sheet defines, so that a figure follows the page's light or dark scheme (and
its font, which the style sheet sets); `png` draws the same figure on white.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from PIL import Image


class Look(NamedTuple):
    """How a model is written and drawn, the same in every figure, table and sentence."""

    short: str
    name: str
    light: str
    dark: str
    dashed: bool


MODELS: dict[str, Look] = {
    "autoencoder": Look("AE", "auto-encoder", "#c2491d", "#f2875a", False),
    "variational_autoencoder": Look("VAE", "variational auto-encoder", "#e39a2d", "#f0bd6a", True),
    "autodecoder": Look("AD", "auto-decoder", "#0a62a9", "#5aa9ee", False),
    "variational_autodecoder": Look("VAD", "variational auto-decoder", "#3f9fd6", "#95d0f3", True),
}
# name -> (light, dark)
INKS: dict[str, tuple[str, str]] = {
    "paper": ("#fefefe", "#15181c"),
    "ink": ("#1c2127", "#e9ecef"),
    "muted": ("#626c79", "#9aa5b1"),
    "rule": ("#dfe3e8", "#333a42"),
}
CLASSES = (
    "#4e79a7", "#e07b2a", "#4f9d5b", "#c9484b", "#8b6bb1",
    "#8c6d5a", "#d179a8", "#7b8087", "#a9a33a", "#2fa3ad",
)  # fmt: skip
WIDTH = 4.6
WIDE = 9.6
_SMALL, _TEXT = 8.5, 9.5


def errors(models: Mapping[str, Any], unit: str) -> Figure:
    """Training and held-out error of every model, and the auto-encoder's after refinement."""
    figure, axes = _panel(height=3.1)
    top = max(_finite(m.test_mse, m.train_mse, m.test_mse_refined) for m in models.values())
    for row, (key, m) in enumerate(models.items()):
        colour = MODELS[key].light
        axes.plot([m.train_mse, m.test_mse], [row, row], color=colour, lw=2.5, zorder=2)
        axes.plot(m.train_mse, row, "o", ms=8, mfc=_ink("paper"), mec=colour, mew=2, zorder=3)
        axes.plot(m.test_mse, row, "o", ms=8.5, color=colour, zorder=3)
        if m.test_mse_refined is not None:
            axes.plot(m.test_mse_refined, row, "D", ms=5.5, color=_ink("ink"), zorder=4)
        axes.text(0, row - 0.32, MODELS[key].name, color=_ink("ink"), size=_TEXT, va="center")
    keys = [
        ("training", {"marker": "o", "mfc": _ink("paper"), "mec": _ink("muted"), "ms": 6.5}),
        ("unseen", {"marker": "o", "color": _ink("muted"), "ms": 7}),
        ("unseen, code refined", {"marker": "D", "color": _ink("ink"), "ms": 5}),
    ]
    handles = [Line2D([], [], ls="", mew=1.6, label=name, **style) for name, style in keys]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=3,
        frameon=False,
        fontsize=_SMALL,
        labelcolor=_ink("muted"),
        handletextpad=0.2,
        columnspacing=1.2,
        borderpad=0,
    )
    axes.set_ylim(len(models) - 0.25, -0.75)
    axes.set_xlim(0, top * 1.1)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"mean squared error per {unit}", color=_ink("muted"), size=_SMALL)
    return figure


def cost(models: Mapping[str, Any]) -> Figure:
    """Held-out error against the time of encoding one unseen sample."""
    figure, axes = _panel(height=3.1)
    points = []
    for key, m in models.items():
        look = MODELS[key]
        points.append((m.infer_ms_per_sample, m.test_mse, look.short, look.light, "o"))
        if m.test_mse_refined is not None:
            points.append(
                (
                    m.infer_ms_per_sample_refined,
                    m.test_mse_refined,
                    f"{look.short} refined",
                    look.light,
                    "D",
                )
            )
            axes.annotate(
                "",
                points[-1][:2],
                points[-2][:2],
                arrowprops={
                    "arrowstyle": "-",
                    "color": look.light,
                    "linestyle": (0, (2, 2)),
                    "lw": 1.2,
                },
            )
    for x, y, _, colour, marker in points:
        axes.plot(x, y, marker, ms=9 if marker == "o" else 7, color=colour)
    axes.set_xscale("log")
    low, high = min(p[0] for p in points), max(p[0] for p in points)
    # room on both sides for the names, which point away from the middle
    margin = max(high / low, 10) ** 0.3
    axes.set_xlim(low / margin, high * margin)
    axes.set_ylim(0, max(p[1] for p in points) * 1.15)
    _label_points(axes, points)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("milliseconds per unseen sample", color=_ink("muted"), size=_SMALL)
    axes.set_ylabel("held-out error", color=_ink("muted"), size=_SMALL)
    axes.grid(True, axis="y", color=_ink("rule"), lw=0.8)
    return figure


def curves(models: Mapping[str, Any], against: str) -> Figure:
    """Training error against "epoch" or "seconds"."""
    figure, axes = _panel(height=2.9)
    for key, m in models.items():
        look = MODELS[key]
        axes.plot(
            m.history[against],
            m.history["mse"],
            color=look.light,
            lw=1.8,
            ls=(0, (4, 1.5)) if look.dashed else "-",
            label=look.short,
            marker="o" if len(m.history["mse"]) == 1 else None,
        )
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=against == "epoch"))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _few_log_ticks(axes, [v for m in models.values() for v in m.history["mse"]])
    axes.grid(True, axis="y", color=_ink("rule"), lw=0.8)
    label = "epochs" if against == "epoch" else "seconds of training"
    axes.set_xlabel(label, color=_ink("muted"), size=_SMALL)
    axes.set_ylabel("training error", color=_ink("muted"), size=_SMALL)
    axes.legend(
        loc="upper right",
        ncols=2,
        frameon=False,
        fontsize=_TEXT,
        labelcolor=_ink("ink"),
        handlelength=2.4,
    )
    return figure


def code_map(points: np.ndarray, labels: np.ndarray | None, colour: str) -> Figure:
    """Codes in two dimensions [M, 2], coloured by label, each class named at its median."""
    figure = Figure(figsize=(WIDTH, WIDTH))
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set_axis_off()
    # spread of the inner 99 %, so that one stray code does not shrink all others to a dot
    low, high = np.quantile(points, [0.005, 0.995], axis=0)
    centre, half = (low + high) / 2, max(float((high - low).max()) / 2, 1e-12) * 1.12
    axes.set_xlim(centre[0] - half, centre[0] + half)
    axes.set_ylim(centre[1] - half, centre[1] + half)
    size = float(np.clip(9000 / max(len(points), 1), 4, 40))
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], s=size, color=colour, lw=0, alpha=0.7)
        return figure
    classes = np.unique(labels)
    colours = class_colours(len(classes))
    order = np.random.default_rng(0).permutation(len(points))
    axes.scatter(
        points[order, 0],
        points[order, 1],
        s=size,
        c=[colours[i] for i in np.searchsorted(classes, labels[order])],
        lw=0,
        alpha=0.75,
    )
    if len(classes) <= 20:
        for value, tone in zip(classes, colours, strict=True):
            x, y = np.median(points[labels == value], axis=0)
            axes.text(
                x,
                y,
                str(value),
                size=11,
                weight="bold",
                color="white",
                ha="center",
                va="center",
                bbox={"boxstyle": "circle,pad=0.22", "fc": tone, "ec": "white", "lw": 1.2},
            )
    return figure


def panels(columns: int, height: float = 3.1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure as wide as the page, with empty panels side by side, in the style of the report.

    Draw with the colours of `MODELS` and `INKS` only: a drawing is made to follow the page's light
    or dark scheme by their values.
    """
    figure = Figure(figsize=(WIDE, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        _plain_axes(axes)
        axes.grid(True, axis="y", color=_ink("rule"), lw=0.8)
    return figure, list(grid.flat)


def spread(
    axes: Axes, x: Sequence[float], estimates: Sequence[Any], key: str, **style: Any
) -> None:
    """The means of estimates against x as the line of a model, and the seeds' range as a band.

    `key` is one of `MODELS`; `style` goes to the line.
    """
    look = MODELS[key]
    line = {"ls": (0, (4, 1.5)) if look.dashed else "-", "label": look.short, "marker": "o"}
    axes.plot(x, [e.mean for e in estimates], color=look.light, lw=1.8, ms=4, **{**line, **style})
    low, high = [e.minimum for e in estimates], [e.maximum for e in estimates]
    axes.fill_between(x, low, high, color=look.light, alpha=0.18, lw=0)


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """A panel's heading and the names of its axes."""
    axes.set_title(title, loc="left", size=_TEXT, color=_ink("ink"), weight="bold")
    axes.set_xlabel(x, color=_ink("muted"), size=_SMALL)
    axes.set_ylabel(y, color=_ink("muted"), size=_SMALL)


def plain_ticks(axes: Axes) -> None:
    """Numbers instead of powers of ten on logarithmic axes, at 1, 2, 5 where there are few tens.

    To be called when all is drawn.
    """
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() != "log":
            continue
        low, high = sorted(axis.get_view_interval())
        if high < 200 * low:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_minor_formatter(NullFormatter())


def legend(axes: Axes, **options: Any) -> None:
    """A panel's legend in the style of the report."""
    style = {"frameon": False, "fontsize": _SMALL, "labelcolor": _ink("ink"), "handlelength": 2.4}
    axes.legend(**{**style, **options})


def class_colours(count: int) -> list[str]:
    """One colour per class, the first ten chosen to be told apart on white and on black."""
    if count <= len(CLASSES):
        return list(CLASSES[:count])
    wheel = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, count))
    return [matplotlib.colors.to_hex(c) for c in wheel]


def strip(samples: np.ndarray, *, image: bool, colour: str | None = None) -> np.ndarray:
    """Samples side by side: RGBA bytes [H, W, 4], gaps transparent.

    Args:
        samples: [K, C, H, W] in [0, 1] if `image`, else [K, ...], drawn as one line each.
        colour: colour of the lines.
    """
    if not image:
        return _line_strip(samples, colour or _ink("muted"))
    pixels = samples.clip(0, 1).transpose(0, 2, 3, 1)
    if pixels.shape[-1] not in (3, 4):
        pixels = pixels.mean(-1, keepdims=True).repeat(3, -1)
    alpha = np.ones_like(pixels[..., :1])
    return _join(np.concatenate([pixels[..., :3], alpha], -1))


def error_strip(originals: np.ndarray, reconstructions: np.ndarray, colour: str) -> np.ndarray:
    """|original - reconstruction| of images as opacity of one colour; 0.5 and above is opaque."""
    error = np.abs(originals - reconstructions).mean(1).clip(0, 0.5) / 0.5
    paint = np.broadcast_to(np.array(to_rgb(colour)), (*error.shape, 3))
    return _join(np.concatenate([paint, error[..., None]], -1))


def rows(strips: Sequence[tuple[str, np.ndarray]]) -> Figure:
    """Strips below each other, each with its name: the file version of the report's rows."""
    height, width = strips[0][1].shape[:2]
    each = WIDTH * 1.6 * height / width
    figure = Figure(figsize=(WIDTH * 1.6 + 1.9, (each + 0.08) * len(strips)), layout="constrained")
    grid = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axes, (name, pixels) in zip(grid, strips, strict=True):
        axes.imshow(pixels, interpolation="nearest", aspect="equal")
        axes.set_axis_off()
        axes.text(-0.02, 0.5, name, transform=axes.transAxes, ha="right", va="center", size=_TEXT)
    return figure


def png(picture: Figure | np.ndarray, *, transparent: bool = False) -> bytes:
    """A figure (at 200 dots per inch) or RGBA bytes as a PNG file."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        if not transparent:
            picture.patch.set_facecolor("white")
            picture.patch.set_alpha(1)
        picture.savefig(buffer, format="png", dpi=200)
    else:
        Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def svg(figure: Figure, name: str) -> str:
    """A figure as an inline <svg> whose colours are the page's."""
    buffer = io.StringIO()
    figure.patch.set_alpha(0)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-z]+[a-zA-Z]*\d*_\d+"', "", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    for key, look in MODELS.items():
        text = text.replace(look.light, f"var(--{key.replace('_', '-')})")
    for key, (light, _) in INKS.items():
        text = text.replace(light, f"var(--{key})")
    return text


def _panel(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    _plain_axes(axes)
    return figure, axes


def _plain_axes(axes: Axes) -> None:
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_ink("rule"))
    axes.tick_params(
        which="both", color=_ink("rule"), labelcolor=_ink("muted"), labelsize=_SMALL, length=3
    )


def _label_points(axes: Axes, points: Sequence[tuple[float, float, str, str, str]]) -> None:
    """Names the points outwards: to their left in the left half, to their right in the right half.

    Names that would touch are moved apart and keep a hairline to their point.
    """
    low, high = axes.get_xlim()
    middle = math.sqrt(low * high)
    gap = 0.085 * axes.get_ylim()[1]
    for right in (False, True):
        side = sorted((p for p in points if (p[0] > middle) == right), key=lambda p: -p[1])
        heights: list[float] = []
        for point in side:
            heights.append(min(point[1], heights[-1] - gap) if heights else point[1])
        if side:
            # share the displacement between the first and the last name
            lift = (side[-1][1] - heights[-1]) / 2
            heights = [h + lift for h in heights]
        for (x, y, label, *_), height in zip(side, heights, strict=True):
            reach = (high / low) ** 0.045
            axes.annotate(
                label,
                (x, y),
                xytext=(x * reach if right else x / reach, height),
                ha="left" if right else "right",
                va="center",
                size=_TEXT,
                color=_ink("ink"),
                arrowprops={
                    "arrowstyle": "-",
                    "color": _ink("muted"),
                    "lw": 0.6,
                    "shrinkA": 1,
                    "shrinkB": 4,
                },
            )


def _few_log_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Ticks at 1, 2, 5 of every decade in sight: a decade alone is often one tick or none."""
    low, high = min(values), max(values)
    if not 0 < low < high:
        return
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    ticks = [s * 10.0**d for d in decades for s in steps]
    axes.set_yticks([t for t in ticks if low * 0.9 <= t <= high * 1.1])
    axes.set_yticks([], minor=True)


def _join(cells: np.ndarray) -> np.ndarray:
    """[K, H, W, 4] in [0, 1] -> one row of bytes, pixels enlarged to cells of 64 or more."""
    _, height, width, _ = cells.shape
    scale = max(1, math.ceil(64 / max(height, width)))
    big = (cells * 255).round().astype(np.uint8).repeat(scale, 1).repeat(scale, 2)
    gap = max(2, width * scale // 16)
    padded = np.pad(big, ((0, 0), (0, 0), (0, gap), (0, 0)))
    row = padded.transpose(1, 0, 2, 3).reshape(height * scale, -1, 4)
    return row[:, : row.shape[1] - gap]


def _line_strip(samples: np.ndarray, colour: str) -> np.ndarray:
    lines = samples.reshape(len(samples), -1)
    figure = Figure(figsize=(0.8 * len(lines), 0.8), dpi=120)
    figure.patch.set_alpha(0)
    canvas = FigureCanvasAgg(figure)
    low, high = float(lines.min()), float(lines.max())
    pad = 0.08 * (high - low) or 1.0
    for i, line in enumerate(lines):
        axes = figure.add_axes(((i + 0.04) / len(lines), 0.02, 0.92 / len(lines), 0.96))
        axes.plot(line, color=colour, lw=1.2, marker="." if len(line) == 1 else None)
        axes.set_ylim(low - pad, high + pad)
        axes.set_axis_off()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


def _ink(name: str) -> str:
    return INKS[name][0]


def _finite(*values: float | None) -> float:
    return max(v for v in values if v is not None)

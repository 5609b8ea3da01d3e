"""Pictures: numbers of training and evaluation -> figures, and figures -> PNG files or SVG for a page."""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

COLOURS = {
    "ink": "#20262e",
    "muted": "#7b8794",
    "grid": "#dfe3e8",
    "first": "#0072b2",
    "second": "#d55e00",
    "third": "#009e73",
    "fourth": "#aa4499",
    "bar": "#8ec0df",
    "on-first": "#fefefe",
}
"""Roles and their colours (after Okabe and Ito 2008, told apart by colour-blind readers); each colour has one role."""

_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": COLOURS["muted"],
    "axes.grid": True,
    "axes.labelcolor": COLOURS["ink"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "svg.hashsalt": "coop",  # else ids differ from run to run
    "text.color": COLOURS["ink"],
    "text.parse_math": False,  # a class name may hold dollar signs
    "xtick.color": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.color": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["ink"],
}
_SHOWN_NAMES = {"coop": "CoOp", "cocoop": "CoCoOp", "upl": "UPL", "dpl": "DPL", "biomedcoop": "BiomedCoOp"}
_SHOWN_CHOICES = 4
"""Of a sweep, in one picture."""
_COUNTED_CLASSES = 16
"""Up to here a confusion matrix has its counts written into the cells."""
_NAMED_CLASSES = 100
"""Up to here its rows and columns are named."""


def shown_name(classifier: str) -> str:
    """`coop` -> CoOp, `linear probe` -> Linear probe."""
    return _SHOWN_NAMES.get(classifier, classifier[:1].upper() + classifier[1:])


@matplotlib.rc_context(_STYLE)
def training_curve(epochs: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and accuracy by epoch, of training and (where measured) validation images."""
    figure = Figure(figsize=(9.1, 3.1))
    loss, accuracy = figure.subplots(1, 2)
    numbers = [row["epoch"] for row in epochs]
    marker = "o" if len(epochs) == 1 else ""
    for axes, field in ((loss, "loss"), (accuracy, "accuracy")):
        for name, key, colour in (("training", field, "first"), ("validation", f"val_{field}", "second")):
            values = [np.nan if row[key] is None else row[key] for row in epochs]
            if not np.isnan(values).all():
                axes.plot(numbers, values, label=name, color=COLOURS[colour], marker=marker)
        axes.set_title(field.capitalize())
        axes.set_xlabel("Epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(False, axis="x")
    loss.set_ylim(bottom=0)
    loss.legend()
    _percent(accuracy, "y")
    _end_on_tens(accuracy)
    return figure


@matplotlib.rc_context(_STYLE)
def few_shot_curve(points: Sequence[Mapping[str, Any]], zero_shot: float) -> Figure:
    """Accuracy by shots, a line for each classifier, with the zero-shot baseline across.

    Parameters
    ----------
    points
        {"shots": int, classifier: accuracy as a fraction, ...} for each number of shots.
    """
    figure = Figure(figsize=(9.1, 3.8))
    axes = figure.subplots()
    ordered = sorted(points, key=lambda point: point["shots"])
    shots = [point["shots"] for point in ordered]
    names = list(dict.fromkeys(name for point in ordered for name in point if name != "shots"))
    for name, colour in zip(names, _cycle(len(names)), strict=True):
        values = [point.get(name, np.nan) for point in ordered]
        axes.plot(shots, values, marker="o", markersize=5.5, color=colour, label=shown_name(name))
    axes.axhline(zero_shot, color=COLOURS["muted"], linestyle=(0, (4, 3)), linewidth=1.5, label="Zero-shot")
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, [str(count) for count in shots])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("Training images a class")
    axes.set_title("Accuracy on the test images")
    axes.grid(False, axis="x")
    _percent(axes, "y")
    _end_on_tens(axes)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(names) + 1)
    return figure


@matplotlib.rc_context(_STYLE)
def sweep_curve(choices: Mapping[str, Sequence[tuple[int, float, float]]], *, zero_shot: float) -> Figure:
    """Accuracy by shots, mean and spread over seeds, a line for each of the first few choices of a sweep.

    Parameters
    ----------
    choices
        (shots, mean, spread) by what the choice is called, the best first.
    """
    figure = Figure(figsize=(9.1, 4.2))
    axes = figure.subplots()
    shown = dict(list(choices.items())[:_SHOWN_CHOICES])
    colours = ("first", "second", "third", "fourth")
    for position, ((label, points), role) in enumerate(zip(shown.items(), colours, strict=False)):
        shots, means, spreads = (np.array(values) for values in zip(*points, strict=True))
        shift = 2 ** (0.03 * (position - (len(shown) - 1) / 2))                    # bars beside each other
        axes.errorbar(shots * shift, means, yerr=spreads, marker="o", markersize=5, capsize=3, elinewidth=1.2,
                      color=COLOURS[role], label=label)  # fmt: skip
    axes.axhline(zero_shot, color=COLOURS["muted"], linestyle=(0, (4, 3)), linewidth=1.5, label="Zero-shot")
    every = sorted({point[0] for points in shown.values() for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(every, [str(count) for count in every])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("Training images a class")
    more = f" (the best {len(shown)} of {len(choices)} choices by validation)" if len(choices) > len(shown) else ""
    axes.set_title(f"Accuracy on the test images, mean and spread over seeds{more}")
    axes.grid(False, axis="x")
    _percent(axes, "y")
    _end_on_tens(axes)
    axes.legend(loc="lower right")
    return figure


@matplotlib.rc_context(_STYLE)
def confusion_matrix(confusion: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Shares of each true class (row) that went to each predicted class (column), with counts when they fit."""
    counts = np.asarray(confusion)                                                # (c, c)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)            # (c, c)
    c = len(class_names)
    side = float(np.clip(0.46 * c, 2.0, 5.6 if c <= 40 else 6.6))
    named = c <= _NAMED_CLASSES
    short = [_short(name) for name in class_names]
    size = min(9.0, 72 * side / c * 0.85)                                         # of the names, in points
    longest = max(map(len, short)) * size * 0.6 / 72 if named else 0.0            # in inches, nearly
    figure = Figure(figsize=(side + longest + 1.6, side + longest * (0.7 if c <= 40 else 1) + 0.6))
    axes = figure.subplots()
    fade = LinearSegmentedColormap.from_list("share", [to_rgba(COLOURS["first"], a) for a in (0, 1)])
    # Shade is opacity, so that any background will do; its square root, so that rare confusions are seen as well.
    image = axes.imshow(shares, cmap=fade, norm=PowerNorm(0.5, 0, 1), interpolation="none")
    axes.grid(False)
    axes.set_xlabel("Predicted class")
    axes.set_ylabel("True class")
    for spine in axes.spines.values():
        spine.set(visible=True, color=COLOURS["grid"])
    if named:
        slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if c <= 40 else {"rotation": 90}
        axes.set_xticks(range(c), short, fontsize=size, **slanted)
        axes.set_yticks(range(c), short, fontsize=size)
        axes.tick_params(length=0)
    if c <= _COUNTED_CLASSES:
        _write_counts(axes, counts, shares)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=24, pad=0.03, ticks=(0, 0.05, 0.2, 0.5, 1),
                          format=PercentFormatter(1, symbol=" %"))  # fmt: skip
    bar.set_label("Share of the true class")
    bar.outline.set_visible(False)
    return figure


@matplotlib.rc_context(_STYLE)
def reliability_diagram(evaluation: Mapping[str, Any], title: str = "Reliability") -> Figure:
    """Accuracy of each bin as a bar, its mean confidence as a line, and below how many images it holds."""
    figure = Figure(figsize=(4.3, 4.7))
    axes, histogram = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    bins = [found for found in evaluation["calibration"] if found["count"]]
    middles = np.array([(found["low"] + found["high"]) / 2 for found in bins])
    widths = np.array([found["high"] - found["low"] for found in bins]) * 0.88
    bars = axes.bar(middles, [found["accuracy"] for found in bins], widths, color=COLOURS["bar"])
    lines = axes.hlines([found["confidence"] for found in bins], middles - widths / 2, middles + widths / 2,
                        color=COLOURS["second"], linewidth=2.5)  # fmt: skip
    equal = axes.axline((0, 0), slope=1, color=COLOURS["muted"], linestyle=(0, (4, 3)), linewidth=1.2)
    axes.set_ylabel("Accuracy")
    axes.set_ylim(0, 1.005)
    axes.set_title(f"{title}: ECE {100 * evaluation['calibration_error']:.1f} %")
    _percent(axes, "y")
    histogram.bar(middles, [found["count"] for found in bins], widths, color=COLOURS["muted"])
    histogram.set_ylabel("Images")
    histogram.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    histogram.set_xlabel("Confidence")
    histogram.set_xlim(0, 1)
    _percent(histogram, "x")
    for each in (axes, histogram):
        each.grid(False, axis="x")
    figure.legend([bars, lines, equal], ["Accuracy", "Mean confidence", "Equal"], loc="outside lower center",
                  ncols=3, fontsize=8.5)  # fmt: skip
    return figure


@matplotlib.rc_context(_STYLE)
def class_accuracy_bars(learned: Mapping[str, float], zero_shot: Mapping[str, float], name: str = "coop") -> Figure:
    """Accuracy of each class, best first, as a bar, with the zero-shot baseline's as a mark."""
    ordered = sorted(learned, key=lambda each: (learned[each], each))
    figure = Figure(figsize=(9.1, 0.9 + 0.28 * len(ordered)))
    axes = figure.subplots()
    places = np.arange(len(ordered))
    bars = axes.barh(places, [learned[each] for each in ordered], height=0.55, color=COLOURS["bar"])
    marks = axes.scatter([zero_shot[each] for each in ordered], places, s=46, marker="D", color=COLOURS["second"],
                         edgecolors=COLOURS["on-first"], clip_on=False, zorder=3)  # fmt: skip
    axes.set_yticks(places, [_short(each, 36) for each in ordered])
    axes.set_ylim(-0.6, len(ordered) - 0.4)
    axes.set_xlim(0, 1)
    axes.tick_params(axis="y", length=0, pad=9)
    axes.grid(False, axis="y")
    _percent(axes, "x")
    axes.legend([bars, marks], [shown_name(name), "Zero-shot"], loc="lower left", bbox_to_anchor=(0, 1), ncols=2,
                borderaxespad=0.2, borderpad=0)  # fmt: skip
    return figure


@matplotlib.rc_context(_STYLE)
def save_png(figure: Figure, path: Path) -> None:
    """On white, at 160 dots an inch; equal figures give equal bytes."""
    buffer = io.BytesIO()
    _draw(figure, buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


@matplotlib.rc_context(_STYLE)
def as_svg(figure: Figure) -> str:
    """An <svg> element to stand in a page, without background; equal figures give equal text.

    The page may give each of `COLOURS` another value through the CSS variables --figure-ink, --figure-first, ...
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    _draw(figure, buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])  # else every figure of a page has an axes_1
    roles = {colour: role for role, colour in COLOURS.items()}
    pattern = rf"(?<=(?:fill|roke): )(?:{'|'.join(roles)})"
    return re.sub(pattern, lambda found: f"var(--figure-{roles[found[0]]}, {found[0]})", svg)


def _draw(figure: Figure, target: Any, **how: Any) -> None:
    with warnings.catch_warnings():
        # Class names may be in scripts that matplotlib's font lacks; the browser has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(target, **how)


def _write_counts(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    for row, column in np.argwhere(counts):
        colour = COLOURS["on-first" if shares[row, column] > 0.45 else "ink"]
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, fontsize=8.5)


def _percent(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def _end_on_tens(axes: Axes) -> None:
    """Let the axis of accuracies begin and end on whole ten percent."""
    low, high = axes.dataLim.intervaly
    axes.set_ylim(max(0, np.floor(10 * low - 0.1) / 10), min(1.005, np.ceil(10 * high + 0.1) / 10))


def _cycle(count: int) -> list[str]:
    lines = [COLOURS[role] for role in ("first", "second", "third", "fourth")]
    return [lines[i % len(lines)] for i in range(count)]


def _short(name: str, limit: int = 24) -> str:
    flat = " ".join(name.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"

"""Pictures: numbers of training and evaluation -> figures, each for a wide page or a narrow one."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from coop_core.report.style import COLOURS, STYLE, as_svg, save_png, shown_name

__all__ = [
    "COLOURS", "NARROW", "WIDE", "as_svg", "class_accuracy_bars", "confusion_matrix", "few_shot_curve",
    "reliability_diagram", "risk_coverage", "save_png", "shown_name", "sweep_curve", "training_curve",
]  # fmt: skip

WIDE, NARROW = 9.1, 4.4
"""Widths of a figure in inches: of a page and of a telephone, each readable without being scaled down by half."""
_SHOWN_CHOICES = 4
"""Of a sweep, in one picture."""
_NAMED_PITCH, _SLANTED_PITCH, _COUNTED_PITCH = 8.0, 16.0, 20.0
"""Widths of a cell in points from which a confusion matrix has names, slanted names, and counts in its cells."""
_CELL, _LARGEST_NAME, _CHARACTER = 0.46, 9.0, 0.62
"""Widest cell in inches, size of a name in points, and the width of its letters as a share of that."""


@matplotlib.rc_context(STYLE)
def training_curve(epochs: Sequence[Mapping[str, Any]], *, width: float = WIDE) -> Figure:
    """Loss and accuracy by epoch, of training and (where measured) validation images."""
    figure = Figure(figsize=(width, 3.1 if width == WIDE else 5.6))
    loss, accuracy = figure.subplots(1, 2) if width == WIDE else figure.subplots(2, 1)
    numbers = [row["epoch"] for row in epochs]
    marker = "o" if len(epochs) == 1 else ""
    for axes, field in ((loss, "loss"), (accuracy, "accuracy")):
        for name, key, colour in (("training", field, "first"), ("validation", f"val_{field}", "second")):
            values = [np.nan if row[key] is None else row[key] for row in epochs]
            if not np.isnan(values).all():
                axes.plot(numbers, values, label=name, color=COLOURS[colour], marker=marker)
        axes.set_title(field.capitalize())
        axes.set_xlabel("Epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True) if len(epochs) > 1 else FixedLocator(numbers))
        axes.grid(False, axis="x")
    loss.set_ylim(bottom=0)
    loss.legend()
    _percent(accuracy, "y")
    _end_on_tens(accuracy)
    return figure


@matplotlib.rc_context(STYLE)
def few_shot_curve(
    points: Sequence[Mapping[str, Any]],
    zero_shot: float,
    *,
    best_baseline: tuple[str, float] | None = None,
    width: float = WIDE,
) -> Figure:
    """Accuracy by shots, a line for each classifier, with the zero-shot baseline across.

    Parameters
    ----------
    points
        {"shots": int, classifier: accuracy as a fraction, ...} for each number of shots.
    best_baseline
        Its name and accuracy. The legend says which line it is; when no point has it, it needs no training images,
        and its line goes across as well.
    """
    figure = Figure(figsize=(width, 3.8))
    axes = figure.subplots()
    best, best_accuracy = best_baseline or ("", 0.0)

    def label(name: str) -> str:
        return f"{shown_name(name)} (best baseline)" if name == best else shown_name(name)

    ordered = sorted(points, key=lambda point: point["shots"])
    shots = [point["shots"] for point in ordered]
    names = list(dict.fromkeys(name for point in ordered for name in point if name != "shots"))
    for name, colour in zip(names, _cycle(len(names)), strict=True):
        values = [point.get(name, np.nan) for point in ordered]
        axes.plot(shots, values, marker="o", markersize=5.5, color=colour, label=label(name))
    if best not in ("", "zero-shot", *names):
        axes.axhline(best_accuracy, color=COLOURS["ink"], linestyle=(0, (1, 2)), linewidth=1.5, label=label(best))
    _across(axes, zero_shot, label("zero-shot"))
    _by_shots(axes, shots, "Accuracy on the test images")
    figure.legend(loc="outside lower center", ncols=4 if width == WIDE else 2)
    return figure


@matplotlib.rc_context(STYLE)
def sweep_curve(choices: Mapping[str, Sequence[tuple[int, float, float]]], *, zero_shot: float) -> Figure:
    """Accuracy by shots, mean and spread over seeds, a line for each of the first few choices of a sweep.

    Parameters
    ----------
    choices
        (shots, mean, spread) by what the choice is called, the best first.
    """
    figure = Figure(figsize=(WIDE, 4.2))
    axes = figure.subplots()
    shown = dict(list(choices.items())[:_SHOWN_CHOICES])
    colours = ("first", "second", "third", "fourth")
    for position, ((label, points), role) in enumerate(zip(shown.items(), colours, strict=False)):
        shots, means, spreads = (np.array(values) for values in zip(*points, strict=True))
        shift = 2 ** (0.03 * (position - (len(shown) - 1) / 2))                    # bars beside each other
        axes.errorbar(shots * shift, means, yerr=spreads, marker="o", markersize=5, capsize=3, elinewidth=1.2,
                      color=COLOURS[role], label=label)  # fmt: skip
    _across(axes, zero_shot, "Zero-shot")
    every = sorted({point[0] for points in shown.values() for point in points})
    more = f" (the best {len(shown)} of {len(choices)} choices by validation)" if len(choices) > len(shown) else ""
    _by_shots(axes, every, f"Accuracy on the test images, mean and spread over seeds{more}")
    axes.legend(loc="lower right")
    return figure


@matplotlib.rc_context(STYLE)
def confusion_matrix(confusion: Sequence[Sequence[int]], class_names: Sequence[str], *, width: float = WIDE) -> Figure:
    """Shares of each true class (row) that went to each predicted class (column).

    The cells take the width there is. Names stand beside them, and counts in them, when the cells are large enough
    for names and counts not to touch.
    """
    counts = np.asarray(confusion)                                                # (c, c)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)            # (c, c)
    c, wide = len(class_names), width == WIDE
    names = _short_names(class_names, 24 if wide else 14)
    longest = max(map(len, names)) * _LARGEST_NAME * _CHARACTER / 72
    free = width - (1.7 if wide else 0.6)                                         # beside the bar and the axis' title
    named = 72 * min(_CELL, (free - longest) / c) >= _NAMED_PITCH
    side = max(2.0, min(_CELL * c, free - longest * named))
    pitch = 72 * side / c
    figure = Figure(figsize=(side + longest * named + width - free, side + longest * named + (0.7 if wide else 1.4)))
    axes = figure.subplots()
    fade = LinearSegmentedColormap.from_list("share", [to_rgba(COLOURS["first"], a) for a in (0, 1)])
    # Shade is opacity, so that any background will do; its square root, so that rare confusions are seen as well.
    image = axes.imshow(shares, cmap=fade, norm=PowerNorm(0.5, 0, 1), interpolation="none")
    axes.grid(False)
    axes.set_xlabel("Predicted class")
    axes.set_ylabel("True class")
    for spine in axes.spines.values():
        spine.set(visible=True, color=COLOURS["grid"])
    _name_cells(axes, names if named else [], pitch)
    if pitch >= max(_COUNTED_PITCH, 6 * len(str(counts.max()))):
        _write_counts(axes, counts, shares)
    where = {"shrink": 0.6, "aspect": 24} if wide else {"location": "bottom", "aspect": 30}
    bar = figure.colorbar(image, ax=axes, pad=0.03, ticks=(0, 0.05, 0.2, 0.5, 1),
                          format=PercentFormatter(1, symbol=" %"), **where)  # fmt: skip
    bar.set_label("Share of the true class")
    bar.outline.set_visible(False)
    return figure


@matplotlib.rc_context(STYLE)
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


@matplotlib.rc_context(STYLE)
def risk_coverage(answering: Mapping[str, Any]) -> Figure:
    """Share of wrong answers by the share of images answered, the surest first, and where the threshold lies."""
    figure = Figure(figsize=(4.3, 3.2))
    axes = figure.subplots()
    curve = answering["curve"]
    axes.plot([point["coverage"] for point in curve], [point["risk"] for point in curve], color=COLOURS["first"])
    if answering["threshold"] > 0 and answering["accuracy"] is not None:
        axes.plot(answering["answered"], 1 - answering["accuracy"], "o", color=COLOURS["second"], label="threshold")
        axes.legend()
    axes.set_xlabel("Images answered, the surest first")
    axes.set_ylabel("Wrong answers")
    axes.set_xlim(0, 1.005)
    axes.set_ylim(bottom=0)
    _percent(axes, "x")
    _percent(axes, "y")
    return figure


@matplotlib.rc_context(STYLE)
def class_accuracy_bars(
    learned: Mapping[str, float],
    baseline: Mapping[str, float],
    *,
    name: str = "coop",
    baseline_name: str = "zero-shot",
    width: float = WIDE,
) -> Figure:
    """Accuracy of each class, best first, as a bar, with a baseline's as a mark."""
    ordered = sorted(learned, key=lambda each: (learned[each], each))
    figure = Figure(figsize=(width, 0.9 + 0.28 * len(ordered)))
    axes = figure.subplots()
    places = np.arange(len(ordered))
    axes.barh(places, [learned[each] for each in ordered], height=0.55, color=COLOURS["bar"], label=shown_name(name))
    axes.scatter([baseline[each] for each in ordered], places, s=46, marker="D", color=COLOURS["second"],
                 edgecolors=COLOURS["on-first"], clip_on=False, zorder=3,
                 label=f"{shown_name(baseline_name)} (best baseline)")  # fmt: skip
    axes.set_yticks(places, _short_names(ordered, 36 if width == WIDE else 20))
    axes.set_ylim(-0.6, len(ordered) - 0.4)
    axes.set_xlim(0, 1)
    axes.tick_params(axis="y", length=0, pad=9)
    axes.grid(False, axis="y")
    _percent(axes, "x", parts=5 if width == WIDE else 2)
    figure.legend(loc="outside upper center", ncols=2, reverse=True)
    return figure


def _name_cells(axes: Axes, names: Sequence[str], pitch: float) -> None:
    """Beside rows and below columns that lie `pitch` points apart: slanted where two slanted lines do not touch."""
    size = min(_LARGEST_NAME, 0.8 * pitch)
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), names, fontsize=size, **slanted if pitch >= _SLANTED_PITCH else {"rotation": 90})
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.tick_params(length=0)


def _write_counts(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    for row, column in np.argwhere(counts):
        colour = COLOURS["on-first" if shares[row, column] > 0.45 else "ink"]
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, fontsize=8.5)


def _across(axes: Axes, accuracy: float, label: str) -> None:
    axes.axhline(accuracy, color=COLOURS["muted"], linestyle=(0, (4, 3)), linewidth=1.5, label=label)


def _by_shots(axes: Axes, shots: Sequence[int], title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, [str(count) for count in shots])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("Training images a class")
    axes.set_title(title)
    axes.grid(False, axis="x")
    _percent(axes, "y")
    _end_on_tens(axes)


def _percent(axes: Axes, which: str, parts: int = 5) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(parts, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def _end_on_tens(axes: Axes) -> None:
    """Let the axis of accuracies begin and end on whole ten percent."""
    low, high = axes.dataLim.intervaly
    axes.set_ylim(max(0, np.floor(10 * low - 0.1) / 10), min(1.005, np.ceil(10 * high + 0.1) / 10))


def _cycle(count: int) -> list[str]:
    lines = [COLOURS[role] for role in ("first", "second", "third", "fourth")]
    return [lines[i % len(lines)] for i in range(count)]


def _short_names(names: Sequence[str], limit: int) -> list[str]:
    """Each in at most `limit` characters, cut in the middle; in twice as many where two would look alike."""
    flat = [" ".join(name.split()) for name in names]
    short = [_cut(name, limit) for name in flat]
    return short if len(set(short)) == len(set(flat)) else [_cut(name, 2 * limit) for name in flat]


def _cut(name: str, limit: int) -> str:
    half = (limit - 1) // 2
    return name if len(name) <= limit else f"{name[: limit - 1 - half].rstrip()}…{name[-half:].lstrip()}"

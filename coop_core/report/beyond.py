"""Beyond the training classes: evaluations of further test sets -> the report's table and picture of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from coop_core.judging.transfer import Transfer, collect
from coop_core.report.pictures import WIDE
from coop_core.report.style import COLOURS, STYLE, shown_name

_ROLES = ("fourth", "third", "second")
"""Colours of the baselines; the method has the first."""


def beyond(evaluations: Mapping[str, Any], targets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the page's section shows, or None without further test sets.

    Accuracies are fractions, None where a classifier cannot answer.
    """
    if not targets:
        return None
    found = collect(evaluations, targets)
    return {
        "tests": [{"name": name, "dataset": its["dataset"], "classes": len(its["class_names"]),
                   "images": its["classifiers"]["zero-shot"]["n"], "is_new": name == found.new}
                  for name, its in targets.items()],
        "rows": [
            {"name": shown_name(row.classifier), "is_learned": row.classifier == evaluations["method"], "own": row.own,
             "targets": list(row.targets.values()), "mean": row.mean, "harmonic": found.harmonic(row)}
            for row in found.rows
        ],
        "is_base_to_new": found.new is not None,
        "has_mean": len(targets) > 1,
        "below": _below_zero_shot(found, evaluations["method"]),
    }  # fmt: skip


def _below_zero_shot(found: Transfer, method: str) -> list[tuple[str, float]]:
    """Test sets on which what was learned is worse than zero-shot, and by how much."""
    rows = {row.classifier: row for row in found.rows}
    learned, untrained = rows[method].targets, rows["zero-shot"].targets
    lost = {name: (untrained[name] or 0.0) - (value or 0.0) for name, value in learned.items()}
    return [(name, loss) for name, loss in lost.items() if loss > 0]


@matplotlib.rc_context(STYLE)
def transfer_bars(
    evaluations: Mapping[str, Any], targets: Mapping[str, Mapping[str, Any]], *, width: float = WIDE
) -> Figure:
    """Accuracy of every classifier on the data set's own test images and on each further test set."""
    found = collect(evaluations, targets)
    judged = bool(evaluations["classifiers"])
    names = [*([str(evaluations["dataset"])] if judged else []), *targets]
    rows = sorted(found.rows, key=lambda row: row.classifier != evaluations["method"])
    thick = 0.8 / len(rows)
    figure = Figure(figsize=(width, 0.8 + 0.28 * len(rows) * len(names)))
    axes = figure.subplots()
    for position, row in enumerate(rows):
        values = [*([row.own] if judged else []), *row.targets.values()]
        places = np.arange(len(names)) + (position - (len(rows) - 1) / 2) * thick
        colour = "first" if position == 0 else _ROLES[(position - 1) % len(_ROLES)]
        axes.barh(places, [value or 0.0 for value in values], height=0.9 * thick, color=COLOURS[colour],
                  label=shown_name(row.classifier))  # fmt: skip
        _write_values(axes, places, values)
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(False, axis="y")
    figure.legend(loc="outside upper left", ncols=len(rows) if width == WIDE else 2)
    return figure


def _write_values(axes: Any, places: np.ndarray, values: Sequence[float | None]) -> None:
    for place, value in zip(places, values, strict=True):
        text = "cannot answer" if value is None else f"{100 * value:.1f}"
        inside = value is not None and value > 0.9
        axes.text((value or 0.0) + (-0.01 if inside else 0.01), place, text, va="center", fontsize=7.5,
                  ha="right" if inside else "left", color=COLOURS["on-first" if inside else "ink"])  # fmt: skip

"""The watch's picture: what a version saw of its test images beside what it is sent."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from coop_core.judging.drift import Drift
from coop_core.judging.seen import Seen
from coop_core.report.style import COLOURS, STYLE

_SHOWN_CLASSES = 20
_LETTERS = 24


@matplotlib.rc_context(STYLE)
def drift_picture(drift: Drift, reference: Seen, sent: Seen, class_names: Sequence[str]) -> Figure:
    """Scores of the classifier that tells both apart, confidences, and shares of the labels that are answered."""
    of_test, of_sent = (np.bincount(its.labels, minlength=len(class_names)) / len(its) for its in (reference, sent))
    shown = np.argsort(-np.maximum(of_test, of_sent), kind="stable")[:_SHOWN_CLASSES][::-1]
    figure = Figure(figsize=(9.1, 5.4 + 0.16 * len(shown)))
    grid = figure.add_gridspec(2, 2, height_ratios=(2.6, 1 + 0.16 * len(shown)))
    scores, confidences = (figure.add_subplot(grid[0, column]) for column in (0, 1))
    labels = figure.add_subplot(grid[1, :])
    both = (("test images", "first", 0), ("sent", "second", 1))
    edges = np.histogram_bin_edges(np.concatenate(drift.scores), 24).tolist()
    for name, colour, side in both:
        values, share = drift.scores[side], np.full(len(drift.scores[side]), 1 / len(drift.scores[side]))
        scores.hist(values, edges, weights=share, histtype="step", linewidth=2, color=COLOURS[colour], label=name)
        own = np.sort((reference, sent)[side].confidences)
        confidences.step([0, *own, 1], [0, *np.arange(1, len(own) + 1) / len(own), 1], where="post",
                         color=COLOURS[colour], label=name)  # fmt: skip
    scores.set_title(f"Told apart by features: AUC {drift.signs[0].value:.2f}")
    scores.set_xlabel("Score of the classifier that tells them apart")
    confidences.set_title("Cumulative share by confidence")
    confidences.set_xlabel("Confidence")
    places = np.arange(len(shown))
    for values, (name, colour, side) in zip((of_test, of_sent), both, strict=True):
        labels.barh(places + 0.2 - 0.4 * side, values[shown], height=0.38, color=COLOURS[colour], label=name)
    labels.set_yticks(places, [_cut(class_names[number]) for number in shown])
    labels.set_title("Labels that are answered")
    labels.grid(False, axis="y")
    for axis in (scores.yaxis, confidences.yaxis, confidences.xaxis, labels.xaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    figure.legend(*labels.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _cut(name: str) -> str:
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1].rstrip()}…"

"""What a finished run shows: a table in the terminal, and what MLflow's pages say of a run and of a version."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from coop_core.judging.transfer import collect
from coop_core.report.findings import answer_cost, best_baseline, shortcomings, summary
from coop_core.report.style import capital, spoken_name

NOT_JUDGED = "not judged: no labelled images"
_LISTED_CLASSES = 30
"""So many class names are written out; of more, the rest are counted."""


def headline_table(evaluation: dict[str, Any]) -> Table | str:
    """Each classifier on the same test images, with the change against zero-shot."""
    classifiers = evaluation["classifiers"]
    if not classifiers:
        return f"{evaluation['dataset']}, seed {evaluation['seed']}: {NOT_JUDGED}"
    n = classifiers["zero-shot"]["n"]
    table = Table(
        title=f"{evaluation['dataset']}: {n} test images, {evaluation['shots']} shots, seed {evaluation['seed']}",
        caption="gain: points against zero-shot; ECE: expected calibration error",
    )
    head, *lines = _cells(evaluation)
    table.add_column(head[0], no_wrap=True)
    for column in head[1:]:
        table.add_column(column, justify="right")
    for name, line in zip(classifiers, lines, strict=True):
        table.add_row(*line, style="bold green" if name == evaluation["method"] else None)
    return table


def transfer_table(evaluation: dict[str, Any], targets: Mapping[str, Mapping[str, Any]]) -> Table:
    """Top-1 of each classifier on the data set itself and on every further test set."""
    found = collect(evaluation, targets)
    table = Table(title="beyond the training classes, top-1 in percent", caption="H: harmonic mean of base and new")
    table.add_column("classifier", no_wrap=True)
    for name in (evaluation["dataset"], *targets, *(["H"] if found.new else [])):
        table.add_column(name, justify="right")
    for row in found.rows:
        values = [row.own, *row.targets.values(), *([found.harmonic(row)] if found.new else [])]
        table.add_row(row.classifier, *("-" if value is None else f"{100 * value:.1f}" for value in values),
                      style="bold green" if row.classifier == evaluation["method"] else None)  # fmt: skip
    return table


def run_note(
    evaluation: dict[str, Any],
    card: Mapping[str, Any],
    *,
    curve: Sequence[Mapping[str, Any]],
    timing: Mapping[str, Any],
) -> str:
    """Markdown: what was trained on what and for how long, what it reached, and what speaks against it."""
    shots, architecture = evaluation["shots"], card["backbone"]["architecture"]
    made = f"{spoken_name(evaluation['method'])} on the backbone {architecture}"
    images = f"{shots} image{'' if shots == 1 else 's'} of each of {len(evaluation['class_names'])} classes"
    if "labelled_by" in evaluation:
        images = f"at most {images}, labelled by {evaluation['labelled_by']},"
    seconds = training_seconds(evaluation, timing)
    return "\n\n".join([
        plain(f"{capital(made)}, learned from {images} of {evaluation['dataset']} (seed {evaluation['seed']}) "
              f"in {seconds:,.1f} seconds on {timing['device']}."),
        plain(summary(evaluation)),
        *(f"**{plain(each)}**" for each in shortcomings(evaluation, curve)),
        *_tables(evaluation),
        f"Once its image is encoded, an answer costs {answer_cost(card)}.",
    ])  # fmt: skip


def version_note(evaluation: dict[str, Any], card: Mapping[str, Any]) -> str:
    """Markdown: what a version answers, how well, and beside which baselines."""
    names = evaluation["class_names"]
    return "\n\n".join([
        plain(summary(evaluation)),
        *_tables(evaluation),
        f"{len(names)} classes: {plain(listed(names))}.",
        f"Once its image is encoded, an answer costs {answer_cost(card)}.",
    ])  # fmt: skip


def version_tags(evaluation: dict[str, Any]) -> dict[str, str]:
    """The same in short, for the list of versions and for searching."""
    if not evaluation["classifiers"]:
        return {"accuracy": NOT_JUDGED, "n_test": "0", "classes": listed(evaluation["class_names"])}
    found, best = evaluation["classifiers"], best_baseline(evaluation)
    learned = found[evaluation["method"]]
    return {
        "accuracy": f"{learned['accuracy']:.4f}",
        "n_test": str(learned["n"]),
        "best_baseline": f"{best}: {found[best]['accuracy']:.4f}",
        "classes": listed(evaluation["class_names"]),
    }


def training_seconds(evaluation: Mapping[str, Any], timing: Mapping[str, Any]) -> float:
    """How long the prompt that was evaluated took, without those of the few-shot curve."""
    return float(timing["seconds"][str(evaluation["shots"])])


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _LISTED_CLASSES
    return ", ".join(names[:_LISTED_CLASSES]) + (f" and {more:,} more" if more > 0 else "")


def plain(text: str) -> str:
    """Somebody's words as Markdown that shows them as they are."""
    return re.sub(r"([\\`*_\[\]#|~])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")


def _tables(evaluation: dict[str, Any]) -> list[str]:
    return [_markdown_table(evaluation)] if evaluation["classifiers"] else []


def _markdown_table(evaluation: dict[str, Any]) -> str:
    head, *lines = _cells(evaluation)
    bold = [[f"**{cell}**" for cell in line] if line[0] == evaluation["method"] else line for line in lines]
    # MLflow's pages set the cells of a table side by side, so a space keeps them apart.
    apart = [[line[0], *(f"&emsp;{cell}" for cell in line[1:])] for line in (head, *bold)]
    rows = [apart[0], ["---", *["---:"] * (len(head) - 1)], *apart[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(evaluation: dict[str, Any]) -> list[list[str]]:
    """The head of a table of classifiers, and their rows."""
    classifiers = evaluation["classifiers"]
    zero_shot = classifiers["zero-shot"]["accuracy"]
    rows = [["classifier", "top-1", "95 % interval", "gain", "macro-F1", "ECE"]]
    for name, e in classifiers.items():
        gain = "" if name == "zero-shot" else f"{100 * (e['accuracy'] - zero_shot):+.1f}"
        low, high = e["interval"]
        rows.append([
            name, f"{100 * e['accuracy']:.1f} %", f"{100 * low:.1f} - {100 * high:.1f}", gain,
            f"{100 * e['macro_f1']:.1f} %", f"{100 * e['calibration_error']:.1f} %",
        ])  # fmt: skip
    return rows

"""Findings: the numbers of a run -> what it reached, and what a reader must know before all else, in sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coop_core.report.style import capital, spoken_name

ZERO_SHOT = "zero-shot"
LAST_PART = 0.1
"""Share of the learning that must no longer lower the loss: its last tenth."""
CLEAR_FALL = 0.05
"""From this share of the loss on, a fall over the last tenth counts; epochs differ by 0.01 to 0.02 by chance."""
FITTED = 0.95
"""Training accuracy from which nothing is left to learn, whatever the loss does."""
_THIN_SPACE, _MINUS = "\N{NARROW NO-BREAK SPACE}", "\N{MINUS SIGN}"


def best_baseline(evaluations: Mapping[str, Any]) -> str:
    """The baseline with the highest accuracy on the test images; among equals, the one listed first."""
    found = evaluations["classifiers"]
    return max((name for name in found if name != evaluations["method"]), key=lambda name: found[name]["accuracy"])


def summary(evaluations: Mapping[str, Any]) -> str:
    """One sentence: what the method reached, against the hand-written prompt and the best other baseline."""
    found, method, shots = evaluations["classifiers"], evaluations["method"], evaluations["shots"]
    learned_from = f"{shots} labelled image{'' if shots == 1 else 's'} a class"
    if by := evaluations.get("labelled_by"):
        learned_from = f"at most {shots} image{'' if shots == 1 else 's'} a class, labelled by {by}"
    if not found:
        return f"{capital(spoken_name(method))} learned from {learned_from}; it was not judged: no labelled images."
    accuracy, change = found[method]["accuracy"], found[method]["accuracy"] - found[ZERO_SHOT]["accuracy"]
    size = f"{abs(100 * change):.1f} points"
    against = {1: f"{size} more than", 0: "as many as", -1: f"{size} fewer than"}[int(np.sign(round(change, 3)))]
    sentence = (
        f"With {learned_from}, {spoken_name(method)} answers "
        f"{percent(accuracy)} of {found[method]['n']:,} test images correctly, {against} the hand-written prompt"
    )
    rivals = {name: each["accuracy"] for name, each in found.items() if name not in (ZERO_SHOT, method)}
    if not rivals:
        return f"{sentence}."
    best = max(rivals, key=lambda name: rivals[name])
    return f"{sentence}; the best other baseline, {spoken_name(best)}, reaches {percent(rivals[best])}."


def shortcomings(evaluations: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> list[str]:
    """What speaks against this run, the gravest first; empty when nothing does.

    Said are: that the method is below the best baseline, that it is below zero-shot (both when the difference is
    0.1 points or more once rounded), and that training had not ended (`unfinished_epochs`).
    """
    found, method = evaluations["classifiers"], capital(spoken_name(evaluations["method"]))
    if not found:
        return _unfinished(curve)
    accuracy, best = found[evaluations["method"]]["accuracy"], best_baseline(evaluations)
    zero_shot = found[ZERO_SHOT]["accuracy"]
    sentences = []
    if best != ZERO_SHOT and is_below(accuracy, found[best]["accuracy"]):
        named = f"the best baseline, {spoken_name(best)}"
        sentences.append(_below(method, accuracy, named, found[best]["accuracy"]) + ".")
    if is_below(accuracy, zero_shot):
        also = ", which is also the best baseline" if best == ZERO_SHOT else ""
        sentences.append(
            f"{_below(method, accuracy, f'zero-shot{also}', zero_shot)}; "
            "the hand-written prompt answers better without any training."
        )
    return [*sentences, *_unfinished(curve)]


def _unfinished(curve: Sequence[Mapping[str, Any]]) -> list[str]:
    epochs = unfinished_epochs(curve)
    if not epochs:
        return []
    before, last = curve[-epochs - 1], curve[-1]
    return [
        f"Training had not ended: the loss was still falling over the last {_epochs(epochs)} of {len(curve)} "
        f"(from {before['loss']:.3g} to {last['loss']:.3g}), and {percent(last['accuracy'], 0)} of the training "
        "images were right. More epochs (train.epochs) or another train.learning_rate may give a better prompt."
    ]


def answer_cost(card: Mapping[str, Any]) -> str:
    """What an answer costs once its image is encoded, by the artefact's card."""
    prompts = card.get("answering", {}).get("prompts_per_image", 0)               # older cards: of methods with none
    if prompts:
        return f"{prompts:,} prompts through the text tower"
    collapses = "class_weights" in card.get("digests", {"class_weights": ""})
    return "one matrix product" if collapses else "a few matrix products"


def unfinished_epochs(curve: Sequence[Mapping[str, Any]]) -> int:
    """How many last epochs show that training had not ended; 0 when they do not.

    Training had not ended when, over the last tenth (`LAST_PART`) of the learning, a straight line through the loss
    falls by `CLEAR_FALL` or more, and the last epoch's training accuracy is below `FITTED`. An epoch counts by its
    learning rate: at a constant rate this is the last tenth of the epochs. The published schedule ends in rates
    near zero, where no loss falls however far there is still to go, so there the last tenth of the learning is about
    the last 40 % of the epochs. A rate that is much too high can look the same: its loss falls because the rate does.
    """
    rates = np.array([row["learning_rate"] for row in curve], dtype=float)
    if len(curve) < 2 or rates.sum() == 0 or curve[-1]["accuracy"] >= FITTED:
        return 0
    still_to_come = rates[::-1].cumsum()[::-1] / rates.sum()                      # from each epoch on, itself included
    epochs = int(np.clip((still_to_come <= LAST_PART + 1e-9).sum(), 1, len(curve) - 1))
    losses = np.array([row["loss"] for row in curve[-epochs - 1 :]])
    slope, start = np.polyfit(np.arange(epochs + 1), losses, 1)
    return epochs if -slope * epochs >= CLEAR_FALL * start else 0


def percent(fraction: float, digits: int = 1) -> str:
    """0.5 -> 50.0 %"""
    return f"{100 * fraction:.{digits}f}{_THIN_SPACE}%"


def points(difference: float) -> str:
    """A difference of fractions in percentage points, with its sign."""
    rounded = round(100 * difference, 1)
    sign = "+" if rounded > 0 else _MINUS if rounded < 0 else "±"
    return f"{sign}{abs(rounded):.1f}"


def is_below(accuracy: float, other: float) -> bool:
    """By 0.1 points or more, once rounded as it is shown."""
    return round(100 * (other - accuracy), 1) > 0


def _below(method: str, accuracy: float, baseline: str, reached: float) -> str:
    gap = f"{100 * (reached - accuracy):.1f} points"
    return f"{method} is {gap} below {baseline}: {percent(accuracy)} against {percent(reached)}"


def _epochs(count: int) -> str:
    return "epoch" if count == 1 else f"{count} epochs"


def pseudo_label_counts(
    named: Sequence[tuple[str, int]], class_names: Sequence[str], truth: Mapping[str, int], *, pool: int
) -> dict[str, Any]:
    """Images learned from by class as zero-shot called them, and how many of those whose truth is known are right.

    `named` are digests and labels, `truth` is {digest: label}; `right` is None where nothing is known.
    """
    classes: list[dict[str, Any]] = []
    for label, name in enumerate(class_names):
        own = [digest for digest, its in named if its == label]
        known = [digest for digest in own if digest in truth]
        right = sum(truth[digest] == label for digest in known)
        classes.append({"name": name, "images": len(own), "known": len(known), "right": right})
    known = sum(each["known"] for each in classes)
    return {
        "pool": pool,
        "images": len(named),
        "classes": classes,
        "none": [each["name"] for each in classes if not each["images"]],
        "right": sum(each["right"] for each in classes) / known if known else None,
    }

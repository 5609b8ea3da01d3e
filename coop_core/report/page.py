"""Report: the numbers of a run, its images and its card -> one HTML page that needs nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from coop_core.files import write_text
from coop_core.judging.confidence import FEW_IMAGES
from coop_core.report import pictures
from coop_core.report.beyond import beyond, transfer_bars
from coop_core.report.findings import ZERO_SHOT, answer_cost, best_baseline, percent, points, shortcomings, summary
from coop_core.report.gallery import galleries
from coop_core.report.style import capital, shown_name, spoken_name

_WIDTHS = {"wide": pictures.WIDE, "narrow": pictures.NARROW}
_SIZED = ("few_shot", "beyond", "training", "confusion", "classes")
"""Pictures that are drawn for a wide page and for a narrow one; the page shows the one that fits."""
_WITHOUT_TRAINING = (ZERO_SHOT, "prompt ensemble")
"""Baselines that are the same for every number of shots."""
_FREQUENT_CONFUSIONS = 8
_LISTED_CLASSES = 40
"""Up to here every class has its own bar and row; beyond, the lowest and highest 20."""
_NEARLY_CALIBRATED = 0.02
"""Up to this difference of mean confidence and accuracy, a classifier is called as confident as it is right."""
_TIMES = "\N{MULTIPLICATION SIGN}"


def write_report(
    path: Path,
    *,
    evaluations: dict[str, Any],
    curve: Sequence[dict[str, Any]],
    predictions: Sequence[dict[str, Any]],
    words: dict[str, Any] | None,
    card: dict[str, Any],
    baseline_card: dict[str, Any],
    dataset_about: dict[str, Any],
    image_root: Path,
    targets: Mapping[str, Mapping[str, Any]] | None = None,
    pseudo: Mapping[str, Any] | None = None,
) -> None:
    """Write the page; equal inputs give equal bytes.

    Parameters
    ----------
    evaluations
        The evaluation file: class_names, shots, method, few_shot_curve, and `Evaluation.as_dict` by classifier.
    curve
        `training.Epoch` rows as dicts.
    predictions
        path (below image_root), label, predicted and confidence of the learned method, for each test image.
    words
        `interpretation.nearest_words`, or None when there is no one list of context vectors.
    card, baseline_card
        What made the artefact and the baselines.
    dataset_about
        `Dataset.about` with name and counts.
    targets
        Evaluations of further test sets by name, as the judge stage writes them.
    pseudo
        `findings.pseudo_label_counts` where the training images had no labels.

    Raises
    ------
    DatasetError
        When an image that is to be shown cannot be read.
    """
    method = _method(evaluations, card)
    context = {
        **method,
        "evaluations": evaluations,
        "summary": summary(evaluations),
        "shortcomings": shortcomings(evaluations, curve),
        **(_findings(evaluations, predictions, image_root) if evaluations["classifiers"] else {"learned": None}),
        "figures": _figures(evaluations, [] if method["is_built"] else curve, targets or {}),
        "beyond": beyond(evaluations, targets or {}),
        "curve": curve,
        "pseudo": pseudo,
        "listed_classes": _LISTED_CLASSES,
        "words": _nearest_words(words),
        "card": card,
        "origin": _origin(card, baseline_card),
        "dataset": dataset_about,
        "totals": _totals(dataset_about.get("counts", {})),
    }
    write_text(path, _environment().get_template("report.html.jinja").render(context))


def _findings(
    evaluations: dict[str, Any], predictions: Sequence[dict[str, Any]], image_root: Path
) -> dict[str, Any]:
    """What the sections show that a run has only when it was judged."""
    learned, names = evaluations["classifiers"][evaluations["method"]], evaluations["class_names"]
    confusion = np.asarray(learned["confusion"])                                  # (c, c)
    return {
        "learned": learned,
        "galleries": galleries(confusion, names, predictions, image_root),
        "confusions": _frequent_confusions(confusion, names),
        "best": best_baseline(evaluations),
        "rows": _rows(evaluations),
        "confidence": _mean_confidence(learned),
        "nearly_calibrated": _NEARLY_CALIBRATED,
        "answering": evaluations.get("answering"),
        "few_validation": FEW_IMAGES,
    }


def _method(evaluations: dict[str, Any], card: dict[str, Any]) -> dict[str, Any]:
    """What the method is called, and what there is to say of one of its kind; older cards are of trained methods."""
    return {
        "method": shown_name(evaluations["method"]),
        "spoken": spoken_name,
        "subject": capital(spoken_name(evaluations["method"])),
        "cost": answer_cost(card),
        "is_built": card["training"].get("is_built", False),
        "has_context": "context_vectors" in card["learned"],
        "shifts": bool(card.get("answering", {}).get("prompts_per_image")),
    }


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # class names, titles and notes are other people's words
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "points": points}
    return environment


def _rows(evaluations: dict[str, Any]) -> list[dict[str, Any]]:
    found = evaluations["classifiers"]
    return [
        {
            "name": shown_name(name),
            "is_learned": name == evaluations["method"],
            "change": None if name == ZERO_SHOT else each["accuracy"] - found[ZERO_SHOT]["accuracy"],
            **each,
        }
        for name, each in found.items()
    ]


def _figures(
    evaluations: dict[str, Any], curve: Sequence[dict[str, Any]], targets: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, str]]:
    """Each picture as SVG by the page it is for, wide or narrow; a small one suits both. Without data, it has none."""
    found, method = evaluations["classifiers"], evaluations["method"]
    reliability = {"reliability": method, "best_reliability": best_baseline(evaluations)} if found else {}
    answering = evaluations.get("answering")
    sizes = {size: _sized_figures(evaluations, curve, targets, width) for size, width in _WIDTHS.items()}
    return {
        **{name: {size: svgs[name] for size, svgs in sizes.items() if name in svgs} for name in _SIZED},
        **{
            name: {"small": pictures.as_svg(pictures.reliability_diagram(found[each], shown_name(each)))}
            for name, each in reliability.items()
        },
        **({"coverage": {"small": pictures.as_svg(pictures.risk_coverage(answering))}} if answering else {}),
    }


def _sized_figures(
    evaluations: dict[str, Any],
    curve: Sequence[dict[str, Any]],
    targets: Mapping[str, Mapping[str, Any]],
    width: float,
) -> dict[str, str]:
    found, method, rows = evaluations["classifiers"], evaluations["method"], evaluations["few_shot_curve"]
    figures = {}
    if found:
        learned, best = found[method], best_baseline(evaluations)
        figures["confusion"] = pictures.confusion_matrix(learned["confusion"], evaluations["class_names"], width=width)
        figures["classes"] = pictures.class_accuracy_bars(
            _lowest_and_highest(learned["class_accuracy"]), found[best]["class_accuracy"],
            name=method, baseline_name=best, width=width,
        )  # fmt: skip
    if len(rows) > 1:
        is_drawn = best in _WITHOUT_TRAINING or any(best in row for row in rows)
        figures["few_shot"] = pictures.few_shot_curve(
            rows, found[ZERO_SHOT]["accuracy"], width=width,
            best_baseline=(best, found[best]["accuracy"]) if is_drawn else None,
        )  # fmt: skip
    if targets:
        figures["beyond"] = transfer_bars(evaluations, targets, width=width)
    if curve:
        figures["training"] = pictures.training_curve(curve, width=width)
    return {name: pictures.as_svg(figure) for name, figure in figures.items()}


def _lowest_and_highest(accuracies: Mapping[str, float]) -> dict[str, float]:
    if len(accuracies) <= _LISTED_CLASSES:
        return dict(accuracies)
    ordered = sorted(accuracies, key=lambda name: (accuracies[name], name))
    kept = ordered[: _LISTED_CLASSES // 2] + ordered[-_LISTED_CLASSES // 2 :]
    return {name: accuracies[name] for name in kept}


def _frequent_confusions(confusion: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    wrong = confusion - np.diag(confusion.diagonal())
    pairs = sorted(np.argwhere(wrong).tolist(), key=lambda pair: (-wrong[tuple(pair)], pair))
    return [
        {
            "true": names[true],
            "predicted": names[predicted],
            "count": int(wrong[true, predicted]),
            "share": wrong[true, predicted] / confusion[true].sum(),
        }
        for true, predicted in pairs[:_FREQUENT_CONFUSIONS]
    ]


def _nearest_words(words: dict[str, Any] | None) -> dict[str, Any] | None:
    if words is None:
        return None
    between = words["between_words"]
    rows = [
        {"words": found, "norm": norm, "ratio": found[0]["distance"] / between if between else None}
        for found, norm in zip(words["vectors"], words["norms"], strict=True)
    ]
    near = sum(found[0]["distance"] <= between for found in words["vectors"])
    alike = len(rows) > 1 and len({frozenset(each["word"] for each in found) for found in words["vectors"]}) == 1
    return {"rows": rows, "between": between, "near": near, "alike": alike}


def _mean_confidence(evaluation: dict[str, Any]) -> float:
    return sum(found["count"] * found["confidence"] for found in evaluation["calibration"]) / evaluation["n"]


def _origin(card: dict[str, Any], baseline_card: dict[str, Any]) -> list[dict[str, Any]]:
    """The cards as titled lists of (key, text)."""
    groups = {
        "Method": card["method"],
        "Backbone": card["backbone"],
        "Data": card["data"],
        "Learned tensors": {name: f" {_TIMES} ".join(map(str, shape)) for name, shape in card["learned"].items()},
        "Digests": card.get("digests", {}),
        "Training": card["training"],
        "Engine": card["engine"],
        "Baselines": baseline_card,
        "Libraries": card["libraries"],
        "Code": {"revision": card["code_revision"]},
        "Parameters": card["params"],
    }
    return [{"title": title, "rows": list(_flat(group))} for title, group in groups.items() if group]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        between = "\n" if any(isinstance(each, str) for each in value) else ", "
        return between.join(map(_text, value)) or "none"
    return str(value)


def _totals(counts: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """Images of each subset over all classes, with the smallest and the largest class."""
    subsets = list(dict.fromkeys(subset for found in counts.values() for subset in found))
    columns = {subset: [found.get(subset, 0) for found in counts.values()] for subset in subsets}
    return [
        {"subset": subset, "total": sum(column), "least": min(column), "most": max(column)}
        for subset, column in columns.items()
        if sum(column)
    ]

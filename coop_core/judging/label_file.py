"""Label file: the pseudo labels of a pool -> labels.csv and its card, and back for whoever learns from them or counts.

A split with labels has an empty one, so that the stages are the same for every run.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coop_core.data.split import Split
from coop_core.errors import ArtifactError
from coop_core.files import as_csv, digest_file, read_json, write_json, write_text

SCHEMA = 1
_HEAD = ("digest", "label", "confidence")


@dataclass(frozen=True)
class PseudoLabels:
    """Classes ascending, in each the most confident image first."""

    rows: np.ndarray
    """(n,) numbers of images in the pool."""
    labels: np.ndarray
    """(n,) int64"""
    confidences: np.ndarray
    """(n,) float32 probabilities of the labels."""

    def fewer(self, per_class: int, *, min_confidence: float | None = None) -> "PseudoLabels":
        """What `pseudo_labels` would choose with fewer images a class."""
        chosen = surest_of_each(self.labels, self.confidences, per_class, min_confidence)
        return PseudoLabels(self.rows[chosen], self.labels[chosen], self.confidences[chosen])


@dataclass(frozen=True)
class Labeller:
    """A backbone whose zero-shot labelled a pool."""

    name: str
    weights_digest: str
    feature_key: str


@dataclass(frozen=True)
class PoolLabels:
    """The pseudo labels of a pool, and what gave them."""

    chosen: PseudoLabels
    per_class: int
    min_confidence: float | None
    labellers: tuple[Labeller, ...]
    """The first is the backbone that is learned with."""

    def of(self, shots: int) -> PseudoLabels:
        """Those of so many images a class; `per_class` or fewer."""
        return self.chosen.fewer(shots, min_confidence=self.min_confidence)


def write_labels(folder: Path, labels: PoolLabels | None, split: Split) -> None:
    """Write a line an image that is learned from, class by class, the surest first; the card last.

    `labels` is None where the training images have labels of their own.
    """
    if labels is None:
        write_text(folder / "labels.csv", as_csv([_HEAD]))
        write_json(folder / "card.json", {"schema": SCHEMA, "pool": 0, "images": 0})
        return
    chosen = labels.chosen
    rows = zip(chosen.rows, chosen.labels, chosen.confidences, strict=True)
    lines = [(split.train[row].digest, int(label), float(confidence)) for row, label, confidence in rows]
    write_text(folder / "labels.csv", as_csv([_HEAD, *lines]))
    write_json(folder / "card.json", {
        "schema": SCHEMA,
        "pool": len(split.train),
        "images": len(lines),
        "pool_digest": split.train_digest,
        "template": split.template,
        "per_class": labels.per_class,
        "min_confidence": labels.min_confidence,
        "labellers": [asdict(one) for one in labels.labellers],
        "labels_digest": digest_file(folder / "labels.csv"),
    })  # fmt: skip


def read_labels(folder: Path, split: Split) -> PoolLabels | None:
    """What `write_labels` wrote for this split; None, and nothing is read, where the training images have labels.

    Raises
    ------
    ArtifactError
        When the labels are of another pool, or are not those of their card.
    """
    if not split.is_unlabelled:
        return None
    card = read_json(folder / "card.json")
    ours = {"schema": SCHEMA, "pool_digest": split.train_digest, "template": split.template}
    if {name: card.get(name) for name in ours} != ours:
        raise ArtifactError(f"{folder} holds the labels of another pool: run `dvc repro label`")
    if card.get("labels_digest") != digest_file(folder / "labels.csv"):
        raise ArtifactError(f"{folder}/labels.csv is not what its card says: run `dvc repro -f label`")
    return PoolLabels(_chosen(folder / "labels.csv", split), card["per_class"], card["min_confidence"],
                      tuple(Labeller(**one) for one in card["labellers"]))  # fmt: skip


def require_asked(
    labels: PoolLabels | None, folder: Path, *, key: str, per_class: int, min_confidence: float | None,
    further: Sequence[str],
) -> None:  # fmt: skip
    """The labels were given as `split` in params.yaml asks, by the backbone of this feature key and the further ones.

    Raises
    ------
    ArtifactError
    """
    if labels is None:
        return
    asked = (per_class, min_confidence, list(further))
    if (labels.per_class, labels.min_confidence, [one.name for one in labels.labellers[1:]]) != asked:
        raise ArtifactError(f"{folder} holds labels that were chosen in another way than params.yaml asks for: run "
                            "`dvc repro label`")  # fmt: skip
    if labels.labellers[0].feature_key != key:
        raise ArtifactError(f"{folder} holds labels that {labels.labellers[0].name} gave with other weights: run "
                            "`dvc repro -f label`")  # fmt: skip


def origin_of(folder: Path, labels: PoolLabels | None) -> dict[str, Any]:
    """What the card of something that was learned from the labels says of them; nothing where there are none."""
    if labels is None:
        return {}
    return {"labels_digest": digest_file(folder / "labels.csv"),
            "labellers": {one.name: one.weights_digest for one in labels.labellers}}  # fmt: skip


def surest_of_each(
    labels: np.ndarray, confidences: np.ndarray, per_class: int, min_confidence: float | None
) -> np.ndarray:
    """Of images class by class, each class's surest first: which are learned from (n,)."""
    starts = np.searchsorted(labels, labels)                                     # where each one's class begins
    chosen = np.arange(len(labels)) - starts < per_class
    return chosen if min_confidence is None else chosen | (confidences > min_confidence)


def _chosen(path: Path, split: Split) -> PseudoLabels:
    row_of = {image.digest: row for row, image in enumerate(split.train)}
    lines = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return PseudoLabels(
        np.array([row_of[digest] for digest, _, _ in lines], dtype=np.int64),
        np.array([int(label) for _, label, _ in lines], dtype=np.int64),
        np.array([float(confidence) for _, _, confidence in lines], dtype=np.float32),
    )

"""Transfer table: evaluations of a data set and of further test sets -> accuracies side by side, and their means."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def harmonic_mean(base: float, new: float) -> float:
    """Of accuracies on base and new classes; 0 when either is.

    >>> round(harmonic_mean(0.8, 0.6), 3)
    0.686
    """
    return 2 * base * new / (base + new) if base and new else 0.0


@dataclass(frozen=True)
class Row:
    """One classifier over all test sets; accuracies are fractions, None where it cannot answer."""

    classifier: str
    own: float | None
    """On the data set it was learned on."""
    targets: dict[str, float | None]

    @property
    def mean(self) -> float | None:
        """Over the targets, where it answers on all."""
        found = [value for value in self.targets.values() if value is not None]
        return statistics.fmean(found) if found and len(found) == len(self.targets) else None


@dataclass(frozen=True)
class Transfer:
    """What came of all targets."""

    rows: list[Row]
    new: str | None
    """The target that holds the new classes of the data set whose base classes were learned."""

    def harmonic(self, row: Row) -> float | None:
        """Of base and new, where this is base-to-new and the classifier answers on both."""
        found = row.targets.get(self.new) if self.new else None
        return None if found is None or row.own is None else harmonic_mean(row.own, found)

    def metrics(self) -> dict[str, float]:
        """For a tracking server: accuracy by target and classifier, means and harmonic means."""
        found: dict[str, float] = {}
        for row in self.rows:
            name = row.classifier.replace(" ", "_")
            values = {**{f"tests/{target}/{name}": value for target, value in row.targets.items()},
                      f"tests_mean/{name}": row.mean, f"harmonic_mean/{name}": self.harmonic(row)}  # fmt: skip
            found |= {key: value for key, value in values.items() if value is not None}
        return found


def collect(own: Mapping[str, Any], targets: Mapping[str, Mapping[str, Any]]) -> Transfer:
    """The evaluations of the data set itself and of every target, by name -> one table."""
    judged = [own, *targets.values()]                                             # own: not where it has no test images
    names: list[str] = next((list(found["classifiers"]) for found in judged if found["classifiers"]), [])
    rows = [Row(name, accuracy(own, name), {target: accuracy(found, name) for target, found in targets.items()})
            for name in names]  # fmt: skip
    new = next((name for name, found in targets.items()
                if own.get("classes") == "base" and found["classes"] == "new"
                and found["dataset_digest"] == own.get("dataset_digest")), None)  # fmt: skip
    return Transfer(rows, new)


def accuracy(evaluation: Mapping[str, Any], classifier: str) -> float | None:
    found = evaluation["classifiers"].get(classifier)
    return None if found is None else found["accuracy"]

"""Comparison: what the sweeps of a recipe scored -> one table of ours, published, difference and tolerance."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from coop_core import files
from coop_core.judging.transfer import harmonic_mean
from coop_core.reproduction.figures import Cell, Figure, Published, Tolerance
from coop_core.reproduction.grid import NEW, Asked
from coop_core.sweeps.sweep import Row

HARMONIC = "harmonic mean"
UNAVAILABLE = "not available here"
COLUMNS = ("dataset", "shots", "metric", "ours", "std", "n", "published", "difference", "tolerance", "verdict", "note")
Verdict = Literal["within", "outside", ""]


@dataclass(frozen=True)
class Line:
    """One result beside what was printed of it."""

    cell: Cell
    ours: float | None
    """A fraction; None where it is not available here."""
    by_seed: Mapping[int, float]
    published: Figure | None
    tolerance: Tolerance | None
    note: str = ""

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over seeds; None below two, and of a harmonic mean of means."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None

    @property
    def difference(self) -> float | None:
        """Ours less the published figure, in points."""
        return None if self.ours is None or self.published is None else 100 * self.ours - self.published.value_percent

    @property
    def verdict(self) -> Verdict:
        if self.difference is None or self.tolerance is None:
            return ""
        return "within" if self.tolerance.holds(round(self.difference, 6)) else "outside"

    def cells(self) -> list[str]:
        """As `COLUMNS`, in per cent and points."""
        tolerance, published = self.tolerance, self.published
        return [
            self.cell.dataset,
            str(self.cell.shots),
            self.cell.metric,
            UNAVAILABLE if self.ours is None else f"{100 * self.ours:.2f}",
            "" if self.spread is None else f"{100 * self.spread:.2f}",
            str(len(self.by_seed)) if self.by_seed else "",
            "not found" if published is None else f"{published.value_percent:.2f}",
            "" if self.difference is None else f"{self.difference:+.2f}",
            "" if tolerance is None else f"-{tolerance.points_below:g} to +{tolerance.points_above:g}",
            self.verdict,
            self.note or (tolerance.reason if tolerance else ""),
        ]


def compare(
    asked: Asked, rows: Mapping[str, Sequence[Row]], reasons: Mapping[str, str], published: Published
) -> list[Line]:
    """A line a data set, number of shots and metric, then their means as published.

    `rows` are the sweeps' by data set, `reasons` why a data set has none.
    """
    maker = _Lines(asked, published)
    found = [line for dataset in asked.datasets
             for line in maker.of_dataset(dataset, rows.get(dataset, ()), reasons.get(dataset, ""))]  # fmt: skip
    return found + maker.averages(found)


@dataclass(frozen=True)
class _Lines:
    asked: Asked
    published: Published

    def of_dataset(self, dataset: str, rows: Sequence[Row], reason: str) -> Iterable[Line]:
        asked = self.asked
        for shots in asked.shots:
            row = next((row for row in rows if row.task["split.shots"] == (shots or _set_shots(asked, dataset))), None)
            if asked.protocol == "base-to-new":
                base = self.line(dataset, shots, "base", row, "accuracy", reason)
                new = self.line(dataset, shots, "new", row, f"tests/{NEW}/learned", reason)
                yield from (base, new, self.harmonic(dataset, shots, base, new, reason))
            else:
                yield self.line(dataset, shots, "accuracy", row, "accuracy", reason)
                for test in asked.how.tests:
                    yield self.line(test, shots, "accuracy", row, f"tests/{test}/learned", reason)

    def line(self, dataset: str, shots: int, metric: str, row: Row | None, key: str, reason: str) -> Line:
        scores = {result.trial.params.seed: result.score(key) for result in row.results} if row else {}
        by_seed = {seed: score for seed, score in scores.items() if score is not None}
        note = reason if row is None else "" if by_seed else "what was learned knows its own classes alone"
        if by_seed and len(by_seed) < len(self.asked.seeds):
            note = f"{len(by_seed)} of {len(self.asked.seeds)} seeds"
        ours = statistics.fmean(by_seed.values()) if by_seed else None
        return self.beside(dataset, shots, metric, ours, by_seed, note)

    def harmonic(self, dataset: str, shots: int, base: Line, new: Line, reason: str) -> Line:
        """H of the means over seeds, as published."""
        known = base.ours is not None and new.ours is not None
        ours = harmonic_mean(base.ours or 0.0, new.ours or 0.0) if known else None
        return self.beside(dataset, shots, HARMONIC, ours, {}, "" if known else reason)

    def beside(
        self, dataset: str, shots: int, metric: str, ours: float | None, by_seed: Mapping[int, float], note: str
    ) -> Line:
        """With the figure of this backbone, else of the recipe's own, against which there is no tolerance."""
        asked = self.asked
        cell = Cell(asked.name, asked.variant or "", asked.protocol, dataset, shots, metric)
        own = self.published.figure(cell, backbone=asked.backbone)
        figure = own or self.published.figure(cell, backbone=asked.own_backbone)
        tolerance = self.published.tolerance(cell) if own and not asked.overrides else None
        return Line(cell, ours, by_seed, figure, tolerance, note)

    def averages(self, lines: Sequence[Line]) -> list[Line]:
        """Over all data sets of the published average, each mean over seeds; H of the averages."""
        asked = self.asked
        wanted = asked.how.tests or asked.how.datasets
        if not asked.how.average or len(wanted) < 2:
            return []
        found: list[Line] = []
        metrics = ("base", "new") if asked.protocol == "base-to-new" else ("accuracy",)
        for shots in asked.shots:
            for metric in metrics:
                parts = {line.cell.dataset: line for line in lines
                         if line.cell.dataset in wanted and (line.cell.shots, line.cell.metric) == (shots, metric)}
                found.append(self._average(shots, metric, [parts.get(name) for name in wanted]))
            if asked.protocol == "base-to-new":
                found.append(self.harmonic(asked.how.average, shots, found[-2], found[-1], found[-1].note))
        return found

    def _average(self, shots: int, metric: str, parts: Sequence[Line | None]) -> Line:
        have = [part for part in parts if part is not None and part.ours is not None]
        if len(have) < len(parts):
            note = f"needs all {len(parts)} data sets, and {len(have)} are here"
            return self.beside(self.asked.how.average, shots, metric, None, {}, note)
        seeds = [seed for seed in self.asked.seeds if all(seed in part.by_seed for part in have)]
        by_seed = {seed: statistics.fmean(part.by_seed[seed] for part in have) for seed in seeds}
        ours = statistics.fmean(part.ours for part in have if part.ours is not None)
        return self.beside(self.asked.how.average, shots, metric, ours, by_seed, "")


def _set_shots(asked: Asked, dataset: str) -> int:
    """The images a class that are drawn although nothing is learned from them."""
    return int(asked.values(dataset, 0)["split"]["shots"])


def head(asked: Asked, command: str) -> list[str]:
    """What must be known before the table is read."""
    recipe = asked.recipe
    lines = [f"{recipe.title}, {asked.protocol}" + (f", variant {asked.variant}" if asked.variant else ""),
             f"{recipe.paper}; backbone {asked.backbone}, seeds {', '.join(map(str, asked.seeds))}",
             f"made by: {command}"]  # fmt: skip
    if asked.backbone != asked.own_backbone:
        lines.append(f"These figures are not the papers': the backbone is {asked.backbone}, and theirs is "
                     f"{asked.own_backbone}. A difference says nothing about the method.")  # fmt: skip
    changed = {name: value for name, value in asked.overrides.items() if not name.startswith("backbone.")}
    if changed:
        told = ", ".join(f"{name} {value}" for name, value in changed.items())
        lines.append(f"Not as the recipe has it: {told}.")
    return lines


def as_csv(lines: Sequence[Line]) -> str:
    rows = [[*COLUMNS, "source", "provenance"]]
    for line in lines:
        figure = line.published
        rows.append([*line.cells(), figure.source if figure else "", figure.provenance if figure else ""])
    return files.as_csv(rows)


def as_markdown(lines: Sequence[Line], above: Sequence[str], differs: Sequence[str]) -> str:
    text = [f"# {above[0]}", "", *(f"{line}\n" for line in above[1:]),
            f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|",
            *(f"| {' | '.join(line.cells())} |" for line in lines), "",
            "Percent; ours is the mean over n seeds, std their sample standard deviation; differences and tolerances "
            "in points.", "", "Differs from the published setting:", "", *(f"- {one}" for one in differs)]  # fmt: skip
    return "\n".join(text) + "\n"

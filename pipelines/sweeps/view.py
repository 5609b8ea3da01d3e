"""A sweep for people: its standing in a line, its outcome as a table in the terminal and on Prefect's page."""

import json
import math
import statistics

from rich import box
from rich.table import Table

from coop_core.judging.transfer import harmonic_mean
from coop_core.sweeps.space import columns, short
from coop_core.sweeps.sweep import Row
from pipelines import console
from pipelines.records.server import Records
from pipelines.records.trials import sweep_links
from pipelines.sweeps.outcome import Outcome, Standing

_NOTE = "Percent, mean and sample standard deviation over seeds. Chosen by validation alone."


def details(standing: Standing) -> str:
    """What a progress bar says beside its count."""
    parts = []
    if standing.running:
        share = sum(standing.running.values()) / len(standing.running)
        parts.append(f"{len(standing.running)} training ({100 * share:.0f} %)")
    if standing.found:
        parts.append(f"{standing.found} on record before")
    if standing.failures:
        parts.append(f"{len(standing.failures)} failed")
    return ", ".join(parts)


def print_outcome(outcome: Outcome, records: Records) -> None:
    head, lines = _cells(outcome)
    numbers = head.index("seeds")
    table = Table(title=f"sweep {outcome.name}", caption=_NOTE, box=box.SIMPLE_HEAD, pad_edge=False)
    for position, name in enumerate(head):
        table.add_column(name, justify="right" if position >= numbers else "left", no_wrap=position >= numbers)
    for row, line in zip(outcome.rows, lines, strict=True):
        table.add_row(*line, style="bold green" if row == outcome.winner else None)
    console.console.print(table)
    standing, best = outcome.standing, outcome.winner
    patch = outcome.folder / "winner.patch"
    runs = [result.run_id for row in outcome.rows for result in row.results]
    run_page, compare_page = sweep_links(records, outcome.run_id, runs)
    lines_below = [
        _counted(standing),
        *(f"failed      {reason}" for reason in sorted(set(standing.failures.values()))),
        *(f"over all    {line}" for line in averages(outcome)),
        f"winner      {describe(best)}: validation {_percent(best, 'val_accuracy')}, test {_percent(best, 'accuracy')}",
        f"make it     git apply {patch} && dvc repro" if outcome.values
        else "make it     dvc repro  (params.yaml is the winner's already)",
        f"files       {', '.join(str(path) for path in outcome.files)}",
        f"MLflow      {run_page}",
        f"compare     {compare_page}",
        *([] if records.address.startswith("http") else ["            (after `make ui` or `make up`)"]),
    ]  # fmt: skip
    for line_below in lines_below:
        console.console.print(line_below, highlight=False, soft_wrap=True, markup=False)


def _counted(standing: Standing) -> str:
    """How many trials there are, and what to do about those that failed."""
    before = f", {standing.found} of them on record before" if standing.found else ""
    again = ": `coop sweep` again trains those and chooses anew" if standing.failures else ""
    return f"{len(standing.results)} trials{before}, {len(standing.failures)} failed{again}"


def as_markdown(outcome: Outcome) -> str:
    head, lines = _cells(outcome)
    text = [f"# Sweep {outcome.name}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row, line in zip(outcome.rows, lines, strict=True):
        text.append(f"| {' | '.join(f'**{cell}**' if row == outcome.winner else cell for cell in line)} |")
    values = "\n".join(f"{name}: {json.dumps(value)}" for name, value in outcome.values.items())
    make_it = f"To make the winner, set in params.yaml and run `dvc repro`:\n\n```yaml\n{values}\n```"
    make_it = make_it if values else "`dvc repro` makes the winner: params.yaml is its."
    failed = ["", f"{_counted(outcome.standing)}."] if outcome.standing.failures else []
    return "\n".join([*text, "", _NOTE, *failed, "", make_it])


def describe(row: Row) -> str:
    return ", ".join(f"{short(name)} {value}" for name, value in (columns(row.task) | columns(row.choice)).items())


def _cells(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """Column names, and a line for each choice on each task."""
    varied = [columns(row.task) | columns(row.choice) for row in outcome.rows]
    names = list(dict.fromkeys(name for values in varied for name in values))
    tests = list(outcome.rows[0].results[0].trial.params.tests)
    is_base_to_new = any(row.harmonic is not None for row in outcome.rows)
    lines = [
        [*(values.get(name, "") for name in names), str(len(row.results)), _percent(row, "val_accuracy"),
         _percent(row, "accuracy"), f"{100 * row.mean('zero_shot_accuracy'):.1f}",
         *(_percent(row, f"tests/{test}/learned") for test in tests),
         *([_harmonic(row)] if is_base_to_new else [])]
        for row, values in zip(outcome.rows, varied, strict=True)
    ]  # fmt: skip
    own = "base" if is_base_to_new else "test"
    head = [*map(short, names), "seeds", "validation", own, "zero-shot", *tests, *(["H"] if is_base_to_new else [])]
    return head, lines


def averages(outcome: Outcome) -> list[str]:
    """Over several data sets, both published kinds of average of base and new, for every choice that has them all."""
    new = outcome.rows[0].results[0].new
    tasks = {str(row.task) for row in outcome.rows}
    if new is None or len(tasks) < 2:
        return []
    by_choice: dict[str, list[Row]] = {}
    for row in outcome.rows:
        by_choice.setdefault(", ".join(columns(row.choice).values()) or "all", []).append(row)
    lines = []
    for choice, its in by_choice.items():
        whole = [row.harmonic for row in its if row.harmonic is not None]
        if len(whole) == len(tasks):
            base = statistics.fmean(row.mean("accuracy") for row in its)
            beyond = statistics.fmean(row.mean(f"tests/{new}/learned") for row in its)
            named = {"base": base, "new": beyond, "H of these means": harmonic_mean(base, beyond),
                     "mean of the H": statistics.fmean(whole)}  # fmt: skip
            lines.append(f"{choice}: " + ", ".join(f"{name} {100 * value:.1f}" for name, value in named.items()))
    return lines


def _harmonic(row: Row) -> str:
    return "-" if row.harmonic is None else f"{100 * row.harmonic:.1f}"


def _percent(row: Row, metric: str) -> str:
    if math.isnan(row.mean(metric)):
        return "-"
    spread = f" ± {100 * row.spread(metric):.1f}" if len(row.results) > 1 else ""
    return f"{100 * row.mean(metric):.1f}{spread}"

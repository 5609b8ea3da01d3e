"""The picture of the light heads: tables of docs/benchmarks.md -> docs/light-heads.png, a panel a data set.

    python benchmarks/heads_picture.py

Every table whose columns are numbers of images a class is taken, so picture and tables cannot differ.
"""

import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from coop_core.report.style import COLOURS, STYLE, capital, save_png

DOCS = Path(__file__).parents[1] / "docs"
Curves = dict[str, list[float]]
"""Percent by head."""
DRAWN = {"CLAP": "first", "GDA": "second", "ProLIP": "third", "CoOp": "fourth", "linear probe": "ink"}
"""Heads in colour, the others in grey."""


def main() -> None:
    found = tables((DOCS / "benchmarks.md").read_text(encoding="utf-8"))
    save_png(picture(found), DOCS / "light-heads.png")


def tables(text: str) -> dict[str, tuple[list[int], Curves]]:
    """Data sets with their numbers of images a class, and each head's means."""
    found: dict[str, tuple[list[int], Curves]] = {}
    for head, *rows in (block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)):
        columns = [cell.strip() for cell in head.strip("| ").split("|")]
        if len(columns) > 2 and columns[1] == "1 image a class":
            shots = [int(column.split()[0]) for column in columns[1:-1]]
            lines = [[cell.strip(" *") for cell in row.strip("|").split("|")] for row in rows[1:]]
            found[columns[0]] = shots, {name: [_mean(cell) for cell in cells[: len(shots)]] for name, *cells in lines}
    return found


def _mean(cell: str) -> float:
    number = re.match(r"[0-9.]+", cell)
    return float(number[0]) if number else float("nan")


@matplotlib.rc_context(STYLE)
def picture(found: dict[str, tuple[list[int], Curves]]) -> Figure:
    figure = Figure(figsize=(8.2, 7.0))
    panels = figure.subplots(2, 2).flatten()
    for axes, (name, (shots, curves)) in zip(panels, found.items(), strict=False):
        axes.axhline(curves["zero-shot"][0], color=COLOURS["muted"], linestyle="--", linewidth=1.2, label="zero-shot")
        for head in sorted(curves.keys() - {"zero-shot"}, key=lambda head: (head in DRAWN, head)):
            role, width = (DRAWN[head], 2.0) if head in DRAWN else ("grid", 1.6)
            style = ":" if head == "linear probe" else "-"
            axes.plot(shots, curves[head], color=COLOURS[role], linewidth=width, linestyle=style, marker="o",
                      markersize=3.5, label=head if head in DRAWN else "_other")  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(shots, [str(number) for number in shots])
        axes.minorticks_off()
        axes.set_title(capital(name))
    panels[0].plot([], [], color=COLOURS["grid"], linewidth=1.6, label="the other heads")
    for axes in panels[2:]:
        axes.set_xlabel("images a class")
    for axes in panels[::2]:
        axes.set_ylabel("percent of test images")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


if __name__ == "__main__":
    main()

"""Published figures: what was carried over agrees with itself, and a result finds the row it is held against."""

import statistics
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from coop_core.errors import ParamsError
from coop_core.judging.transfer import harmonic_mean
from coop_core.params.recipes import read_recipe, recipe_names
from coop_core.reproduction.figures import Cell, Figure, Published

ROOT = Path(__file__).parents[1]
PUBLISHED = Published.read(ROOT / "published")
FIGURES = PUBLISHED.figures
H = "harmonic mean"


def table(figure: Figure) -> tuple[object, ...]:
    """What a figure shares with the others of its row in the paper."""
    return figure.method, figure.protocol, figure.shots, figure.backbone, figure.setting


def by_table(metric: str) -> dict[tuple[object, ...], dict[str, float]]:
    found: dict[tuple[object, ...], dict[str, float]] = defaultdict(dict)
    for figure in FIGURES:
        if figure.metric == metric:
            found[table(figure)][figure.dataset] = figure.value_percent
    return found


def test_no_figure_stands_twice() -> None:
    keys = Counter((*table(figure), figure.dataset, figure.metric) for figure in FIGURES)
    assert [key for key, count in keys.items() if count > 1] == []


def test_a_result_finds_one_figure_at_most() -> None:
    cells = Counter((figure.recipe, figure.variant, figure.protocol, figure.dataset, figure.shots, figure.metric,
                     figure.backbone) for figure in FIGURES if figure.recipe)  # fmt: skip
    assert [cell for cell, count in cells.items() if count > 1] == []


def test_h_is_of_base_and_new() -> None:
    base, new = by_table("base"), by_table("new")
    rows = [(key, name, value) for key, cells in by_table(H).items() for name, value in cells.items()
            if "no H of the averages" not in str(key)]  # fmt: skip
    assert len(rows) > 40
    for key, name, value in rows:
        assert value == pytest.approx(harmonic_mean(base[key][name], new[key][name]), abs=0.015), (key, name)


def test_averages_are_of_their_rows() -> None:
    checked = 0
    for metric in ("accuracy", "base", "new"):
        for key, cells in by_table(metric).items():
            own = "imagenet" if "learned on imagenet" in str(key[-1]) or key[1] == "domain-generalisation" else ""
            for name, value in cells.items():
                parts = [other for one, other in cells.items() if not one.startswith("average-") and one != own]
                if name.startswith("average-") and len(parts) == int(name.split("-")[1]):
                    assert value == pytest.approx(statistics.fmean(parts), abs=0.011), (key, name)
                    checked += 1
    assert checked >= 15


def test_every_recipe_and_variant_that_is_named_is_there() -> None:
    names = recipe_names(ROOT / "recipes")
    for row in (*FIGURES, *PUBLISHED.tolerances):
        assert row.recipe in {"", *names}
        if isinstance(row, Figure) and row.variant:
            assert row.variant in read_recipe(ROOT / "recipes", row.recipe).variants


def test_every_tolerance_has_a_figure() -> None:
    for tolerance in PUBLISHED.tolerances:
        fitting = [figure for figure in FIGURES if tolerance == PUBLISHED.tolerance(Cell(
            figure.recipe, figure.variant, figure.protocol, figure.dataset, figure.shots, figure.metric))]  # fmt: skip
        assert fitting, tolerance


def test_every_data_set_that_is_named_has_a_card_or_is_an_average() -> None:
    cards = {path.stem for path in (ROOT / "catalog").glob("*.yaml")}
    assert {one.dataset for one in FIGURES if not one.dataset.startswith("average-")} <= cards


def test_a_tolerance_may_be_wider_on_one_side() -> None:
    tolerance = PUBLISHED.tolerance(Cell("coop-ijcv22", "", "few-shot", "imagenet", 16, "accuracy"))
    assert tolerance
    assert [tolerance.holds(difference) for difference in (-2.7, -2.6, 0.3, 0.4)] == [False, True, True, False]


@pytest.mark.parametrize(
    ("file", "old", "new", "sentence"),
    [
        ("tables.csv", ",quoted\n", ",remembered\n", r"tables\.csv, line 2: provenance: Input should be 'read'"),
        ("tables.csv", ",58.18,", ",158.18,", r"tables\.csv, line 2: value_percent: Input should be less than"),
        ("tables.csv", "value_percent", "value", r"tables\.csv, line 2: .*value"),
        ("tolerances.csv", "points_below", "below", r"tolerances\.csv, line 2: .*below"),
    ],
)
def test_a_row_that_cannot_be_meant_is_a_sentence(tmp_path: Path, file: str, old: str, new: str, sentence: str) -> None:
    for name in ("tables.csv", "tolerances.csv"):
        text = (ROOT / "published" / name).read_text()
        (tmp_path / name).write_text(text.replace(old, new, 1) if name == file else text)
    with pytest.raises(ParamsError, match=sentence):
        Published.read(tmp_path)


def test_a_missing_table_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"tables\.csv is missing: restore it with git"):
        Published.read(tmp_path)

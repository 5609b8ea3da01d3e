"""`coop reproduce`: a recipe becomes the sweeps its paper ran, and their results one honest table."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_stages import working_in
from toy_images import paint, paint_classes
from typer.testing import CliRunner

from coop_core.errors import DatasetError, ParamsError, TrainingError
from coop_core.params import Params, load_params
from coop_core.params.recipes import Recipe, read_recipe, recipe_names
from coop_core.reproduction.comparison import Line, as_csv, as_markdown, compare, head
from coop_core.reproduction.estimate import Size, _building, pace_of, work_of
from coop_core.reproduction.figures import Figure, Published, Tolerance
from coop_core.reproduction.grid import Asked, ask, sweeps
from coop_core.sweeps.sweep import Result, Row, trials
from pipelines.commands import cli, reproduction
from pipelines.settings import Settings
from pipelines.sources.catalogue import source_of

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
NAMES = recipe_names(RECIPES)
BASE = load_params(ROOT / "params.yaml")
WAYS = [(name, protocol) for name in NAMES for protocol in read_recipe(RECIPES, name).protocols]


def asked(name: str, **how: Any) -> Asked:
    return ask(name, read_recipe(RECIPES, name), **how)


def of(one: Asked, dataset: str) -> list[Params]:
    sources = {name: f"data/{name}.yaml" for name in (dataset, *one.how.tests)}
    return sweeps(one, BASE, dataset=dataset, sources=sources)


# The grid


@pytest.mark.parametrize(("name", "protocol"), WAYS)
def test_every_protocol_of_every_recipe_is_sweeps_that_can_be_run(name: str, protocol: str) -> None:
    one = asked(name, protocol=protocol)
    assert set(one.datasets) | set(one.how.tests) <= {path.stem for path in (ROOT / "catalog").glob("*.yaml")}
    for dataset in one.datasets:
        found = [trial for params in of(one, dataset) for trial in trials(params, [{}])]
        wanted = sorted((shots or 1, seed) for shots in one.shots for seed in one.seeds)
        assert sorted((trial.params.split.shots, trial.params.seed) for trial in found) == wanted
        assert all(trial.params.dataset.source == f"data/{dataset}.yaml" for trial in found)


def test_every_recipe_has_a_protocol() -> None:
    assert {name for name, _ in WAYS} == set(NAMES)


def test_shots_of_one_schedule_are_one_sweep_with_the_published_epochs() -> None:
    found = [(params.sweep.space["split.shots"], params.train.epochs) for params in of(asked("coop-ijcv22"), "dtd")]
    assert found == [([1], 50), ([2, 4], 100), ([8, 16], 200)]


def test_what_the_paper_sets_for_a_data_set_is_set() -> None:
    assert {params.train.epochs for params in of(asked("coop-ijcv22"), "imagenet")} == {50}
    (params,) = of(asked("biomedcoop-cvpr25", shots=[16]), "kneexray")
    assert params.method.model_dump()["selection_threshold"] == 1.75


def test_base_to_new_is_judged_on_the_new_classes_of_the_same_data_set() -> None:
    (params,) = of(asked("cocoop-cvpr22"), "dtd")
    assert params.split.classes == "base"
    assert [(test.source, test.classes) for test in params.tests.values()] == [("data/dtd.yaml", "new")]


def test_base_to_new_of_biomedcoop_has_settings_of_its_own() -> None:
    (params,) = of(asked("biomedcoop-base-to-new-cvpr25"), "covid-qu-ex")
    method = params.method.model_dump()
    assert (method["sccm_weight"], method["kdsp_weight"], method["selection_threshold"]) == (20.0, 1.0, 1.25)
    assert (params.train.epochs, params.train.batch_size, params.split.classes) == (50, 4, "base")
    assert [test.classes for test in params.tests.values()] == ["new"]
    assert "busi" not in asked("biomedcoop-base-to-new-cvpr25").datasets


def test_across_data_sets_all_classes_are_learned_and_every_test_set_is_judged() -> None:
    (params,) = of(asked("cocoop-cvpr22", protocol="domain-generalisation"), "imagenet")
    assert params.split.classes == "all"
    assert {name: test.source for name, test in params.tests.items()} == {
        name: f"data/{name}.yaml" for name in ("imagenetv2", "imagenet-sketch", "imagenet-a", "imagenet-r")
    }


def test_another_backbone_brings_what_decides_its_weights() -> None:
    one = asked("coop-ijcv22", overrides={"backbone.architecture": "local-dir:towers", "backbone.pretrained": None})
    assert {params.backbone.files for params in of(one, "dtd")} == {"towers"}
    assert (one.backbone, one.own_backbone) == ("local-dir:towers", "RN50-quickgelu (openai)")


@pytest.mark.parametrize(
    ("name", "how", "sentence"),
    [
        ("coop-ijcv22", {"protocol": "base-to-new"}, "--protocol base-to-new is not in recipe coop-ijcv22: it has "),
        ("coop-ijcv22", {"shots": [3]}, "--shots 3 is not in the recipe: it has 1, 2, 4, 8, 16"),
        ("coop-ijcv22", {"seeds": [1, 1]}, "--seeds 1 1 names one twice"),
        ("coop-ijcv22", {"variant": "m5"}, "--variant m5 is not in the recipe"),
        ("zero-shot", {"shots": [16]}, "--shots is not for recipe zero-shot, which learns nothing: "),
    ],
)
def test_what_the_recipe_does_not_have_is_a_sentence(name: str, how: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ParamsError, match=sentence):
        asked(name, **how)


def test_a_recipe_without_protocols_is_a_sentence() -> None:
    recipe = Recipe(title="t", paper="p", code="c", seeds=[1], set={}, differs=["d"])
    with pytest.raises(ParamsError, match="recipe mine has no protocols, so it does not say what its paper ran"):
        ask("mine", recipe)


def test_a_change_that_is_no_parameter_is_a_sentence() -> None:
    with pytest.raises(ParamsError, match=r"recipe coop-ijcv22 on dtd: train\.epoch is not a known key"):
        of(asked("coop-ijcv22", overrides={"train.epoch": 3}), "dtd")
    with pytest.raises(ParamsError, match=r"trian\.epochs is not a parameter of params\.yaml"):
        of(asked("coop-ijcv22", overrides={"trian.epochs": 3}), "dtd")


@pytest.mark.parametrize(("change", "sentence"), [
    ("train.epochs", "--set train.epochs is no NAME=VALUE"), ("dataset.source=x", "--set dataset.source is not for"),
    ("split.shots=4", "--set split.shots is not for `coop reproduce`: data sets, shots and se"),
])  # fmt: skip
def test_a_change_that_is_said_otherwise_is_a_sentence(change: str, sentence: str) -> None:
    with pytest.raises(ParamsError, match=sentence):
        reproduction.overrides(None, [change])


def test_the_backbone_and_changes_are_values_by_name() -> None:
    assert reproduction.overrides("mini", ["train.epochs=5", "split.test_per_class=null"]) == {
        "backbone.architecture": "mini", "backbone.pretrained": None, "train.epochs": 5, "split.test_per_class": None,
    }  # fmt: skip


def test_the_work_is_counted_before_anything_is_computed() -> None:
    found = work_of(of(asked("coop-ijcv22", shots=[1, 16], seeds=[1, 2]), "dtd"), Size(47, 2820, 1692), tests=10)
    assert found.encodings == 1692 + 10 + 2 * (47 * 1 * 8 + 47 * 1) + 2 * (47 * 16 * 8 + 47 * 4)
    assert (found.trainings, found.steps) == (4, 2 * (50 * 1 + 200 * (47 * 16 // 32)))


def test_what_reads_pixels_encodes_in_every_step_and_searches_first() -> None:
    found = work_of(of(asked("dpl-2025", shots=[16], seeds=[1, 2]), "dtd"), Size(47, 2820, 1692), tests=0)
    assert found.search_steps == 2 * 80 * (47 * 16 // 4)
    assert found.steps == 2 * 40 * (47 * 16 // 4)
    assert found.encodings == 1692 + 2 * (40 * 47 * 4 + 1692)


def test_every_labeller_of_a_pool_encodes_it() -> None:
    plain, star = (work_of(of(asked("upl-2022", variant=variant), "dtd"), Size(47, 2820, 1692), tests=0)
                   for variant in (None, "star"))  # fmt: skip
    assert star.encodings - plain.encodings == 7 * 2820


def test_depths_that_are_given_are_not_searched_for() -> None:
    lengths = {"method.image_lengths": [1, 1], "method.text_lengths": [1, 1, 1]}
    assert work_of(of(asked("dpl-2025", overrides=lengths), "dtd"), Size(47, 2820, 1692), tests=0).search_steps == 0


@pytest.mark.parametrize(("name", "expected"), [
    ("dpl-2025", (False, True, True)), ("gda-iclr24", (True, False, False)), ("linear-probe", (True, False, False)),
    ("coop-ijcv22", (False, True, False)), ("upl-2022", (False, True, False)),
])  # fmt: skip
def test_every_kind_of_training_has_a_pace(zoo: Any, name: str, expected: tuple[bool, ...]) -> None:
    one = asked(name, overrides=reproduction.overrides(zoo.architecture("flat"), ["features.views=1"]))
    pace = pace_of(of(one, "dtd")[0], zoo.backbone("flat"), classes=3)
    assert (pace.building > 0, pace.step > 0, pace.search_step > 0) == expected


def test_more_classes_than_are_timed_take_as_much_longer_as_twice_as_many_did() -> None:
    assert _building(lambda classes: 2.0 * classes, 60) == 120
    assert _building(lambda classes: 0.01 * classes**2, 1000) == pytest.approx(0.01 * 1000**2)
    assert _building(lambda classes: 0.01 * classes, 1000) == pytest.approx(10)
    assert _building(lambda classes: 1 / classes, 1000) == pytest.approx(0.01)


# The table

FIGURE = Figure(method="CoOp", recipe="coop-ijcv22", dataset="dtd", protocol="few-shot", shots=16, metric="accuracy",
                backbone="RN50-quickgelu (openai)", value_percent=63.5, source="a thread",
                provenance="read")  # fmt: skip
TOLERANCE = Tolerance(recipe="coop-ijcv22", protocol="few-shot", dataset="dtd", points_below=1, points_above=0.5,
                      reason="other images")  # fmt: skip


def rows_of(one: Asked, dataset: str, score: Mapping[int, tuple[float, float]]) -> list[Row]:
    """Results by seed: accuracy on the test images, and on every further test set."""
    found = []
    for params in of(one, dataset):
        for shots in params.sweep.space["split.shots"] if params.sweep else []:
            some = [trial for trial in trials(params, [{}]) if trial.params.split.shots == shots]
            results = tuple(
                Result(trial, 0.5, 1.0, score[trial.params.seed][0], 0.3,
                       tests={f"tests/{name}/learned": score[trial.params.seed][1] for name in params.tests})
                for trial in some
            )  # fmt: skip
            found.append(Row(some[0].task, {}, results))
    return found


def lines_of(one: Asked, score: Mapping[int, tuple[float, float]], *figures: Figure, only: str = "") -> list[Line]:
    rows = {dataset: rows_of(one, dataset, score) for dataset in one.datasets if only in ("", dataset)}
    reasons = {dataset: "no images" for dataset in one.datasets if dataset not in rows}
    return compare(one, rows, reasons, Published(figures, (TOLERANCE,)))


@pytest.mark.parametrize(("accuracy", "verdict"), [(0.625, "within"), (0.6401, "outside"), (0.6249, "outside")])
def test_a_result_stands_beside_its_figure_with_difference_and_verdict(accuracy: float, verdict: str) -> None:
    one = asked("coop-ijcv22", datasets=["dtd"], shots=[16], seeds=[1, 2])
    line = lines_of(one, {1: (accuracy - 0.01, 0), 2: (accuracy + 0.01, 0)}, FIGURE)[0]
    assert line.cells() == [
        "dtd", "16", "accuracy", f"{100 * accuracy:.2f}", "1.41", "2", "63.50", f"{100 * accuracy - 63.5:+.2f}",
        "-1 to +0.5", verdict, "other images",
    ]  # fmt: skip


def test_a_figure_of_another_number_of_shots_or_metric_is_not_taken() -> None:
    one = asked("coop-ijcv22", datasets=["dtd"], shots=[8], seeds=[1])
    assert lines_of(one, {1: (0.6, 0)}, FIGURE)[0].cells()[6:8] == ["not found", ""]


@pytest.mark.parametrize("overrides", [{"backbone.architecture": "mini", "backbone.pretrained": None},
                                       {"train.epochs": 5}])  # fmt: skip
def test_what_is_not_as_published_gets_no_verdict_and_a_head_that_says_so(overrides: dict[str, Any]) -> None:
    one = asked("coop-ijcv22", datasets=["dtd"], shots=[16], seeds=[1], overrides=overrides)
    line = lines_of(one, {1: (0.635, 0)}, FIGURE)[0]
    assert (line.published, line.verdict, line.cells()[8]) == (FIGURE, "", "")
    said = " ".join(head(one, "coop reproduce"))
    assert ("These figures are not the papers': the backbone is mini" in said) == ("train.epochs" not in overrides)
    assert ("Not as the recipe has it: train.epochs 5" in said) == ("train.epochs" in overrides)


def test_base_to_new_has_h_of_the_means_and_the_published_kind_of_average() -> None:
    one = asked("cocoop-cvpr22", seeds=[1, 2])
    lines = lines_of(one, {1: (0.8, 0.5), 2: (0.6, 0.7)})
    assert [line.cell.metric for line in lines[:3]] == ["base", "new", "harmonic mean"]
    assert [line.ours for line in lines[:3]] == pytest.approx([0.7, 0.6, 2 * 0.7 * 0.6 / 1.3])
    assert [(line.cell.dataset, line.cell.metric) for line in lines[-3:]] == [
        ("average-11", "base"), ("average-11", "new"), ("average-11", "harmonic mean")]  # fmt: skip
    assert [line.ours for line in lines[-3:]] == pytest.approx([0.7, 0.6, 2 * 0.7 * 0.6 / 1.3])


def test_across_data_sets_the_average_leaves_the_source_out() -> None:
    lines = lines_of(asked("cocoop-cvpr22", protocol="cross-dataset", seeds=[1]), {1: (0.9, 0.5)})
    assert [line.cell.dataset for line in lines][:2] == ["imagenet", "caltech101"]
    assert len(lines) == 12
    assert (lines[-1].cell.dataset, lines[-1].ours) == ("average-10", 0.5)


def test_what_cannot_be_had_is_said_and_never_guessed() -> None:
    one = asked("coop-ijcv22", shots=[16], seeds=[1])
    lines = lines_of(one, {1: (0.6, 0)}, FIGURE, only="dtd")
    by_name = {line.cell.dataset: line for line in lines}
    assert by_name["eurosat"].cells()[3] == "not available here"
    assert by_name["eurosat"].note == "no images"
    assert by_name["average-11"].ours is None
    assert by_name["average-11"].note == "needs all 11 data sets, and 1 are here"


def test_seeds_that_failed_and_classes_that_cannot_be_rebound_are_said() -> None:
    one = asked("cocoop-cvpr22", datasets=["dtd"], seeds=[1, 2])
    (row,) = rows_of(one, "dtd", {1: (0.8, 0.5), 2: (0.6, 0.7)})
    blind = Result(row.results[0].trial, 0.5, 1.0, 0.8, 0.3)
    found = compare(one, {"dtd": [Row(row.task, {}, (blind,))]}, {"dtd": "too few images"}, Published((), ()))
    assert [(line.ours, line.note) for line in found[:2]] == [
        (0.8, "1 of 2 seeds"), (None, "what was learned knows its own classes alone")]  # fmt: skip


def test_the_files_hold_every_line_with_the_source_of_its_figure() -> None:
    one = asked("coop-ijcv22", datasets=["dtd", "eurosat"], shots=[16], seeds=[1])
    lines = lines_of(one, {1: (0.6, 0)}, FIGURE, only="dtd")
    rows = list(csv.DictReader(as_csv(lines).splitlines()))
    assert [(row["dataset"], row["ours"], row["source"]) for row in rows[:2]] == [
        ("dtd", "60.00", "a thread"), ("eurosat", "not available here", "")]  # fmt: skip
    text = as_markdown(lines, head(one, "coop reproduce coop-ijcv22"), one.recipe.differs)
    assert "made by: coop reproduce coop-ijcv22" in text
    assert "| dtd | 16 | accuracy | 60.00 |" in text
    assert all(f"- {one}" in text for one in one.recipe.differs)


# Where data sets stand


def test_a_folder_with_the_papers_names_is_read_by_the_catalogues_cards(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    paint(folder / "eurosat/2750/River/1.jpg", 1)
    with working_in(ROOT):
        found = source_of("eurosat", folder, cards=tmp_path / "cards")
    card = json.loads(found.read_text())
    assert found == tmp_path / "cards/eurosat.yaml"
    assert card["path"] == str(folder / "eurosat")
    assert card["template"] == "a centered satellite photo of {}."


def test_a_card_of_ones_own_comes_first_then_a_folder_of_the_name(tmp_path: Path) -> None:
    (tmp_path / "toys").mkdir()
    assert source_of("toys", tmp_path, cards=tmp_path / "cards") == tmp_path / "toys"
    (tmp_path / "toys.yaml").write_text("name: toys\npath: toys")
    assert source_of("toys", tmp_path, cards=tmp_path / "cards") == tmp_path / "toys.yaml"


def test_images_that_are_not_here_are_named_with_the_place_they_belong_to(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\npath: pictures")
    with pytest.raises(DatasetError, match=r"mine needs its images in .*/pictures: .*mine\.yaml says where they are"):
        source_of("mine", tmp_path, cards=tmp_path)
    with working_in(ROOT), pytest.raises(DatasetError, match=r"eurosat needs its images in .*/eurosat: .*eurosat"):
        source_of("eurosat", tmp_path, cards=tmp_path)
    with pytest.raises(DatasetError, match=r"toys is not in .* and has no card in the catalogue: put toys\.yaml or"):
        source_of("toys", tmp_path, cards=tmp_path)


# The command


@pytest.fixture
def project(tmp_path: Path, zoo: Any) -> Path:
    """A project with a recipe of the toys' size, and a folder of data sets beside it."""
    folder = tmp_path / "project"
    for name in ("recipes", "published"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "params.yaml", folder)
    paint_classes(tmp_path / "data/toys", {"cat": 12, "dog": 12, "fox": 12, "river": 12})
    return folder


def arguments(zoo: Any, *more: str) -> list[str]:
    return ["reproduce", "coop-as-in-cocoop-cvpr22", "--datasets", "toys", "gone", "--shots", "1", "2", "--seeds", "1",
            "2", "--backbone", zoo.architecture("flat"), "--data-folder", "../data", "--set", "train.epochs=3",
            "features.views=1", *more]  # fmt: skip


def test_a_plan_counts_what_is_to_be_done_and_says_what_is_missing(project: Path, zoo: Any) -> None:
    with working_in(project):
        said = CliRunner().invoke(cli.app, arguments(zoo, "--plan"), catch_exceptions=False)
    assert said.exit_code == 0
    assert "toys: 40 encodings of images at most, 4 trainings" in said.output
    assert "gone: not available here: gone is not in ../data and has no card in the catalogue" in said.output
    assert f"weights: {zoo.architecture('flat')}, here" in said.output
    assert "ms a step with 2 classes" in said.output
    assert not (project / "artifacts").exists()


@pytest.mark.parametrize(("recipe", "sentence"), [
    ("dpl-2025", " of search and "), ("dpl-2025", " ms a step of the search and "),
    ("gda-iclr24", " of building one after another ("),
])  # fmt: skip
def test_a_plan_says_how_long_a_search_and_a_building_take(project: Path, zoo: Any, recipe: str, sentence: str) -> None:
    words = ["reproduce", recipe, "--datasets", "toys", "--shots", "2", "--seeds", "1", "--backbone",
             zoo.architecture("flat"), "--data-folder", "../data", "--plan"]  # fmt: skip
    with working_in(project):
        said = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert sentence in said.output
    assert "not estimated" not in said.output


class Scorer:
    """Does what sweeps do but the training; the data set called `broken` has no result."""

    def __init__(self) -> None:
        self.asked: list[Params] = []

    def __call__(self, params: Params) -> list[Row]:
        self.asked.append(params)
        if "broken" in params.dataset.source:
            raise TrainingError("the loss became nan")
        return [Row(one.task, {}, (Result(one, 0.5, 1.0, 0.75, 0.3, tests={"tests/new/learned": 0.25}),))
                for one in trials(params, [{}])]  # fmt: skip


def table_of(project: Path, asked: Asked, run: Scorer) -> list[dict[str, str]]:
    with working_in(project):
        reproduction.reproduce(asked, Settings(_env_file=None), Path("../data"), run=run)
        (table,) = Path("artifacts/reproduce/coop-as-in-cocoop-cvpr22").glob("*.csv")
        assert table.with_suffix(".md").read_text().startswith("# CoOp as in CoCoOp's comparison")
        return list(csv.DictReader(table.read_text().splitlines()))


def test_one_data_set_that_fails_leaves_the_others_their_lines(project: Path, zoo: Any) -> None:
    paint_classes(project / "../data/broken", {"cat": 2, "dog": 2})
    one = asked("coop-as-in-cocoop-cvpr22", datasets=["broken", "toys", "gone"], seeds=[1],
                overrides=reproduction.overrides(zoo.architecture("flat"), []))  # fmt: skip
    rows = table_of(project, one, Scorer())
    assert [(row["dataset"], row["ours"], row["note"]) for row in rows if row["metric"] == "base"] == [
        ("broken", "not available here", "the loss became nan"), ("toys", "75.00", ""),
        ("gone", "not available here", "gone is not in ../data and has no card in the catalogue: put gone.yaml or "
         "gone/ with a folder a class there"),
        ("average-11", "not available here", "needs all 11 data sets, and 0 are here"),
    ]  # fmt: skip


def test_missing_weights_are_asked_for_once_and_nothing_is_trained(project: Path) -> None:
    paint_classes(project / "../data/more", {"cat": 2, "dog": 2})
    one = asked("coop-as-in-cocoop-cvpr22", datasets=["toys", "more"], seeds=[1],
                overrides=reproduction.overrides("local-dir:nowhere", []))  # fmt: skip
    run = Scorer()
    rows = table_of(project, one, run)
    assert run.asked == []
    assert {row["ours"] for row in rows} == {"not available here"}
    assert "nowhere" in rows[0]["note"]


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was_and_ends_with_one_table(project: Path, zoo: Any) -> None:
    command = [sys.executable, "-m", "pipelines.commands.cli", *arguments(zoo)]
    (project / "dvc.yaml").touch()

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, cwd=project, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    first = start()
    logs = project / ".cache/trainers"
    while first.poll() is None and not logs.exists():
        time.sleep(0.2)
    time.sleep(8)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)

    last = start()
    out, err = last.communicate(timeout=300)
    assert last.returncode == 0, err
    again = start()
    assert "4 on record before" in "".join(again.communicate(timeout=300))

    (table,) = (project / "artifacts/reproduce/coop-as-in-cocoop-cvpr22").glob("*.csv")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    of_toys = [row for row in rows if row["dataset"] == "toys"]
    assert [(row["shots"], row["metric"], row["n"]) for row in of_toys] == [
        (shots, metric, n) for shots in ("1", "2") for metric, n in (("base", "2"), ("new", "2"), ("harmonic mean", ""))
    ]  # fmt: skip
    assert all(0 <= float(row["ours"]) <= 100 for row in of_toys)
    assert {row["ours"] for row in rows if row["dataset"] == "gone"} == {"not available here"}
    assert "These figures are not the papers'" in out


def test_options_with_several_values_may_be_given_once(project: Path) -> None:
    with working_in(project):
        once = CliRunner().invoke(cli.app, ["reproduce", "coop-ijcv22", "--shots", "1", "3", "--plan"])
    assert isinstance(once.exception, ParamsError)
    assert "--shots 3 is not in the recipe" in str(once.exception)

"""Recipes: every published setting is one that params.yaml can have, and is written as a change to read."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_stages import working_in

from coop_core.errors import ParamsError
from coop_core.params import load_params
from coop_core.params.recipes import apply_recipe, read_recipe, recipe_names
from pipelines.commands import cli

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
NAMES = recipe_names(RECIPES)
WAYS = [(name, shots, variant) for name in NAMES for recipe in [read_recipe(RECIPES, name)]
        for shots in (None, *recipe.by_shots) for variant in (None, *recipe.variants)]  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(RECIPES, tmp_path / "recipes")
    return tmp_path


def applied(project: Path, name: str, **how: Any) -> Any:
    text, _ = apply_recipe(project / "params.yaml", read_recipe(RECIPES, name).values(**how))
    (project / "params.yaml").write_text(text)
    return load_params(project / "params.yaml")


@pytest.mark.parametrize(("name", "shots", "variant"), WAYS)
def test_every_recipe_in_all_its_ways_is_a_valid_setting(project, name, shots, variant) -> None:
    params = applied(project, name, shots=shots, variant=variant)
    built = {"linear-probe": "linear_probe", "zero-shot": "zero_shot", "prompt-ensemble": "zero_shot"}
    assert params.method.name == built.get(name, name.partition("-")[0])
    assert params.split.shots == (shots or (1 if params.method.name == "zero_shot" else 16))


@pytest.mark.parametrize(
    ("name", "how", "expected"),
    [
        # 50 epochs at 1 shot, 100 at 2 and 4, 200 at 8 and 16; ImageNet always 50 (COOP.md)
        *(("coop-ijcv22", {"shots": shots}, {"epochs": epochs, "batch_size": 32, "learning_rate": 0.002})
          for shots, epochs in ((1, 50), (2, 100), (4, 100), (8, 200), (16, 200))),
        ("coop-ijcv22", {"shots": 16, "variant": "imagenet"}, {"epochs": 50}),
        ("coop-as-in-cocoop-cvpr22", {}, {"epochs": 200, "batch_size": 32, "learning_rate": 0.002}),
        ("cocoop-cvpr22", {}, {"epochs": 10, "batch_size": 1, "learning_rate": 0.002}),
        ("upl-2022", {}, {"epochs": 50, "batch_size": 32, "learning_rate": 0.002}),
        ("biomedcoop-cvpr25", {}, {"epochs": 100, "batch_size": 4, "learning_rate": 0.0025}),
        ("biomedcoop-base-to-new-cvpr25", {}, {"epochs": 50, "batch_size": 4, "learning_rate": 0.0025}),
        ("coop-guided-cvpr24", {}, {"epochs": 10, "batch_size": 4, "learning_rate": 0.0035}),
    ],
)  # fmt: skip
def test_the_schedule_is_the_published_one(project, name, how, expected) -> None:
    found = applied(project, name, **how).train.model_dump()
    warm_up = {"momentum": 0.9, "weight_decay": 5e-4, "warmup_epochs": 1, "warmup_learning_rate": 1e-5}
    assert found.items() >= (expected | warm_up).items()


def test_a_recipe_leaves_nothing_of_the_one_before_and_no_comment_out(project) -> None:
    before = (project / "params.yaml").read_text()
    applied(project, "upl-2022", variant="confident")
    starred = applied(project, "upl-2022", variant="star")
    params = applied(project, "coop-ijcv22")
    after = (project / "params.yaml").read_text()

    assert len(starred.split.further_labellers) == 7
    assert (params.split.unlabelled, params.split.min_confidence) == (None, None)
    assert params.split.further_labellers == []
    assert [line for line in before.splitlines() if "#" in line] == [li for li in after.splitlines() if "#" in li]
    assert params.dataset == load_params(ROOT / "params.yaml").dataset


def test_the_change_that_is_shown_is_the_change_that_is_made(project, capsys) -> None:
    with working_in(project):
        subprocess.run(["git", "init", "-q"], check=True)
        cli.recipe("cocoop-cvpr22", show=True)
        said = capsys.readouterr()
        assert load_params().method.name == "coop"
        cli.recipe("cocoop-cvpr22")
        text = Path("params.yaml").read_text()
        shutil.copy(ROOT / "params.yaml", project)
        subprocess.run(["git", "apply"], input=said.out, text=True, check=True)
        assert Path("params.yaml").read_text() == text
        cli.recipe("cocoop-cvpr22")
    assert "\ndiffers:\n  - " in said.err
    assert "Conditional Prompt Learning" in said.err


def test_the_list_names_every_recipe_with_its_variants(project, capsys) -> None:
    with working_in(project):
        cli.recipe("list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == NAMES
    assert "(--variant m4, middle, class-specific, words, imagenet)" in lines[NAMES.index("coop-ijcv22")]


@pytest.mark.parametrize(
    ("name", "how", "sentence"),
    [
        ("coop", {}, "no recipe 'coop': there are biomedcoop-base-to-new-cvpr25, biomedcoop-cvpr25, "),
        ("coop-ijcv22", {"shots": 3}, "--shots 3 is not in the recipe: it has 1, 2, 4, 8, 16"),
        ("coop-ijcv22", {"variant": "m5"}, "--variant m5 is not in the recipe: it has m4, middle"),
        ("cocoop-cvpr22", {"variant": "m4"}, "--variant m4 is not in the recipe: it has none"),
    ],
)
def test_what_is_not_there_is_a_sentence(project, name, how, sentence) -> None:
    with working_in(project), pytest.raises(ParamsError, match=sentence):
        cli.recipe(name, **how)
    assert (project / "params.yaml").read_text() == (ROOT / "params.yaml").read_text()

"""Choosing: by validation images alone, the cheapest of those that they do not tell apart."""

import csv
import json
import subprocess
from collections import Counter
from typing import Any

import pytest
from rich.console import Console
from test_stages import paint_images, working_in, write_params
from toy_dataset import toy_dataset
from toy_params import toy_params

import coop_core.params.sections
from coop_core.data.dataset import Dataset
from coop_core.errors import ParamsError
from coop_core.methods import gda
from coop_core.methods.class_mean import Params as ClassMean
from coop_core.methods.coop import Params as CoOp
from coop_core.methods.probe import Params as Probe
from coop_core.methods.tip_adapter import Params as TipAdapter
from coop_core.methods.zero_shot import Params as ZeroShot
from coop_core.params import load_params
from coop_core.sweeps.choosing import Candidate, choose, try_heads
from coop_core.sweeps.trials import TrialRunner
from pipelines import paths
from pipelines.commands.choice import run_choice, sentence_of, table_of


def candidate(hits: str, method: Any, **its: Any) -> Candidate:
    """`hits` as 1 and 0."""
    known = {"calibration_error": 0.1, "seconds": 1.0, "numbers": 10, "prompts_per_image": 0, "collapses": True,
             "rebinds": False, "is_built": True, "test_accuracy": 0.5}  # fmt: skip
    return Candidate(method, tuple(hit == "1" for hit in hits), **{**known, **its})


MEAN, COOP, TIP = ClassMean(), CoOp(), TipAdapter(fine_tune=True)


def test_a_head_that_is_clearly_best_is_taken_whatever_it_costs() -> None:
    found = choose([candidate("0" * 20 + "1" * 20, MEAN), candidate("1" * 40, TIP, collapses=False)])
    assert found.taken.method == TIP
    assert found.tied == (found.taken,)
    assert "answers best, by more than one standard error" in sentence_of(found)


def test_of_heads_that_are_not_told_apart_the_cheapest_is_taken() -> None:
    best = candidate("1" * 30 + "0" * 10, TIP, collapses=False, test_accuracy=0.99)
    near = candidate("1" * 29 + "0" * 10 + "1", COOP, is_built=False)
    nearly = candidate("00" + "1" * 28 + "0" * 9 + "1", MEAN, test_accuracy=0.01)
    far = candidate("1" * 5 + "0" * 35, ClassMean())
    found = choose([best, near, nearly, far])
    assert [one.method for one in found.candidates[:3]] == [COOP, TIP, MEAN]
    assert found.taken == nearly  # and not by its test accuracy
    assert len(found.tied) == 3
    assert "cheapest of 3 that the validation images do not tell apart" in sentence_of(found)
    assert "40 validation images decide little" in sentence_of(found)


def test_the_difference_is_paired() -> None:
    """Ten answers more on the same images are more than ten answers that others balance."""
    steady = choose([candidate("1" * 50 + "0" * 50, MEAN), candidate("1" * 60 + "0" * 40, TIP)])
    mixed = choose([candidate("0" * 45 + "1" * 55, MEAN, numbers=5), candidate("1" * 60 + "0" * 40, TIP)])
    assert steady.behind[1] == (pytest.approx(0.1), pytest.approx(0.0302, abs=1e-3))
    assert mixed.behind[1][1] > 0.08
    assert steady.taken.method == TIP
    assert mixed.taken.method == MEAN


@pytest.mark.parametrize("images", [8, 20])
def test_a_head_that_knows_no_class_text_is_in_question_from_20_validation_images_on(images: int) -> None:
    """At one image a class it looks good on a few images by chance."""
    untrained, near = candidate("0" * images, ZeroShot()), candidate("1" * 5 + "0" * (images - 5), Probe())
    found = choose([candidate("1" * images, MEAN), untrained, near])

    is_few = images < 20
    assert found.taken.method == (Probe() if is_few else MEAN)
    assert [one.method for one in found.out] == [MEAN] * is_few
    assert ("out of the question: class_mean." in sentence_of(found)) == is_few
    assert found.candidates[-1 if is_few else 0].method == MEAN
    assert len(found.tied) == 1


def test_heads_without_zero_shot_among_them_are_all_in_question() -> None:
    """Whoever names the methods to compare gets these."""
    found = choose([candidate("1" * 8, MEAN), candidate("0" * 8, Probe())])

    assert (found.taken.method, found.out) == (MEAN, ())


def test_when_nothing_separates_them_it_says_so() -> None:
    found = choose([candidate("10", MEAN, numbers=5), candidate("01", TIP)])
    assert sentence_of(found).startswith("Nothing separates these 2 heads: take class_mean, the cheapest.")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_dataset(tmp_path_factory.mktemp("toys"))


def test_what_a_head_sets_by_validation_images_is_judged_on_others(zoo, dataset, tmp_path, monkeypatch) -> None:
    """Every image is judged once, by what the other half chose."""
    seen: list[int] = []
    chosen = gda._choose

    def watch(texts: Any, weights: Any, bias: Any, validation: Any) -> float:
        seen.append(len(validation.labels))
        return chosen(texts, weights, bias, validation)

    monkeypatch.setattr(gda, "_choose", watch)
    params = toy_params(zoo.architecture("flat"), split={"shots": 4})
    runner = TrialRunner(store_folder=tmp_path / "store", device="cpu")
    heard: list[Any] = []
    own, = (one for one in try_heads(params, dataset, runner, heads=[{"name": "gda"}], heard=heard.append)
            if one.method.name == "gda")  # fmt: skip

    assert seen == [12, 6, 6]
    assert len(own.hits) == 12
    assert {one.method.name for one in heard} == {"gda", "coop"}  # the project's own method is among them


def test_a_head_that_sets_nothing_by_validation_images_is_fitted_once(zoo, dataset, tmp_path, monkeypatch) -> None:
    fitted: list[str] = []
    train = TrialRunner.train

    def count(self: Any, params: Any, found: Any, **how: Any) -> Any:
        fitted.append(params.method.name)
        return train(self, params, found, **how)

    monkeypatch.setattr(TrialRunner, "train", count)
    params = toy_params(zoo.architecture("flat"), split={"shots": 4}, method={"name": "probe", "epochs": 5})
    heads = [{"name": "zero_shot"}, {"name": "prolip", "steps": 5}, {"name": "linear_probe"}, {"name": "tip_adapter"}]
    try_heads(params, dataset, TrialRunner(store_folder=tmp_path / "store", device="cpu"), heads=heads)

    assert Counter(fitted) == {"zero_shot": 1, "prolip": 1, "probe": 1, "linear_probe": 3, "tip_adapter": 3}


def test_a_head_that_cannot_be_is_left_out_and_told(zoo, dataset, tmp_path) -> None:
    params = toy_params(zoo.architecture("flat"), split={"shots": 4})
    runner, heard = TrialRunner(store_folder=tmp_path / "store", device="cpu"), []
    heads = [{"name": "class_mean"}, {"name": "biomedcoop"}]
    found = try_heads(params, dataset, runner, heads=heads, heard=heard.append)

    assert [one.method.name for one in found] == ["class_mean", "coop"]
    assert heard[1].startswith("biomedcoop: biomedcoop learns from sentences a class")


def test_the_command_writes_a_patch_that_dvc_can_run(mini, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(coop_core.params.sections, "load_backbone", lambda *named, **more: mini)
    folder = tmp_path / "project"
    paint_images(folder / "images")
    write_params(folder)
    with working_in(folder):
        subprocess.run(["git", "init", "-q"], check=True)
        run_choice(methods=["class_mean", "zero_shot"], shots=1, seed=3)
        taken = json.loads((paths.CHOICE / "choice.json").read_text())["taken"]
        lines = (paths.CHOICE / "heads.csv").read_text().splitlines()
        subprocess.run(["git", "apply", str(paths.CHOICE / "winner.patch")], check=True)
        params = load_params(paths.PARAMS)
        with pytest.raises(ParamsError, match="--methods 'svm' is no method: there are biomedcoop, "):
            run_choice(methods=["svm"], shots=None, seed=None)

    assert params.method.model_dump() == taken
    assert (params.split.shots, params.split.curve_shots, params.seed) == (1, [], 3)
    assert len(lines) == 4  # both, and the project's own
    assert {row["head"]: row["in_question"] for row in csv.DictReader(lines)} == {
        "class_mean": "False", "zero_shot": "True", "coop": "True",
    }  # fmt: skip
    assert "git apply artifacts/choice/winner.patch && dvc repro" in capsys.readouterr().out


def test_the_table_fits_a_terminal() -> None:
    found = choose([candidate("1" * 200, TIP, seconds=123.4, prompts_per_image=0),
                    candidate("0" * 200, COOP, prompts_per_image=100, rebinds=True)])  # fmt: skip
    console = Console(width=80, record=True)
    console.print(table_of(found, toy_params("x"), "flowers"))
    text = console.export_text()
    assert "tip_adapter-f" in text
    assert "100.0 ±0.0" in text
    assert "…" not in text

"""Transfer: what was learned is judged on other images and classes, with the baselines that can answer there."""

import shutil
import sys
from typing import Any

import pytest
import torch
from test_split import FIVE, toy_dataset
from test_stages import _load_the_backbone_once, done, finished, project, read, write_params  # noqa: F401

from coop_core.errors import ArtifactError, ParamsError, SplitError
from coop_core.judging.classifier import LinearClassifier
from coop_core.judging.transfer import Row, Transfer, collect, harmonic_mean
from coop_core.params import TargetParams, load_params
from coop_core.transfer import cut_to, target_of
from pipelines.stages import evaluate, judge, report, split, train

# MLflow's own, of its pages on agents.
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")


def params(**changes: Any) -> TargetParams:
    return TargetParams(source="toy", **changes)


# Which images and classes


def test_a_target_is_judged_on_its_test_images_alone():
    target = target_of(toy_dataset(test=4), params())

    assert len(target.images) == 20
    assert all("/test" in image.path for image in target.images)


def test_new_classes_are_those_that_base_leaves_relabelled_from_0():
    base, new = (target_of(toy_dataset(), params(classes=classes)) for classes in ("base", "new"))

    assert (base.class_names, new.class_names) == (FIVE[:3], FIVE[3:])
    assert set(new.labels) == {0, 1}


def test_a_class_gets_the_words_that_it_is_given():
    target = target_of(toy_dataset(), params(class_names={"abbey": "old_church"}))

    assert target.class_names == ("old church", *FIVE[1:])


def test_words_for_a_class_that_is_not_there_are_refused():
    with pytest.raises(SplitError, match="class_names gives other words for 'abey', which toy does not have: its cl"):
        target_of(toy_dataset(), params(class_names={"abey": "church"}))


def test_a_target_without_test_images_is_refused():
    with pytest.raises(SplitError, match="toy has no test image of 'abbey', 'bay'"):
        target_of(toy_dataset(test=0), params())


def test_a_targets_digest_changes_with_its_class_names_and_images():
    one, *others = (target_of(toy_dataset(test=test), params(class_names=names)).digest
                    for test, names in ((6, {}), (5, {}), (6, {"abbey": "church"})))  # fmt: skip

    assert len({one, *others}) == 3


# Classifiers of fixed classes


def test_a_probe_is_cut_to_the_targets_classes_in_their_order():
    probe = LinearClassifier(torch.arange(6.0).view(3, 2), bias=torch.tensor([1.0, 2.0, 3.0]), normalise=False)

    found = cut_to(probe, ["cat", "sea_lake", "river"], ["river", "sea lake"])

    assert found.weights.tolist() == [[4, 5], [2, 3]]
    assert found.bias.tolist() == [3, 2]


def test_a_probe_does_not_answer_for_a_class_it_does_not_know():
    assert cut_to(LinearClassifier(torch.eye(2)), ["cat", "dog"], ["cat", "fox"]) is None


# Base and new


def test_harmonic_means_are_those_of_the_papers_table():
    """CLIP's and CoOp's published averages (Zhou et al., CVPR 2022, table 1a)."""
    assert 100 * harmonic_mean(0.6934, 0.7422) == pytest.approx(71.70, abs=0.005)
    assert 100 * harmonic_mean(0.8269, 0.6322) == pytest.approx(71.66, abs=0.005)


def test_the_harmonic_mean_of_nothing_right_is_0():
    assert harmonic_mean(0.0, 0.9) == 0.0


def evaluation(classes: str, *, digest: str = "own", **accuracies: float) -> dict[str, Any]:
    return {"classes": classes, "dataset_digest": digest,
            "classifiers": {name: {"accuracy": value} for name, value in accuracies.items()}}  # fmt: skip


def test_base_and_new_of_one_data_set_have_a_harmonic_mean():
    found = collect(evaluation("base", coop=0.8), {"unseen": evaluation("new", coop=0.4)})

    assert found.new == "unseen"
    assert found.metrics()["harmonic_mean/coop"] == pytest.approx(2 * 0.8 * 0.4 / 1.2)


@pytest.mark.parametrize(("own", "digest"), [("all", "own"), ("base", "another")])
def test_anything_else_has_none(own, digest):
    found = collect(evaluation(own, coop=0.8), {"unseen": evaluation("new", digest=digest, coop=0.4)})

    assert "harmonic_mean/coop" not in found.metrics()


def test_a_mean_is_over_all_targets_or_none():
    rows = [Row("coop", 0.9, {"a": 0.5, "b": 0.7}), Row("linear probe", 0.9, {"a": 0.5, "b": None})]

    metrics = Transfer(rows, None).metrics()

    assert metrics["tests_mean/coop"] == pytest.approx(0.6)
    assert "tests_mean/linear_probe" not in metrics
    assert metrics["tests/a/linear_probe"] == 0.5


def test_a_target_cannot_take_the_data_sets_own_place(project):  # noqa: F811
    write_params(project, tests={"own": {"source": "images"}})

    with pytest.raises(ParamsError, match="own is the data set's own test images"):
        load_params(project / "params.yaml")


# The stage


def judged(project, name: str, monkeypatch, **target: Any) -> dict[str, Any]:  # noqa: F811
    write_params(project, tests={name: target})
    monkeypatch.setattr(sys, "argv", ["stages", "judge", name])
    judge.main()
    return read(project / f"artifacts/judged/{name}/evaluation.json")


def test_the_data_sets_own_images_are_judged_as_evaluate_judges_them(project, monkeypatch):  # noqa: F811
    found = judged(project, "again", monkeypatch, source="images")

    expected = read(project / "artifacts/judged/own/evaluation.json")
    assert {name: one["confusion"] for name, one in found["classifiers"].items()} == {
        name: one["confusion"] for name, one in expected["classifiers"].items()
    }


def test_other_classes_are_judged_by_whatever_can_answer(project, monkeypatch):  # noqa: F811
    for name, other in (("red_brick", "tomato"), ("green_field", "frog")):
        shutil.copytree(project / "images" / name, project / "others" / other)

    found = judged(project, "others", monkeypatch, source="others")

    assert list(found["classifiers"]) == ["zero-shot", "prompt ensemble", "coop"]
    assert found["class_names"] == ["frog", "tomato"]
    lines = (project / "artifacts/judged/others/predictions.csv").read_text().splitlines()
    assert lines[0] == "path,label,predicted,confidence,zero-shot,prompt ensemble"
    assert len(lines) == 1 + found["classifiers"]["coop"]["n"]


def test_what_was_learned_of_each_class_refuses_other_classes(project, monkeypatch):  # noqa: F811
    shutil.copytree(project / "images/red_brick", project / "others/tomato")
    shutil.copytree(project / "images/blue_lake", project / "others/sea")
    write_params(project, method={"class_specific": True})
    train.main()
    evaluate.main()

    with pytest.raises(ArtifactError, match="something of its own for each of blue lake, green field, red brick"):
        judged(project, "others", monkeypatch, source="others", test_fraction=0.5)


def test_an_unknown_name_is_told(project, monkeypatch):  # noqa: F811
    write_params(project, tests={"greys": {"source": "images"}})
    monkeypatch.setattr(sys, "argv", ["stages", "judge", "gray"])

    with pytest.raises(ParamsError, match=r"params\.yaml has no tests\.gray: give one of greys"):
        judge.main()


def test_label_noise_reaches_the_split(project):  # noqa: F811
    clean = read(project / "artifacts/split.json")
    write_params(project, split={"label_noise": 0.5})
    split.main()

    noisy = read(project / "artifacts/split.json")
    changed = [a["label"] != b["label"] for a, b in zip(clean["train"], noisy["train"], strict=True)]
    assert sum(changed) == 3
    assert (noisy["val"], noisy["test"], noisy["label_noise"]) == (clean["val"], clean["test"], 0.5)


def test_the_report_shows_every_test_set_that_is_named_now(project, monkeypatch):  # noqa: F811
    judged(project, "greys", monkeypatch, source="images")
    judged(project, "again", monkeypatch, source="images")

    report.main()

    page = (project / "artifacts/report/report.html").read_text()
    assert "Beyond the training classes" in page
    assert ">again</th>" in page
    assert "greys" not in page


def test_without_further_test_sets_the_report_says_nothing_of_them(done):  # noqa: F811
    assert "Beyond the training classes" not in (done / "artifacts/report/report.html").read_text()

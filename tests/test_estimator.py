"""PromptClassifier: images and class names in one call -> what the stages would write, and its answers."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from toy_images import paint, paint_classes, toy_image
from toy_params import toy_params

import coop_core.artifact
import coop_core.backbone
import coop_core.params.sections
from coop_core import PromptClassifier
from coop_core.data.catalog import read_source
from coop_core.data.importers import import_dataset
from coop_core.data.split import few_shot_split
from coop_core.errors import (
    ArtifactError,
    BackboneError,
    CoopError,
    DatasetError,
    ParamsError,
    SplitError,
    TrainingError,
)
from coop_core.features.examples import CachedFeatures
from coop_core.features.extract import extract_features
from coop_core.files import read_array
from coop_core.params.defaults import default_params
from coop_core.preparing import prepare
from coop_core.training import fit
from pipelines.commands.predict import load_predictor
from pipelines.settings import Settings

ROOT = Path(__file__).parents[1]
NAMES = ("cat", "forest_floor", "river")
DPL = {"name": "dpl", "image_lengths": [0, 2], "text_lengths": [1, 0, 2]}
COOP: dict[str, Any] = {"name": "coop", "n_context": 2}
TRAIN = {"epochs": 4, "batch_size": 4, "learning_rate": 0.02}
PICTURES = [toy_image(number, size=(40, 30)) for number in range(12)]
LABELS = [name for name in NAMES for _ in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Class folders of the pictures."""
    root = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(LABELS):
        paint(root / name / f"{number}.png", number, size=(40, 30))
    return root


@pytest.fixture(scope="module")
def fitted(backbone, folder) -> PromptClassifier:
    return PromptClassifier(backbone=backbone).fit(folder)


def learned(classifier: PromptClassifier) -> dict[str, str]:
    """Digests of the tensors."""
    return {name: digest for name, digest in classifier.artifact_.card["digests"].items() if name != "card"}


# What it learns from


def in_memory(convert: Callable[[Image.Image], Any]) -> list[Any]:
    return [convert(picture) for picture in PICTURES]


FORMS: dict[str, Callable[[Path], list[Any]]] = {
    "PIL images": lambda folder: PICTURES,
    "arrays": lambda folder: in_memory(np.asarray),
    "paths": lambda folder: [folder / name / f"{number}.png" for number, name in enumerate(LABELS)],
    "paths as text": lambda folder: [f"{folder}/{name}/{number}.png" for number, name in enumerate(LABELS)],
    "bytes": lambda folder: [(folder / name / f"{number}.png").read_bytes() for number, name in enumerate(LABELS)],
}


@pytest.mark.parametrize("form", FORMS)
def test_pictures_and_labels_teach_what_their_folder_does(fitted, backbone, folder, form):
    found = PromptClassifier(backbone=backbone).fit(FORMS[form](folder), np.array(LABELS))

    assert learned(found) == learned(fitted)
    assert found.split_.train_digest == fitted.split_.train_digest
    assert list(found.classes_) == ["cat", "forest floor", "river"]


def test_a_csv_file_teaches_what_its_folder_does(fitted, backbone, folder):
    lines = ["path,label", *(f"{name}/{number}.png,{name}" for number, name in enumerate(LABELS))]
    (folder / "list.csv").write_text("\n".join(lines))

    assert learned(PromptClassifier(backbone=backbone).fit(folder / "list.csv")) == learned(fitted)


def test_it_learns_what_the_parts_of_the_pipeline_learn(backbone, folder, tmp_path):
    """Put together by hand, as the stages do."""
    params = toy_params(backbone.architecture, split={"shots": 2}, method=COOP, train=TRAIN)
    dataset = import_dataset(*read_source(folder), tmp_path / "raw", test_fraction=0)
    split = few_shot_split(dataset, shots=2, seed=params.seed)
    features = {}
    for name in ("train", "val"):
        images = getattr(split, name)
        target = tmp_path / f"{name}.npy"
        extract_features(backbone, images, root=dataset.root, target=target, store_folder=tmp_path / "store")
        features[name] = CachedFeatures.of(images, read_array(target), device=backbone.device)
    training = prepare(
        params, split=split, backbone=backbone, examples=features["train"], validation=features["val"]
    )
    curve = fit(training)

    found = PromptClassifier(COOP, backbone=backbone, shots=2, train=TRAIN).fit(folder)

    assert torch.equal(found.artifact_.state["context_vectors"], training.learner.context_vectors.detach())
    assert [epoch.loss for epoch in found.curve_] == [epoch.loss for epoch in curve]
    assert [epoch.val_loss for epoch in found.curve_] == [epoch.val_loss for epoch in curve]


def test_all_images_of_uneven_classes_are_learned_from(backbone, tmp_path):
    paint_classes(tmp_path, {"cat": 2, "river": 7})

    found = PromptClassifier(backbone=backbone).fit(tmp_path)

    assert np.bincount([image.label for image in found.split_.train]).tolist() == [2, 7]
    assert found.split_.val == ()


def test_test_images_are_not_learned_from_and_are_what_a_folder_is_judged_on(backbone, tmp_path):
    paint_classes(tmp_path / "train", {"cat": 2, "river": 2})
    paint_classes(tmp_path / "test", {"cat": 1, "river": 1}, first=100)

    found = PromptClassifier(backbone=backbone).fit(tmp_path)

    tested = [tmp_path / "test/cat/0.png", tmp_path / "test/river/0.png"]
    assert len(found.split_.train) == 4
    assert found.score(tmp_path) == found.score(tested, ["cat", "river"])
    assert found.score(tested, ["cat", "river"]) + found.score(tested, ["river", "cat"]) == 1


def test_a_cache_keeps_features_from_one_fit_to_the_next(backbone, folder, tmp_path):
    told: list[tuple[str, int, int]] = []
    PromptClassifier(backbone=backbone, cache=tmp_path).fit(folder)

    PromptClassifier(backbone=backbone, cache=tmp_path, progress=lambda *words: told.append(words)).fit(folder)

    assert [words for words in told if words[0] == "features computed"] == [("features computed", 12, 12)]


def test_progress_is_told_of_every_step(backbone, folder):
    told: list[tuple[str, int, int]] = []
    PromptClassifier(COOP, backbone=backbone, train=TRAIN, progress=lambda *words: told.append(words)).fit(folder)

    assert {what: (done, total) for what, done, total in told} == {
        "images checked": (12, 12), "features computed": (12, 12), "epochs of coop": (4, 4)
    }  # fmt: skip


@pytest.mark.parametrize(("given", "architecture", "pretrained"), [
    ("mini", "mini", None), ("ViT-B-32:openai", "ViT-B-32", "openai"), ("ViT-B-32", "ViT-B-32", None),
    ("RN50:/weights/a:b.pt", "RN50", "/weights/a:b.pt"), ("local-dir:/towers", "local-dir:/towers", None),
    ("hf-hub:someone/something", "hf-hub:someone/something", None),
])  # fmt: skip
def test_a_backbone_is_an_architecture_and_what_it_was_trained_on(given, architecture, pretrained):
    found = default_params(method="gda", backbone=given, shots=None, template="a {}.", seed=1, train=None)

    assert (found.backbone.architecture, found.backbone.pretrained) == (architecture, pretrained)
    assert found.train.learning_rate == (0.02 if given == "mini" else 0.002)


# What it answers


def test_answers_are_the_most_probable_classes(fitted):
    probabilities = fitted.predict_proba(PICTURES)

    assert probabilities.shape == (12, 3)
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(12))
    assert fitted.predict(PICTURES).tolist() == fitted.classes_[probabilities.argmax(axis=1)].tolist()


def test_the_score_is_the_share_of_right_answers(fitted):
    right = np.mean(fitted.predict(PICTURES) == [name.replace("_", " ") for name in LABELS])

    assert fitted.score(PICTURES, LABELS) == right
    assert 0.5 < right <= 1


def test_no_images_have_no_answers(fitted):
    assert fitted.predict_proba([]).shape == (0, 3)
    assert len(fitted.predict([])) == 0


# What it keeps


@pytest.mark.parametrize("method", [
    "gda", "tip_adapter", "biomedcoop", pytest.param(COOP, id="coop"), pytest.param(DPL, id="dpl")
])  # fmt: skip
def test_what_is_saved_answers_alike_when_it_is_loaded_and_saved_again(backbone, folder, tmp_path, method):
    said = {name: [f"this shows a {name}.", f"a {name}, outdoors.", f"one {name}."] for name in NAMES}
    classifier = PromptClassifier(method, backbone=backbone, train=TRAIN, descriptions=said).fit(folder)
    classifier.save(tmp_path / "first")

    loaded = PromptClassifier.load(tmp_path / "first", device="cpu")
    loaded.save(tmp_path / "second")

    assert np.array_equal(loaded.predict_proba(PICTURES), classifier.predict_proba(PICTURES))
    files = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}


def test_the_command_line_answers_with_what_is_saved(fitted, tmp_path):
    fitted.save(tmp_path / "prompt")

    predictor = load_predictor(str(tmp_path / "prompt"), Settings(), class_names=None, device="cpu")

    assert [answer.answer for answer in predictor.predict(PICTURES)] == fitted.predict(PICTURES).tolist()


def test_the_card_says_what_was_given(fitted, backbone):
    card = fitted.artifact_.card

    assert card["params"]["train"]["learning_rate"] == 0.002                      # the paper's, as this is no mini
    assert card["method"]["name"] == "gda"
    assert card["data"]["shots"] == 4
    assert card["params"]["split"]["shots"] == 4
    assert card["code_revision"].startswith("coop_core ")
    assert card["backbone"]["weights_digest"] == backbone.weights_digest


# What it is


def test_it_can_be_cloned_and_has_parameters_as_scikit_learn_expects():
    classifier = PromptClassifier("probe", shots=4, seed=3)

    twin = clone(classifier.set_params(shots=8))

    assert twin is not classifier
    assert twin.get_params() == classifier.get_params()
    assert twin.get_params()["shots"] == 8


def test_it_says_what_it_is(fitted, tmp_path):
    assert repr(PromptClassifier()) == "PromptClassifier('gda', backbone='mini': not fitted)"
    assert repr(fitted).endswith(": learned 3 classes from 12 images)")
    fitted.save(tmp_path)
    assert repr(PromptClassifier.load(tmp_path, device="cpu")).endswith(": learned 3 classes)")


def test_importing_the_package_imports_nothing_heavy():
    program = "import sys, coop_core; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()

    assert "coop_core" in loaded
    assert not {"torch", "numpy", "PIL", "pydantic", "open_clip"} & set(loaded)


def test_the_examples_of_the_page_run(backbone, folder, tmp_path, monkeypatch, capsys):
    """On toys in the places that docs/api.md names, with a tiny backbone in place of mini."""
    monkeypatch.chdir(tmp_path)
    for module in (coop_core.artifact, coop_core.backbone, coop_core.params.sections):
        monkeypatch.setattr(module, "load_backbone", lambda *named, **more: backbone)
    for place in ("photos", "held_out"):
        shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.csv"))
    for name in ("one.jpg", "another.jpg"):
        PICTURES[0].save(name)
    one, heads = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.DOTALL)

    exec(one)
    exec(heads)

    assert len(PromptClassifier.load("prompt").predict(["one.jpg"])) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["gda", "probe", "tip_adapter"]


# What it refuses

WRONG: dict[str, tuple[dict[str, Any], type[CoopError], str]] = {
    "an unknown method": ({"method": "magic"}, ParamsError, "PromptClassifier: method: name is 'magic', but the meth"),
    "a method's unknown key": ({"method": {"name": "gda", "beta": 1}}, ParamsError, "beta is not a known key"),
    "a method without labels": ({"method": "upl"}, ParamsError, "upl learns from images without labels, and here all"),
    "a method that needs sentences": ({"method": "biomedcoop"}, CoopError, "descriptions"),
    "a class without sentences": ({"descriptions": {"cat": ["a cat."]}}, DatasetError, "no sentence for 'forest fl"),
    "no shots": ({"shots": 0}, ParamsError, r"split\.shots: input should be greater than or equal to 1"),
    "more shots than images": ({"shots": 5}, SplitError, "split.shots 5 needs 5 training images a class, but 'cat'"),
    "two holes": ({"template": "{} {}"}, ParamsError, r"template '\{\} \{\}' needs exactly one \{\} for the class"),
    "no template": ({"template": None}, ParamsError, "template None needs exactly one"),
    "an unknown key of train": ({"train": {"rate": 1}}, ParamsError, "train.rate is not a known key"),
    "no section": ({"train": 3}, ParamsError, "train is 3, not a dict of the train section"),
    "a number for a backbone": ({"backbone": 3}, ParamsError, "backbone.architecture: input should be a valid string"),
    "an unknown backbone": ({"backbone": "ViT-Z-99:openai"}, BackboneError, "ViT-Z-99"),
    "an unknown device": ({"backbone": "mini", "device": "gpu"}, ParamsError, r"device 'gpu' cannot be used \(.*\)"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_parameter_that_cannot_be_is_a_sentence(backbone, folder, kind):
    asked, error, sentence = WRONG[kind]

    with pytest.raises(error, match=sentence):
        PromptClassifier(**{"backbone": backbone, **asked}).fit(folder)


GIVEN: dict[str, tuple[tuple[Any, ...], str]] = {
    "no folder": (("nowhere",), "nowhere is no folder of class folders and no CSV file with path and label"),
    "pictures alone": ((PICTURES,), "images without labels must be a folder of class folders or a CSV file"),
    "one picture": ((PICTURES[0], ["cat"]), r"a list of images and a list of labels are wanted, not one: write \["),
    "one label": ((PICTURES, "cat"), "a list of images and a list of labels are wanted, not one"),
    "too few labels": ((PICTURES, LABELS[:-1]), "there are 12 images and 11 labels: give each image its label"),
    "nothing": (([], []), "there are 0 images and 0 labels"),
    "numbers": ((PICTURES, [0, 1, 2] * 4), "label 0 is no class name, and the text tower reads words"),
    "one class": ((PICTURES, ["cat"] * 12), "a classifier needs two classes or more, but there is only one: cat"),
    "a missing file": ((["a.png", "b.png"], ["cat", "sea"]), r"images cannot be read .*: a\.png is missing, b\.png"),
    "floats": (([np.zeros((4, 4)), PICTURES[0]], ["cat", "sea"]), "image 0: the image is an array of float64"),
    "None": (([PICTURES[0], None], ["cat", "sea"]), "image 1 is a NoneType: give a path, a PIL image, an array"),
    "twice": (([PICTURES[0]] * 2, ["cat", "sea"]), "the same image is in two classes"),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_images_that_cannot_be_learned_from_are_a_sentence(backbone, kind):
    given, sentence = GIVEN[kind]

    with pytest.raises(DatasetError, match=sentence):
        PromptClassifier(backbone=backbone).fit(*given)


@pytest.mark.parametrize("ask", [
    lambda one: one.predict(PICTURES), lambda one: one.predict_proba(PICTURES), lambda one: one.save("place"),
    lambda one: one.score(PICTURES, LABELS),
])  # fmt: skip
def test_what_has_learned_nothing_answers_nothing(ask):
    with pytest.raises(TrainingError, match="has learned nothing yet: call fit, or PromptClassifier"):
        ask(PromptClassifier())


def test_a_class_that_was_not_learned_cannot_be_scored(fitted):
    with pytest.raises(DatasetError, match="'sea' was not learned: there are cat, forest floor, river"):
        fitted.score(PICTURES[:2], ["cat", "sea"])


def test_a_prompt_is_not_saved_over_a_file(fitted, tmp_path):
    (tmp_path / "prompt").write_text("mine")

    with pytest.raises(ArtifactError, match="prompt is a file, and a prompt is saved as a folder"):
        fitted.save(tmp_path / "prompt")


def test_a_folder_without_a_prompt_is_not_loaded(tmp_path):
    with pytest.raises(ArtifactError, match=r"card\.json is missing"):
        PromptClassifier.load(tmp_path)


def test_a_parameter_that_is_none_is_a_sentence():
    with pytest.raises(ParamsError, match="PromptClassifier has no parameter 'shot': there are method, backbone"):
        PromptClassifier().set_params(shot=3)

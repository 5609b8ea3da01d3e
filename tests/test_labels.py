"""Pseudo labels as a file: who gave them, who reads them, and what is refused."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_split import toy_dataset
from test_stages import paint_images, working_in, write_params
from torch.nn.modules.module import register_module_forward_pre_hook
from toy_images import paint_classes
from toy_params import toy_params

import coop_core.params.sections
from coop_core.artifact import read_artifact, write_card
from coop_core.backbone import Backbone, load_backbone
from coop_core.data.catalog import read_source
from coop_core.data.dataset import Dataset
from coop_core.data.importers import import_dataset
from coop_core.data.split import Split, few_shot_split, located, read_split
from coop_core.errors import ArtifactError, ParamsError
from coop_core.features.examples import CachedFeatures
from coop_core.features.extract import extract_features, feature_key
from coop_core.judging.label_file import Labeller, PoolLabels, read_labels, require_asked, write_labels
from coop_core.judging.pseudo_labels import answer_pool, label_pool, pseudo_labels
from coop_core.sweeps.trials import TrialRunner
from pipelines import paths
from pipelines.stages import baselines, download, evaluate, features, label, report, track, train
from pipelines.stages import split as split_stage

FIRST = Labeller("first", "w1", "key 1")


@pytest.fixture
def pool() -> Split:
    return few_shot_split(toy_dataset(train=9), shots=3, seed=1, unlabelled="all")


def probabilities(split: Split, seed: int) -> np.ndarray:
    """Of chance, with confidences that often tie."""
    logits = np.round(4 * np.random.default_rng(seed).normal(size=(len(split.train), len(split.class_names))))
    return torch.from_numpy(logits).float().softmax(1).numpy()


def labels_of(split: Split, **how: Any) -> PoolLabels:
    return label_pool(split, [(FIRST, probabilities(split, 0))], **{"per_class": 3, **how})


@pytest.mark.parametrize("min_confidence", [None, 0.5, 0.97])
def test_what_is_read_is_what_was_written(pool: Split, tmp_path: Path, min_confidence: float | None) -> None:
    written = labels_of(pool, min_confidence=min_confidence)
    write_labels(tmp_path, written, pool)
    found = read_labels(tmp_path, pool)

    assert found is not None
    for name in ("rows", "labels", "confidences"):
        ours, theirs = getattr(written.chosen, name), getattr(found.chosen, name)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)
    assert (found.per_class, found.min_confidence, found.labellers) == (3, min_confidence, (FIRST,))


@pytest.mark.parametrize("min_confidence", [None, 0.5, 0.97])
@pytest.mark.parametrize("shots", [1, 2, 3])
def test_fewer_images_a_class_are_those_that_fewer_would_have_chosen(
    pool: Split, shots: int, min_confidence: float | None
) -> None:
    digests = [image.digest for image in pool.train]
    alone = pseudo_labels(probabilities(pool, 0), digests, per_class=shots, min_confidence=min_confidence)
    assert labels_of(pool, min_confidence=min_confidence).of(shots).rows.tolist() == alone.rows.tolist()


def test_several_labellers_answer_by_the_mean_of_their_probabilities(pool: Split) -> None:
    parts = [probabilities(pool, seed) for seed in range(3)]
    answers = [(Labeller(str(number), "w", "k"), part) for number, part in enumerate(parts)]
    found = label_pool(pool, answers, per_class=3)
    wanted = pseudo_labels(np.mean(parts, axis=0), [image.digest for image in pool.train], per_class=3)

    assert found.chosen.labels.tolist() == wanted.labels.tolist()
    assert found.chosen.confidences == pytest.approx(wanted.confidences)
    assert [one.name for one in found.labellers] == ["0", "1", "2"]
    assert found.chosen.rows.tolist() != labels_of(pool).chosen.rows.tolist()


def test_one_labeller_is_as_if_there_were_no_others(pool: Split) -> None:
    alone = pseudo_labels(probabilities(pool, 0), [image.digest for image in pool.train], per_class=3)
    assert np.array_equal(labels_of(pool).chosen.confidences, alone.confidences)


def test_labelled_images_have_an_empty_file_that_nobody_reads(tmp_path: Path) -> None:
    split = few_shot_split(toy_dataset(train=9), shots=2, seed=1)
    write_labels(tmp_path, None, split)
    assert (tmp_path / "labels.csv").read_text() == "digest,label,confidence\n"
    assert json.loads((tmp_path / "card.json").read_text()) == {"schema": 1, "pool": 0, "images": 0}
    assert read_labels(tmp_path / "nowhere", split) is None


def edit_csv(folder: Path) -> None:
    lines = (folder / "labels.csv").read_text().splitlines()
    digest, number, confidence = lines[1].split(",")
    lines[1] = f"{digest},{int(number) + 1},{confidence}"
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("change", "sentence"), [
    (edit_csv, "labels.csv is not what its card says: run `dvc repro -f label`"),
    (lambda folder: write_labels(folder, None, few_shot_split(toy_dataset(train=9), shots=2, seed=1)),
     "holds the labels of another pool: run `dvc repro label`"),
    (lambda folder: shutil.rmtree(folder), "card.json is missing"),
])  # fmt: skip
def test_labels_that_are_not_those_of_the_pool_are_refused(
    pool: Split, tmp_path: Path, change: Callable[[Path], Any], sentence: str
) -> None:
    write_labels(tmp_path / "labels", labels_of(pool), pool)
    change(tmp_path / "labels")
    with pytest.raises(ArtifactError, match=sentence):
        read_labels(tmp_path / "labels", pool)


@pytest.mark.parametrize(("asked", "sentence"), [
    ({"per_class": 2}, "chosen in another way than params.yaml asks for"),
    ({"min_confidence": 0.9}, "chosen in another way than params.yaml asks for"),
    ({"further": ["second"]}, "chosen in another way than params.yaml asks for"),
    ({"key": "key 2"}, "that first gave with other weights"),
])  # fmt: skip
def test_labels_that_were_asked_for_otherwise_are_refused(pool: Split, asked: dict[str, Any], sentence: str) -> None:
    wanted = {"key": "key 1", "per_class": 3, "min_confidence": None, "further": []}
    require_asked(labels_of(pool), Path("labels"), **wanted)
    with pytest.raises(ArtifactError, match=sentence):
        require_asked(labels_of(pool), Path("labels"), **{**wanted, **asked})


def further(*named: tuple[str, str | None]) -> list[dict[str, Any]]:
    return [{"architecture": architecture, "pretrained": pretrained} for architecture, pretrained in named]


@pytest.mark.parametrize(("split", "sentence"), [
    ({"further_labellers": further(("mini", None))}, "further_labellers are for images without labels"),
    ({"unlabelled": "all", "further_labellers": further(("mini", None), ("mini", "imagenet-minilm"))},
     "mini would count twice"),
    ({"unlabelled": "all", "further_labellers": further(("local-dir:elsewhere/one", None))},
     "backbone.files must be a folder that holds elsewhere/one as well"),
])  # fmt: skip
def test_labellers_that_make_no_sense_are_refused(zoo: Any, split: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ParamsError, match=sentence):
        toy_params(zoo.architecture("flat"), split=split)


def test_the_backbone_itself_is_no_further_labeller(zoo: Any) -> None:
    own = zoo.architecture("flat")
    with pytest.raises(ParamsError, match="would count twice: name each backbone once, and not backbone itself"):
        toy_params(own, split={"unlabelled": "all", "further_labellers": further((own, None))})


def test_who_labels_is_part_of_a_run_only_where_somebody_is_named(zoo: Any) -> None:
    plain = toy_params(zoo.architecture("flat"), split={"unlabelled": "all"})
    asked = {"unlabelled": "all", "further_labellers": further(("mini", None))}
    several = toy_params(zoo.architecture("flat"), split=asked)
    assert "further_labellers" not in plain.of_run()["split"]
    assert several.of_run()["split"]["further_labellers"] == further(("mini", None))


# The stages, with `mini` and a small tower of random weights


@pytest.fixture(scope="module", autouse=True)
def _load_mini_once(mini: Backbone) -> Iterator[None]:
    def load(architecture: str, pretrained: str | None, **how: Any) -> Backbone:
        return mini if architecture == "mini" else load_backbone(architecture, pretrained, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coop_core.params.sections, "load_backbone", load)
        yield


METHOD = {"name": "upl", "members": 2, "n_context": 2}


@pytest.fixture(scope="module")
def starred(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose pool is labelled by two backbones, up to its report."""
    folder = tmp_path_factory.mktemp("starred") / "project"
    paint_images(folder / "images")
    shutil.copytree(zoo.architecture("flat").removeprefix("local-dir:"), folder / "towers/flat")
    asked = {"unlabelled": "all", "further_labellers": further(("local-dir:towers/flat", None))}
    write_params(folder, split=asked, backbone={"files": "towers"}, method=METHOD)
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("  class_specific: false\n", ""))
    with working_in(folder):
        for stage in (download, split_stage, features, label, baselines, train, evaluate, report):
            stage.main()
    return folder


@pytest.fixture
def project(starred: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(starred, tmp_path / "project")
    with working_in(tmp_path / "project"):
        yield tmp_path / "project"


def test_the_labels_are_those_of_the_mean_of_both_backbones(project: Path, mini: Backbone, zoo: Any) -> None:
    split = read_split(paths.SPLIT)
    other = zoo.backbone("flat")
    own = torch.from_numpy(np.load(paths.FEATURES / "train.npy")[:, 0])
    store = project / ".cache/features" / feature_key(other)
    assert store.is_dir()
    theirs = label.features_of(split, coop_core.params.load_params(paths.PARAMS), other, label.load_settings())
    both = [answer_pool(split, own, mini)[1], answer_pool(split, theirs, other)[1]]
    wanted = pseudo_labels((both[0] + both[1]) / 2, [image.digest for image in split.train], per_class=2)
    found = read_labels(paths.LABELS, split)

    assert found is not None
    assert found.chosen.rows.tolist() == wanted.rows.tolist()
    assert [one.weights_digest for one in found.labellers] == [mini.weights_digest, other.weights_digest]


def test_the_card_of_what_was_learned_names_the_labels_and_the_weights_of_who_gave_them(
    project: Path, mini: Backbone, zoo: Any
) -> None:
    data = read_artifact(paths.PROMPT).card["data"]
    card = json.loads((paths.LABELS / "card.json").read_text())

    assert data["labels_digest"] == card["labels_digest"]
    assert data["labellers"] == {mini.name: mini.weights_digest,
                                 "local-dir:towers/flat": zoo.backbone("flat").weights_digest}  # fmt: skip


def test_the_page_names_who_labelled(project: Path) -> None:
    page = " ".join((paths.REPORT / "report.html").read_text().split())
    assert "the mean of mini (imagenet-minilm) and local-dir:towers/flat, answered 18 images" in page


@pytest.mark.parametrize("stage", [baselines, train])
def test_whoever_learns_compares_the_labels_with_what_is_asked(project: Path, stage: Any) -> None:
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("  shots: 2\n", "  shots: 3\n"))
    with pytest.raises(ArtifactError, match=r"chosen in another way than params\.yaml asks for: run `dvc"):
        stage.main()


@pytest.mark.parametrize("stage", [baselines, train, report])
def test_whoever_reads_the_labels_looks_whether_they_are_whole(project: Path, stage: Any) -> None:
    edit_csv(paths.LABELS)
    with pytest.raises(ArtifactError, match=r"labels\.csv is not what its card says"):
        stage.main()


@pytest.mark.parametrize(("stage", "sentence"), [
    (evaluate, "the prompt in artifacts/ belong to other labels than the prompt that is judged"),
    (report, "the prompt in artifacts/ was learned from other labels than those in artifacts/labels"),
])  # fmt: skip
def test_a_prompt_of_other_labels_is_neither_judged_nor_shown(project: Path, stage: Any, sentence: str) -> None:
    artifact = read_artifact(paths.PROMPT)
    card = {**artifact.card, "data": {**artifact.card["data"], "labels_digest": "another"}}
    write_card(paths.PROMPT, card)
    with pytest.raises(ArtifactError, match=sentence):
        stage.main()


def test_the_record_holds_the_labels(project: Path) -> None:
    evaluation = json.loads((paths.EVALUATION / "evaluation.json").read_text())
    prompt = track.with_metrics(paths.PROMPT, project / "with-metrics", evaluation)
    assert (paths.LABELS, "labels") in track.make_record(evaluation, prompt).files


def toys(folder: Path) -> Dataset:
    """Two classes with a validation subset, which a sweep without labels needs."""
    for first, subset in ((0, "train"), (100, "val"), (200, "test")):
        paint_classes(folder / f"toys/{subset}", {"cat": 6, "dog": 6}, first=first)
    card, beside = read_source(folder / "toys")
    return import_dataset(card, beside / card.path, folder / "raw", test_fraction=0.4)


def features_by(backbone: Backbone, split: Split, dataset: Dataset, folder: Path) -> torch.Tensor:
    extract_features(backbone, located(split.train, dataset), root=dataset.root, target=folder / "features.npy",
                     store_folder=folder / "own store")  # fmt: skip
    return torch.from_numpy(np.load(folder / "features.npy")[:, 0])


@pytest.mark.parametrize("named", [(), ("flat-squash",), ("flat-squash", "flat-resnet-quickgelu")])
def test_a_trial_learns_from_what_the_stage_would_label(zoo: Any, tmp_path: Path, named: tuple[str, ...]) -> None:
    dataset = toys(tmp_path)
    more = further(*((zoo.architecture(name), None) for name in named))
    params = toy_params(zoo.architecture("flat"), split={"unlabelled": "all", "further_labellers": more},
                        backbone={"files": str(zoo.root)}, method=METHOD)  # fmt: skip
    learned_from = TrialRunner(store_folder=tmp_path / "store", device="cpu").materials(params, dataset).train

    split = few_shot_split(dataset, shots=params.split.shots, seed=params.seed, unlabelled="all")
    backbones = [zoo.backbone(name) for name in ("flat", *named)]
    features = [features_by(one, split, dataset, tmp_path) for one in backbones]
    answers = [answer_pool(split, its, one) for its, one in zip(features, backbones, strict=True)]
    rows = np.sort(label_pool(split, answers, per_class=params.split.shots).chosen.rows)
    assert isinstance(learned_from, CachedFeatures)
    assert torch.equal(learned_from.features[:, 0], features[0][rows])


def test_an_image_is_encoded_once_by_every_labeller(zoo: Any, tmp_path: Path) -> None:
    dataset = toys(tmp_path)
    asked = further(*((zoo.architecture(name), None) for name in ("flat-squash", "flat-resnet-quickgelu")))
    params = toy_params(zoo.architecture("flat"), split={"unlabelled": "all", "further_labellers": asked},
                        backbone={"files": str(zoo.root)}, method=METHOD)  # fmt: skip
    encoded: list[int] = []

    def see(module: torch.nn.Module, inputs: Any) -> None:
        if type(module).__name__ == "ModifiedResNet":
            encoded.append(len(inputs[0]))

    handle = register_module_forward_pre_hook(see)
    try:
        TrialRunner(store_folder=tmp_path / "store", device="cpu").materials(params, dataset)
        once = sum(encoded)
        for seed in (1, 2):
            others = TrialRunner(store_folder=tmp_path / "store", device="cpu")
            others.materials(params.model_copy(update={"seed": seed}), dataset)
    finally:
        handle.remove()
    assert once >= 12
    assert sum(encoded) <= once + 2 * (once - 12)  # what loading itself encodes, if it does

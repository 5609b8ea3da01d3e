"""The image tower's last linear map: split off by type, one product from what the store keeps, and learned there."""

import copy
import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_feature_store import WIDTH, Tower, backbone_of, straightforward
from test_stages import paint_images, working_in, write_params
from torch import Tensor, nn
from toy_images import paint, paint_classes
from toy_split import toy_split

import coop_core.artifact
import coop_core.params.sections
from coop_core import PromptClassifier
from coop_core.backbone.projection import Projection
from coop_core.data.split import SplitImage
from coop_core.features.extract import extract_features, feature_key
from coop_core.features.store import FeatureStore
from coop_core.files import digest_file, read_array
from coop_core.judging.baselines import zero_shot
from coop_core.judging.pseudo_labels import answer_pool, label_pool, pool_examples
from coop_core.methods.learner import projected
from coop_core.predictor import Predictor
from pipelines.stages import baselines, download, evaluate, features, judge, train
from pipelines.stages import split as split_stage

WITH = {"flat": 32, "flat-resnet-quickgelu": 256, "native-biased-projection-timm": 64}
"""Toy towers that end in a linear map, and how wide it is before that."""


def noise(backbone: Any, count: int = 3) -> Tensor:
    size = backbone.transform.size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", WITH)
def test_features_are_one_product_away_from_what_comes_before_the_map(zoo, relative_error, name):
    backbone = zoo.backbone(name)
    before = backbone.encode_unprojected(noise(backbone))

    assert before.shape == (3, WITH[name])
    own = zoo.model(name).encode_image(noise(backbone))
    assert relative_error(backbone.project(before), own) <= 1e-6
    assert torch.equal(backbone.encode_images(noise(backbone)), backbone.project(before))


@pytest.mark.parametrize("name", WITH)
def test_the_tower_itself_keeps_its_map(zoo, relative_error, name):
    """Deep prompts and digests read it there."""
    backbone = zoo.backbone(name)

    assert relative_error(backbone.image_tower(noise(backbone)), zoo.model(name).encode_image(noise(backbone))) <= 1e-6
    assert backbone.load_weights().keys() == zoo.model(name).state_dict().keys()


def test_before_the_map_of_a_vision_transformer_is_what_it_says_without_one(zoo):
    without = copy.deepcopy(zoo.model("flat").visual)
    without.proj = None

    found = zoo.backbone("flat").encode_unprojected(noise(zoo.backbone("flat")))

    assert torch.equal(found, without(noise(zoo.backbone("flat"))))


@pytest.mark.parametrize("name", ["coca", "mini"])
def test_a_tower_without_such_a_map_gives_its_features(zoo, mini, name):
    backbone = mini if name == "mini" else zoo.backbone(name)

    assert backbone.projection is None
    assert torch.equal(backbone.encode_unprojected(noise(backbone, 1)), backbone.encode_images(noise(backbone, 1)))


def test_a_head_of_two_layers_is_no_linear_map(open_clip):
    from coop_core.backbone.projection import split_projection

    visual = open_clip.timm_model.TimmModel("test_vit", 24, image_size=160, pool="token", proj="mlp", pretrained=False)

    assert split_projection(visual) is None


def test_a_row_is_the_same_whatever_rows_it_is_computed_with():
    drawn = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(768, 512, generator=drawn), torch.randn(300, 768, generator=drawn)
    project = Projection(nn.Identity(), weight, torch.randn(512, generator=drawn))

    assert torch.equal(project(rows)[7:9], project(rows[7:9]))


def test_what_comes_before_the_map_is_float32_where_the_tower_is_not(zoo):
    from coop_core.backbone import load_backbone

    half = load_backbone(zoo.architecture("flat"), None, image_precision="bfloat16")

    assert half.encode_unprojected(noise(half)).dtype == half.encode_images(noise(half)).dtype == torch.float32


# The store


@pytest.fixture
def images(tmp_path: Path) -> list[SplitImage]:
    paths = [paint(tmp_path / "images" / f"{i}.png", i) for i in range(5)]
    return [SplitImage(path.name, 0, digest_file(path)) for path in paths]


@pytest.mark.parametrize("first", [True, False], ids=["before the map first", "features first"])
def test_one_image_pass_serves_both(tmp_path, images, first):
    tower, weight = Tower(), torch.randn(WIDTH, 4, generator=torch.Generator().manual_seed(0))
    backbone = dataclasses.replace(backbone_of(tower), projection=Projection(tower, weight))

    found = {}
    for unprojected in (first, not first):
        target = tmp_path / f"{unprojected}.npy"
        extract_features(backbone, images, root=tmp_path / "images", target=target, store_folder=tmp_path / "store",
                         views=2, seed=3, batch_size=2, unprojected=unprojected)  # fmt: skip
        found[unprojected] = read_array(target)

    assert tower.images == 10
    before = straightforward(tmp_path, images, views=2)
    np.testing.assert_array_equal(found[True], before)
    np.testing.assert_allclose(found[False], before @ weight.numpy(), rtol=1e-6, atol=1e-6)
    store = FeatureStore(tmp_path / "store" / feature_key(backbone))
    assert store.missing([(images[0].digest, "0")]) == []
    assert store.width == WIDTH


def test_features_whose_map_is_computed_apart_are_kept_apart_and_the_card_says_so(zoo):
    backbone = zoo.backbone("flat")

    assert feature_key(backbone) != feature_key(dataclasses.replace(backbone, projection=None))


def test_a_pool_is_labelled_by_its_features_and_learned_from_before_the_map(backbone):
    before = torch.randn(40, 2, 32, generator=torch.Generator().manual_seed(0))
    split = dataclasses.replace(toy_split(("cat", "dog")), shots=3, train=tuple(
        SplitImage("", -1, f"{number:02}") for number in range(40)))  # fmt: skip

    seen = projected(before[:, 0], backbone, reads="unprojected")
    found = label_pool(split, [answer_pool(split, seen, backbone)], per_class=3).chosen
    examples = pool_examples(before, found)

    assert torch.equal(examples.features, before[sorted(found.rows.tolist())])
    assert torch.equal(projected(examples.features, backbone, reads="unprojected"),
                       pool_examples(backbone.project(before), found).features)  # fmt: skip


# From images to answers


@pytest.fixture
def project(zoo, tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder of a project that learns by ProLIP on a tower with a last map, up to its judgements."""
    for module in (coop_core.params.sections, coop_core.artifact):
        monkeypatch.setattr(module, "load_backbone", lambda *named, **more: zoo.backbone("flat"))
    paint_images(tmp_path / "images")
    place = zoo.architecture("flat")
    write_params(tmp_path, backbone={"architecture": place, "files": place.removeprefix("local-dir:")},
                 tests={"again": {"source": "images", "class_names": {"red brick": "a wall"}}})  # fmt: skip
    method = "method: {name: prolip, learning_rate: 0.01, steps: 50}\n"
    text = (tmp_path / "params.yaml").read_text()
    start = text.index("method:")
    (tmp_path / "params.yaml").write_text(text[:start] + method + text[text.index("train:", start) :])
    with working_in(tmp_path):
        for stage in (download, split_stage, features, baselines, train, evaluate):
            stage.main()
        monkeypatch.setattr("sys.argv", ["judge", "judge", "again"])
        judge.main()
        yield tmp_path


def test_the_stages_learn_and_judge_before_the_map(project, zoo):
    """And `predict`, which reads pixels, answers as `evaluate` did, which reads the file of features."""
    backbone = zoo.backbone("flat")
    wide, narrow = (np.load(project / f"artifacts/features/{name}.npy") for name in ("test-unprojected", "test"))
    assert (wide.shape[2], narrow.shape[2]) == (32, 24)
    np.testing.assert_array_equal(narrow, backbone.project(torch.from_numpy(wide)).numpy())
    assert json.loads((project / "artifacts/features/card.json").read_text())["is_projected"] is True
    assert json.loads((project / "artifacts/prompt/card.json").read_text())["learned"] == {"change": [32, 24]}

    for place, folder, names in (("own", "data/raw", None), ("again", ".", ["blue lake", "green field", "a wall"])):
        predictor = Predictor.load(project / "artifacts/prompt", class_names=names)
        with (project / f"artifacts/judged/{place}/predictions.csv").open() as file:
            rows = list(csv.DictReader(file))
        found = predictor.predict([project / folder / row["path"] for row in rows])
        assert [predictor.class_names[int(row["predicted"])] for row in rows] == [one.labels[0] for one in found]
        np.testing.assert_allclose([float(row["confidence"]) for row in rows],
                                   [one.probabilities[0] for one in found], rtol=1e-4)  # fmt: skip



def test_the_classifier_in_python_learns_before_the_map(zoo, tmp_path):
    paint_classes(tmp_path / "toys", {"cat": 8, "dog": 8})
    fitted = PromptClassifier({"name": "prolip", "learning_rate": 0.01}, backbone=zoo.backbone("flat"))
    fitted.fit(tmp_path / "toys")

    change, map_ = fitted.artifact_.state["change"], fitted.predictor_.backbone.projection
    pictures = sorted((tmp_path / "toys").glob("*/*"))
    pixels = torch.stack([torch.from_numpy(fitted.predictor_.view(path)) for path in pictures])
    before = fitted.predictor_.backbone.encode_unprojected(pixels)
    texts = zero_shot(fitted.predictor_.backbone, ["cat", "dog"], "a photo of a {}.")
    assert tuple(change.shape) == (32, 24)
    np.testing.assert_allclose(fitted.predict_proba(pictures), texts.probabilities(before @ (map_.weight + change)),
                               rtol=1e-4)  # fmt: skip

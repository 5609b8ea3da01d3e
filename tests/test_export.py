"""Export: a prompt -> models that answer alike without this product, or one sentence and nothing."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_methods import images as examples_of
from test_methods import width_read
from toy_images import paint
from toy_prompt import write_prompt
from toy_split import toy_split

from coop_core import conversion
from coop_core.artifact import Artifact, read_artifact, write_artifact, write_card
from coop_core.backbone import Backbone, load_backbone
from coop_core.card import make_card
from coop_core.conversion import openvino_runtime, require_packages
from coop_core.errors import ArtifactError, DatasetError
from coop_core.exchange.exported import export_model, export_weights
from coop_core.files import read_json, read_tensors
from coop_core.judging.classifier import LinearClassifier
from coop_core.methods import Task, load_method
from coop_core.predictor import Predictor

NAMES = ("cat", "sea lake", "river")
ROOT = Path(__file__).parents[1]
DOCS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(encoding="utf-8"), re.DOTALL)
"""The reader by ONNX Runtime, what OpenVINO's has in place of its end, and the one of class weights."""
WITHOUT = DOCS[0].replace("import numpy as np, onnxruntime", "import numpy as np").partition("session = ")[0]
READERS = {"onnx": DOCS[0], "openvino": WITHOUT + DOCS[1]}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    """Of several sizes and kinds."""
    folder = tmp_path_factory.mktemp("images")
    sizes = [(40, 30), (30, 47), (33, 33), (90, 20), (31, 64)]
    return [paint(folder / f"{number}.{'png' if number % 2 else 'jpg'}", number, size=size)
            for number, size in enumerate(sizes)]  # fmt: skip


def with_answering(folder: Path, **told: float) -> Artifact:
    card = read_json(folder / "card.json")
    write_card(folder, {**card, "answering": {**card["answering"], **told}})
    return read_artifact(folder)


@pytest.fixture(scope="module")
def artifact(backbone, images, tmp_path_factory) -> Artifact:
    """With a temperature, and a threshold between its answers to the images."""
    folder = write_prompt(tmp_path_factory.mktemp("prompt"), backbone, NAMES)
    found = Predictor(with_answering(folder, temperature=3.0), backbone).predict(images)
    sure = sorted(one.probabilities[0] for one in found)
    return with_answering(folder, temperature=3.0, threshold=(sure[1] + sure[2]) / 2)


@pytest.fixture(scope="module")
def exported(artifact, backbone, images, tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("exported") / "model"
    return folder, export_model(artifact, backbone, folder, images=images)


def lines_of(artifact: Artifact, backbone: Backbone, images: list[Path]) -> list[tuple[str, str, float]]:
    """What `coop predict` answers."""
    found = Predictor(artifact, backbone).predict(images)
    return [(str(path), one.answer or "no answer", one.probabilities[0])
            for path, one in zip(images, found, strict=True)]  # fmt: skip


def read_with(program: str, folder: Path, images: list[Path]) -> list[tuple[str, str, Any]]:
    done = subprocess.run([sys.executable, "-c", program, str(folder), *map(str, images)], capture_output=True,
                          text=True, check=True)  # fmt: skip
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return [(path, label, pytest.approx(float(said), abs=1e-4)) for path, label, said in rows]


def test_both_models_answer_as_the_artefact(exported):
    _, found = exported

    assert found.images == 5
    assert set(found.differences) == {"ONNX Runtime", "OpenVINO"}
    assert max(found.differences.values()) < 1e-5


@pytest.mark.parametrize("runtime", READERS)
def test_the_reader_of_the_docs_answers_as_predict_without_this_product(runtime, exported, artifact, backbone, images):
    program = READERS[runtime] + "\nassert not {'coop_core', 'torch'} & set(sys.modules)"

    expected = lines_of(artifact, backbone, images)

    assert {label for _, label, _ in expected} > {"no answer"}
    assert expected == read_with(program, exported[0], images)


def test_the_docs_reader_has_twenty_lines():
    assert len([line for line in DOCS[0].splitlines() if line.strip()]) <= 22


def test_what_is_beside_the_models_is_the_artefacts(exported, artifact, backbone):
    folder, found = exported
    told = read_json(folder / "answer.json")

    assert sorted(found.files) == ["answer.json", "card.json", "model.bin", "model.onnx", "model.xml"]
    assert found.files["model.onnx"] == (folder / "model.onnx").stat().st_size
    assert read_json(folder / "card.json") == artifact.card
    assert (told["labels"], told["threshold"]) == (list(NAMES), artifact.threshold)
    assert told["inside"] == {"temperature": 3.0, "logit_scale": backbone.logit_scale}


def test_features_are_those_of_the_image_tower(exported, backbone, relative_error):
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    found = openvino_runtime(exported[0] / "model.xml")(pixels.numpy())["features"]

    assert relative_error(torch.from_numpy(found), backbone.encode_images(pixels)) < 1e-5


def test_a_model_that_answers_otherwise_is_refused_and_nothing_is_left(artifact, backbone, images, tmp_path):
    """Two classes that only float64 tells apart, at so low a temperature that it matters."""
    own = artifact.classifier
    first, second, third = map(NAMES.index, Predictor(artifact, backbone).predict(images[:1])[0].labels)
    weights = own.weights.clone()
    weights[second] = weights[first] + 1e-6 * weights[third]
    write_artifact(tmp_path / "prompt", AsLearner(artifact, replace(own, weights=weights)), artifact.card)
    cold = with_answering(tmp_path / "prompt", temperature=1e-6, threshold=0.0)

    with pytest.raises(ArtifactError, match=r"nothing was exported: ONNX Runtime answers .* with .* the artefact "):
        export_model(cold, backbone, tmp_path / "deep/model", images=images)

    assert list((tmp_path / "deep").iterdir()) == []


class AsLearner:
    """What `write_artifact` asks of a learner, of an artefact."""

    def __init__(self, artifact: Artifact, classifier: LinearClassifier) -> None:
        self.state_dict, self.classifier = lambda: artifact.state, lambda: classifier


def test_an_earlier_export_is_replaced_and_other_files_are_left_alone(artifact, backbone, images, tmp_path):
    export_weights(artifact, backbone, tmp_path / "weights", images=images)
    (tmp_path / "weights/class_weights.npz").write_bytes(b"older")
    export_weights(artifact, backbone, tmp_path / "weights", images=images)
    assert (tmp_path / "weights/class_weights.npz").read_bytes() != b"older"

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    with pytest.raises(ArtifactError, match="mine is there already and holds something else: name another folder"):
        export_weights(artifact, backbone, tmp_path / "mine", images=images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "weights"]
    assert (tmp_path / "mine/thesis.txt").read_text() == "years"


@pytest.mark.parametrize("name", ["coop", "linear_probe", "gda"])
def test_the_docs_reader_of_class_weights_answers_as_predict(name, artifact, backbone, images, tmp_path, monkeypatch):
    one = artifact if name == "coop" else with_answering(write_method(name, backbone, tmp_path / name), temperature=2.0)
    export_weights(one, backbone, tmp_path / "weights", images=images)
    pixels = np.stack([Predictor(one, backbone).view(path) for path in images])
    known: dict[str, Any] = {"features": backbone.encode_images(torch.from_numpy(pixels)).numpy()}
    monkeypatch.chdir(tmp_path)

    exec(DOCS[2], known)

    expected = Predictor(one, backbone).rank(pixels)
    assert known["probabilities"].max(axis=1) == pytest.approx([p.probabilities[0] for p in expected], abs=1e-5)
    assert [one.class_names[row.argmax()] for row in known["probabilities"]] == [p.labels[0] for p in expected]
    tensors, _ = read_tensors(tmp_path / "weights/class_weights.safetensors")
    assert {key: value.tolist() for key, value in tensors.items()} == {
        key: known["arrays"][key].tolist() for key in known["arrays"]
    }


METHODS: dict[str, dict[str, Any]] = {
    "gda": {}, "linear_probe": {"steps": 1}, "prolip": {"steps": 3}, "tip_adapter": {}, "cocoop": {},
    "dpl": {"image_lengths": [0, 2], "text_lengths": [1, 0, 2]}, "zero_shot": {"templates": ["an image of {}."]},
}  # fmt: skip
"""One of each kind: with a bias, on features as they are, with more than class weights, and so on."""


def write_method(name: str, backbone: Backbone, folder: Path) -> Path:
    """An artefact of a method that is built, from a few features; what is learned by steps is as it starts."""
    module, split = load_method(name), toy_split(NAMES)
    params, examples = module.Params(**METHODS[name]), examples_of(width=width_read(name, backbone))
    learner = module.build(
        params, backbone=backbone, task=Task(NAMES, "a photo of a {}.", split.descriptions),
        generator=torch.Generator().manual_seed(0), examples=examples,
    )  # fmt: skip
    card = make_card(learner=learner, method=params, backbone=backbone, split=split, shots=1, params={}, curve=(),
                     code_revision="abc123")  # fmt: skip
    write_artifact(folder, learner, card)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gda", "linear_probe", "prolip", "tip_adapter", "dpl"])
def test_every_kind_of_method_that_can_answers_alike(name, backbone, images, tmp_path):
    found = export_model(read_artifact(write_method(name, backbone, tmp_path / name)), backbone, tmp_path / "model",
                         images=images)  # fmt: skip

    assert max(found.differences.values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flat-squash", "flat-resnet-quickgelu", "native-biased-projection-timm", "coca"])
def test_every_kind_of_image_tower_answers_alike_and_is_read_alike(family, zoo, images, tmp_path):
    backbone = zoo.backbone(family)
    artifact = read_artifact(write_method("zero_shot", backbone, tmp_path / "prompt"))

    export_model(artifact, backbone, tmp_path / "model", images=images)

    assert lines_of(artifact, backbone, images) == read_with(READERS["onnx"], tmp_path / "model", images)


@pytest.mark.slow
def test_mini_answers_alike(mini, images, tmp_path):
    artifact = read_artifact(write_prompt(tmp_path / "prompt", mini, NAMES))

    export_model(artifact, mini, tmp_path / "model", images=images)

    for runtime in READERS.values():
        assert lines_of(artifact, mini, images) == read_with(runtime, tmp_path / "model", images)


@pytest.mark.parametrize(("name", "write", "fault"), [
    ("cocoop", export_model, "cocoop encodes a prompt a class for every image, so neither class weights nor"),
    ("cocoop", export_weights, "cocoop answers by more than class weights, so they alone answer nothing"),
    ("tip_adapter", export_weights, "tip_adapter answers by more than class weights"),
    ("dpl", export_weights, "dpl changes the image tower as well, so they alone answer nothing"),
])  # fmt: skip
def test_what_cannot_be_exported_is_a_sentence(name, write, fault, backbone, images, tmp_path):
    artifact = read_artifact(write_method(name, backbone, tmp_path / name))

    with pytest.raises(ArtifactError, match=fault):
        write(artifact, backbone, tmp_path / "model", images=images)

    assert not (tmp_path / "model").exists()


def test_images_in_half_precision_are_refused(zoo, images, tmp_path):
    backbone = load_backbone(zoo.architecture("flat"), None, image_precision="bfloat16")
    artifact = read_artifact(write_method("zero_shot", backbone, tmp_path / "prompt"))

    with pytest.raises(ArtifactError, match=r"encoded in bfloat16, .* train with backbone\.image_precision: float32"):
        export_model(artifact, backbone, tmp_path / "model", images=images)


def test_without_images_nothing_is_exported(artifact, backbone, tmp_path):
    with pytest.raises(ArtifactError, match="checked on real images, and there are none: name some with --images"):
        export_weights(artifact, backbone, tmp_path / "model", images=[])


def test_an_image_that_cannot_be_read_is_a_sentence(artifact, backbone, tmp_path):
    with pytest.raises(DatasetError, match=r"none\.png is missing"):
        export_weights(artifact, backbone, tmp_path / "model", images=[tmp_path / "none.png"])


def test_without_the_extra_a_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(conversion, "PACKAGES", ("onnx", "no_such_package"))

    with pytest.raises(ArtifactError, match=r"no_such_package: pip install -c constraints\.txt -e '\.\[export\]'"):
        require_packages()


def test_the_extra_is_pinned():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    extra = re.search(r"^export = (\[.*?\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert extra is not None
    assert sorted(json.loads(extra[1])) == sorted(conversion.PACKAGES)
    for name in conversion.PACKAGES:
        assert any(pin.startswith(f"{name}==") for pin in pins), name

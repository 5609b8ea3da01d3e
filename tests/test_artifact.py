"""Artefacts: what was learned comes back whole, on its own backbone and for fitting classes, or not at all."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coop_core.artifact import Artifact, check_backbone, read_artifact, restore_learner, write_artifact
from coop_core.backbone import Backbone, load_backbone
from coop_core.card import make_card
from coop_core.data.split import Split, SplitImage
from coop_core.errors import ArtifactError
from coop_core.methods import Task, coop
from coop_core.prompts.encoder import PromptEncoder
from coop_core.prompts.layout import build_layout

NAMES = ("cat", "annual crop land", "river")
OTHERS = ("pterodactyl", "forest", "sea lake", "highway")


@pytest.fixture
def saved(backbone, tmp_path):
    """A learner and the folder it was written to, at every call a new pair."""

    def save(folder: str = "artefact", *, on: Backbone = backbone, **params: Any) -> tuple[coop.CoOp, Path]:
        method = coop.Params(**{"n_context": 3, "class_token_position": "middle", **params})
        generator = torch.Generator().manual_seed(len(folder))
        learner = coop.build(method, backbone=on, task=Task(NAMES, "a photo of a {}."), generator=generator)
        card = make_card(
            learner=learner,
            method=method,
            backbone=on,
            split=_split(),
            shots=1,
            params={"seed": 7},
            curve=[{"epoch": 0, "loss": 1.5}],
            code_revision="abc123",
        )
        write_artifact(tmp_path / folder, learner, card)
        return learner, tmp_path / folder

    return save


def test_what_was_learned_comes_back_equal(saved):
    learner, folder = saved()

    assert torch.equal(read_artifact(folder).state["context_vectors"], learner.context_vectors)


def test_the_classifier_comes_back_equal(saved, backbone):
    learner, folder = saved()

    classifier = read_artifact(folder).classifier

    assert torch.equal(classifier.weights, learner.class_weights())
    assert classifier.scale == backbone.logit_scale


def test_the_transform_comes_back_equal(saved, backbone):
    _, folder = saved()

    assert read_artifact(folder).transform == backbone.transform


@pytest.mark.parametrize("class_specific", [False, True])
def test_a_restored_learner_answers_as_the_one_that_was_saved(saved, backbone, class_specific):
    learner, folder = saved(class_specific=class_specific)
    features = torch.nn.functional.normalize(torch.randn(5, 24, generator=torch.Generator().manual_seed(0)), dim=-1)

    restored = restore_learner(read_artifact(folder), backbone)

    assert torch.equal(restored.logits(features), learner.logits(features))


def test_the_card_says_what_made_it(saved, backbone):
    _, folder = saved()
    card = read_artifact(folder).card

    assert card["class_names"] == list(NAMES)
    assert card["template"] == "a photo of a {}."
    assert card["params"] == {"seed": 7}
    assert card["backbone"]["weights_digest"] == backbone.weights_digest
    assert card["data"]["train_digest"] == _split().train_digest
    assert card["learned"] == {"context_vectors": [3, backbone.text_tower.width]}
    assert card["training"] == {"is_built": False, "epochs": 1, "last": {"epoch": 0, "loss": 1.5}}


def test_shared_context_bound_to_other_classes_is_the_encoding_of_their_names(saved, backbone):
    learner, folder = saved()
    layout = build_layout(backbone.text_tower, OTHERS, n_context=3, position="middle")

    rebound = restore_learner(read_artifact(folder), backbone, OTHERS)

    expected = PromptEncoder(backbone.text_tower, layout)(learner.context_vectors)
    assert torch.equal(rebound.class_weights(), expected)


def test_binding_to_the_same_classes_in_another_order_moves_their_weights_along(saved, backbone):
    learner, folder = saved()

    rebound = restore_learner(read_artifact(folder), backbone, NAMES[::-1])

    torch.testing.assert_close(rebound.class_weights(), learner.class_weights().flip(0))


@pytest.mark.parametrize("names", [OTHERS, NAMES[::-1], NAMES[:2]])
def test_class_specific_context_refuses_other_classes(saved, backbone, names):
    _, folder = saved(class_specific=True)

    with pytest.raises(ArtifactError, match=r"something of its own for each of cat, .* with other classes: train"):
        restore_learner(read_artifact(folder), backbone, names)


def test_class_names_that_are_written_otherwise_are_its_own(saved, backbone):
    learner, folder = saved(class_specific=True)

    restored = restore_learner(read_artifact(folder), backbone, [f"_{name} " for name in NAMES])

    assert torch.equal(restored.class_weights(), learner.class_weights())


def test_other_backbone_weights_are_refused_naming_both(saved, zoo, backbone):
    _, folder = saved()
    other = zoo.backbone("native")
    both = f"with weights {backbone.weights_digest[:12]}.*with weights {other.weights_digest[:12]}"

    with pytest.raises(ArtifactError, match=f"zoo0/flat.*{both}: load the backbone it was learned on"):
        restore_learner(read_artifact(folder), other)


def test_equal_weights_with_another_activation_are_refused(saved, zoo, tmp_path):
    """QuickGELU is no weight, yet context learned with it means something else without."""
    _, folder = saved()
    shutil.copytree(zoo.architecture("flat").removeprefix("local-dir:"), tmp_path / "quick")
    config = json.loads((tmp_path / "quick/open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (tmp_path / "quick/open_clip_config.json").write_text(json.dumps(config))

    with pytest.raises(ArtifactError, match="load the backbone it was learned on"):
        restore_learner(read_artifact(folder), load_backbone(f"local-dir:{tmp_path / 'quick'}", None))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_artefact_loads_the_backbone_it_was_learned_on(saved, zoo, precision):
    _, folder = saved(on=load_backbone(zoo.architecture("flat"), None, image_precision=precision))
    artifact = read_artifact(folder)

    check_backbone(artifact, artifact.load_backbone())


def test_a_card_from_before_image_precision_means_float32(saved, backbone):
    _, folder = saved()
    artifact = read_artifact(folder)
    del artifact.card["backbone"]["image_precision"]

    assert artifact.load_backbone().weights_digest == backbone.weights_digest


def test_another_precision_is_refused_naming_it(saved, zoo):
    _, folder = saved()
    half = load_backbone(zoo.architecture("flat"), None, image_precision="bfloat16")

    with pytest.raises(ArtifactError, match=r"flat with weights .* is .*flat, images in bfloat16 with weights"):
        check_backbone(read_artifact(folder), half)


def test_a_card_with_an_unknown_precision_is_not_whole(saved):
    _, folder = saved()
    card = json.loads((folder / "card.json").read_text())
    card["backbone"]["image_precision"] = "bf16"
    (folder / "card.json").write_text(json.dumps(card))

    with pytest.raises(ArtifactError, match=r"not whole \(backbone.image_precision: input should be 'float32'"):
        read_artifact(folder)


def test_a_method_of_another_version_is_refused(saved, backbone):
    _, folder = saved()
    artifact = read_artifact(folder)
    card = {**artifact.card, "method": {"name": "unheard-of"}}

    with pytest.raises(ArtifactError, match="method 'unheard-of' is not in this version of the product"):
        restore_learner(Artifact(card, artifact.state, artifact.classifier), backbone)


def test_parameters_the_method_does_not_know_are_refused(saved, backbone):
    _, folder = saved()
    artifact = read_artifact(folder)
    card = {**artifact.card, "method": {**artifact.card["method"], "n_context": 0}}

    with pytest.raises(ArtifactError, match="method parameters are not valid: Input should be greater"):
        restore_learner(Artifact(card, artifact.state, artifact.classifier), backbone)


def test_a_state_that_is_not_the_methods_is_refused(saved, backbone):
    _, folder = saved()
    artifact = read_artifact(folder)

    with pytest.raises(ArtifactError, match=r"holds \{\}, but the method expects \{'context_vectors': \(3, 32\)\}"):
        restore_learner(Artifact(artifact.card, {}, artifact.classifier), backbone)


@pytest.mark.parametrize("name", ["context.safetensors", "class_weights.safetensors"])
@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_a_truncated_file_is_refused(saved, name, kept):
    _, folder = saved()
    (folder / name).write_bytes((folder / name).read_bytes()[:kept])

    with pytest.raises(ArtifactError, match=f"{name} is damaged"):
        read_artifact(folder)


@pytest.mark.parametrize("name", ["context.safetensors", "class_weights.safetensors"])
def test_a_file_with_one_changed_bit_is_refused(saved, name):
    _, folder = saved()
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)

    with pytest.raises(ArtifactError, match=f"{name} is not the file its card was written for"):
        read_artifact(folder)


@pytest.mark.parametrize("name", ["context.safetensors", "class_weights.safetensors"])
def test_a_file_of_another_artefact_is_refused(saved, name):
    _, folder = saved()
    _, other = saved("another one")
    shutil.copy(other / name, folder / name)

    with pytest.raises(ArtifactError, match=f"{name} is not the file its card was written for"):
        read_artifact(folder)


def test_a_checkpoint_without_context_vectors_is_refused(saved):
    _, folder = saved()
    save_file({"something_else": torch.zeros(2)}, folder / "context.safetensors")

    with pytest.raises(ArtifactError, match="is not the file its card was written for"):
        read_artifact(folder)


@pytest.mark.parametrize("name", ["card.json", "context.safetensors", "class_weights.safetensors"])
def test_a_missing_file_is_refused(saved, name):
    _, folder = saved()
    (folder / name).unlink()

    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        read_artifact(folder)


@pytest.mark.parametrize("text", ["", "{", '{"schema": 1', "\x00"])
def test_a_card_that_is_no_json_is_refused(saved, text):
    _, folder = saved()
    (folder / "card.json").write_text(text)

    with pytest.raises(ArtifactError, match=r"card\.json is not readable JSON"):
        read_artifact(folder)


@pytest.mark.parametrize("card", ["[]", "{}", '{"schema": 0}', '{"schema": 3}'])
def test_a_card_of_another_schema_is_refused(saved, card):
    _, folder = saved()
    (folder / "card.json").write_text(card)

    with pytest.raises(ArtifactError, match=r"card\.json is not a card of schema 2"):
        read_artifact(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card.update(class_names=card["class_names"][1:] + card["class_names"][:1]),
        lambda card: card.update(class_names=[*card["class_names"], "dog"]),
        lambda card: card["method"].update(class_token_position="front"),
        lambda card: card["backbone"]["transform"].update(mean=[0.4, 0.4, 0.4]),
        lambda card: card["backbone"].update(weights_digest="0" * 64),
        lambda card: card["data"].update(shots=4),
        lambda card: card["params"].update(seed=2),
        lambda card: card["digests"].update(card="0" * 64),
        lambda card: card["digests"].pop("card"),
    ],
    ids=["order of classes", "a class more", "method", "transform", "weights", "data", "params", "digest", "no digest"],
)
def test_a_card_that_was_changed_after_it_was_written_is_refused(saved, change):
    _, folder = saved()
    card = json.loads((folder / "card.json").read_text())
    change(card)
    (folder / "card.json").write_text(json.dumps(card))

    with pytest.raises(ArtifactError, match=r"card\.json was changed after it was written"):
        read_artifact(folder)


def test_a_card_that_is_only_laid_out_otherwise_is_read(saved):
    _, folder = saved()
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(dict(reversed(card.items())), indent=7))

    assert read_artifact(folder).class_names == NAMES


def test_a_card_of_the_first_schema_is_read_without_a_digest_of_itself(saved, backbone):
    _, folder = saved()
    first_schema(folder)
    artifact = read_artifact(folder)

    check_backbone(artifact, backbone)
    assert artifact.class_names == NAMES


def test_a_card_of_the_first_schema_with_a_class_more_than_its_classifier_is_refused(saved):
    _, folder = saved()
    first_schema(folder, class_names=[*NAMES, "dog"])

    with pytest.raises(ArtifactError, match="class names differ in number"):
        read_artifact(folder)


def first_schema(folder: Path, **changes: Any) -> None:
    """The card as the first version of the product wrote it."""
    card = json.loads((folder / "card.json").read_text())
    del card["digests"]["card"], card["backbone"]["transform_digest"]
    (folder / "card.json").write_text(json.dumps({**card, "schema": 1, **changes}))


def test_images_prepared_in_another_way_are_refused(saved, backbone):
    _, folder = saved()
    other = dataclasses.replace(backbone, transform=dataclasses.replace(backbone.transform, interpolation="bilinear"))

    with pytest.raises(ArtifactError, match=r"images prepared by .*bicubic.*prepares them by .*bilinear"):
        check_backbone(read_artifact(folder), other)


def test_another_version_of_the_image_preparation_is_told_in_the_log(saved, backbone, caplog):
    _, folder = saved()
    artifact = read_artifact(folder)
    artifact.card["backbone"]["transform_digest"] = "of before"
    check_backbone(artifact, backbone)

    assert "another version of the image preparation" in caplog.text


def test_a_card_that_lost_its_class_names_is_refused(saved):
    _, folder = saved()
    card = json.loads((folder / "card.json").read_text())
    del card["class_names"]
    (folder / "card.json").write_text(json.dumps(card))

    with pytest.raises(ArtifactError, match=r"card\.json"):
        read_artifact(folder)


def test_an_artefact_consists_of_safetensors_and_json_alone(saved):
    _, folder = saved()

    assert sorted(file.name for file in folder.iterdir()) == [
        "card.json", "class_weights.safetensors", "context.safetensors"
    ]  # fmt: skip


def test_the_context_file_holds_nothing_of_the_frozen_towers(saved):
    _, folder = saved()

    assert list(load_file(folder / "context.safetensors")) == ["context_vectors"]


def _split() -> Split:
    images = tuple(SplitImage(f"{label}.png", label, f"digest {label}") for label in range(len(NAMES)))
    return Split("fields", "digest", "a photo of a {}.", NAMES, 1, 7, "all", images, (), images)

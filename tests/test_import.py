"""Import: CoOp's and CoCoOp's own checkpoints -> artefacts that answer as theirs did; nothing in a file is run."""

import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_weights import CLASS_NAMES, JOINT, WIDTH, draw
from test_golden import COCOOP, COOP, META, assert_close
from test_golden import clip as clip  # a fixture
from torch import Tensor
from toy_checkpoint import write_dassl
from toy_images import paint
from toy_prompt import write_prompt

from coop_core.artifact import Artifact, read_artifact, restore_learner
from coop_core.errors import ArtifactError, GateError
from coop_core.exchange.dassl import read_checkpoint
from coop_core.exchange.imported import import_checkpoint
from coop_core.judging.gate import Policy
from coop_core.predictor import Predictor
from pipelines.champion import promotion
from pipelines.commands.importing import class_names
from pipelines.records.imported import register_import
from pipelines.records.registry import fetch_prompt, find_version
from pipelines.records.server import Records
from pipelines.settings import Settings

# MLflow's own, of its pages on agents; it appears once, in whichever test imports mlflow.pyfunc first.
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")

SHARED = {"ctx": draw("context", 4, WIDTH, std=0.02)}
SPECIFIC = {"ctx": draw("context", len(CLASS_NAMES), 4, WIDTH, std=0.02)}
COCOOPS = {"ctx": COOP["words.context"], **{name.replace("meta.", "meta_net."): one for name, one in META.items()}}


@pytest.fixture(scope="module")
def features(clip: Any) -> Tensor:
    """(6, d)"""
    return clip.encode_images(COOP["images"])


@pytest.fixture
def imported(clip: Any, tmp_path: Path) -> Any:
    def of(learned: dict[str, Tensor], *, names: tuple[str, ...] = CLASS_NAMES, position: Any = "end",
           **how: Any) -> Artifact:  # fmt: skip
        path = write_dassl(tmp_path / "prompt_learner/model.pth.tar-50", clip, learned, CLASS_NAMES, **how)
        import_checkpoint(read_checkpoint(path), tmp_path / "imported", backbone=clip, class_names=names,
                          position=position, code_revision="abc123")  # fmt: skip
        return read_artifact(tmp_path / "imported")

    return of


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize(("sharing", "learned"), [("shared", SHARED), ("specific", SPECIFIC)])
def test_an_imported_coop_has_the_logits_of_the_reference(imported, features, position, sharing, learned):
    artifact = imported(learned, position=position)

    assert_close(artifact.classifier.logits(features), COOP[f"m4.{sharing}.{position}.logits"], of="logits")


def test_an_imported_cocoop_has_the_logits_of_the_reference(imported, features, clip):
    learner = restore_learner(imported(COCOOPS), clip)

    with torch.no_grad():
        assert_close(learner.logits(features), COCOOP["words.logits"], of="logits")


def test_half_precision_and_a_prefix_of_several_gpus_are_read(imported, features):
    artifact = imported(SHARED, dtype=torch.float16, prefix="module.")

    assert artifact.card["imported"]["precision"] == "float16"
    assert artifact.state["context_vectors"].dtype == torch.float32
    assert torch.allclose(artifact.classifier.logits(features), COOP["m4.shared.end.logits"].float(), atol=0.05)


def test_the_card_says_what_is_known_and_what_is_not(imported, tmp_path):
    artifact = imported(SHARED)
    told, path = artifact.card["imported"], tmp_path / "prompt_learner/model.pth.tar-50"

    assert (told["file"], told["sha256"]) == (path.name, read_checkpoint(path).digest)
    assert told["class_names"] == "given, and those of the file"
    assert {"data set", "split", "accuracy"} < set(told["unknown"])
    assert set(artifact.card["data"].values()) == {"unknown"}
    assert artifact.card["training"]["epochs"] == 50
    assert "metrics" not in artifact.card


def test_shared_context_takes_other_class_names_and_the_card_says_so(imported):
    artifact = imported(SHARED, names=("cat", "dog"))

    assert artifact.class_names == ("cat", "dog")
    assert artifact.card["imported"]["class_names"] == "given, other than those of the file"


@pytest.mark.parametrize(("names", "fault"), [
    (CLASS_NAMES[:5], "context of its own for each of 8 classes, and 5 class names are given"),
    (CLASS_NAMES[::-1], "class names given are not those it was learned for, in its order"),
    (("cat", "cat"), "class names must be two or more, and differ: twice cat"),
    (("cat",), "class names must be two or more"),
])  # fmt: skip
def test_class_specific_context_wants_its_own_class_names(imported, names, fault, tmp_path):
    with pytest.raises(ArtifactError, match=fault):
        imported(SPECIFIC, names=names)
    assert not (tmp_path / "imported").exists()


def test_another_width_is_refused(imported, tmp_path):
    learned = {"ctx": draw("context", 4, WIDTH, std=0.02)}
    with pytest.raises(ArtifactError, match=r"context vectors 128 wide, and the text tower of .* is 32 wide"):
        imported_on_toy(learned, tmp_path, imported)


def imported_on_toy(learned: dict[str, Tensor], folder: Path, imported: Any) -> None:
    """The file of the golden CLIP on a backbone of another width."""
    imported(learned)
    from conftest import Zoo

    (folder / "zoo").mkdir()
    import_checkpoint(read_checkpoint(folder / "prompt_learner/model.pth.tar-50"), folder / "other",
                      backbone=Zoo(folder / "zoo").backbone("flat"), class_names=CLASS_NAMES,
                      code_revision="")  # fmt: skip


@pytest.mark.parametrize(("name", "shape"), [("meta_net.linear1.weight", (4, JOINT - 8)),
                                             ("meta_net.linear2.weight", (WIDTH - 8, 4))])  # fmt: skip
def test_a_meta_net_of_another_width_is_refused(imported, name, shape):
    with pytest.raises(ArtifactError, match=r"holds .* but cocoop on .* has .*name the backbone that"):
        imported({**COCOOPS, name: torch.zeros(shape)})


def test_another_towers_embeddings_are_refused(clip, tmp_path):
    path = write_dassl(tmp_path / "model.pth.tar-1", clip, SHARED, CLASS_NAMES)
    told = torch.load(path, weights_only=False)
    told["state_dict"]["token_prefix"] = told["state_dict"]["token_prefix"].flip(-1)
    torch.save(told, path)

    with pytest.raises(ArtifactError, match="the embedding of its first token is another one"):
        import_checkpoint(read_checkpoint(path), tmp_path / "imported", backbone=clip, class_names=CLASS_NAMES,
                          code_revision="")  # fmt: skip


def test_cocoop_has_the_class_name_at_the_end_alone(imported):
    with pytest.raises(ArtifactError, match="--position front: CoCoOp has the class name at the end alone"):
        imported(COCOOPS, position="front")


def test_the_file_holds_objects_and_none_of_them_is_made(clip, tmp_path):
    path = write_dassl(tmp_path / "model.pth.tar-50", clip, SHARED, CLASS_NAMES)
    with pytest.raises(pickle.UnpicklingError, match="CosineAnnealingLR"):
        torch.load(path, weights_only=True)
    allowed = torch.serialization.get_safe_globals()

    found = read_checkpoint(path)

    assert torch.equal(found.context, SHARED["ctx"])
    assert torch.serialization.get_safe_globals() == allowed


@pytest.mark.parametrize("result", [np.float64(71.5), 71.5, np.array([71.5])[0]])
def test_a_result_in_the_file_costs_nothing(clip, tmp_path, result):
    path = write_dassl(tmp_path / "model.pth.tar-50", clip, SHARED, CLASS_NAMES)
    torch.save({**torch.load(path, weights_only=False), "val_result": result}, path)

    assert read_checkpoint(path).epoch == 50


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_a_file_that_runs_something_is_refused_and_runs_nothing(tmp_path):
    content = {"state_dict": {"ctx": torch.zeros(4, 8)}, "evil": Evil(tmp_path / "trace")}
    torch.save(content, tmp_path / "model.pth.tar-1")

    with pytest.raises(ArtifactError, match=r"cannot be read without running code: it names posix\.mkdir, and only"):
        read_checkpoint(tmp_path / "model.pth.tar-1")

    assert not (tmp_path / "trace").exists()


BAD: dict[str, tuple[Any, str]] = {
    "of another method": ({"state_dict": {"ctx": torch.zeros(4, 8), "proj.weight": torch.zeros(8, 8)}},
                          r"is neither CoOp's nor CoCoOp's \(proj\.weight\)"),
    "without context": ({"state_dict": {"token_prefix": torch.zeros(3, 1, 8)}}, r"nor CoCoOp's \(no ctx"),
    "half of a meta-net": ({"state_dict": {"ctx": torch.zeros(4, 8), "meta_net.linear1.bias": torch.zeros(4)}},
                           "half of a meta-net"),
    "of one dimension": ({"state_dict": {"ctx": torch.zeros(8)}}, r"ctx is torch\.float32 \(8,\), not numbers"),
    "of whole numbers": ({"state_dict": {"ctx": torch.zeros(4, 8, dtype=torch.long)}}, r"ctx is torch\.int64"),
    "diverged": ({"state_dict": {"ctx": torch.full((4, 8), torch.nan)}}, "values that are no numbers"),
    "a list": ([torch.zeros(4, 8)], "holds no state dict"),
    "a number": ({"state_dict": {"ctx": 4}}, "holds no state dict"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_another_file_is_a_sentence(kind, tmp_path):
    content, fault = BAD[kind]
    torch.save(content, tmp_path / "model.pth.tar-1")

    with pytest.raises(ArtifactError, match=fault):
        read_checkpoint(tmp_path / "model.pth.tar-1")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half a zip"])
def test_a_damaged_file_is_a_sentence(content, tmp_path):
    (tmp_path / "model.pth.tar-1").write_bytes(content)

    with pytest.raises(ArtifactError, match="is no checkpoint that torch reads, or is damaged"):
        read_checkpoint(tmp_path / "model.pth.tar-1")


def test_a_zip_that_is_cut_is_a_sentence(clip, tmp_path):
    path = write_dassl(tmp_path / "model.pth.tar-50", clip, SHARED, CLASS_NAMES)
    path.write_bytes(path.read_bytes()[:-500])
    assert not zipfile.is_zipfile(path)

    with pytest.raises(ArtifactError, match="is no checkpoint that torch reads, or is damaged"):
        read_checkpoint(path)


def test_a_folder_and_nothing_are_sentences(clip, tmp_path):
    write_dassl(tmp_path / "prompt_learner/model.pth.tar-50", clip, SHARED, CLASS_NAMES)
    with pytest.raises(ArtifactError, match=r"a folder: name a file in it, such as prompt_learner/model\.pth\.tar-50"):
        read_checkpoint(tmp_path)
    with pytest.raises(ArtifactError, match="is missing: name the checkpoint's file"):
        read_checkpoint(tmp_path / "none")


def test_an_import_takes_the_place_of_an_earlier_one_and_of_nothing_else(imported, clip, tmp_path):
    assert imported(SHARED).card["method"]["class_specific"] is False
    assert imported(SPECIFIC).card["method"]["class_specific"] is True
    shutil.rmtree(tmp_path / "imported")
    write_prompt(tmp_path / "imported", clip, CLASS_NAMES)
    before = (tmp_path / "imported/card.json").read_bytes()

    with pytest.raises(ArtifactError, match="imported holds a prompt that was not imported: name another folder"):
        imported(SHARED)
    assert (tmp_path / "imported/card.json").read_bytes() == before


@pytest.mark.parametrize(("told", "expected"), [
    ("cat, sea lake ,river", ["cat", "sea lake", "river"]), ("names.txt", ["a cat, sleeping", "river"]),
])  # fmt: skip
def test_class_names_are_given_or_read(told, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("a cat, sleeping\n\nriver\n")

    assert class_names(told) == expected


def test_it_is_predicted_with_from_its_folder(imported, tmp_path):
    imported(SHARED)

    (answer,) = Predictor.load(tmp_path / "imported").predict([paint(tmp_path / "a.png", 1, size=(40, 30))])

    assert answer.answer in {name.replace("_", " ") for name in CLASS_NAMES}


@pytest.mark.slow
def test_a_registered_import_is_a_candidate_that_the_gate_refuses_for_want_of_answers(imported, tmp_path):
    imported(SHARED)
    settings = Settings(_env_file=None, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", registered_model="theirs",
                        cache_folder=tmp_path / "cache", artifact_location=(tmp_path / "mlruns").as_uri())  # fmt: skip

    records = Records(settings)
    number = register_import(tmp_path / "imported", "theirs", records)

    assert find_version("candidate", records).number == number
    card = read_artifact(fetch_prompt("theirs@candidate", records, tmp_path / "fetched")).card
    assert card["imported"]["file"] == "model.pth.tar-50"
    policy = Policy(min_gain_over_zero_shot=0.0, significance=0.05, max_class_drop=0.5, min_images_a_class=10)
    with pytest.raises(GateError, match=f"version {number} has no answers to test images on record"):
        promotion.promote(records, policy)
    assert find_version("champion", records) is None

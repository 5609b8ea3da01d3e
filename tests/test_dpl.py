"""DPL: searched and trained on pixels, killed and taken up, kept, asked again, and refused where it cannot be."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_stages import COLOURS, paint_images, working_in, write_params
from torch import Tensor
from toy_dataset import toy_dataset
from toy_params import toy_params

import coop_core.params.sections
from coop_core.answering import answer_with, answerer
from coop_core.artifact import read_artifact, restore_learner, write_artifact
from coop_core.backbone import Backbone
from coop_core.card import make_card
from coop_core.data.dataset import Dataset
from coop_core.data.split import Split, few_shot_split, read_split
from coop_core.errors import ArtifactError, ParamsError, PromptError, TrainingError
from coop_core.features.examples import FRESH, DecodedImages
from coop_core.files import read_tensors
from coop_core.judging.seen import Seen, small
from coop_core.methods import Task, dpl
from coop_core.params import Params
from coop_core.predictor import Predictor
from coop_core.preparing import prepare
from coop_core.prompts.engine import Engine
from coop_core.prompts.prompted_images import PromptedImages
from coop_core.sweeps.trials import Scores, TrialRunner
from coop_core.training import Checkpoint, Training, fit
from pipelines import paths
from pipelines.stages import baselines, download, evaluate, features, report, track, train
from pipelines.stages import split as split_stage

GIVEN = {"name": "dpl", "image_lengths": [0, 2], "text_lengths": [1, 0, 2]}
SEARCHED = {"name": "dpl", "search": {"image_candidates": 2, "text_candidates": 3, "epochs": 2,
                                      "validation_batch_size": 4}}  # fmt: skip
TASK = Task(("cat", "sea lake"), "a photo of a {}.")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_dataset(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module")
def split(dataset: Dataset) -> Split:
    return few_shot_split(dataset, shots=4, seed=1)


def images(subset: Any, dataset: Dataset, backbone: Backbone, *, views: int = 1) -> DecodedImages:
    return DecodedImages(subset, dataset.root, backbone.transform, backbone.device, views, seed=1)


def params_of(zoo: Any, method: dict[str, Any], **more: Any) -> Params:
    return toy_params(zoo.architecture("flat"), method=method, train={"epochs": 6, "learning_rate": 0.2}, **more)


@pytest.fixture
def prepared(zoo: Any, dataset: Dataset, split: Split) -> Any:
    def of(method: dict[str, Any], *, checkpoint: Checkpoint | None = None, examples: Any = None) -> Training:
        backbone = zoo.backbone("flat")
        examples = examples or images(split.train, dataset, backbone, views=FRESH)
        validation = images(split.val, dataset, backbone)
        return prepare(params_of(zoo, method), split=split, backbone=backbone, examples=examples,
                       validation=validation, checkpoint=checkpoint)  # fmt: skip

    return of


def kept(training: Training, backbone: Backbone, split: Split, folder: Path) -> Any:
    method = training.found or dpl.Params(**GIVEN)
    card = make_card(learner=training.learner, method=method, backbone=backbone, split=split, shots=4, params={},
                     curve=[], code_revision="abc")  # fmt: skip
    write_artifact(folder, training.learner, card)
    return read_artifact(folder)


def test_images_are_decoded_as_the_features_stage_does(dataset, split, zoo):
    """View 0 is the test view; any other depends on the image, the seed and its number."""
    backbone = zoo.backbone("flat")
    found = images(split.val, dataset, backbone, views=FRESH)
    rows = torch.tensor([1, 0, 1])
    plain, fresh = found.batch(rows, torch.zeros(3, dtype=torch.long)), found.batch(rows, torch.tensor([7, 7, 8]))

    assert torch.equal(plain[0], plain[2])
    assert not torch.equal(plain[0], fresh[0])
    assert not torch.equal(fresh[0], fresh[2])
    assert torch.equal(fresh, found.batch(rows, torch.tensor([7, 7, 8])))
    in_turn = list(found.batches(rows.split(1), [torch.tensor([view]) for view in (7, 7, 8)]))
    assert torch.equal(torch.cat(in_turn), fresh)


def test_it_learns_and_keeps_nothing_but_what_it_learned(prepared, zoo, dataset, split, tmp_path):
    training, backbone = prepared(GIVEN), zoo.backbone("flat")
    curve = fit(training)
    artifact = kept(training, backbone, split, tmp_path / "prompt")

    assert curve[-1].loss < curve[0].loss
    assert {name: tuple(t.shape) for name, t in artifact.state.items()} == {
        "image_rows.1": (2, 32), "text_rows.0": (1, 32), "text_rows.2": (2, 32),
    }  # fmt: skip
    assert artifact.card["answering"] == {"prompts_per_image": 0}
    shown = images(split.test, dataset, backbone)
    own = answer_with(training.learner, class_names=split.class_names).of_examples(shown)
    assert torch.equal(answerer(artifact, backbone=backbone).of_examples(shown), own)
    plain = backbone.encode_images(shown.batch(torch.arange(3), torch.zeros(3, dtype=torch.long)))
    assert not torch.allclose(artifact.classifier.probabilities(plain), own[:3])
    files = [dataset.root / image.path for image in split.test]
    predicted = Predictor.load(tmp_path / "prompt").predict(files, top=1)
    assert [answer.labels[0] for answer in predicted] == [split.class_names[i] for i in own.argmax(1)]


def test_it_answers_with_other_classes(prepared, zoo, dataset, split, tmp_path):
    training, backbone = prepared(GIVEN), zoo.backbone("flat")
    fit(training)
    artifact = kept(training, backbone, split, tmp_path / "prompt")
    names = ["red fox", "cat"]
    found = answerer(artifact, backbone=backbone, class_names=names).of_examples(images(split.test, dataset, backbone))
    rebound = restore_learner(artifact, backbone, names).classifier().weights

    assert found.shape == (len(split.test), 2)
    assert torch.allclose(rebound[1], training.learner.classifier().weights[0], atol=1e-6)


def test_the_search_finds_a_length_for_each_layer_and_training_starts_from_it(prepared):
    training = prepared(SEARCHED)
    method = training.found

    assert len(method.image_lengths) == 2
    assert len(method.text_lengths) == 3
    assert set(method.image_lengths) <= {0, 1, 2}
    assert set(method.text_lengths) <= {0, 1, 2, 3}
    rows = {f"image_rows.{i}": n for i, n in enumerate(method.image_lengths) if n}
    rows |= {f"text_rows.{i}": n for i, n in enumerate(method.text_lengths) if n}
    assert {name: len(t) for name, t in training.learner.state_dict().items()} == rows
    assert all(t.abs().max() < 0.2 for t in training.learner.state_dict().values())  # drawn anew, not the search's


class _KilledError(Exception):
    pass


class _Killed(DecodedImages):
    """Ends the process, so to speak, when it is asked for its 5th batch: in the middle of the second epoch."""

    def batches(self, rows: Any, views: Any) -> Any:
        for pixels in super().batches(rows, views):
            if next(self.count) == 5:
                raise _KilledError
            yield pixels

    count = itertools.count(1)


def test_a_search_that_is_killed_within_an_epoch_finds_the_same(prepared, zoo, dataset, split, tmp_path, monkeypatch):
    found: list[dict[str, Tensor]] = []
    given = dpl.Params(**GIVEN)
    monkeypatch.setattr(dpl.Supernet, "found", lambda own, params: found.append(own.state_dict()) or given)
    checkpoint = Checkpoint(tmp_path / "a.safetensors", "key", every_seconds=0)
    backbone = zoo.backbone("flat")
    prepared(SEARCHED)
    with pytest.raises(_KilledError):
        prepared(SEARCHED, checkpoint=checkpoint,
                 examples=_Killed(split.train, dataset.root, backbone.transform, "cpu", FRESH, 1))  # fmt: skip
    assert read_tensors(checkpoint.of_search.path)[1]["steps"] == "4"
    prepared(SEARCHED, checkpoint=checkpoint)
    prepared(SEARCHED, checkpoint=checkpoint)  # all is done: nothing is searched again

    whole, *taken_up = found
    assert len(taken_up) == 2
    for again in taken_up:
        assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    checkpoint.remove()
    assert not list(tmp_path.glob("*.safetensors"))


def test_strict_upstream_swaps_the_towers_and_asks_the_same_images(zoo, dataset, split, monkeypatch):
    backbone, asked = zoo.backbone("flat-twin"), []
    both = {"image_candidates": 3, "text_candidates": 3, "epochs": 1, "validation_batch_size": 3}
    seen = DecodedImages.batches

    def watched(own: Any, rows: Any, views: Any) -> Any:
        asked.append([some.tolist() for some in rows])
        return seen(own, rows, views)

    monkeypatch.setattr(DecodedImages, "batches", watched)

    def lengths(strict: bool) -> tuple[Any, Any]:
        params = toy_params(zoo.architecture("flat-twin"),
                            method={"name": "dpl", "search": both, "strict_upstream": strict})  # fmt: skip
        net = dpl.supernet(params.method, backbone=backbone, task=TASK, generator=torch.Generator().manual_seed(3))
        found = net.found(params.method)
        prepare(params, split=split, backbone=backbone, examples=images(split.train, dataset, backbone),
                validation=images(split.val, dataset, backbone))  # fmt: skip
        return found.image_lengths, found.text_lengths

    assert lengths(True) == lengths(False)[::-1]
    strict, fixed = asked[1], asked[3]
    assert strict == [[0, 1, 2]] * 3
    assert len(set(itertools.chain(*fixed))) == 9  # of 12 validation images, another three each time


def test_the_teacher_keeps_answers_near_zero_shot(prepared):
    plain, held = prepared({**GIVEN}), prepared({**GIVEN, "distillation": 1000.0})
    pixels, labels = plain.examples.batch(torch.arange(4), torch.zeros(4, dtype=torch.long)), torch.zeros(4).long()
    with torch.no_grad():
        (without, logits), (with_teacher, _) = plain.learner.loss(pixels, labels), held.learner.loss(pixels, labels)
        taught = held.learner._taught(pixels)
        expected = (taught.softmax(1) * (taught.log_softmax(1) - logits.log_softmax(1))).sum() / logits.numel()

    assert (with_teacher - without).item() == pytest.approx(1000 * expected.item(), rel=1e-3)


def test_several_templates_are_averaged_as_features(zoo):
    backbone, templates = zoo.backbone("flat"), ["a photo of a {}.", "a drawing of two {} on a field."]

    def towers(texts: list[str], **more: Any) -> dpl.Towers:
        return dpl.Towers(backbone, TASK, dpl.Params(templates=texts, **more), Engine())

    each = torch.stack([towers([one]).class_weights([None] * 3) for one in templates])
    expected = torch.nn.functional.normalize(each.mean(0), dim=-1)
    torch.testing.assert_close(towers(templates).class_weights([None] * 3), expected)
    torch.testing.assert_close(towers(templates).taught(), expected)
    torch.testing.assert_close(towers(templates, strict_upstream=True).taught(), each[1])


def test_strict_upstream_averages_embeddings_and_ends_them_where_the_last_template_ends(zoo):
    backbone, templates = zoo.backbone("flat"), ["a drawing of two large {} on a field.", "a photo of a {}."]
    tower = backbone.text_tower
    found = dpl.Towers(backbone, TASK, dpl.Params(templates=templates, strict_upstream=True), Engine())
    ids = [[tower.tokenizer.tokenize(text.format(name)) for name in TASK.class_names] for text in templates]
    expected = []
    for long, last in zip(*ids, strict=True):
        rows = tower.embed(torch.tensor([long[: len(last)], last])).mean(0)
        expected.append(tower.encode(rows[None], torch.tensor([len(last)]))[0])
    expected = torch.nn.functional.normalize(torch.stack(expected), dim=-1)

    torch.testing.assert_close(found.class_weights([None] * 3), expected)
    assert found.encoder.path == "cut"


def test_little_memory_computes_images_in_pieces(zoo):
    """As many at a time as fit, each again in the backward pass."""
    tower = zoo.backbone("flat").image_tower
    assert PromptedImages(tower, Engine(max_memory=1)).together == 1
    ample = PromptedImages(tower, Engine(max_memory=10**9))
    assert PromptedImages(tower, Engine(max_memory=3 * ample.kept)).together == 3


def test_trials_judge_it_on_pixels_here_and_elsewhere(zoo, dataset, tmp_path):
    further = {"same": {"source": "toys"}, "new": {"source": "toys", "class_names": {"cat": "red fox"}}}
    params = [params_of(zoo, GIVEN, tests=further), params_of(zoo, {"name": "coop", "n_context": 2})]
    runner = TrialRunner(store_folder=tmp_path / "store", device="cpu")
    found = runner.run(params, dataset, tests={"same": dataset, "new": dataset})[0]

    assert isinstance(found, Scores)
    assert found.tests["same"]["learned"] == pytest.approx(found.accuracy, abs=0.25)
    assert 0 <= found.tests["new"]["learned"] <= 1


@pytest.mark.parametrize(
    ("name", "fault"),
    [("flat-resnet-quickgelu", "has another tower"), ("native-biased-projection-timm", "has another tower"),
     ("bert-mean-linear", "plain causal text towers"), ("native-custom-blocks", "plain causal text towers")],
)  # fmt: skip
def test_towers_of_other_blocks_are_refused(zoo, name, fault):
    with pytest.raises(PromptError, match=fault):
        dpl.build(dpl.Params(**GIVEN), backbone=zoo.backbone(name), task=TASK, generator=torch.Generator())


def test_lengths_for_another_number_of_layers_are_refused(zoo):
    with pytest.raises(PromptError, match=r"text_lengths has 2 numbers, but .* has 3 text layers"):
        dpl.build(dpl.Params(image_lengths=[1, 1], text_lengths=[1, 1]), backbone=zoo.backbone("flat"), task=TASK,
                  generator=torch.Generator())  # fmt: skip


def test_float16_is_refused(zoo):
    with pytest.raises(PromptError, match="in float16 its gradients would vanish"):
        dpl.build(dpl.Params(**GIVEN), backbone=zoo.backbone("flat"), task=TASK, generator=torch.Generator(),
                  engine=Engine(precision="float16"))  # fmt: skip


def test_lengths_of_one_tower_alone_and_a_pool_without_labels_are_refused(zoo):
    with pytest.raises(ParamsError, match="given together"):
        params_of(zoo, {"name": "dpl", "image_lengths": [1]})
    with pytest.raises(ParamsError, match="method dpl reads pixels"):
        params_of(zoo, GIVEN, split={"unlabelled": "all"})


def test_a_search_without_validation_images_says_so(zoo, dataset, split):
    backbone = zoo.backbone("flat")
    with pytest.raises(TrainingError, match="the search needs validation images"):
        prepare(params_of(zoo, SEARCHED), split=split, backbone=backbone,
                examples=images(split.train, dataset, backbone), validation=images((), dataset, backbone))  # fmt: skip


def test_a_search_whose_loss_is_no_number_ends(zoo, dataset, split, monkeypatch):
    backbone = zoo.backbone("flat")
    monkeypatch.setattr(dpl.Supernet, "loss", lambda own, pixels, labels: (own.image_alphas.sum() * float("nan")
                        + sum(p.sum() for p in own.parameters()), None))  # fmt: skip
    train, val = images(split.train, dataset, backbone), images(split.val, dataset, backbone)
    with pytest.raises(TrainingError, match="the search's loss became nan in epoch 1"):
        prepare(params_of(zoo, SEARCHED), split=split, backbone=backbone, examples=train, validation=val)


def test_what_was_learned_on_other_towers_does_not_answer(prepared, zoo, split, tmp_path):
    training = prepared(GIVEN)
    artifact = kept(training, zoo.backbone("flat"), split, tmp_path / "prompt")
    with pytest.raises(ArtifactError, match="load the backbone it was learned on"):
        answerer(artifact, backbone=zoo.backbone("flat-quickgelu"))


def test_every_stage_takes_it_from_images_to_the_record(zoo, tmp_path, monkeypatch):
    """On a tiny CLIP in place of the sample's backbone."""
    tiny = zoo.backbone("flat")
    monkeypatch.setattr(coop_core.params.sections, "load_backbone", lambda *named, **more: tiny)
    monkeypatch.setattr("coop_core.artifact.load_backbone", lambda *named, **more: tiny)
    folder = tmp_path / "project"
    paint_images(folder / "images")
    write_params(folder, method={"name": "dpl"}, split={"curve_shots": []})
    text = (folder / "params.yaml").read_text()
    own = text[text.index("method:") : text.index("train:")]
    (folder / "params.yaml").write_text(text.replace(own, f"method: {json.dumps(SEARCHED)}\n\n"))
    with working_in(folder):
        for stage in (download, split_stage, features, baselines, train, evaluate, report):
            stage.main()
        card = read_artifact(paths.PROMPT).card
        evaluation = json.loads((paths.EVALUATION / "evaluation.json").read_text())
        record = track.make_record(evaluation, track.with_metrics(paths.PROMPT, tmp_path / "prompt", evaluation))
        seen, first = Seen.from_tensors(read_tensors(paths.REFERENCE)[0]), read_split(paths.SPLIT).test[0]
        predictor = Predictor(read_artifact(paths.PROMPT), tiny, with_features=True)
        (served,) = predictor.rank(predictor.view(paths.RAW / first.path)[None])
        frozen = small(torch.from_numpy(np.load(paths.FEATURES / "test.npy")[:1, 0]))[0]

    # What it is compared with later, and what a server records: the prompted tower's feature, not the frozen one's.
    assert np.abs(served.feature - seen.features[0]).max() < 2e-3
    assert np.abs(served.feature - frozen).max() > 1e-2
    assert len(card["method"]["image_lengths"]) == 2
    assert set(card["learned"]) <= {*(f"image_rows.{i}" for i in range(2)), *(f"text_rows.{i}" for i in range(3))}
    assert "dpl" in evaluation["classifiers"]
    assert set(evaluation["class_names"]) == {name.replace("_", " ") for name in COLOURS}
    assert record.metrics["accuracy"] == evaluation["classifiers"]["dpl"]["accuracy"]

"""Sentences a class: from a dataset card or a language model's answer to the method that learns from them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_stages import paint_images, working_in, write_params
from torch.nn import functional as F

from coop_core.data.dataset import read_dataset, words
from coop_core.data.descriptions import check_descriptions, read_descriptions
from coop_core.data.split import few_shot_split, read_split, write_split
from coop_core.errors import DatasetError, PromptError, TrainingError
from coop_core.methods import Task, biomedcoop
from pipelines import paths
from pipelines.commands import cli, describe
from pipelines.stages import download

NAMES = ["river", "forest floor"]
GIVEN = {"river": ["water that flows.", "a blue line."], "forest_floor": ["leaves."]}


def check(content: object) -> object:
    return check_descriptions(content, NAMES, where="here")


def test_every_class_gets_its_sentences_in_the_order_of_labels() -> None:
    assert check(dict(reversed(GIVEN.items()))) == (("water that flows.", "a blue line."), ("leaves.",))


def test_a_sentence_that_stands_twice_is_used_once_and_told(caplog: pytest.LogCaptureFixture) -> None:
    assert check({**GIVEN, "river": ["water.", "water. "]}) == (("water.",), ("leaves.",))
    assert caplog.messages == ["here: sentences that stand twice are used once ('river')"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([], "an object of class names, each with a list of sentences, is wanted"),
        ({"river": ["water."]}, "no sentence for 'forest floor'"),
        ({**GIVEN, "river": []}, "no sentence for 'river'"),
        ({**GIVEN, "lake": ["water."]}, "no such class: 'lake'"),
        ({**GIVEN, "forest floor": ["moss."]}, "a name stands twice"),
        ({**GIVEN, "river": "water."}, "'river' has no list of sentences"),
        ({**GIVEN, "river": ["water.", 7]}, "'river' has 7 where a sentence"),
        ({**GIVEN, "river": ["  "]}, "'river' has '  ' where a sentence"),
        ({**GIVEN, "river": ["w" * 1001]}, "where a sentence of at most 1000 characters is wanted"),
        ({"lake": ["water."]}, "no sentence for 'river', 'forest floor'; no such class: 'lake'"),
    ],
)
def test_what_is_not_right_is_said(content: object, sentence: str) -> None:
    with pytest.raises(DatasetError, match=f"^here: .*{sentence}"):
        check(content)


@pytest.mark.parametrize(("text", "sentence"), [
    ("{", "are no JSON"), ('{"a": [], "a": []}', "a name stands twice"), (None, "do not exist")])  # fmt: skip
def test_a_file_that_cannot_be_read_is_a_sentence(tmp_path: Path, text: str | None, sentence: str) -> None:
    if text is not None:
        (tmp_path / "said.json").write_text(text)
    with pytest.raises(DatasetError, match=sentence):
        read_descriptions(tmp_path / "said.json")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Images with a card whose sentences stand in a file beside it."""
    paint_images(tmp_path / "images")
    write_params(tmp_path)
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    said = {name: [f"this shows {words(name)}.", f"an image of {words(name)}."] for name in names}
    (tmp_path / "said.json").write_text(json.dumps(said))
    (tmp_path / "card.yaml").write_text("name: toys\npath: images\ndescriptions: said.json\n")
    text = (tmp_path / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("source: images", "source: card.yaml"))
    return tmp_path


def test_sentences_go_from_the_card_to_the_split_and_change_the_data_sets_digest(project: Path) -> None:
    with working_in(project):
        download.main()
        dataset = read_dataset(paths.RAW)
        write_split(paths.SPLIT, few_shot_split(dataset, shots=1, seed=1, classes="new"))
        split = read_split(paths.SPLIT)

    first = dataset.class_names[0]
    assert dataset.descriptions[0] == (f"this shows {first}.", f"an image of {first}.")
    assert split.descriptions == dataset.descriptions[-len(split.class_names) :]
    assert dataset.digest != replace(dataset, descriptions=dataset.descriptions[::-1]).digest
    assert dataset.digest != replace(dataset, descriptions=()).digest


def test_a_card_whose_sentences_lack_a_class_is_refused(project: Path) -> None:
    (project / "said.json").write_text('{"nobody": ["a."]}')
    with working_in(project), pytest.raises(DatasetError, match="descriptions of toys: no sentence for "):
        download.main()


def test_the_question_names_every_class_and_its_answer_becomes_the_file(project: Path, capsys) -> None:
    with working_in(project):
        download.main()
        names = read_dataset(paths.RAW).class_names
        cli.describe(sentences=3)
        asked = capsys.readouterr().out
        (project / "answer.txt").write_text("Sure!\n```json\n" + json.dumps({n: [f"{n}."] for n in names}) + "\n```\n")
        cli.describe(project / "answer.txt")

    assert all(f"- {name}\n" in asked for name in names)
    assert "write 3 different sentences" in asked
    assert json.loads(capsys.readouterr().out) == {name: [f"{name}."] for name in names}


@pytest.mark.parametrize(
    "text", ["I cannot do that.", '{"river": ["w', '{"river": ["a."], "river": ["b."]}', "{" * 100_000]
)
def test_an_answer_without_json_is_a_sentence(text: str) -> None:
    with pytest.raises(DatasetError, match="the answer holds no whole JSON object"):
        describe.read_answer(text, NAMES)


def learner(backbone, descriptions=(("water.", "blue."), ("leaves.",)), **more):
    return biomedcoop.build(biomedcoop.Params(), backbone=backbone, task=Task(tuple(NAMES), "a {}.", descriptions),
                            generator=torch.Generator(), **more)  # fmt: skip


def test_a_data_set_without_sentences_is_refused_and_a_trained_prompt_needs_none(backbone) -> None:
    with pytest.raises(TrainingError, match="biomedcoop learns from sentences a class, and the data set has none"):
        learner(backbone, ())
    assert learner(backbone, (), state={}).logits(torch.randn(2, 24)).shape == (2, 2)


def test_a_sentence_longer_than_the_towers_context_is_refused(backbone) -> None:
    with pytest.raises(PromptError, match="but the text tower takes 40: shorten it"):
        learner(backbone, (("water " * 50,), ("leaves.",)))


def test_only_the_context_vectors_are_learned_and_kept(backbone) -> None:
    assert set(learner(backbone).state_dict()) == {"context_vectors"}


def test_classes_may_have_different_numbers_of_sentences(backbone) -> None:
    sentences = learner(backbone).sentences
    first, second = sentences.features[0], sentences.features[1, 0]
    torch.testing.assert_close(sentences.overall, torch.stack([F.normalize(first.mean(0), dim=-1), second]))
    only_second = torch.tensor([False, True])
    torch.testing.assert_close(sentences.mean(only_second), torch.stack([first[1], second]))


@pytest.mark.parametrize("scores", [[1.0], [2.0, 2.0, 2.0], [2.0, 2.0, 2.0, 9.0]])
def test_where_most_scores_are_alike_all_sentences_are_taken(scores: list[float]) -> None:
    assert biomedcoop.select(torch.tensor(scores), 1.0).all()


def test_what_nobody_agrees_with_is_left_out() -> None:
    assert biomedcoop.select(torch.tensor([1.0, 1.1, 1.2, 9.0]), 1.0).tolist() == [True, True, True, False]


def test_the_losses_beside_cross_entropy_pull_towards_the_sentences(backbone) -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(4, 24, generator=generator), torch.tensor([0, 1, 0, 1])
    own = learner(backbone)
    before = own.held_near_sentences(own.class_weights(), own.logits(images), images)
    optimiser = torch.optim.SGD(own.parameters(), lr=0.02)
    for _ in range(20):
        optimiser.zero_grad()
        loss, _ = own.loss(images, labels)
        sum(own.held_near_sentences(own.class_weights(), own.logits(images), images)).backward()
        optimiser.step()
    after = own.held_near_sentences(own.class_weights(), own.logits(images), images)
    assert loss.isfinite()
    assert sum(after) < sum(before)

"""Predictor: pictures of any kind -> an answer each, in their order; what cannot be read costs the others nothing."""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_images import paint, toy_image
from toy_prompt import write_prompt

from coop_core.artifact import read_artifact
from coop_core.errors import DatasetError
from coop_core.predictor import Prediction, Predictor

NAMES = ("cat", "sea lake", "river")


@pytest.fixture(scope="module")
def predictor(backbone, tmp_path_factory) -> Predictor:
    """Of an untrained prompt on a tiny backbone."""
    return Predictor(read_artifact(write_prompt(tmp_path_factory.mktemp("prompt"), backbone, NAMES)), backbone)


@pytest.fixture
def file(tmp_path) -> Path:
    return paint(tmp_path / "a.png", 1, size=(40, 30))


FORMS: dict[str, Callable[[Path], object]] = {
    "path as text": str,
    "bytes": Path.read_bytes,
    "an open image": Image.open,
    "an image": lambda file: toy_image(1, size=(40, 30)),
    "RGBA": lambda file: toy_image(1, size=(40, 30)).convert("RGBA"),
    "an array": lambda file: np.asarray(toy_image(1, size=(40, 30))),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_picture_is_answered_alike_in_every_form(predictor, file, form):
    assert predictor.predict([FORMS[form](file)]) == predictor.predict([file])


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "I;16"])
def test_an_image_of_any_mode_is_answered(predictor, mode):
    assert len(predictor.predict([Image.new(mode, (40, 30))])) == 1


def test_transparency_is_laid_on_white_as_when_training(predictor):
    clear, white = Image.new("RGBA", (40, 30), (0, 0, 0, 0)), Image.new("RGB", (40, 30), "white")

    assert predictor.predict([clear]) == predictor.predict([white])


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_the_same_open_image_many_times_is_answered_each_time(predictor, file):
    opened = Image.open(file)

    (alone,) = predictor.predict([file])
    for answer in predictor.predict(16 * [opened]):
        assert answer.labels == alone.labels
        assert answer.probabilities == pytest.approx(alone.probabilities)  # other batches round otherwise


@pytest.mark.parametrize("batch_size", [1, 3, 10**9])
def test_answers_come_in_the_order_of_their_images(predictor, batch_size):
    images = [toy_image(number, size=(40, 30)) for number in range(8)]
    alone = [predictor.predict([image])[0] for image in images]

    found = predictor.predict(images, batch_size=batch_size)

    assert [answer.labels for answer in found] == [answer.labels for answer in alone]
    assert [answer.probabilities[0] for answer in found] == pytest.approx([a.probabilities[0] for a in alone])


def test_no_images_have_no_answers(predictor):
    assert predictor.predict([]) == []


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no picture": (lambda folder: b"no picture", "cannot be read"),
    "missing": (lambda folder: folder / "none.png", "is missing"),
    "a sliver": (lambda folder: Image.new("RGB", (1, 4000)), "one side more than 100 times the other"),
    "floats": (lambda folder: np.zeros((4, 4)), "not of uint8"),
    "a pipe": (lambda folder: os.mkfifo(folder / "p.jpg") or folder / "p.jpg", "is no regular file"),
    "nothing": (lambda folder: None, "the image is a NoneType: give a path, a file's bytes, a PIL image or an array"),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_image_that_cannot_be_read_gets_its_fault_and_costs_the_others_nothing(predictor, file, tmp_path, kind):
    make, fault = BAD[kind]

    before, wrong, after = predictor.answers([file, make(tmp_path), file], batch_size=2)

    assert before.labels == after.labels == predictor.predict([file])[0].labels
    assert isinstance(wrong, DatasetError)
    assert fault in str(wrong)


def test_predict_raises_the_first_fault(predictor, file, tmp_path):
    with pytest.raises(DatasetError, match=r"none\.png is missing"):
        predictor.predict([file, tmp_path / "none.png", b"no picture"])


@pytest.mark.parametrize("one", ["a.png", b"abc", Path("a.png"), toy_image(0), np.zeros((4, 4, 3), np.uint8)])
def test_one_image_that_is_no_list_is_a_sentence(predictor, one):
    with pytest.raises(DatasetError, match=r"a list of images is wanted, not one: write \[image\]"):
        predictor.predict(one)


@pytest.mark.parametrize("top", [0, -1])
def test_none_is_too_few_classes_to_show(predictor, file, top):
    with pytest.raises(DatasetError, match=f"top is {top}, but counts the classes to show: give 1 or more"):
        predictor.predict([file], top=top)


def test_top_above_the_number_of_classes_shows_all(predictor, file):
    assert set(predictor.predict([file], top=99)[0].labels) == set(NAMES)


def test_a_batch_of_none_is_a_sentence(predictor, file):
    with pytest.raises(DatasetError, match="batch_size is 0: give 1 or more"):
        predictor.predict([file], batch_size=0)


def test_only_a_few_batches_are_decoded_ahead(predictor):
    """However many images there are: the iterator is asked for three batches and no more until answers are taken."""
    asked = []

    def images() -> Iterator[bytes]:
        for number in range(500):
            asked.append(number)
            buffer = io.BytesIO()
            toy_image(number).save(buffer, "PNG")
            yield buffer.getvalue()

    answers = predictor.answers(images(), batch_size=4)
    assert isinstance(next(answers), Prediction)
    assert len(asked) <= 16
    answers.close()

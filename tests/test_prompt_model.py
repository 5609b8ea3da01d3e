"""The served model: pictures in every form that callers hand over -> an answer each, or the right sentence."""

import base64
import io
import os
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import EpsImagePlugin, Image
from toy_images import toy_image
from toy_prompt import write_prompt

from pipelines.records import served

# MLflow's own, of its pages on agents; it appears once, in whichever test imports mlflow.pyfunc first.
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")

NAMES = ("cat", "sea lake", "river")


def encoded(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


RAW = encoded(toy_image(1, size=(40, 30)))
TEXT = base64.b64encode(RAW).decode()


@pytest.fixture(scope="module")
def model(backbone, tmp_path_factory) -> Iterator[Any]:
    """The product's file behind MLflow's own checks, without a registry: an untrained prompt on a tiny backbone."""
    before = dict(os.environ)
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_LOGGING_LEVEL="ERROR")
    folder = tmp_path_factory.mktemp("served")
    write_prompt(folder / "prompt", backbone, NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow.pyfunc

        mlflow.pyfunc.save_model(
            folder / "model",
            python_model=str(Path(served.__file__).with_name("prompt_model.py")),
            artifacts={"prompt": str(folder / "prompt")},
            signature=signature(),
            pip_requirements=[],
        )
        yield mlflow.pyfunc.load_model(str(folder / "model"))
    sys.modules.pop("prompt_model", None)
    os.environ.clear()
    os.environ.update(before)


def signature() -> Any:
    """As `served` logs it."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "image")]),
        params=ParamSchema([ParamSpec("top", DataType.long, 0)]),
    )


def ask(model: Any, pictures: Any, **params: Any) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                           # MLflow's, on hints and schemas
        return model.predict(pictures, params=params or None)


@pytest.fixture(scope="module")
def expected(model) -> dict[str, Any]:
    """What the picture is answered with when it comes as it should."""
    answer = ask(model, pd.DataFrame({"image": [TEXT]})).iloc[0].to_dict()
    assert set(answer["labels"]) == set(NAMES)
    assert answer["error"] == ""
    return answer


FORMS: dict[str, Any] = {
    "list of dict": [{"image": TEXT}],
    "dict of list": {"image": [TEXT]},
    "dict of str": {"image": TEXT},
    "series": pd.Series([TEXT], name="image"),
    "encodebytes": pd.DataFrame({"image": [base64.encodebytes(RAW).decode()]}),
    "carriage returns": pd.DataFrame({"image": [base64.encodebytes(RAW).decode().replace("\n", "\r\n")]}),
    "urlsafe": pd.DataFrame({"image": [base64.urlsafe_b64encode(RAW).decode()]}),
    "unpadded": pd.DataFrame({"image": [TEXT.rstrip("=")]}),
    "data URL": pd.DataFrame({"image": [f"data:image/png;base64,{TEXT}"]}),
    "extra column": pd.DataFrame({"image": [TEXT], "id": [7]}),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_is_answered_alike_in_every_form(model, expected, form):
    assert ask(model, FORMS[form]).iloc[0].to_dict() == expected


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


NOT_BASE64 = "the image is not base64 text: send the file's bytes in base64, not its path or address"
WRONG: dict[str, tuple[Any, str]] = {
    "none": (None, "the image is missing"),
    "empty": ("", "the image is empty"),
    "a path": ("photos/one.png", NOT_BASE64),
    "an address": ("https://example.org/a.png", NOT_BASE64),
    "signs": ("%%%", NOT_BASE64),
    "letters beyond ASCII": ("bücher", NOT_BASE64),
    "a text": (b64(b"no picture"), "the image cannot be read (no picture in one of the formats"),
    "EPS": (b64(encoded(toy_image(0), format="EPS")), "the image cannot be read (no picture in one of the formats"),
    "a wide one": (b64(png_header(60_000, 1)), "the image has 60000 x 1 pixels, one side more than 100 times"),
    "a sliver": (b64(encoded(Image.new("RGB", (1, 4000)))), "the image has 1 x 4000 pixels, one side more than"),
    "cut short": (b64(encoded(toy_image(0, size=(64, 64)))[:900]), "the image cannot be read (image file is truncated"),
    "damaged AVIF": (b64(encoded(toy_image(0, size=(64, 64)), format="AVIF")[:400]), "the image cannot be read ("),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_row_that_is_no_image_gets_its_reason_and_leaves_the_others_alone(model, expected, kind):
    wrong, reason = WRONG[kind]

    answers = ask(model, pd.DataFrame({"image": [TEXT, wrong, TEXT]})).to_dict("records")

    assert [answer["label"] for answer in answers] == [expected["label"], "", expected["label"]]
    assert answers[1]["error"].startswith(reason)
    assert [answer["error"] for answer in answers[::2]] == ["", ""]


def test_a_row_that_is_not_a_number_gets_its_reason(model):
    answers = ask(model, pd.DataFrame({"image": [float("nan"), TEXT]}, dtype=object))

    assert answers["error"].tolist()[1] == ""
    assert answers["error"].tolist()[0] == "the image is missing"


def test_an_eps_picture_runs_no_program(model, tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/it-ran\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)                        # as in a process that never asked

    ask(model, pd.DataFrame({"image": [WRONG["EPS"][0]]}))

    assert not (tmp_path / "it-ran").exists()


def test_transparency_is_laid_on_white_as_when_training(model):
    clear, white = Image.new("RGBA", (40, 30), (0, 0, 0, 0)), Image.new("RGB", (40, 30), "white")

    first, second = ask(model, pd.DataFrame({"image": [b64(encoded(clear)), b64(encoded(white))]}))["probabilities"]

    assert first == pytest.approx(second)


@pytest.mark.parametrize("rows", [0, 1, 70])
def test_there_are_as_many_answers_as_rows(model, rows):
    assert len(ask(model, pd.DataFrame({"image": pd.Series(rows * [TEXT], dtype=str)}))) == rows


def test_a_mapping_of_many_pictures_has_an_answer_each(model):
    assert ask(model, {"image": [TEXT, "", TEXT]})["error"].tolist() == ["", "the image is empty", ""]


def test_answers_carry_the_index_of_their_rows(model):
    assert ask(model, pd.DataFrame({"image": [TEXT, ""]}, index=[10, 20])).index.tolist() == [10, 20]


@pytest.mark.parametrize(("top", "shown"), [(0, 3), (1, 1), (2, 2), (99, 3)])
def test_top_says_how_many_classes_are_shown(model, top, shown):
    assert len(ask(model, pd.DataFrame({"image": [TEXT]}), top=top)["labels"][0]) == shown


def test_a_top_below_none_is_an_error_that_the_caller_sees(model):
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=r"top is -1, but counts the classes to answer with: give 1 or more") as f:
        ask(model, pd.DataFrame({"image": [TEXT]}), top=-1)
    assert f.value.get_http_status_code() == 400


@pytest.mark.parametrize(
    ("pictures", "sentence"),
    [
        (pd.DataFrame({"img": [TEXT]}), "Model is missing inputs"),
        (pd.DataFrame({"image": [3.5]}), r"schema '\['image': string \(required\)\]'"),
        ([TEXT], r"schema '\['image': string \(required\)\]'"),
        (np.asarray(toy_image(0)), "schema|image"),
    ],
    ids=["another column", "a number", "a list", "an array"],
)
def test_what_the_schema_refuses_names_what_is_wanted(model, pictures, sentence):
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=sentence):
        ask(model, pictures)


VALUES: dict[str, tuple[Callable[[], Any], bool]] = {
    "the file itself": (lambda: RAW, True),
    "base64 as bytes": (lambda: TEXT.encode(), True),
    "a picture": (lambda: toy_image(0), False),
    "a number": (lambda: 3.5, False),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_that_reach_the_model_without_a_schema_are_told_apart(model, expected, kind):
    make, answered = VALUES[kind]
    plain = model.unwrap_python_model()

    answer = plain.predict(None, pd.DataFrame({"image": pd.Series([make()], dtype=object)})).iloc[0]

    assert answer["label"] == (expected["label"] if answered else "")
    assert answer["error"] == ("" if answered else f"the image is given as {type(make()).__name__}, not as base64 text")

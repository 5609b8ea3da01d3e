"""The registered model as MLflow loads it: base64 images in, labels and probabilities out.

MLflow runs this file from the model's own folder, beside a copy of coop_core, so it imports nothing else of
the product; and it wants `set_model` to be called on the way.
"""

import base64
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class PromptModel(PythonModel):
    def load_context(self, context: Any) -> None:
        from coop_core.predictor import Predictor

        device = (context.model_config or {}).get("device", "cpu")
        self.predictor = Predictor.load(Path(context.artifacts["prompt"]), device=device)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Column `image` (base64 of a file, n rows) -> label, probability, labels, probabilities, error, and answer:
        the label, or None where it is not probable enough for the version's threshold.

        A row that is no image gets its reason in `error` and leaves the others alone.

        Raises
        ------
        MlflowException
            For a `top` below 0; 0 asks for all classes.
        """
        top, files = checked_top(params), files_of(model_input)
        answers = self.predictor.answers([file for file in files if isinstance(file, bytes)], top=top)
        rows = [row(next(answers) if isinstance(file, bytes) else file) for file in files]
        return pd.DataFrame(rows, columns=COLUMNS, index=files.index)


COLUMNS = ["label", "probability", "labels", "probabilities", "error", "answer"]
_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_URL_SAFE = str.maketrans("-_", "+/")


def checked_top(params: dict[str, Any] | None) -> int | None:
    """How many classes are asked for, None for all; MlflowException for a number below 0."""
    top = int((params or {}).get("top", 0))
    if top < 0:
        raise MlflowException.invalid_parameter_value(
            f"top is {top}, but counts the classes to answer with: give 1 or more, or 0 for all"
        )
    return top or None


def files_of(model_input: pd.DataFrame) -> "pd.Series[Any]":
    """The bytes of each row's file, or a sentence saying why there are none."""
    images = model_input["image"]
    if len(images) == 1 and isinstance(images.iloc[0], list):
        images = pd.Series(images.iloc[0], dtype=object)                          # how {"image": [...]} arrives
    return pd.Series([_file_bytes(value) for value in images], index=images.index, dtype=object)


def row(answer: Any) -> list[Any]:
    """A prediction, or why there is none."""
    if isinstance(answer, str | Exception):
        return ["", 0.0, [], [], str(answer), None]
    its = [list(answer.labels), list(answer.probabilities)]
    return [answer.labels[0], answer.probabilities[0], *its, "", answer.answer]


def _file_bytes(value: Any) -> bytes | str:
    """What a row holds as a file's bytes, or a sentence saying why not.

    Base64 may be wrapped in lines, URL-safe, unpadded, or behind `data:image/png;base64,`.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "the image is missing"
    if not isinstance(value, str | bytes):
        return f"the image is given as {type(value).__name__}, not as base64 text"
    if not value:
        return "the image is empty"
    if isinstance(value, bytes):
        if not value.isascii():
            return value                                                          # the file itself
        value = value.decode("ascii")
    text = "".join(_DATA_URL.sub("", value, count=1).split()).translate(_URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        return "the image is not base64 text: send the file's bytes in base64, not its path or address"


set_model(PromptModel())

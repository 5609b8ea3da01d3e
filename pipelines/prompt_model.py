"""The registered model as MLflow loads it: base64 images in, labels and probabilities out.

MLflow runs this file from the model's own folder, beside a copy of coop_core, so it imports nothing else of
the product; and it wants `set_model` to be called on the way.
"""

import base64
import binascii
import io
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from PIL import Image


class PromptModel(PythonModel):
    def load_context(self, context: Any) -> None:
        from coop_core.predictor import Predictor

        device = (context.model_config or {}).get("device", "cpu")
        self.predictor = Predictor.load(Path(context.artifacts["prompt"]), device=device)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Column `image` (base64 of a file, n rows) -> label, probability, labels, probabilities, error.

        A row that is no image gets its reason in `error` and leaves the others alone.
        """
        top = int((params or {}).get("top", 0)) or None
        decoded = [_decode(text) for text in model_input["image"]]
        images = [image for image in decoded if isinstance(image, Image.Image)]
        answers = iter(self.predictor.predict(images, top=top) if images else [])
        return pd.DataFrame([_row(image, answers) for image in decoded], columns=_COLUMNS)


_COLUMNS = ["label", "probability", "labels", "probabilities", "error"]


def _row(image: Any, answers: Any) -> list[Any]:
    if not isinstance(image, Image.Image):
        return ["", 0.0, [], [], image]
    answer = next(answers)
    return [answer.labels[0], answer.probabilities[0], list(answer.labels), list(answer.probabilities), ""]


def _decode(text: str) -> Image.Image | str:
    """The image, or a sentence saying why there is none."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
            from coop_core.images import to_rgb

            return to_rgb(image).image
    except (binascii.Error, TypeError, AttributeError):
        return "image is not base64 text"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return "image is not a readable picture"


set_model(PromptModel())

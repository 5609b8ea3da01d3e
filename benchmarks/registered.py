"""A registry in a folder: prompts -> registered versions, one of them the champion; for load and for slow tests."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coop_core.artifact import write_card
from coop_core.files import read_json
from pipelines.records.registry import CHAMPION
from pipelines.records.served import log_model
from pipelines.records.server import connected
from pipelines.settings import Settings

EARLIER = Path(__file__).parents[1] / "tests" / "registered_earlier"
"""A prompt on `mini` with three classes."""


def renamed(class_names: Sequence[str], folder: Path) -> Path:
    """The same prompt with other names for its classes, so that an answer says which of both gave it."""
    shutil.copytree(EARLIER, folder)
    write_card(folder, {**read_json(folder / "card.json"), "class_names": list(class_names)})
    return folder


def registry_settings(folder: Path, **more: Any) -> Settings:
    """Of a SQLite file of its own, with a model that has no version yet."""
    return Settings(_env_file=None, tracking_uri=f"sqlite:///{folder}/mlflow.db", registered_model="toys",
                    artifact_location=(folder / "mlruns").as_uri(), cache_folder=folder / "cache", **more)  # fmt: skip


def as_variables(settings: Settings) -> dict[str, str]:
    """For a process of its own."""
    return {"COOP_TRACKING_URI": settings.tracking_uri, "COOP_REGISTERED_MODEL": str(settings.registered_model),
            "COOP_CACHE_FOLDER": str(settings.cache_folder)}  # fmt: skip


def register(prompt: Path, settings: Settings) -> str:
    """A version as `track` makes it -> its number."""
    with connected(settings) as mlflow:
        client = mlflow.MlflowClient()
        if client.get_experiment_by_name("toys") is None:
            client.create_experiment("toys", settings.artifact_location)
        mlflow.set_experiment("toys")
        with mlflow.start_run():
            model = log_model(mlflow, prompt)
        return str(mlflow.register_model(model.model_uri, settings.registered_model).version)


def make_champion(number: str, settings: Settings) -> None:
    with connected(settings) as mlflow:
        mlflow.MlflowClient().set_registered_model_alias(settings.registered_model, CHAMPION, number)

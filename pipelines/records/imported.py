"""Imported: an artefact that was not trained here -> a registered version, with what is not known of it left open."""

from pathlib import Path

from coop_core.artifact import read_artifact
from pipelines.records.registry import CANDIDATE
from pipelines.records.served import log_model
from pipelines.records.server import Records, signs_of_life

_DESCRIPTION = """\
Imported from `{file}` (SHA-256 `{sha256}`), which holds it in {precision}. Not known: {unknown}.

No answers to test images are on record, so `coop promote` refuses it."""


def register_import(folder: Path, name: str, records: Records) -> str:
    """Register what `coop import` wrote, with the alias `candidate` -> its number."""
    card = read_artifact(folder).card
    told = card["imported"]
    tags = {"imported": told["sha256"], "method": card["method"]["name"], "code_revision": card["code_revision"],
            "backbone": card["backbone"]["architecture"]}  # fmt: skip
    with records.asked() as client:
        import mlflow

        experiment = records.find_experiment(client, records.experiment)
        run_tags = {**tags, **signs_of_life()}
        with mlflow.start_run(experiment_id=experiment, run_name=f"import-{told['file']}", tags=run_tags):
            mlflow.log_artifact(str(folder / "card.json"))
            model = log_model(mlflow, folder)
            number = str(mlflow.register_model(model.model_uri, name, tags=tags).version)
            client.update_model_version(
                name, number, description=_DESCRIPTION.format(**{**told, "unknown": ", ".join(told["unknown"])})
            )
            mlflow.set_tags({"coop.model": name, "coop.version": number})
        client.set_registered_model_alias(name, CANDIDATE, number)
    return number

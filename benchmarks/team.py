"""Team: a clone of this project with a team's servers of its own -> its commands, and what its servers know.

Its servers are those of `infra/native/topology.py`; `outages.py`, `load.py` and the test of the topology use it.
"""

import base64
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from kill_matrix import Playground

from coop_core.artifact import read_artifact
from pipelines.records.registry import fetch_prompt
from pipelines.records.server import Records, connected, pages
from pipelines.settings import Settings

PROJECT = "team"
MODEL = f"{PROJECT}-images"
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Team:
    """The topology in one folder, a clone whose workers it has, and what its commands said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.first = Playground(folder / "first")
        self.said: list[str] = []

    def topology(self, command: str, *more: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, str(self.first.folder / "infra/native/topology.py"), command]
        return self.run(self.first, *program, str(self.folder / "services"), *more)

    def up(self, *more: str) -> None:
        """Start what does not run."""
        begun = self.topology("up", "--project", PROJECT, *more)
        assert begun.returncode == 0, begun.stdout + begun.stderr

    def run(self, clone: Playground, *words: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(words, cwd=clone.folder, env=clone.environment, capture_output=True, text=True,
                               timeout=timeout)  # fmt: skip
        self.said.append(ended.stdout + ended.stderr)
        return ended

    def well(self, clone: Playground, *words: str, timeout: float = 900) -> str:
        ended = self.run(clone, *words, timeout=timeout)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def coop(self, clone: Playground, *words: str, timeout: float = 900) -> str:
        return self.well(clone, sys.executable, "-m", "pipelines.commands.cli", *words, timeout=timeout)

    def dvc(self, clone: Playground, *words: str) -> str:
        return self.well(clone, sys.executable, "-m", "dvc", *words)

    def share(self, clone: Playground) -> None:
        """Give a clone the settings of the topology, and nothing else."""
        shutil.copyfile(self.folder / "services/settings.env", clone.folder / ".env")
        shutil.copyfile(self.folder / "services/dvc.config", clone.folder / ".dvc/config.local")

    @property
    def settings(self) -> Settings:
        return Settings(_env_file=self.folder / "services/settings.env")

    @property
    def secrets(self) -> dict[str, str]:
        return json.loads((self.folder / "services/secrets.json").read_text())

    def prefect(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What Prefect's server says; a body is posted."""
        login = self.settings.prefect_api_auth
        assert login is not None
        name, _, password = login.get_secret_value().partition(":")
        with httpx.Client(auth=(name, password), trust_env=False, timeout=30) as client:
            address = f"{self.settings.prefect_api_url}/{path}"
            answer = client.get(address) if body is None else client.post(address, json=body)
        assert answer.status_code < 300, answer.text
        return answer.json()

    def begin_retraining(self) -> str:
        """Ask for a run of the deployment -> its identity."""
        name = f"{PROJECT}-retrain"
        deployment = self.prefect(f"deployments/name/{name}/{name}")
        return self.prefect(f"deployments/{deployment['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})["id"]

    def ended_run(self, identity: str, *, within: float = 400) -> dict[str, Any]:
        """A flow run when it has ended; a server that does not answer meanwhile is asked again."""
        wait_until(lambda: self.prefect(f"flow_runs/{identity}")["state"]["type"] in ENDED, within)
        return self.prefect(f"flow_runs/{identity}")

    def retrain(self) -> dict[str, Any]:
        """A run of the deployment to its end."""
        return self.ended_run(self.begin_retraining())

    def champion(self) -> str | None:
        with connected(self.settings) as mlflow:
            found = mlflow.MlflowClient().search_registered_models(f"name = '{MODEL}'")
            return dict(found[0].aliases).get("champion") if found else None

    def versions(self) -> list[Any]:
        """Of the model, each of which was fetched and read whole."""
        with connected(self.settings) as mlflow:
            found = list(mlflow.MlflowClient().search_model_versions(f"name = '{MODEL}'"))
        for version in found:
            with tempfile.TemporaryDirectory() as target:
                read_artifact(fetch_prompt(f"{MODEL}/{version.version}", Records(self.settings), Path(target)))
        return found

    def runs(self, wanted: str) -> list[Any]:
        """Runs of every experiment that the filter lets through."""
        with connected(self.settings) as mlflow:
            client = mlflow.MlflowClient()
            experiments = [experiment.experiment_id for experiment in client.search_experiments()]
            return [run for number in experiments for run in pages(client, number, wanted)]

    def ask(self, client: httpx.Client) -> httpx.Response:
        """One picture, answered by the champion."""
        token = self.settings.serve_token
        assert token is not None
        image = next((self.first.folder / "images").rglob("*.png")).read_bytes()
        body = {"dataframe_split": {"columns": ["image"], "data": [[base64.b64encode(image).decode()]]}}
        return client.post(f"http://127.0.0.1:{self.settings.serve_port}/invocations", json=body,
                           headers={"Authorization": f"Bearer {token.get_secret_value()}"})  # fmt: skip


def wait_until(fulfilled: Callable[[], Any], seconds: float) -> None:
    """Ask twice a second; whoever does not answer is asked again.

    Raises
    ------
    TimeoutError
        When the time is over.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if fulfilled():
                return
        except Exception:  # a server on its way down or up
            pass
        time.sleep(0.5)
    raise TimeoutError(f"not fulfilled in {seconds:.0f} s")

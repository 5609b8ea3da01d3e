"""`python -m pipelines.flows.deploying`: infra/prefect.yaml, under this project's names -> deployments on the server.

The server is PREFECT_API_URL's, or that of the settings.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from coop_core.errors import ServiceError
from coop_core.files import write_json
from pipelines import console
from pipelines.environment import inherited_environment, prefect_access
from pipelines.flows.names import on_server
from pipelines.settings import load_settings

_DEPLOYMENTS = Path("infra/prefect.yaml")


def deploy() -> None:
    """Make or change every deployment; again changes nothing.

    Raises
    ------
    ServiceError
        With Prefect's last words.
    """
    if not _DEPLOYMENTS.exists():
        raise ServiceError(f"there is no {_DEPLOYMENTS} in {Path.cwd()}: run this in the project's folder")
    settings = load_settings()
    placeholders = {"COOP_PROJECT": str(Path.cwd()), "COOP_RETRAIN_CRON": settings.retrain_cron,
                    "COOP_WATCH_CRON": settings.watch_cron, "COOP_WATCH_ACTIVE": settings.watch_active}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prefect.yaml"
        write_json(file, under_project(YAML(typ="safe").load(_DEPLOYMENTS.read_text(encoding="utf-8"))))  # YAML as well
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        environment = inherited_environment() | prefect_access() | placeholders
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        said = [line.strip() for line in (ended.stdout + ended.stderr).splitlines() if line.strip()]
        raise ServiceError(f"the flows could not be deployed: {(said or ['no message'])[-1][:300]}")


def under_project(tree: dict[str, Any]) -> dict[str, Any]:
    """infra/prefect.yaml's content, with deployments and pools as this project calls them."""

    def named(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "name": on_server(part["name"])}

    found = [{**named(one), "work_pool": named(one["work_pool"])} for one in tree["deployments"]]
    return {**tree, "deployments": found}


if __name__ == "__main__":
    console.run(deploy)

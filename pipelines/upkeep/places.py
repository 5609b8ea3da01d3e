"""Settings, and the environment of servers where they run here -> what there is to keep, and where it lies.

On one machine: MLflow's and Prefect's SQLite files, the files of runs, DVC's own storage, and this checkout's state.
Where the variables that start a team's servers are set, the databases and the bucket that they name.
"""

from configparser import ConfigParser
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sqlalchemy.engine import URL

from coop_core.errors import ServiceError
from pipelines import paths
from pipelines.environment import server_variables
from pipelines.settings import Settings, is_own
from pipelines.upkeep import bucket, databases

MLFLOW, PREFECT, USERS = "mlflow", "prefect", "users"
STATE = (paths.PARAMS, Path("dvc.lock"), Path("data.dvc"), paths.TRACKED)
SECRET = (Path(".env"), Path(".dvc/config.local"))
STORAGE = Path(".dvc-storage")


@dataclass(frozen=True)
class Places:
    databases: dict[str, URL] = field(default_factory=dict)
    """By what they are for."""
    artifacts: list[str] = field(default_factory=list)
    """Where MLflow's server keeps files for its clients: an s3:// address or a folder."""


def find_places(settings: Settings) -> Places:
    """Where this machine's records are, or where they belong.

    Raises
    ------
    ServiceError
        When MLflow's records are a server's, and nothing here says where it keeps them.
    """
    given = server_variables()
    found = {PREFECT: databases.parse(given.get(PREFECT) or _sqlite(settings.services_folder / "prefect/prefect.db"))}
    if MLFLOW in given:
        found[MLFLOW] = databases.parse(given[MLFLOW])
        if USERS in given:
            found[USERS] = databases.parse(_users(Path(given[USERS])))
    elif not settings.tracking_uri.startswith("http"):
        found[MLFLOW] = databases.parse(settings.tracking_uri)
    elif is_own(settings.tracking_uri, settings.mlflow_port):
        found[MLFLOW] = databases.parse(_sqlite(Path("mlflow.db")))
    else:
        raise ServiceError(f"MLflow's records are with the server at {settings.tracking_uri}: on its machine, with the "
                           "variables that it is started with (MLFLOW_BACKEND_STORE_URI and "
                           "MLFLOW_ARTIFACTS_DESTINATION), the same command keeps them")  # fmt: skip
    for name, url in found.items():
        if url.get_backend_name() == "sqlite":
            found[name] = url.set(database=str(Path(str(url.database)).absolute()))
    return Places(found, [given["artifacts"]] if "artifacts" in given else [])


def roots(places: Places, records: URL) -> list[str]:
    """Where files of runs lie: folders and s3:// addresses, none below another; `records` is MLflow's database."""
    own = Path(str(places.databases[MLFLOW].database)).parent / "mlruns"
    told = [*places.artifacts, *databases.column(records, "experiments", "artifact_location")]
    if records.get_backend_name() == "sqlite":
        told.append(str(own))
    found = {place if bucket.is_bucket(place) else as_folder(place) for place in told}
    kept = sorted(place for place in found if place)
    return [one for one in kept if not any(one != other and one.startswith(f"{other}/") for other in kept)]


def as_folder(place: str) -> str:
    """A file: address, or a path, as a path; "" for what a server keeps (mlflow-artifacts:)."""
    parts = urlsplit(place)
    return unquote(parts.path).rstrip("/") if parts.scheme in ("", "file") else ""


def _sqlite(file: Path) -> str:
    return f"sqlite:///{file.absolute()}"


def _users(file: Path) -> str:
    """The database of users in the file of MLFLOW_AUTH_CONFIG_PATH."""
    parser = ConfigParser()
    parser.read(file)
    return parser.get("mlflow", "database_uri", fallback=_sqlite(Path("basic_auth.db")))

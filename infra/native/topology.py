"""The topology of a team as plain processes on loopback: `python infra/native/topology.py up|status|down FOLDER`.

`install FOLDER` brings PostgreSQL (root on Debian) and Swift, where they are missing; `up` brings Swift by itself.

    PostgreSQL          records of Prefect and MLflow
    OpenStack Swift     an S3 store: files of runs, DVC's remote, sources of data sets
    MLflow's server     with logins; it passes files on to the store
    Prefect's server    with a login
    workers             one of the pool cpu, two of the pool gpu or as many as --gpu-workers says
    coop serve          answers as the champion

It is given in the project's folder, with the project's Python. FOLDER keeps everything: records, files, logs, and the
secrets, which are made at the first start and readable by its user alone. `FOLDER/settings.env` is the `.env` of a
clone that shares all this, and `FOLDER/dvc.config` its `.dvc/config.local`. No TLS, no second machine: for trying
out, for tests, and to read what a team's own servers need.
"""

import argparse
import json
import os
import secrets as random
import sys
from collections.abc import Mapping
from pathlib import Path

import database
import store
from keeping import Keeper, answers, free_ports, python, run

from coop_core.errors import CoopError, ServiceError
from pipelines.environment import inherited_environment, service_environment
from pipelines.logins import write_private

SERVERS = ("postgresql", "s3", *store.KINDS, "mlflow", "prefect", "serve")
SECRETS = ("postgres", *database.DATABASES, "swift", "s3", "login_mlflow", "login_prefect", "forms", "serve")
BUCKETS = ("coop-mlflow", "coop-dvc", "coop-data")
USER = "coop"


def up(folder: Path, *, project: str | None, gpu_workers: int = 2) -> None:
    """Start what does not run, in order, and wait until all is well; again repairs what is missing."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    keeper, ports, secrets = Keeper(folder), _ports(folder), _secrets(folder)
    here = Path.cwd()
    database.start(keeper, port=ports["postgresql"], secrets=secrets, cwd=here)
    store.start(keeper, ports=ports, secrets=secrets, buckets=BUCKETS, cwd=here)
    _start_mlflow(keeper, ports, secrets)
    _start_prefect(keeper, ports, secrets)
    settings = _settings(ports, secrets, project)
    write_private(folder / "settings.env", "".join(f"{name}={value}\n" for name, value in settings.items()))
    write_private(folder / "dvc.config", _dvc_settings(ports, secrets))
    keeper.wait("mlflow", lambda: answers(_address(ports, "mlflow") + "/health"))
    keeper.wait("prefect", lambda: answers(_address(ports, "prefect") + "/api/health"))
    _start_workers(keeper, ports, settings, gpu_workers)
    keeper.wait("serve", lambda: answers(_address(ports, "serve") + "/health"))


def status(folder: Path) -> bool:
    """Show every process -> whether all run."""
    keeper, ports = Keeper(folder), _ports(folder)
    well = bool(keeper.names())
    for name in keeper.names():
        process = keeper.find(name)
        well &= process is not None
        _say(f"{name:14} {f'process {process.pid}' if process else 'ended'}  {keeper.log(name)}")
    for name in ("mlflow", "prefect", "serve", "s3"):
        _say(f"{name:14} {_address(ports, name)}")
    return well


def _ports(folder: Path) -> dict[str, int]:
    """Chosen at the first start and kept, because clones have the addresses."""
    file = folder / "ports.json"
    if not file.exists():
        file.write_text(json.dumps(dict(zip(SERVERS, free_ports(len(SERVERS)), strict=True))))
    return json.loads(file.read_text())


def _secrets(folder: Path) -> dict[str, str]:
    file = folder / "secrets.json"
    if not file.exists():
        write_private(file, json.dumps({name: random.token_hex(16) for name in SECRETS}))
    return json.loads(file.read_text())


def _address(ports: Mapping[str, int], name: str) -> str:
    return f"http://127.0.0.1:{ports[name]}"


def _start_mlflow(keeper: Keeper, ports: Mapping[str, int], secrets: Mapping[str, str]) -> None:
    """With its records and its users in PostgreSQL, and files in the store, whose keys no client needs."""
    base = f"postgresql+psycopg://mlflow:{secrets['mlflow']}@127.0.0.1:{ports['postgresql']}"
    users = keeper.folder / "mlflow-users.ini"
    write_private(users, f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {base}/mlflow_users\n"
                         "auth_cache_ttl_seconds = 300\n")  # fmt: skip
    environment = inherited_environment() | _driver(keeper.folder) | {
        "MLFLOW_BACKEND_STORE_URI": f"{base}/mlflow", "MLFLOW_AUTH_CONFIG_PATH": str(users),
        "MLFLOW_AUTH_ADMIN_USERNAME": USER, "MLFLOW_AUTH_ADMIN_PASSWORD": secrets["login_mlflow"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets["forms"], "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": store.KEY, "AWS_SECRET_ACCESS_KEY": secrets["s3"],
        "AWS_ENDPOINT_URL_S3": _address(ports, "s3"),
    }  # fmt: skip
    hosts = ",".join(f"{host}:{ports['mlflow']}" for host in ("127.0.0.1", "localhost"))
    keeper.start("mlflow", python("-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1",
                                  "--port", str(ports["mlflow"]), "--workers", "1", "--allowed-hosts", hosts,
                                  "--artifacts-destination", f"s3://{BUCKETS[0]}/files"),
                 environment, cwd=keeper.folder)  # fmt: skip


def _driver(folder: Path) -> dict[str, str]:
    """PostgreSQL's driver for Python, where the project's extra `server` is not installed."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        place = folder / "driver"
        if not place.exists():
            pins = [line for line in Path("constraints.txt").read_text().splitlines() if line.startswith("psycopg")]
            run(python("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(place), *pins))
        return {"PYTHONPATH": os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")]))}
    return {}


def _start_prefect(keeper: Keeper, ports: Mapping[str, int], secrets: Mapping[str, str]) -> None:
    base = f"postgresql+asyncpg://prefect:{secrets['prefect']}@127.0.0.1:{ports['postgresql']}"
    environment = inherited_environment() | _service(keeper.folder, ports) | {
        "PREFECT_API_DATABASE_CONNECTION_URL": f"{base}/prefect",
        "PREFECT_SERVER_API_AUTH_STRING": f"{USER}:{secrets['login_prefect']}",
    }  # fmt: skip
    keeper.start("prefect", python("-m", "prefect", "server", "start", "--host", "127.0.0.1",
                                   "--port", str(ports["prefect"])), environment, cwd=keeper.folder)  # fmt: skip


def _service(folder: Path, ports: Mapping[str, int]) -> dict[str, str]:
    """What Prefect's server and the workers of `make up` have as well."""
    return service_environment(folder, prefect_api_url=_address(ports, "prefect") + "/api",
                               tracking_uri=_address(ports, "mlflow"))  # fmt: skip


def _settings(ports: Mapping[str, int], secrets: Mapping[str, str], project: str | None) -> dict[str, str]:
    """The `.env` of whoever shares these servers."""
    return {
        **({"COOP_PROJECT_NAME": project} if project else {}),
        "COOP_TRACKING_URI": _address(ports, "mlflow"),
        "COOP_TRACKING_USERNAME": USER,
        "COOP_TRACKING_PASSWORD": secrets["login_mlflow"],
        "COOP_PREFECT_API_URL": _address(ports, "prefect") + "/api",
        "COOP_PREFECT_API_AUTH": f"{USER}:{secrets['login_prefect']}",
        "COOP_S3_ENDPOINT_URL": _address(ports, "s3"),
        "COOP_S3_ACCESS_KEY_ID": store.KEY,
        "COOP_S3_SECRET_ACCESS_KEY": secrets["s3"],
        "COOP_SERVE_PORT": str(ports["serve"]),
        "COOP_SERVE_TOKEN": secrets["serve"],
    }


def _dvc_settings(ports: Mapping[str, int], secrets: Mapping[str, str]) -> str:
    keys = f"    access_key_id = {store.KEY}\n    secret_access_key = {secrets['s3']}\n    region = us-east-1\n"
    return (f"['remote \"storage\"']\n    url = s3://{BUCKETS[1]}/dvc\n    endpointurl = {_address(ports, 's3')}\n"
            + keys)  # fmt: skip


def _start_workers(keeper: Keeper, ports: Mapping[str, int], settings: Mapping[str, str], gpu_workers: int) -> None:
    """Pools and deployments, then the workers and the champion's server, all in the project's folder."""
    login = {"PREFECT_API_AUTH_STRING": settings["COOP_PREFECT_API_AUTH"]}
    environment = inherited_environment() | _service(keeper.folder, ports) | dict(settings) | login
    run(python("-m", "pipelines.flows.bootstrap", settings["COOP_PREFECT_API_URL"]), environment=environment,
        cwd=Path.cwd())  # fmt: skip
    prefix = f"{settings['COOP_PROJECT_NAME']}-" if "COOP_PROJECT_NAME" in settings else ""
    workers = {"worker-cpu": "cpu", **{f"worker-gpu-{number}": "gpu" for number in range(gpu_workers)}}
    for name, pool in workers.items():
        command = python("-m", "prefect", "worker", "start", "--pool", prefix + pool, "--type", "process",
                         "--name", name, "--install-policy", "never",
                         *(("--limit", "1") if pool == "gpu" else ()))  # fmt: skip
        named = {"SUPERVISOR_PROCESS_NAME": name}  # so that trainers of two workers have logs of their own
        keeper.start(name, command, environment | named, cwd=Path.cwd())
    keeper.start("serve", python("-m", "pipelines.commands.cli", "serve"), environment, cwd=Path.cwd())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=("install", "up", "status", "down"))
    parser.add_argument("folder", type=lambda given: Path(given).absolute(), metavar="FOLDER")
    parser.add_argument("--project", help="as COOP_PROJECT_NAME: begins the names of pools, flows and models")
    parser.add_argument("--gpu-workers", type=int, default=2, metavar="N", help="each takes one run at a time")
    asked = parser.parse_args()
    try:
        if asked.command in ("status", "down") and not asked.folder.is_dir():
            raise ServiceError(f"there is nothing at {asked.folder}: `up` makes it")
        if asked.command == "down":
            _say("ended: " + (", ".join(Keeper(asked.folder).end()) or "nothing, for nothing runs"))
            return 0
        if asked.command == "install":
            asked.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            database.install()
            store.install(asked.folder)
            return 0
        if asked.command == "up":
            if not Path("dvc.yaml").exists():
                raise ServiceError(f"{Path.cwd()} is not the project's folder: give this command there")
            up(asked.folder, project=asked.project, gpu_workers=asked.gpu_workers)
        return 0 if status(asked.folder) else 1
    except CoopError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())

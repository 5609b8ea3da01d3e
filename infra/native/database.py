"""Database: the distribution's PostgreSQL -> a cluster in a folder, on loopback, with a database a server.

PostgreSQL runs as no root, so for root it is the user `postgres`, who is let through closed folders to its own.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from keeping import Keeper, run

from coop_core.errors import ServiceError

DATABASES = {"prefect": ("prefect",), "mlflow": ("mlflow", "mlflow_users")}
"""Role -> its databases."""


def find_programs() -> Path:
    """The folder with initdb and postgres, the newest version of the distribution first.

    Raises
    ------
    ServiceError
        Where there is none.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    own = shutil.which("initdb")
    if own is None:
        raise ServiceError("there is no PostgreSQL here: install it, on Debian by `apt-get install postgresql`")
    return Path(own).parent


def install() -> None:
    """From the distribution, where it is missing and this is root on Debian.

    Raises
    ------
    ServiceError
        Where that is not so, or apt-get fails.
    """
    try:
        find_programs()
    except ServiceError:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        run(["apt-get", "install", "-y", "--no-install-recommends", "postgresql"], environment=quiet)
        find_programs()


def start(keeper: Keeper, *, port: int, secrets: Mapping[str, str], cwd: Path) -> None:
    """Make the cluster, its roles and databases where they are missing, and run the server."""
    programs, data = find_programs(), keeper.folder / "postgresql"
    as_user = _as_user()
    if not (data / "PG_VERSION").exists():
        data.mkdir(mode=0o700, exist_ok=True)
        if as_user:
            shutil.chown(data, "postgres", "postgres")
        run([*as_user, str(programs / "initdb"), "-D", str(data), "-U", "postgres", "--auth=scram-sha-256",
             "--pwfile=/dev/stdin", "--encoding=UTF8", "--locale=C.UTF-8"],
            told=secrets["postgres"] + "\n")  # fmt: skip
    keeper.start("postgresql", [*as_user, str(programs / "postgres"), "-D", str(data), "-p", str(port),
                                "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="],
                 os.environ, cwd=cwd)  # fmt: skip
    keeper.wait("postgresql", lambda: _accepts(programs, port))
    _make_databases(programs, port, secrets)


def _accepts(programs: Path, port: int) -> bool:
    """Whether it takes connections; after a crash it listens first and recovers then."""
    asked = [str(programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    return subprocess.run(asked, check=False).returncode == 0


def _as_user() -> list[str]:
    if os.geteuid() != 0:
        return []
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups",
            "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "--no-new-privs"]  # fmt: skip


def _make_databases(programs: Path, port: int, secrets: Mapping[str, str]) -> None:
    """Through standard input and the environment, so that no password stands in the list of processes."""
    environment = os.environ | {"PGPASSWORD": secrets["postgres"]}
    psql = [str(programs / "psql"), "-h", "127.0.0.1", "-p", str(port), "-U", "postgres",
            "-At", "-v", "ON_ERROR_STOP=1"]  # fmt: skip
    there = set(run(psql, told="SELECT datname FROM pg_database", environment=environment).split())
    for role, databases in DATABASES.items():
        if not set(databases) <= there:
            lines = [f"CREATE ROLE {role} LOGIN PASSWORD '{secrets[role]}';",
                     *(f"CREATE DATABASE {database} OWNER {role};" for database in databases)]  # fmt: skip
            run(psql, told="\n".join(lines), environment=environment)

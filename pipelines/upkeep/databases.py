"""A database's address -> a copy of all it holds, while it is in use; and back, at another place perhaps.

SQLite by its own backup interface; PostgreSQL by pg_dump and pg_restore, which lie beside its client. A password goes
to them in their environment, never on a command line.
"""

import sqlite3
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import MetaData, String, create_engine, func, inspect, literal, select, update
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from coop_core.errors import ServiceError
from pipelines.environment import inherited_environment


def parse(address: str) -> URL:
    """An address as SQLAlchemy has it: sqlite:///FILE or postgresql://...

    Raises
    ------
    ServiceError
        For another kind of database; the address is not shown, because it may hold a password.
    """
    try:
        url = make_url(address)
    except ArgumentError:
        raise ServiceError("a database's address cannot be read: write postgresql://NAME:PASSWORD@HOST:5432/DATABASE"
                           ) from None  # fmt: skip
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise ServiceError(f"a database is of {url.get_backend_name()}: only SQLite and PostgreSQL can be kept here")
    return url


def dump(url: URL, target: Path) -> None:
    """Write a copy of the database into a file, as it was at one moment.

    Raises
    ------
    ServiceError
    """
    if url.get_backend_name() == "postgresql":
        _run(["pg_dump", "--format=custom", "--no-owner", f"--file={target}"], url)
        return
    if not Path(str(url.database)).exists():
        raise ServiceError(f"there is no database {url.database}")
    place = f"{Path(str(url.database)).absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(place, uri=True)) as source, closing(sqlite3.connect(target)) as copy:
        source.backup(copy)


def load(source: Path, url: URL) -> None:
    """Put what `dump` wrote into a database of PostgreSQL, in place of what it holds; all of it or nothing.

    Raises
    ------
    ServiceError
    """
    _run(["pg_restore", "--clean", "--if-exists", "--no-owner", "--single-transaction", "--exit-on-error",
          f"--dbname={url.database}", str(source)], url)  # fmt: skip


def is_empty(url: URL) -> bool:
    """Whether a database has no table yet.

    Raises
    ------
    ServiceError
        When it does not answer.
    """
    with _engine(url) as engine:
        return not inspect(engine).get_table_names()


def column(url: URL, table: str, name: str) -> list[str]:
    """The distinct values of a column."""
    with _engine(url) as engine, engine.connect() as connection:
        found = MetaData()
        found.reflect(engine, only=[table])
        values = connection.execute(select(found.tables[table].c[name]).distinct())
        return sorted(str(value) for (value,) in values if value)


def relocate(url: URL, moved: Mapping[str, str]) -> int:
    """Write new places for old ones into every column of text -> how many values changed.

    MLflow's records hold the places of files as whole addresses in more tables than one release tells. A value is
    changed where it is the old place or goes on from it with a slash, and nowhere else.
    """
    changed = 0
    with _engine(url) as engine, engine.begin() as connection:
        tables = MetaData()
        tables.reflect(engine)
        for table in tables.sorted_tables:
            for one in table.columns:
                if not isinstance(one.type, String):
                    continue
                for old, new in moved.items():
                    rest = func.substr(one, len(old) + 1)
                    is_there = (func.substr(one, 1, len(old)) == old) & func.substr(rest, 1, 1).in_(["", "/"])
                    command = update(table).where(is_there).values({one: literal(new) + rest})
                    changed += connection.execute(command).rowcount
    return changed


@contextmanager
def _engine(url: URL) -> Iterator[Engine]:
    """An engine that leaves no connection open; its faults are sentences."""
    driver = "postgresql+psycopg" if url.get_backend_name() == "postgresql" else "sqlite"
    try:
        engine = create_engine(url.set(drivername=driver))
    except ModuleNotFoundError as error:
        raise ServiceError(f"PostgreSQL needs the Python module {error.name}: python -m pip install "
                           "-c constraints.txt -e '.[server]'") from None  # fmt: skip
    try:
        yield engine
    except SQLAlchemyError as error:
        reason = " ".join(str(getattr(error, "orig", error)).split())[:200]
        secret = str(url.password) if url.password else None
        raise ServiceError(f"the database {shown(url)} says: {reason.replace(secret, '***') if secret else reason}"
                           ) from None  # fmt: skip
    finally:
        engine.dispose()


def shown(url: URL) -> str:
    """The address without its password."""
    return url.render_as_string(hide_password=True)


def _run(command: Sequence[str], url: URL) -> None:
    """A program of PostgreSQL's, which finds the server in its environment."""
    told = {"PGHOST": url.host, "PGPORT": url.port, "PGUSER": url.username, "PGPASSWORD": url.password,
            "PGDATABASE": url.database, "PGSSLMODE": url.query.get("sslmode"), "PGCONNECT_TIMEOUT": 10}  # fmt: skip
    environment = inherited_environment() | {name: str(value) for name, value in told.items() if value}
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        raise ServiceError(f"{command[0]} is not on this machine: install PostgreSQL's client (Debian: "
                           "postgresql-client), as new as its server") from None  # fmt: skip
    if ended.returncode:
        said = " ".join(ended.stderr.split())[:300]
        raise ServiceError(f"{command[0]} failed for {shown(url)}: {said}")

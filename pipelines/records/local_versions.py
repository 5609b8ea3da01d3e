"""A registered version in MLflow's SQLite file -> the folder of its files, without MLflow.

Importing MLflow takes longer than answering an image. Where the file has the tables of the MLflow that is pinned, and
the version's files lie on this machine, two queries say where; all else, and every fault, is left to MLflow's client.
"""

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from pipelines.settings import Settings, store_address

SCHEMA = "dc11669786a5"
"""What the pinned MLflow calls the tables that these queries know."""
_PREFIX = "sqlite:///"
_VERSION = "SELECT version FROM registered_model_aliases WHERE workspace = 'default' AND name = ? AND alias = ?"
_PLACE = ("SELECT coalesce(storage_location, source) FROM model_versions WHERE workspace = 'default' AND name = ? "
          "AND version = ? AND current_stage != 'Deleted_Internal' AND status = 'READY'")  # fmt: skip


def find_locally(reference: str, settings: Settings) -> Path | None:
    """`name@alias` or `name/version` -> its model's folder; None where MLflow's client has to be asked."""
    match = re.fullmatch(r"(?:models:/)?([^/@:\s]+)(?:@([^/@:\s]+)|/(\d+))", reference)
    file = Path(store_address(settings).removeprefix(_PREFIX))
    if match is None or not store_address(settings).startswith(_PREFIX) or not file.is_file():
        return None
    try:
        with closing(sqlite3.connect(f"file:{quote(str(file.absolute()))}?mode=ro", uri=True)) as database:
            if database.execute("SELECT version_num FROM alembic_version").fetchall() != [(SCHEMA,)]:
                return None
            name, alias, number = match.groups()
            found = database.execute(_VERSION, (name, alias)).fetchone() if alias else (int(number),)
            place = database.execute(_PLACE, (name, found[0])).fetchone() if found else None
    except sqlite3.Error:
        return None
    folder = _local(place[0]) if place else None
    return folder if folder is not None and folder.is_dir() else None


def _local(place: str) -> Path | None:
    """An absolute path or a file: address of this machine."""
    if place.startswith("/"):
        return Path(place)
    parts = urlsplit(place)
    return Path(unquote(parts.path)) if (parts.scheme, parts.netloc) == ("file", "") else None

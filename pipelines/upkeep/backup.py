"""All records of this machine, or of a team's servers -> one file, while they are in use or not.

Databases come first, then the files that they tell of: a run or a version that is on record has its files already.
Not in it: images, image features, and what `dvc pull` or `dvc repro` makes again; the login, which `make up` makes.
"""

import socket
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from pipelines.settings import Settings
from pipelines.upkeep import archive, bucket, databases
from pipelines.upkeep.archive import Writer
from pipelines.upkeep.places import MLFLOW, SECRET, STATE, STORAGE, Places, find_places, roots


def backup(settings: Settings, file: Path, *, secrets: bool) -> list[str]:
    """Write the archive -> what is in it, and where that was; `secrets` takes .env and DVC's local settings as well.

    Raises
    ------
    ServiceError
        When a database or a bucket does not answer, or a program is missing.
    ArtifactError
        When there is a file of that name.
    """
    places, project = find_places(settings), Path.cwd()
    file.parent.mkdir(parents=True, exist_ok=True)
    with archive.writing(file) as out:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".backup-") as folder:
            kinds, found = _databases(out, places, Path(folder))
        for number, root in enumerate(found):
            _files(out, f"files/{number}", root)
        out.add_folder("storage", STORAGE)
        taken = [name for name in (*STATE, *(SECRET if secrets else ())) if name.exists()]
        for name in taken:
            out.add(f"project/{name}", name)
        out.finish({
            "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "host": socket.gethostname(), "project": str(project),
            "databases": kinds, "roots": found,
            "versions": {name: version(name) for name in ("mlflow", "prefect")},
        })  # fmt: skip
    shown = [f"{name}: {databases.shown(places.databases[name])}" for name in kinds]
    storage = [f"DVC's storage: {STORAGE}"] if STORAGE.is_dir() else []
    return [*shown, *(f"files: {root}" for root in found), *storage, f"project: {', '.join(map(str, taken))}"]


def _databases(out: Writer, places: Places, folder: Path) -> tuple[dict[str, str], list[str]]:
    """-> the kind of each database there is, and the places of files that MLflow's tells of."""
    kinds, records = {}, places.databases[MLFLOW]
    for name, url in places.databases.items():
        kind = url.get_backend_name()
        if name != MLFLOW and kind == "sqlite" and not Path(str(url.database)).exists():
            continue  # no `make up` yet
        databases.dump(url, folder / name)
        out.add(f"databases/{name}", folder / name)
        kinds[name] = kind
    if records.get_backend_name() == "sqlite":
        records = records.set(database=str(folder / MLFLOW))
    return kinds, roots(places, records)


def _files(out: Writer, name: str, root: str) -> None:
    if bucket.is_bucket(root):
        bucket.each(root, lambda key, stream, size: out.stream(f"{name}/{key}", stream, size))
    else:
        out.add_folder(name, Path(root))

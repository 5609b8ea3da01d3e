"""An archive of `coop backup` -> everything where it belongs here, whatever the old machine and folder were called.

MLflow's records hold places as whole addresses, so those are written anew. First the whole archive is read and
checked, then a person is asked about what is there already, then it is put in place; what was there is moved aside.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from coop_core.errors import ArtifactError, ServiceError
from pipelines import paths
from pipelines.services import supervision
from pipelines.settings import Settings
from pipelines.upkeep import archive, bucket, databases
from pipelines.upkeep.places import MLFLOW, SECRET, STORAGE, find_places


@dataclass(frozen=True)
class Restored:
    facts: dict[str, Any]
    """What the archive says of itself."""
    put: list[str]
    """Where everything is now."""
    aside: Path | None
    """The folder with what was there before."""
    changed: int
    """Addresses in MLflow's records that were written anew."""
    notes: list[str]


@dataclass(frozen=True)
class _Plan:
    """Where everything goes."""

    urls: dict[str, Any]
    """Databases, by what they are for."""
    roots: dict[str, str]
    """Old places of files -> new ones, in order."""
    local: dict[Path, Path]
    """What is unpacked -> where it goes."""


def restore(settings: Settings, file: Path, *, agree: Callable[[Sequence[str]], bool]) -> Restored:
    """Put an archive in place; `agree` is asked about what is there already, and moved aside or written over.

    Raises
    ------
    ArtifactError
        When the archive is damaged, or of another kind of place; nothing was changed.
    ServiceError
        When services run here, a database or bucket does not answer, or nobody agreed.
    """
    if supervision.connect(settings.services_folder.absolute()) is not None:
        raise ServiceError("the services run here: `make down`, then restore")
    facts = archive.read_facts(file)
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".restore-") as folder:
        unpacked = Path(folder)
        _unpack(file, unpacked, facts["roots"])
        _rewrite(unpacked / "project", facts["project"])
        own = unpacked / "project/.env"
        if own.exists() and not Path(".env").exists():
            settings = Settings(_env_file=str(own))
        plan = _plan(settings, facts, unpacked)
        _ask(plan, agree)
        changed = _relocate_unpacked(plan, facts, unpacked)
        changed += _fill_servers(plan, facts, file, unpacked)
        settings.services_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = _put(plan.local)
    put = [f"{name}: {databases.shown(url)}" for name, url in plan.urls.items()]
    put += [f"files: {new}" for new in plan.roots.values()]
    return Restored(facts, put, aside, changed, _notes(facts))


def _unpack(file: Path, target: Path, roots: Sequence[str]) -> None:
    """Everything but what goes into buckets."""
    remote = tuple(f"files/{number}/" for number, root in enumerate(roots) if bucket.is_bucket(root))

    def take(name: str, stream: IO[bytes], size: int) -> None:
        if not name.startswith(remote or ("\0",)):
            archive.write_out(stream, target / name)

    archive.each(file, take)


def _rewrite(folder: Path, project: str) -> None:
    """Settings and the word on the last run name this folder instead of the old one; secrets are for this user."""
    for name in (*SECRET, paths.TRACKED):
        found = folder / name
        if found.exists():
            text = found.read_text(encoding="utf-8")
            found.write_text(text.replace(project, str(Path.cwd())), encoding="utf-8")
            found.chmod(0o600 if name in SECRET else 0o644)


def _plan(settings: Settings, facts: dict[str, Any], unpacked: Path) -> _Plan:
    places = find_places(settings)
    urls = {}
    for name, kind in facts["databases"].items():
        here = places.databases.get(name)
        if here is None or here.get_backend_name() != kind:
            there = "none" if here is None else f"one of {here.get_backend_name()}"
            raise ArtifactError(f"the backup has a {kind} database for {name}, and here is {there}: point the settings "
                                "at a database of the same kind")  # fmt: skip
        urls[name] = here
    destination = next(iter(places.artifacts), None)
    roots = {old: destination if destination and bucket.is_bucket(old) else _moved(old, facts["project"])
             for old in facts["roots"]}  # fmt: skip
    local = {unpacked / f"databases/{name}": Path(str(url.database))
             for name, url in urls.items() if url.get_backend_name() == "sqlite"}  # fmt: skip
    local |= {unpacked / f"files/{number}": Path(new)
              for number, new in enumerate(roots.values()) if not bucket.is_bucket(new)}  # fmt: skip
    local[unpacked / "storage"] = STORAGE.absolute()
    inside = unpacked / "project"
    local |= {one: Path.cwd() / one.relative_to(inside) for one in inside.rglob("*") if one.is_file()}
    return _Plan(urls, roots, {there: here for there, here in local.items() if there.exists()})


def _moved(place: str, project: str) -> str:
    """A place below the old project's folder is below this one now; any other is where it was."""
    return str(Path.cwd()) + place.removeprefix(project) if place.startswith(f"{project}/") else place


def _ask(plan: _Plan, agree: Callable[[Sequence[str]], bool]) -> None:
    there = [str(here) for source, here in plan.local.items() if _is_in_the_way(source, here)]
    there += [databases.shown(url) for url in plan.urls.values()
              if url.get_backend_name() == "postgresql" and not databases.is_empty(url)]  # fmt: skip
    there += [root for root in plan.roots.values() if bucket.is_bucket(root) and not bucket.is_empty(root)]
    if there and not agree(there):
        raise ServiceError(f"nothing was restored, because {', '.join(there)} would be replaced: move that away, or "
                           "agree with --yes")  # fmt: skip


def _is_in_the_way(source: Path, target: Path) -> bool:
    """Whether something other than what comes is there."""
    if target.is_dir():
        return any(target.iterdir())
    return target.exists() and target.read_bytes() != source.read_bytes()


def _addresses(plan: _Plan) -> dict[str, str]:
    """Old -> new beginnings of what MLflow's records hold: as paths and as addresses of files."""
    found = {}
    for old, new in plan.roots.items():
        if old != new:
            found[old] = new
            if not bucket.is_bucket(old):
                found[Path(old).as_uri()] = Path(new).as_uri()
    return found


def _relocate_unpacked(plan: _Plan, facts: dict[str, Any], unpacked: Path) -> int:
    moved, records = _addresses(plan), unpacked / "databases" / MLFLOW
    if not moved or facts["databases"][MLFLOW] != "sqlite":
        return 0
    return databases.relocate(databases.parse(f"sqlite:///{records}"), moved)


def _fill_servers(plan: _Plan, facts: dict[str, Any], file: Path, unpacked: Path) -> int:
    """Databases and buckets that are not files here -> how many addresses were written anew."""
    for name, url in plan.urls.items():
        if url.get_backend_name() == "postgresql":
            databases.load(unpacked / "databases" / name, url)
    remote = {f"files/{number}/": new for number, new in enumerate(plan.roots.values()) if bucket.is_bucket(new)}

    def take(name: str, stream: IO[bytes], size: int) -> None:
        for prefix, new in remote.items():
            if name.startswith(prefix):
                bucket.put(new, name.removeprefix(prefix), stream)

    if remote:
        archive.each(file, take)
    moved = _addresses(plan)
    return databases.relocate(plan.urls[MLFLOW], moved) if moved and facts["databases"][MLFLOW] == "postgresql" else 0


def _put(local: dict[Path, Path]) -> Path | None:
    """Move everything into place -> the folder with what was there, if anything was."""
    aside = Path.cwd() / f"before-restore-{datetime.now():%Y-%m-%d-%H-%M-%S}"
    for source, target in local.items():
        if _is_in_the_way(source, target):
            kept = aside / (target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target.name)
            kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            for one in (target, *(target.with_name(target.name + ending) for ending in ("-wal", "-shm"))):
                if one.exists():
                    shutil.move(one, kept.with_name(one.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            target.rmdir()
        shutil.move(source, target)
    return aside if aside.exists() else None


def _notes(facts: dict[str, Any]) -> list[str]:
    here = {name: version(name) for name in facts["versions"]}
    return [f"the backup was made with {name} {then} and this is {here[name]}: see \"Upgrades\" in docs/operations.md"
            for name, then in facts["versions"].items() if then != here[name]]  # fmt: skip

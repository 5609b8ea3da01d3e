"""Outages: what a team's servers need goes away in the middle of work, comes back, and what is left is looked at.

    python benchmarks/outages.py                              an hour on 2 cores; needs what infra/native needs
    python benchmarks/outages.py --only "PostgreSQL down:sweep" --json FILE
    python benchmarks/outages.py --list

A team's topology of its own (PostgreSQL, an S3 store, MLflow, Prefect, three workers, `coop serve`) and a clone with
little pictures, each on a small disk in memory that can be filled (root only). Something goes away for 40 seconds while
a sweep goes through the workers, a retraining is under way, or files are on their way through a link that this script
cuts or slows. Whoever was killed is started again by `topology.py up`. Meanwhile the champion is asked twice a second.
A row is well when nothing is lost: no trial, no version, no byte of a file.
"""

import argparse
import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from kill_matrix import ROOT, TRIALS, Playground, change, chosen, ended
from PIL import Image
from rich.console import Console
from rich.table import Table
from team import MODEL, Team, wait_until

from coop_core.files import digest_file, write_json
from pipelines.records.registry import fetch_prompt
from pipelines.records.server import Records, connected
from pipelines.records.trials import TRIAL

sys.path.insert(0, str(ROOT / "infra/native"))
from keeping import Keeper

AWAY = 40
"""Seconds."""
PATIENCE = 600
FILE_MEGABYTES = 48


@dataclass
class Row:
    outage: str
    work: str
    ended: str = ""
    """As what the work ended that was under way."""
    said: str = ""
    """The last that its user saw."""
    again: str = "-"
    """How the same ended when it was given again, where that was needed."""
    lost: str = "nothing"
    seconds: float = 0.0
    """The work from its start to its end."""
    recovered: float = 0.0
    """From the end of the outage until `coop doctor` finds everything well; what was killed is started in it."""
    asked: int = 0
    unanswered: int = 0
    """Requests to the champion without an answer."""

    @property
    def well(self) -> bool:
        return self.lost == "nothing" and self.again in ("-", "done") and self.recovered < PATIENCE


class Link:
    """A port of loopback that leads to another, until it is cut; it can be slow."""

    def __init__(self, port: int) -> None:
        self.port, self.whole, self.carried = port, True, 0
        self.rate: float | None = None
        """Bytes a second in each direction; None is as fast as it goes."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.own_port = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            caller, _ = self._listener.accept()
            threading.Thread(target=self._carry, args=(caller,), daemon=True).start()

    def _carry(self, caller: socket.socket) -> None:
        with contextlib.suppress(OSError), caller, socket.create_connection(("127.0.0.1", self.port)) as server:
            while self.whole:
                for ready in select.select([caller, server], [], [], 0.2)[0]:
                    piece = ready.recv(1 << 16)
                    if not piece:
                        return
                    if ready is caller:  # MLflow's server answers to its own name alone
                        piece = piece.replace(f"127.0.0.1:{self.own_port}".encode(), f"127.0.0.1:{self.port}".encode())
                    (server if ready is caller else caller).sendall(piece)
                    self.carried += len(piece)
                    if self.rate:
                        time.sleep(len(piece) / self.rate)


class Asker:
    """Asks the champion twice a second, and counts."""

    def __init__(self, team: Team) -> None:
        self.team, self.asked, self.unanswered = team, 0, 0
        threading.Thread(target=self._ask, daemon=True).start()

    def _ask(self) -> None:
        with httpx.Client(trust_env=False, timeout=20) as client:
            while True:
                self.asked += 1
                try:
                    self.unanswered += self.team.ask(client).status_code != 200
                except httpx.HTTPError:
                    self.unanswered += 1
                time.sleep(0.5)


class Scene:
    """The topology, its clone, and whoever asks its champion."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.team = Team(folder)
        self.asker: Asker | None = None
        self.round = 0

    @property
    def services(self) -> Path:
        return self.folder / "services"

    def process(self, name: str) -> psutil.Process:
        found = Keeper(self.services).find(name)
        assert found is not None, name
        return found

    def recover(self) -> float:
        """Seconds until the doctor finds everything well."""
        begun = time.monotonic()
        command = (sys.executable, "-m", "pipelines.commands.cli", "doctor", "--json")
        while time.monotonic() - begun < PATIENCE:
            if self.team.run(self.team.first, *command).returncode == 0:
                return time.monotonic() - begun
            time.sleep(1)
        return PATIENCE


@contextmanager
def killed(scene: Scene, *names: str) -> Iterator[None]:
    """Without warning, with all below it; then started again by the one command."""
    for name in names:
        family = [scene.process(name), *scene.process(name).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, 10)
    yield
    scene.team.up()


@contextmanager
def frozen(scene: Scene, *names: str) -> Iterator[None]:
    """It holds its connections and says nothing, as behind a network that swallows everything."""
    family = [process for name in names for process in (scene.process(name), *scene.process(name).children(True))]
    for process in family:
        process.suspend()
    try:
        yield
    finally:
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


@contextmanager
def filled(scene: Scene, place: Path) -> Iterator[None]:
    """Not a byte is left on the disk."""
    filler = place / "filler"
    with filler.open("wb") as file:
        with contextlib.suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(1 << 20))
        with contextlib.suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(1))
    try:
        yield
    finally:
        filler.unlink()
    with contextlib.suppress(AssertionError):  # what ended for want of room is started again
        scene.team.up()


OUTAGES: dict[str, Callable[[Scene], AbstractContextManager[None]]] = {
    "nothing": lambda scene: contextlib.nullcontext(),
    "S3 down": lambda scene: killed(scene, "swift-proxy"),
    "PostgreSQL down": lambda scene: killed(scene, "postgresql"),
    "MLflow down": lambda scene: killed(scene, "mlflow"),
    "Prefect down": lambda scene: killed(scene, "prefect"),
    "S3 frozen": lambda scene: frozen(scene, "swift-proxy"),
    "PostgreSQL frozen": lambda scene: frozen(scene, "postgresql"),
    "MLflow frozen": lambda scene: frozen(scene, "mlflow"),
    "Prefect frozen": lambda scene: frozen(scene, "prefect"),
    "a trial worker killed": lambda scene: killed(scene, "worker-gpu-0"),
    "the flows' worker killed": lambda scene: killed(scene, "worker-cpu"),
    "coop serve killed": lambda scene: killed(scene, "serve"),
    "disk of the clone full": lambda scene: filled(scene, scene.folder / "first"),
    "disk of the servers full": lambda scene: filled(scene, scene.services),
}
WORKS = ("sweep", "retraining")
LINKS = ("dvc push, cut", "dvc push, slow", "dvc pull, cut", "S3 source, cut", "S3 source, slow",
         "record of a run, cut", "sweep here, MLflow cut", "sweep here, MLflow slow")  # fmt: skip


def during_sweep(scene: Scene, row: Row) -> None:
    """A sweep is under way through the workers, and is given again where it does not end well."""
    team = scene.team
    team.first.params(epochs=150)
    since, begun = time.time(), time.monotonic()
    command = team.first.coop("sweep")
    wait_until(lambda: trials(team, since, "RUNNING") or command.poll() is not None, PATIENCE)
    with OUTAGES[row.outage](scene):
        time.sleep(AWAY if row.outage != "nothing" else 0)
    row.recovered = scene.recover()
    row.ended, said = ended(command), team.first.said()
    row.seconds = time.monotonic() - begun
    row.lost = lost_trials(team, since)
    if row.ended != "done" or row.lost != "nothing":
        counted = [line for line in said.splitlines() if re.match(r"\d+ trials", line)]
        row.said = counted[0] if counted else last_line(said)
        row.again = ended(team.first.coop("sweep"))
        row.lost = lost_trials(team, since)


def trials(team: Team, since: float, status: str) -> list[Any]:
    """Runs of trials that began after a moment."""
    found = team.runs(f"attributes.start_time > {1000 * since:.0f} and attributes.status = '{status}'")
    return [run for run in found if TRIAL in run.data.tags]


def lost_trials(team: Team, since: float) -> str:
    missing = TRIALS - len({run.data.tags[TRIAL] for run in trials(team, since, "FINISHED")})
    return f"{missing} trials" if missing else "nothing"


def during_retraining(scene: Scene, row: Row) -> None:
    """A retraining is in its stage `train`; then what comes after it is missing what it needs."""
    team = scene.team
    before = len(team.versions())
    team.first.params(epochs=150)
    begun = time.monotonic()
    run = team.begin_retraining()
    wait_until(lambda: team.first.processes("pipelines.stages train"), PATIENCE)
    with OUTAGES[row.outage](scene):
        time.sleep(AWAY if row.outage != "nothing" else 0)
    row.recovered = scene.recover()
    state = team.ended_run(run, within=PATIENCE)["state"]
    row.seconds = time.monotonic() - begun
    row.ended, row.said = state["type"].lower(), last_line(state["message"] or "")
    if state["type"] != "COMPLETED":
        again = team.retrain()["state"]
        row.again = "done" if again["type"] == "COMPLETED" else f"{again['type'].lower()}: {again['message']}"
    row.lost = damage(team, before + 1)


def damage(team: Team, expected: int) -> str:
    """What the registry lacks: every version loads, its run is finished, and the last one has the alias."""
    found = team.versions()
    with connected(team.settings) as mlflow:
        states = {mlflow.MlflowClient().get_run(version.run_id).info.status for version in found}
    if len(found) != expected or states != {"FINISHED"}:
        return f"{len(found)} versions of {expected}, their runs {', '.join(sorted(states))}"
    return "nothing" if team.champion() == str(expected) else f"champion is {team.champion()} of {expected}"


def through_link(scene: Scene, row: Row) -> None:
    """A second clone reaches the servers through a link."""
    team, second = scene.team, second_clone(scene)
    what, how = row.work.split(", ")
    of_mlflow = "MLflow" in how or "record" in what
    ports = json.loads((scene.services / "ports.json").read_text())
    link = Link(ports["mlflow" if of_mlflow else "s3"])
    for name in (".env", ".dvc/config.local"):
        file = second.folder / name
        file.write_text(file.read_text().replace(f":{link.port}", f":{link.own_port}"))
    prepare, words, check = {
        "dvc push": (lambda: new_blob(team, second), ("-m", "dvc", "push", "blob.bin.dvc"),
                     lambda: blob_arrives(team, second)),
        "dvc pull": (lambda: pushed_blob(team, second), ("-m", "dvc", "pull", "blob.bin.dvc"),
                     lambda: blob_is_here(second)),
        "S3 source": (lambda: new_source(scene, second), ("-m", "dvc", "repro", "download"),
                      lambda: source_is_here(second)),
        "record of a run": (lambda: second.params(epochs=20), ("-m", "dvc", "repro"), lambda: tracked(scene, second)),
        "sweep here": (lambda: second.params(epochs=150), ("-m", "pipelines.commands.cli", "sweep", "--local"),
                       lambda: lost_trials(team, since)),
    }[what]  # fmt: skip
    prepare()
    link.carried = 0
    if "slow" in how:
        link.rate = 2e6 if not of_mlflow else 50e3
    since, begun = time.time(), time.monotonic()
    with (second.folder / "said.log").open("w") as log:
        command = subprocess.Popen([sys.executable, *words], cwd=second.folder, env=second.environment,
                                   stdout=log, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    if "cut" in how:
        if what == "record of a run":
            wait_until(lambda: second.processes("pipelines.stages track"), PATIENCE)
            link.carried = 0
        enough = {"sweep here": 200_000, "record of a run": 60_000}.get(what, 10_000_000)
        wait_until(lambda: link.carried > enough or command.poll() is not None, PATIENCE)
        link.whole = False
        time.sleep(AWAY)
        link.whole = True
    row.ended = ended(command)
    row.seconds = time.monotonic() - begun
    if row.ended != "done":
        row.said = last_line((second.folder / "said.log").read_text())
        again = subprocess.run([sys.executable, *words], cwd=second.folder, env=second.environment,
                               capture_output=True, text=True)  # fmt: skip
        row.again = "done" if again.returncode == 0 else f"exit {again.returncode}: {last_line(again.stderr)}"
    row.lost = check()


def second_clone(scene: Scene) -> Playground:
    scene.round += 1
    second = Playground(scene.folder / f"second-{scene.round}")
    second.round = 1000 * scene.round
    scene.team.share(second)
    return second


def new_blob(team: Team, clone: Playground) -> None:
    (clone.folder / "blob.bin").write_bytes(random.Random(clone.round).randbytes(FILE_MEGABYTES << 20))
    team.dvc(clone, "add", "blob.bin")


def pushed_blob(team: Team, clone: Playground) -> None:
    new_blob(team, clone)
    (clone.folder / "expected").write_text(digest_file(clone.folder / "blob.bin"))
    team.dvc(clone, "push", "blob.bin.dvc")
    forget_blob(clone)


def forget_blob(clone: Playground) -> None:
    (clone.folder / "blob.bin").unlink(missing_ok=True)
    shutil.rmtree(clone.folder / ".dvc/cache")


def blob_arrives(team: Team, clone: Playground) -> str:
    expected = digest_file(clone.folder / "blob.bin")
    forget_blob(clone)
    team.dvc(clone, "pull", "blob.bin.dvc")
    return "nothing" if digest_file(clone.folder / "blob.bin") == expected else "the file differs"


def blob_is_here(clone: Playground) -> str:
    here = digest_file(clone.folder / "blob.bin")
    return "nothing" if here == (clone.folder / "expected").read_text() else "the file differs"


def new_source(scene: Scene, clone: Playground) -> None:
    """An archive of large pictures in the store, and a card that names it."""
    from store import KEY

    rng = np.random.default_rng(clone.round)
    for name in ("tomato", "grass", "sky"):
        for number in range(24):
            picture = clone.folder / "large" / name / f"{number}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (480, 480, 3), dtype=np.uint8)).save(picture)
    archive = clone.folder / "large.tar"
    with tarfile.open(archive, "w") as file:
        for path in sorted((clone.folder / "large").iterdir()):
            file.add(path, path.name)
    import boto3

    ports = json.loads((scene.services / "ports.json").read_text())
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{ports['s3']}", aws_access_key_id=KEY,
                          aws_secret_access_key=scene.team.secrets["s3"], region_name="us-east-1")  # fmt: skip
    client.upload_file(str(archive), "coop-data", "large.tar")
    card = ("name: large\ntitle: large\nlayout: folders\npath: large\nfiles:\n  - name: large.tar\n    unpack: true\n"
            f"    sha256: {digest_file(archive)}\n    sources: [s3://coop-data/large.tar]\n")  # fmt: skip
    (clone.folder / "cards").mkdir(exist_ok=True)
    (clone.folder / "cards/large.yaml").write_text(card)
    archive.unlink()
    clone.params(epochs=2)
    change(clone.folder, dataset={"source": "cards/large.yaml"})


def source_is_here(clone: Playground) -> str:
    found = sum(1 for _ in (clone.folder / "data/raw").rglob("*.png"))
    return "nothing" if found == 72 else f"{72 - found} of 72 images"


def tracked(scene: Scene, clone: Playground) -> str:
    version = json.loads((clone.folder / "artifacts/tracked.json").read_text())["model_version"]
    with tempfile.TemporaryDirectory() as target:
        fetched = fetch_prompt(f"{MODEL}/{version}", Records(scene.team.settings), Path(target))
        own = {path.name: digest_file(path) for path in (clone.folder / "artifacts/prompt").glob("*.safetensors")}
        same = bool(own) and own.items() <= {path.name: digest_file(path) for path in fetched.iterdir()}.items()
    running = scene.team.runs("attributes.status = 'RUNNING'")
    return "nothing" if same and not running else f"the version differs, or {len(running)} runs are open"


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else ""


@contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[bool]:
    """A disk of its own in memory -> whether this user may have one."""
    place.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "tmpfs", str(place)]
    mounted = os.geteuid() == 0 and subprocess.run(words, check=False, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(place)], check=False)


def play(scene: Scene, wanted: list[str], rows: list[Row], json_file: Path | None) -> None:
    team = scene.team
    installed = team.topology("install")
    if installed.returncode:
        raise SystemExit(installed.stderr)
    team.up()
    team.share(team.first)
    team.first.params(epochs=4)
    assert team.retrain()["state"]["type"] == "COMPLETED"
    with httpx.Client(trust_env=False, timeout=20) as client:
        wait_until(lambda: team.ask(client).status_code == 200, PATIENCE)
    scene.asker = Asker(team)
    for one in wanted:
        outage, _, work = one.partition(":")
        row = Row(outage, work)
        before = scene.asker.asked, scene.asker.unanswered
        try:
            if outage == "link":
                through_link(scene, row)
            else:
                {"sweep": during_sweep, "retraining": during_retraining}[work](scene, row)
        except Exception as error:  # the other rows have their own chance
            row.lost = f"not known: {type(error).__name__}: {last_line(str(error))}"
        row.asked, row.unanswered = (now - then for now, then in zip(
            (scene.asker.asked, scene.asker.unanswered), before, strict=True))  # fmt: skip
        rows.append(row)
        Console(stderr=True, width=200).print(row)
        if json_file:
            write_json(json_file, [asdict(row) for row in rows])


def show(rows: list[Row]) -> None:
    table = Table(title=f"away for {AWAY} s in the middle of it")
    for column in ("outage", "work", "ended as", "given again", "lost", "whole", "well again", "champion", "said"):
        table.add_column(column)
    for row in rows:
        table.add_row(row.outage, row.work, row.ended, row.again, row.lost, f"{row.seconds:.0f} s",
                      f"{row.recovered:.0f} s", f"{row.asked - row.unanswered} of {row.asked}", row.said)  # fmt: skip
    Console(width=200).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="written after every row")
    every = [f"{outage}:{work}" for work in WORKS for outage in OUTAGES] + [f"link:{work}" for work in LINKS]
    arguments = chosen(parser, every, metavar="OUTAGE:WORK")
    wanted = arguments.only
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("stopped"))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="outages-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with small_disk(folder / "services", 4000) as first, small_disk(folder / "first", 3000) as second:
            scene = Scene(folder)
            if not (first and second):
                wanted = [one for one in wanted if not one.startswith("disk")]
                Console(stderr=True).print("no disks of its own here (root only): rows of full disks are left out")
            try:
                play(scene, wanted, rows, arguments.json)
            finally:
                scene.team.topology("down")
    show(rows)
    if not all(row.well for row in rows):
        sys.exit(f"not well: {[f'{row.outage}:{row.work}' for row in rows if not row.well]}")


if __name__ == "__main__":
    main()

"""The kill matrix: whoever works is killed in the middle of it, and what is left is looked at.

    python benchmarks/kill_matrix.py                          each victim with SIGTERM and SIGKILL, an hour on 2 cores
    python benchmarks/kill_matrix.py --only gpu-worker:KILL trainer:KILL
    python benchmarks/kill_matrix.py --list

Real services on free ports, in a clone of this project with little pictures, so it disturbs nothing. A row is well
when nothing stays "running" in Prefect and MLflow, no process is left that nobody waits for, the same command
again finishes the work, no trial is lost, and every registered version is whole.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from coop_core.artifact import read_artifact
from pipelines.environment import SERVICE_OF, use_prefect
from pipelines.logins import make_login
from pipelines.records.registry import fetch_prompt
from pipelines.records.server import Records, connected, pages
from pipelines.services.supervision import connect
from pipelines.settings import Settings

ROOT = Path(__file__).parents[1]
SIGNALS = {"TERM": signal.SIGTERM, "KILL": signal.SIGKILL}
SWEEP = ("trainer", "trials-flow", "gpu-worker", "sweep-flow", "cpu-worker", "prefect-server", "mlflow-server",
         "supervisor")  # fmt: skip
LOCAL = ("local-sweep", "local-trainer")
RETRAIN = ("stage", "dvc", "retrain-flow", "track-stage")
TRIALS = 8
PATIENCE = 300
"""Seconds for everything to come to rest."""


@dataclass
class Row:
    victim: str
    signal: str
    said: str = ""
    """How what was running ended by itself."""
    again: str = "-"
    """How the same command ended when it was given again, where that was needed."""
    prefect: float = 0.0
    """Seconds after the kill until Prefect shows nothing running."""
    mlflow: float = 0.0
    orphans: int = 0
    """Processes below the victim that were alive 25 seconds after it, and any that were left in the end."""
    lost: int = 0
    twice: int = 0
    """Trials that were trained to the end more than once."""
    whole: bool = True

    @property
    def well(self) -> bool:
        rest = max(self.prefect, self.mlflow) < PATIENCE
        return rest and self.orphans == 0 and self.lost == 0 and self.whole and self.again in ("-", "done")


class Playground:
    """A clone with services of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.round = folder, 0
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        listed = subprocess.run(["git", "ls-files", "-mo", "--exclude-standard"], cwd=ROOT, check=True,
                                capture_output=True, text=True).stdout.split("\n")  # fmt: skip
        for name in filter(None, listed):
            if name != "dvc.lock" and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        ports = free_ports(3)
        self.settings = Settings(
            _env_file=None, tracking_uri=f"sqlite:///{folder}/mlflow.db", cache_folder=folder / ".cache",
            registered_model="coop-images", prefect_port=ports[0], mlflow_port=ports[1],
            serve_port=ports[2],
            services_folder=folder / ".services", prefect_api_url=f"http://127.0.0.1:{ports[0]}/api",
        )  # fmt: skip
        self.records = Records(self.settings)
        text = (f"COOP_PREFECT_PORT={ports[0]}\nCOOP_MLFLOW_PORT={ports[1]}\nCOOP_SERVE_PORT={ports[2]}\n"
                "COOP_RETRAIN_CRON=0 0 29 2 *\nCOOP_WATCH_CRON=0 0 29 2 *\n")  # fmt: skip
        (folder / ".env").write_text(text + f"COOP_PREFECT_API_URL={self.settings.prefect_api_url}\n")
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("COOP_", "MLFLOW_", "PREFECT_"))},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(folder),
            "DVC_SITE_CACHE_DIR": str(folder / ".site"), "COLUMNS": "200",
        }  # fmt: skip
        paint(folder / "images")

    def params(self, *, epochs: int) -> None:
        """Little work in which there is time to be killed, and never work that was done before."""
        self.round += 1
        change(
            self.folder,
            dataset={"source": "images"},
            split={"shots": 2, "curve_shots": [], "test_per_class": 4},
            method={"n_context": 4},
            train={"epochs": epochs, "learning_rate": 0.01 + 1e-5 * self.round},
            baselines={"linear_probe_steps": 0},
            gate={"min_gain_over_zero_shot": -1.0, "max_class_drop": 1.0, "significance": 1e-9},  # lets all pass
            sweep={
                "name": f"kill-{self.round}", "seeds": [1, 2], "max_failed": 0.5,
                "space": {"split.shots": [1, 2], "train.weight_decay": [0.0, 1e-4 * self.round]},
            },
        )  # fmt: skip

    def coop(self, *words: str) -> subprocess.Popen[str]:
        with (self.folder / "said.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "pipelines.commands.cli", *words], cwd=self.folder, env=self.environment,
                stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            )  # fmt: skip

    def said(self) -> str:
        return (self.folder / "said.log").read_text()

    def done(self, *words: str, timeout: float = PATIENCE) -> int:
        return self.coop(*words).wait(timeout)

    def processes(self, words: str) -> list[psutil.Process]:
        """Processes of this playground whose command holds these words; guards do not count."""
        found = []
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
                here = process.cwd() == str(self.folder)
                if here and words in line and "pipelines.processes" not in line:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def runs(self, wanted: str) -> list[Any]:
        with connected(self.settings) as mlflow:
            client = mlflow.MlflowClient()
            experiments = [e.experiment_id for e in client.search_experiments()]
            return [run for number in experiments for run in pages(client, number, wanted)]


@contextmanager
def services(playground: Playground) -> Iterator[None]:
    if playground.done("up") != 0:
        raise SystemExit(playground.said())
    try:
        yield
    finally:
        playground.done("down")


def kill_sweep(playground: Playground, row: Row, *, local: bool) -> None:
    """A sweep is under way; its victim is killed; the sweep is given again where it did not end well."""
    words = ("sweep", "--local") if local else ("sweep",)
    playground.params(epochs=150)
    begun = 1000 * time.time()
    command = playground.coop(*words)
    wait_for(lambda: playground.runs("attributes.status = 'RUNNING' and tags.`coop.trial` != ''"), "a trial", command)
    time.sleep(3)
    victim = find(playground, row.victim, command)
    below = victim.children(recursive=True)
    victim.send_signal(SIGNALS[row.signal])
    killed = time.monotonic()
    time.sleep(25)
    if not row.victim.endswith(("server", "supervisor")):  # those come back, and what they served goes on
        row.orphans = sum(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in below)
    row.said = ended(command)
    if row.victim == "supervisor":
        playground.done("up")
    row.prefect = at_rest(playground, killed, in_prefect)
    row.mlflow = at_rest(playground, killed, in_mlflow)
    if row.said != "done":
        row.again = ended(playground.coop(*words))
    finished = Counter(
        run.data.tags["coop.trial"] for run in playground.runs(f"attributes.start_time > {begun:.0f} and "
                                                              "attributes.status = 'FINISHED'")
        if "coop.trial" in run.data.tags
    )  # fmt: skip
    row.lost, row.twice = TRIALS - len(finished), sum(count - 1 for count in finished.values())
    time.sleep(10)
    row.orphans += len(playground.processes("pipelines.sweeps.trainer"))


def kill_retraining(playground: Playground, row: Row) -> None:
    from pipelines.flows import client

    playground.params(epochs=150)
    run = client.start("retrain", parameters={})
    if row.victim == "track-stage":
        wait_for(lambda: playground.runs("attributes.status = 'RUNNING'"), "the record of the run")
    else:
        wait_for(lambda: playground.processes("pipelines.stages train"), "the stage")
        time.sleep(3)
    victim = find(playground, row.victim, None)
    below = victim.children(recursive=True)
    victim.send_signal(SIGNALS[row.signal])
    killed = time.monotonic()
    row.prefect = at_rest(playground, killed, in_prefect)
    row.mlflow = at_rest(playground, killed, in_mlflow)
    row.said = (client.look(run.id).state_name or "?").lower()
    time.sleep(10)
    row.orphans = sum(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in below)
    row.orphans += len(playground.processes("pipelines.stages")) + len(playground.processes("dvc repro"))
    again = client.start("retrain", parameters={})
    wait_for(lambda: client.ended(client.look(again.id)), "the retraining again")
    row.again = "done" if client.look(again.id).state_name == "Completed" else str(client.look(again.id).state_name)
    row.whole = versions_are_whole(playground)


def versions_are_whole(playground: Playground) -> bool:
    """Every registered version loads and carries what its run must have."""
    with connected(playground.settings) as mlflow:
        found = mlflow.MlflowClient().search_model_versions()
        statuses = {mlflow.MlflowClient().get_run(version.run_id).info.status for version in found}
    for version in found:
        with tempfile.TemporaryDirectory() as target:
            name = f"{version.name}/{version.version}"
            read_artifact(fetch_prompt(name, playground.records, Path(target)))
    return bool(found) and statuses == {"FINISHED"}


def find(playground: Playground, victim: str, command: subprocess.Popen[str] | None) -> psutil.Process:
    if victim == "local-sweep":
        assert command is not None
        return psutil.Process(command.pid)
    if victim in ("trainer", "local-trainer"):
        return playground.processes("pipelines.sweeps.trainer")[0]
    if victim == "dvc":
        return playground.processes("dvc repro")[0]
    if victim in ("stage", "track-stage"):
        return playground.processes("pipelines.stages")[0]
    supervisor = connect(playground.settings.services_folder)
    if victim == "supervisor":
        return psutil.Process(supervisor.getPID())
    below = {"trials-flow": "gpu-worker-0", "sweep-flow": "cpu-worker", "retrain-flow": "cpu-worker",
             "gpu-worker": "gpu-worker-0"}  # fmt: skip
    process = psutil.Process(supervisor.getProcessInfo(below.get(victim, victim))["pid"])
    if not victim.endswith("flow"):
        return process
    return max(process.children(), key=lambda child: child.memory_info().rss)


def in_prefect(playground: Playground) -> list[str]:
    """Runs that Prefect believes to be under way."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType

    from pipelines.flows.client import connection

    state = FlowRunFilterState(
        type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
    )
    with connection() as client:
        return [run.name for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(state=state))]


def in_mlflow(playground: Playground) -> list[str]:
    """Runs that MLflow believes to be under way, after the reconciler has looked."""
    running = playground.runs("attributes.status = 'RUNNING'")
    if running:
        playground.done("reconcile")
    return [run.info.run_name for run in running]


def at_rest(playground: Playground, since: float, under_way: Callable[[Playground], list[str]]) -> float:
    """Seconds from the kill until nothing is under way."""
    while time.monotonic() - since < PATIENCE:
        try:
            if not under_way(playground):
                return time.monotonic() - since
        except Exception as error:  # a server that was killed is on its way up again
            Console(stderr=True).print(f"  waiting: {str(error)[:100]}", style="dim", markup=False)
        time.sleep(3)
    return PATIENCE


def ended(command: subprocess.Popen[str]) -> str:
    try:
        status = command.wait(2 * PATIENCE)
    except subprocess.TimeoutExpired:
        command.kill()
        return "no end"
    return "done" if status == 0 else f"exit {status}"


def wait_for(there: Callable[[], Any], what: str, command: subprocess.Popen[str] | None = None) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            if there():
                return
        except Exception:  # no database yet
            pass
        if command is not None and command.poll() is not None:
            raise SystemExit(f"the command ended before {what} began")
        time.sleep(0.5)
    raise SystemExit(f"{what} did not begin")


def change(folder: Path, **sections: dict[str, Any]) -> None:
    """Set parameters in a folder's params.yaml: `train={"epochs": 3}`."""
    yaml = YAML()
    tree = yaml.load((folder / "params.yaml").read_text())
    for name, values in sections.items():
        tree[name] |= values
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(tree, file)


def paint(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, colour in {"tomato": (200, 40, 30), "grass": (40, 160, 50), "sky": (90, 140, 230)}.items():
        (folder / name).mkdir(parents=True)
        for i in range(24):
            pixels = np.clip(np.array(colour) + rng.normal(0, 40, (40, 48, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [f"{victim}:{name}" for victim in (*LOCAL, *SWEEP, *RETRAIN) for name in SIGNALS]
    wanted = chosen(parser, every, metavar="VICTIM:SIGNAL").only
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("stopped"))
    rows = []
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        playground = Playground(Path(folder) / "project")
        login = make_login(playground.settings.services_folder)
        use_prefect(str(playground.settings.prefect_api_url), Path(folder) / "client", login)
        with services(playground):
            for one in wanted:
                victim, name = one.split(":")
                row = Row(victim, name)
                if victim in RETRAIN:
                    kill_retraining(playground, row)
                else:
                    kill_sweep(playground, row, local=victim in LOCAL)
                rows.append(row)
                Console(stderr=True).print(row)
        mark = str(playground.settings.services_folder)
        left = [process for process in psutil.process_iter() if environment_of(process).get(SERVICE_OF) == mark]
    show(rows)
    if left or not all(row.well for row in rows):
        sys.exit(f"not well: {[f'{r.victim}:{r.signal}' for r in rows if not r.well]}, left running: {left}")


def chosen(parser: argparse.ArgumentParser, every: Sequence[str], *, metavar: str) -> argparse.Namespace:
    """What the command line says; `only` are the rows to run, all of them where it names none."""
    parser.add_argument("--only", nargs="+", metavar=metavar, default=list(every), help="of those that --list shows")
    parser.add_argument("--list", action="store_true")
    found = parser.parse_args()
    if found.list:
        Console().print("\n".join(every), highlight=False)
        sys.exit()
    if unknown := sorted(set(found.only) - set(every)):
        parser.error(f"{', '.join(unknown)}: not among those that --list shows")
    return found


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def show(rows: list[Row]) -> None:
    table = Table(title="kill matrix")
    for column in ("victim", "signal", "ended by itself as", "given again"):
        table.add_column(column)
    for column in ("Prefect at rest", "MLflow at rest", "orphans", "trials lost", "trained twice", "well"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.victim, row.signal, row.said, row.again, f"{row.prefect:.0f} s", f"{row.mlflow:.0f} s",
            str(row.orphans), str(row.lost), str(row.twice), "yes" if row.well else "NO",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()

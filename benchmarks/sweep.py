"""What a sweep costs beside its training: the sweep of params.yaml in a clone, here and through Prefect's workers.

    python benchmarks/sweep.py                     60 trials, each way with 2 epochs (nearly all overhead) and whole
    python benchmarks/sweep.py --ways workers --epochs 2

A first sweep brings the data set and its features, so that neither is counted. Seconds of training are what the
trainers measured; trials that are trained side by side share them.
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

from kill_matrix import Playground, change, services
from rich.console import Console
from rich.table import Table

from pipelines.environment import use_prefect
from pipelines.logins import make_login


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=["local", "workers"], default=["local", "workers"])
    parser.add_argument("--epochs", nargs="+", type=int, default=[2, 100])
    arguments = parser.parse_args()
    table = Table(title="sweep of params.yaml")
    for column in ("way", "epochs", "trials", "whole", "training", "beside it", "a trial"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        playground = Playground(Path(folder) / "project")
        where = {"cwd": playground.folder, "env": playground.environment}
        subprocess.run(["dvc", "repro", "-q", "data.dvc"], **where, check=True)
        login = make_login(playground.settings.services_folder)
        use_prefect(str(playground.settings.prefect_api_url), Path(folder) / "client", login)
        timed(playground, "local", 1)
        for way in arguments.ways:
            if way == "workers":
                with services(playground):
                    rows = [timed(playground, way, epochs) for epochs in arguments.epochs]
            else:
                rows = [timed(playground, way, epochs) for epochs in arguments.epochs]
            for row in rows:
                table.add_row(way, *row)
    Console().print(table)


def timed(playground: Playground, way: str, epochs: int) -> list[str]:
    """One row of the table; each way trains anew."""
    decay = 0.0005 if way == "local" else 0.0005001
    change(playground.folder, train={"epochs": epochs, "warmup_epochs": min(1, epochs - 1), "weight_decay": decay})
    before = {run.info.run_id for run in finished(playground)}
    begun = time.monotonic()
    words = ("sweep", "--local") if way == "local" else ("sweep",)
    if playground.done(*words, timeout=3600) != 0:
        raise SystemExit(playground.said())
    whole = time.monotonic() - begun
    Console(stderr=True).print(playground.said(), highlight=False, markup=False)
    runs = [run for run in finished(playground) if run.info.run_id not in before]
    training = sum(run.data.metrics["seconds"] for run in runs)
    return [str(epochs), str(len(runs)), f"{whole:.0f} s", f"{training:.0f} s", f"{whole - training:.0f} s",
            f"{(whole - training) / len(runs):.2f} s"]  # fmt: skip


def finished(playground: Playground) -> list:
    if not (playground.folder / "mlflow.db").exists():
        return []
    return [run for run in playground.runs("attributes.status = 'FINISHED'") if "coop.trial" in run.data.tags]


if __name__ == "__main__":
    main()

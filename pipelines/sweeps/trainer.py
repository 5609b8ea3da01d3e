"""Trainer: a process that takes groups of trials as lines of JSON, trains them, and says what became of each.

It keeps the backbone, the images' features and the libraries from one group to the next, so that a trial costs its
training and little more. Its owner talks to it through `pipelines.processes`, which ends it when the owner is gone.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from coop_core.errors import CoopError, ServiceError
from coop_core.files import digest_path
from coop_core.params import flat, parse_params
from pipelines import console, paths
from pipelines.records.server import Records, heartbeat
from pipelines.records.trials import TrialRun, start_trial
from pipelines.revision import core_digest
from pipelines.settings import Settings, choose_device, load_settings
from pipelines.sources.datasets import expected_dataset


@dataclass(frozen=True)
class Order:
    """One trial to be done."""

    key: str
    name: str
    params: dict[str, Any]
    dataset_digest: str
    weights_digest: str
    """Of `backbone.files`."""
    code: str
    parent: str
    """The sweep's run."""
    tags: dict[str, str]
    tests: dict[str, str] = field(default_factory=dict)
    """Digests of the further test sets' data, by name."""

    def line(self) -> dict[str, Any]:
        return asdict(self)


def main() -> None:
    """Serve groups from standard input until it closes; answers go to what was standard output.

    One argument: how many trainers share the device's memory.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library that prints must not speak in our place
    from coop_core.sweeps.trials import TrialRunner

    settings, here = load_settings(), Here()
    records = Records(settings)
    store_folder, sharing = settings.cache_folder / paths.FEATURE_STORE, int(sys.argv[1]) if len(sys.argv) > 1 else 1
    runner = TrialRunner(store_folder=store_folder, device=choose_device(settings), sharing=sharing)
    for line in sys.stdin:
        serve([Order(**order) for order in json.loads(line)], runner, records, answers, here=here)


class Here:
    """What this machine has of what decides a result; looked at once, as the backbone is loaded once."""

    def __init__(self) -> None:
        self._code, self._weights = core_digest(), dict[str, str]()

    def fault(self, order: Order) -> str:
        """Why an order cannot be done here as it was given; empty where it can."""
        if order.code != self._code:
            return "coop_core is not the code this sweep began with: start `coop sweep` again"
        files = order.params["backbone"]["files"]
        found = self._weights[files] if files in self._weights else digest_path(Path(files))
        self._weights[files] = found
        if found != order.weights_digest:
            return (f"{files} here is not what decides this sweep's weights (digest {found[:12] or 'of nothing'}, not "
                    f"{order.weights_digest[:12]}): bring this machine's copy up to date")  # fmt: skip
        return ""


def serve(orders: Sequence[Order], runner: Any, records: Records, answers: IO[str], *, here: Here) -> None:
    """Train a group side by side: one run each in MLflow, one answer each."""
    runs: list[TrialRun] = []
    try:
        for order in orders:
            runs.append(_open(order, records))
            _say(answers, {"event": "started", "key": order.key, "run_id": runs[-1].run_id})
        with heartbeat(records, [run.run_id for run in runs]):
            answered = _train(orders, runner, records.settings, answers, here)
            for order, run, found in zip(orders, runs, answered, strict=True):
                if isinstance(found, CoopError):
                    run.fail(str(found))
                    _say(answers, {"event": "failed", "key": order.key, "reason": str(found)})
                else:
                    run.finish(found.metrics(), found.curve)
                    _say(answers, {"event": "finished", "key": order.key, "run_id": run.run_id,
                                   "metrics": found.metrics()})  # fmt: skip
    except BaseException as error:
        reason = "stopped" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
        with ExitStack() as each:  # whatever happens to one, the others are closed
            for run in runs:
                each.callback(run.fail, reason, status="KILLED")  # the owner decides whether they are tried again
        raise


def _open(order: Order, records: Records) -> TrialRun:
    return start_trial(
        records, parent=order.parent, key=order.key, code=order.code, name=order.name,
        params=flat(order.params), tags=order.tags,
    )  # fmt: skip


def _train(orders: Sequence[Order], runner: Any, settings: Settings, answers: IO[str], here: Here) -> Any:
    if fault := next(filter(None, map(here.fault, orders)), ""):
        return [ServiceError(fault)] * len(orders)
    params = [parse_params(order.params, where=order.name) for order in orders]
    try:
        dataset = expected_dataset(orders[0].dataset_digest, params[0].dataset, settings)
        tests = {name: expected_dataset(digest, params[0].tests[name], settings)
                 for name, digest in orders[0].tests.items()}  # fmt: skip
    except CoopError as error:
        return [error] * len(orders)
    spoken = time.monotonic()

    def on_epoch(position: int, epoch: Any) -> None:
        nonlocal spoken
        if time.monotonic() - spoken > 1:
            spoken = time.monotonic()
            done = (epoch.epoch + 1) / params[position].train.epochs
            _say(answers, {"event": "progress", "key": orders[position].key, "done": done})

    return runner.run(params, dataset, tests=tests, on_epoch=on_epoch)


def _say(answers: IO[str], event: dict[str, Any]) -> None:
    answers.write(json.dumps(event) + "\n")
    answers.flush()


if __name__ == "__main__":
    console.run(main)

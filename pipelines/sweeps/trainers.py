"""Trainers: groups of trials -> processes on this machine that train them, and what became of each trial."""

import json
import logging
import os
import queue
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coop_core.errors import ServiceError
from pipelines.console import FAULT
from pipelines.environment import trainer_environment
from pipelines.processes import Group, end_all
from pipelines.records.server import Records
from pipelines.records.trials import close_lost
from pipelines.services.local import find_devices
from pipelines.settings import Settings
from pipelines.sweeps.trainer import Order

log = logging.getLogger(__name__)

Event = dict[str, Any]
"""What a trainer says: event (started, progress, finished, failed), key, and what belongs to it."""
TRAINER = (sys.executable, "-m", "pipelines.sweeps.trainer")
ATTEMPTS = 2
"""How often a trial is tried whose trainer dies."""


@dataclass(frozen=True)
class Slot:
    """Where one trainer runs."""

    device: str | None
    """A CUDA device's number; None leaves the choice to COOP_DEVICE."""
    threads: int | None


class LocalTrainers:
    """Runs groups on several trainers at once. Whatever ends the call ends the trainers."""

    def __init__(
        self, records: Records, slots: Sequence[Slot], *, log_folder: Path, command: Sequence[str] = TRAINER
    ) -> None:
        self.records, self.slots, self.log_folder, self.command = records, slots, log_folder, command
        self._attempts: Counter[str] = Counter()
        self._running: dict[int, Group] = {}
        self._stopping = False
        self._lock = threading.Lock()

    def __call__(self, groups: Sequence[Sequence[Order]], on_event: Callable[[Event], object]) -> None:
        """Run all groups; `on_event` hears of every trial and may raise to stop."""
        self._stopping, self._running = False, {}
        todo: queue.SimpleQueue[Sequence[Order]] = queue.SimpleQueue()
        for group in groups:
            todo.put(group)
        events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
        threads = [
            threading.Thread(target=self._work, args=(number, slot, todo, events), name=f"trainer-{number}")
            for number, slot in enumerate(self.slots[: len(groups)])
        ]
        left = len(threads)
        try:
            for thread in threads:
                thread.start()
            while left:
                try:
                    event = events.get(timeout=1)  # so that a signal is noticed soon
                except queue.Empty:
                    continue
                if event is None:
                    left -= 1
                elif isinstance(event, BaseException):
                    raise event
                else:
                    on_event(event)
        finally:
            self._stop()
            for thread in threads:
                if thread.is_alive():  # a signal may come before all have started
                    thread.join()

    def _stop(self) -> None:
        with self._lock:
            self._stopping = True
            running = list(self._running.values())
        end_all(running)

    def _work(self, number: int, slot: Slot, todo: Any, events: Any) -> None:
        trainer: Group | None = None
        try:
            while not self._stopping:
                try:
                    orders = todo.get_nowait()
                except queue.Empty:
                    break
                trainer = trainer or self._start(number, slot)
                if trainer is None:
                    break
                lost, run_ids = self._serve(trainer, orders, events)
                if lost and not self._stopping:
                    status = trainer.wait()
                    trainer.end()
                    trainer = None
                    if status == FAULT and not run_ids:
                        raise ServiceError(f"a trainer cannot start: {self._last_words(number)}")
                    self._take_back(lost, run_ids, status, number, todo, events)
        except BaseException as error:
            events.put(error)
        finally:
            if trainer:
                trainer.finish()
            events.put(None)

    def _start(self, number: int, slot: Slot) -> Group | None:
        with self._lock:
            if self._stopping:
                return None
            sharing = sum(other.device == slot.device for other in self.slots)
            self._running[number] = Group(
                (*self.command, str(sharing)), log=self._log(number), talk=True,
                environment=trainer_environment(device=slot.device, threads=slot.threads),
            )  # fmt: skip
            return self._running[number]

    def _serve(self, trainer: Group, orders: Sequence[Order], events: Any) -> tuple[list[Order], dict[str, str]]:
        """Have a group trained -> the orders that were not answered, and the runs that were begun."""
        trainer.tell(json.dumps([order.line() for order in orders]))
        waiting = {order.key: order for order in orders}
        run_ids: dict[str, str] = {}
        for line in trainer.says:
            event = json.loads(line)
            if event["event"] == "started":
                run_ids[event["key"]] = event["run_id"]
            elif event["event"] in ("finished", "failed"):
                del waiting[event["key"]]
            if "key" in event:
                events.put(event)
            if not waiting:
                break
        return list(waiting.values()), {key: run_ids[key] for key in waiting if key in run_ids}

    def _take_back(
        self, lost: Sequence[Order], run_ids: dict[str, str], status: int, number: int, todo: Any, events: Any
    ) -> None:
        """Try what a dead trainer left, one by one, so that only the culprit fails."""
        reason = f"its trainer ended with status {status}: see {self._log(number)}"
        log.warning("%d trials lost: %s", len(lost), reason)
        for order in lost:
            self._attempts[order.key] += 1
            again = self._attempts[order.key] < ATTEMPTS
            if order.key in run_ids:
                close_lost(self.records, run_ids[order.key], "KILLED" if again else "FAILED", reason=reason)
            if again:
                todo.put([order])
            else:
                events.put({"event": "failed", "key": order.key, "reason": reason})

    def _last_words(self, number: int) -> str:
        lines = self._log(number).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else f"see {self._log(number)}"

    def _log(self, number: int) -> Path:
        return self.log_folder / f"trainer-{number}.log"


def local_slots(settings: Settings, jobs: int | None) -> list[Slot]:
    """A slot for each CUDA device, or for the processor's cores; `jobs` sets how many."""
    if devices := find_devices(settings):
        return [Slot(device, None) for device in devices[:jobs]]
    cores = os.cpu_count() or 1
    count = min(jobs or max(1, cores // 2), cores)
    return [Slot(None, max(1, cores // count))] * count

"""Trainers: every trial is answered for, whatever happens to the process that trains it."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coop_core.errors import ServiceError
from pipelines import processes
from pipelines.records.server import Records
from pipelines.settings import Settings
from pipelines.sweeps.trainer import Order
from pipelines.sweeps.trainers import LocalTrainers, Slot

FAKE = """
import json, os, sys, time
for line in sys.stdin:
    for order in json.loads(line):
        key = order["key"]
        if key.startswith("die"):
            os.kill(os.getpid(), 9)
        if key.startswith("once") and not os.path.exists(key):
            open(key, "w").close()
            os.kill(os.getpid(), 9)
        if key.startswith("slow"):
            time.sleep(600)
        if key.startswith("bad"):
            print(json.dumps({"event": "failed", "key": key, "reason": "the loss became nan"}), flush=True)
        else:
            print(json.dumps({"event": "finished", "key": key, "run_id": key, "metrics": {}}), flush=True)
"""
FAULTY = "import sys; print('error: COOP_DEVICE is cuda, but torch sees none', file=sys.stderr); sys.exit(2)"


def orders(*keys: str) -> list[Order]:
    return [Order(key, key, {}, "images", "weights", "code", "parent", {}) for key in keys]


@pytest.fixture
def trainers(tmp_path, monkeypatch) -> Callable[..., LocalTrainers]:
    monkeypatch.chdir(tmp_path)

    def make(code: str = FAKE, slots: int = 2) -> LocalTrainers:
        records = Records(Settings(_env_file=None, cache_folder=tmp_path))
        command = (sys.executable, "-c", code)
        return LocalTrainers(records, [Slot(None, 1)] * slots, log_folder=tmp_path / "logs", command=command)

    return make


def heard(run: LocalTrainers, *groups: list[Order]) -> dict[str, Any]:
    events: list[dict[str, Any]] = []
    run(groups, events.append)
    assert len({event["key"] for event in events}) == len(events), "each trial is answered once"
    return {event["key"]: event for event in events}


def test_every_trial_of_every_group_is_answered(trainers):
    found = heard(trainers(), orders("a", "b", "bad-c"), orders("d"), orders("e", "f"))
    assert {key: event["event"] for key, event in found.items()} == {
        "a": "finished", "b": "finished", "bad-c": "failed", "d": "finished", "e": "finished", "f": "finished"
    }  # fmt: skip


def test_trainers_can_be_asked_again(trainers):
    run = trainers()
    assert set(heard(run, orders("a"))) == {"a"}
    assert set(heard(run, orders("b"), orders("c"))) == {"b", "c"}


def test_a_trial_that_kills_its_trainer_fails_alone(trainers):
    found = heard(trainers(), orders("a", "die", "b"), orders("c"))

    assert {key: event["event"] for key, event in found.items()} == {
        "a": "finished", "die": "failed", "b": "finished", "c": "finished"
    }  # fmt: skip
    assert "its trainer ended with status 137" in found["die"]["reason"]
    assert "trainer-" in found["die"]["reason"]


def test_a_trial_whose_trainer_was_killed_once_is_done_by_the_next(trainers):
    found = heard(trainers(slots=1), orders("once-a", "b"))
    assert {event["event"] for event in found.values()} == {"finished"}


def test_trainers_that_cannot_start_say_why(trainers):
    with pytest.raises(ServiceError, match="a trainer cannot start: COOP_DEVICE is cuda, but torch sees none"):
        heard(trainers(FAULTY), orders("a"), orders("b"))


def test_a_listener_that_raises_ends_all_trainers_at_once(trainers):
    run = trainers()

    def refuse(event: dict[str, Any]) -> None:
        raise ServiceError("too many failures")

    begun = time.monotonic()
    with pytest.raises(ServiceError, match="too many failures"):
        run([orders("bad"), orders("slow")], refuse)
    assert time.monotonic() - begun < 20


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell's background jobs ignore the signal, and would wait for ever."""
    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, own)


def test_a_signal_ends_all_trainers_within_seconds(trainers, interruptible):
    threading.Timer(1.5, signal.raise_signal, (signal.SIGINT,)).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        heard(trainers(), orders("slow-a"), orders("slow-b"))
    assert time.monotonic() - begun < 20


def test_a_signal_while_trainers_start_leaves_none(trainers, monkeypatch):
    run, start = trainers(), threading.Thread.start

    def start_one(thread: threading.Thread) -> None:
        start(thread)
        if thread.name.startswith("trainer-"):
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start_one)
    with pytest.raises(KeyboardInterrupt):
        heard(run, orders("slow-a"), orders("slow-b"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("trainer-")]


def test_trainers_that_ignore_the_request_end_in_the_time_of_one(trainers, monkeypatch):
    """Each is given time twice: until its command ends, then until its children have."""
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 1.5)
    stubborn = "import signal\nsignal.signal(15, signal.SIG_IGN)\n" + FAKE
    run, said = trainers(stubborn, slots=4), list[float]()

    def refuse(event: dict[str, Any]) -> None:
        said.append(time.monotonic())
        if len(said) == 4:
            raise ServiceError("too many failures")

    with pytest.raises(ServiceError, match="too many failures"):
        run([[*orders(f"bad-{n}"), *orders(f"slow-{n}")] for n in range(4)], refuse)
    assert 3 <= time.monotonic() - said[-1] < 6


def test_no_trainer_is_started_that_has_nothing_to_do(trainers, tmp_path: Path):
    heard(trainers(slots=4), orders("a"))
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["trainer-0.log"]


def test_every_trainer_is_told_how_many_share_its_device(trainers):
    code = """
import json, sys
for line in sys.stdin:
    for order in json.loads(line):
        print(json.dumps({"event": "finished", "key": order["key"], "run_id": "", "metrics": sys.argv[1]}), flush=True)
"""
    assert {event["metrics"] for event in heard(trainers(code, slots=3), *map(orders, "abcd")).values()} == {"3"}

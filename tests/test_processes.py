"""Processes: a group ends with whoever started it, however that one ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines import processes
from pipelines.processes import Group

SLEEPER = [sys.executable, "-c", "import subprocess, sys, time\n"
           "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
           "print('up', flush=True)\ntime.sleep(600)"]  # fmt: skip
"""A command with a child of its own, as DVC is."""
OWNER = f"""
import time
from pathlib import Path
from pipelines.processes import Group
group = Group({SLEEPER!r}, log=Path("log"))
while "up" not in Path("log").read_text():
    time.sleep(0.05)
print(group.process.pid, flush=True)
time.sleep(600)
"""


def members(group: int) -> list[int]:
    """Processes of a group that are alive."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def ends(group: int, *, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while members(group) and time.monotonic() < until:
        time.sleep(0.1)
    return not members(group)


def started(group: Group, log: Path) -> int:
    while "up" not in log.read_text():
        time.sleep(0.05)
    return group.process.pid


@pytest.mark.parametrize("code", [0, 2, 7])
def test_the_exit_status_is_the_commands(tmp_path, code):
    with Group([sys.executable, "-c", f"import sys; sys.exit({code})"], log=tmp_path / "log") as group:
        assert group.wait(20) == code


def test_a_command_that_was_killed_counts_as_128_and_the_signal(tmp_path):
    with Group([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], log=tmp_path / "log") as group:
        assert group.wait(20) == 128 + signal.SIGKILL


def test_leaving_the_block_ends_the_command_and_its_children(tmp_path):
    with Group(SLEEPER, log=tmp_path / "log") as group:
        leader = started(group, tmp_path / "log")
        assert len(members(leader)) == 3  # guard, command, its child
    assert ends(leader, seconds=2)  # the system takes a moment to bury what was killed


def test_a_command_that_ignores_the_request_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 1.0)
    stubborn = [sys.executable, "-c", "import signal, time\nsignal.signal(15, signal.SIG_IGN)\n"
                "print('up', flush=True)\ntime.sleep(600)"]  # fmt: skip
    with Group(stubborn, log=tmp_path / "log") as group:
        leader = started(group, tmp_path / "log")
    assert ends(leader, seconds=2)  # the system takes a moment to bury what was killed


@pytest.mark.parametrize("by_owner", [True, False])
def test_a_child_of_the_command_has_time_to_close_what_it_has_open(tmp_path, by_owner):
    child = (
        "import signal, sys, time\n"
        "signal.signal(15, lambda *_: (time.sleep(1), open('closed', 'w'), sys.exit()))\n"
        "print('up', flush=True)\ntime.sleep(600)"
    )
    command = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}], cwd={str(tmp_path)!r})"
    words = [sys.executable, "-c", command]
    group = Group(words, log=tmp_path / "log")
    leader = started(group, tmp_path / "log")
    if by_owner:
        group.end()
    else:
        os.close(group._held)  # as when the owner is killed
        group._held = os.open(os.devnull, os.O_RDONLY)
        assert ends(leader)
        group.end()
    assert (tmp_path / "closed").exists()


def test_killing_the_guard_alone_leaves_the_rest_to_the_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 1.0)
    with Group(SLEEPER, log=tmp_path / "log") as group:
        leader = started(group, tmp_path / "log")
        os.kill(leader, signal.SIGKILL)
        assert group.wait(20) == -signal.SIGKILL
    assert ends(leader)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=SLOW), pytest.param(signal.SIGINT, marks=SLOW)]
)
def test_a_group_ends_with_its_owner(tmp_path, number):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    with owner:
        leader = int(owner.stdout.readline())
        assert members(leader)
        owner.send_signal(number)
    assert ends(leader)


@pytest.mark.parametrize("path", ["/usr/bin:/bin", ""])
def test_a_command_finds_the_python_that_started_it(tmp_path, monkeypatch, path):
    """As the stages of dvc.yaml do below a worker that was started without the virtual environment on PATH."""
    monkeypatch.setenv("PATH", path)
    with Group(["python", "-c", "import sys; print(sys.executable)"], log=tmp_path / "log") as group:
        assert group.wait(20) == 0
    assert (tmp_path / "log").read_text().strip() == sys.executable


def test_lines_go_to_the_command_and_come_back(tmp_path):
    echo = [sys.executable, "-c", "import sys\nfor line in sys.stdin: print('heard', line.strip(), flush=True)"]
    with Group(echo, log=tmp_path / "log", talk=True) as group:
        group.tell("one")
        assert group.says.readline() == "heard one\n"
        assert group.finish() == 0


def test_telling_a_command_that_is_gone_is_no_fault(tmp_path):
    with Group([sys.executable, "-c", "pass"], log=tmp_path / "log", talk=True) as group:
        group.wait(20)
        group.tell("anyone?")
        assert group.says.readline() == ""

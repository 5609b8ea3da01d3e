"""Keeping: a command -> a process with a log, that a later call of this program finds again and ends."""

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from coop_core.errors import ServiceError

READY_WITHIN = 600
"""Seconds; a server starts in ten to twenty where nothing else works."""
_ENDS_WITHIN = 30


class Keeper:
    """The processes of one folder. What they are called, their numbers and when they began stand in a file there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._file = folder, folder / "processes.json"
        (folder / "logs").mkdir(exist_ok=True)

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str], *, cwd: Path) -> None:
        """Start what does not run; its log is logs/NAME.log. Secrets belong into the environment."""
        if self.find(name) is not None:
            return
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(command, env=dict(environment), cwd=cwd, stdin=subprocess.DEVNULL, stdout=log,
                                       stderr=log, start_new_session=True)  # fmt: skip
        self._write({**self._read(), name: [process.pid, psutil.Process(process.pid).create_time()]})

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def find(self, name: str) -> psutil.Process | None:
        """The running process called so; its number alone might be another's by now."""
        number, began = self._read().get(name, (0, 0.0))
        try:
            process = psutil.Process(int(number))
            alive = process.create_time() == began and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if number and alive else None

    def names(self) -> list[str]:
        return list(self._read())

    def wait(self, name: str, ready: Callable[[], bool]) -> None:
        """Until it is ready.

        Raises
        ------
        ServiceError
            With its last words, when it ends or takes too long.
        """
        end = time.monotonic() + READY_WITHIN
        while not ready():
            said = self.log(name).read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
            if self.find(name) is None:
                raise ServiceError(f"{name} ended: {said[0][:300]}; see {self.log(name)}")
            if time.monotonic() > end:
                raise ServiceError(f"{name} is not ready after {READY_WITHIN} s: {said[0][:300]}; see {self.log(name)}")
            time.sleep(0.2)

    def end(self) -> list[str]:
        """End all, the last first, each with its process group -> their names."""
        ended = []
        for name in reversed(self.names()):
            process = self.find(name)
            if process is not None:
                _end_group(process)
                ended.append(name)
        self._file.unlink(missing_ok=True)
        return ended

    def _read(self) -> dict[str, tuple[int, float]]:
        return json.loads(self._file.read_text()) if self._file.exists() else {}

    def _write(self, numbers: Mapping[str, object]) -> None:
        self._file.write_text(json.dumps(numbers))


def _end_group(leader: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [leader, *leader.children(recursive=True)]
        leader.terminate()
        _, alive = psutil.wait_procs(family, timeout=_ENDS_WITHIN)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5)


def answers(address: str) -> bool:
    """Whether a server says anything at all; loopback is never asked through a proxy."""
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=5).close()
    except urllib.error.HTTPError as error:
        error.close()
        return error.code < 500
    except OSError:
        return False
    return True


def run(command: Sequence[str], *, told: str = "", environment: Mapping[str, str] | None = None,
        cwd: Path | None = None) -> str:  # fmt: skip
    """Run to the end, with `told` on its standard input -> what it said.

    Raises
    ------
    ServiceError
        With its last words.
    """
    ended = subprocess.run(command, input=told, env=None if environment is None else dict(environment), cwd=cwd,
                           capture_output=True, text=True)  # fmt: skip
    if ended.returncode:
        said = (ended.stderr + ended.stdout).strip().splitlines()[-1:] or ["no message"]
        raise ServiceError(f"{Path(command[0]).name} failed: {said[0][:300]}")
    return ended.stdout


def python(*words: str) -> tuple[str, ...]:
    return (sys.executable, *words)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has, all different."""
    with contextlib.ExitStack() as probes:
        found = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in found:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in found]

"""Serving under load: `coop serve` against the bare tower and `mlflow models serve`, and what a swap or a kill costs.

    python benchmarks/serving.py                               on loopback, some minutes
    python benchmarks/serving.py --requests 30 --clients 1 8 --json FILE

A registry of its own in a temporary folder holds one prompt on `mini` twice, under other class names, so that an answer
says which version gave it. Clients are threads of this process that wait for each answer before they ask again; they
share the cores with the server, as does everything else of this machine.
"""

import argparse
import base64
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import paint
from registered import EARLIER, as_variables, make_champion, register, registry_settings, renamed
from rich.console import Console
from rich.table import Table

from coop_core.files import write_json
from coop_core.predictor import Predictor
from pipelines.allocator import keep_freed_memory
from pipelines.environment import inherited_environment

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"1": ("one a", "one b", "one c"), "2": ("two a", "two b", "two c")}
BAD = 1000


class Answer(NamedTuple):
    status: int
    seconds: float
    version: str | None
    labels: tuple[str, ...]
    retry_after: str | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100, help="of each number of clients, in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare:
        return work(given.bare)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = registry_settings(folder)
        versions = {number: renamed(names, folder / number) for number, names in NAMES.items()}
        assert [register(prompt, settings) for prompt in versions.values()] == list(versions)
        make_champion("1", settings)
        images = [(folder / image.path).read_bytes() for image in paint(folder, 64)]
        bodies = [body_of(image) for image in images]
        with coop_serve(folder, settings) as server, mlflow_serve(settings) as theirs, Bare(folder) as bare:
            ports = {"coop serve": server.port, "mlflow models serve": theirs}
            found["bare"], found["load"] = in_turns(bare, ports, bodies, given)
        with coop_serve(folder, settings) as server:
            found["swap"] = swaps(server.port, bodies, lambda number: make_champion(number, settings))
            found["queue"] = rush(server.port, bodies)
            found["bad"] = bad_bodies(server.port, bodies)
            found["stop"] = stop(server, bodies)
        found["kill"] = kill(folder, settings, bodies)
    show(found)
    if given.json:
        write_json(given.json, found)
    return None


def body_of(image: bytes) -> bytes:
    return json.dumps(
        {"dataframe_split": {"columns": ["image"], "data": [[base64.b64encode(image).decode()]]}}
    ).encode()


class Bare:
    """A process that answers without a server: the whole predictor on files in memory, and its tower on views."""

    def __init__(self, folder: Path) -> None:
        environment = inherited_environment() | {"OMP_WAIT_POLICY": "PASSIVE"}
        self._process = subprocess.Popen([sys.executable, __file__, "--bare", str(folder)], env=environment, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def __enter__(self) -> "Bare":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    def rates(self) -> dict[str, float]:
        """Images a second."""
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def work(folder: Path) -> None:
    import numpy as np

    keep_freed_memory()
    predictor = Predictor.load(EARLIER)
    images = [file.read_bytes() for file in sorted(folder.glob("*.jpg"))]
    views = np.stack([predictor.view(image) for image in images])
    predictor.rank(views[:32])
    for _ in sys.stdin:
        begin = time.perf_counter()
        for start in range(0, len(views), 32):
            predictor.rank(views[start : start + 32])
        between = time.perf_counter()
        predictor.predict(images)
        end = time.perf_counter()
        print(json.dumps({"tower": len(views) / (between - begin), "predictor": len(images) / (end - between)}),
              flush=True)  # fmt: skip


class Server(NamedTuple):
    process: subprocess.Popen[bytes]
    port: int


@contextmanager
def coop_serve(folder: Path, settings: Any) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "pipelines.commands.cli", "serve", "--port", str(port)]
    environment = inherited_environment() | as_variables(settings) | {"PYTHONPATH": str(ROOT)}
    with (folder / "serve.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        wait_for(port, "/ready", process)
        yield Server(process, port)
    finally:
        process.kill()
        process.wait()


@contextmanager
def mlflow_serve(settings: Any) -> Iterator[int]:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{settings.registered_model}@champion",
               "--env-manager", "local", "--port", str(port)]  # fmt: skip
    environment = inherited_environment() | {"MLFLOW_TRACKING_URI": settings.tracking_uri}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)  # fmt: skip
    try:
        wait_for(port, "/ping", process)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)                                    # its server is a child of its own
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, path: str, process: subprocess.Popen[bytes], seconds: float = 180) -> float:
    """Until the server says that it is ready -> after how many seconds."""
    begin = time.monotonic()
    while time.monotonic() - begin < seconds and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            if answer.status == 200:
                return time.monotonic() - begin
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    sys.exit(f"no server on port {port}: it ended with {process.poll()}")


def ask(connection: http.client.HTTPConnection, content: bytes) -> Answer:
    begin = time.perf_counter()
    connection.request("POST", "/invocations", content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    labels = tuple(row["label"] for row in json.loads(text)["predictions"]) if answer.status == 200 else ()
    return Answer(answer.status, time.perf_counter() - begin, answer.headers["X-Coop-Version"], labels,
                  answer.headers["Retry-After"])  # fmt: skip


def clients(port: int, bodies: Sequence[bytes], *, count: int, each: Callable[[], bool]) -> list[Answer]:
    """So many clients that ask one after another, while `each` says so."""

    def client(number: int) -> list[Answer]:
        connection, chosen = http.client.HTTPConnection("127.0.0.1", port, timeout=120), random.Random(number)
        found = []
        while each():
            found.append(ask(connection, chosen.choice(bodies)))
        connection.close()
        return found

    with ThreadPoolExecutor(count) as pool:
        return [answer for answers in pool.map(client, range(count)) for answer in answers]


def so_many(requests: int) -> Callable[[], bool]:
    left, lock = [requests], threading.Lock()

    def take() -> bool:
        with lock:
            left[0] -= 1
            return left[0] >= 0

    return take


def in_turns(bare: Bare, ports: dict[str, int], bodies: Sequence[bytes], given: Any) -> tuple[Any, Any]:
    """-> the bare rates (medians), and by server and number of clients: latencies in ms, images/s, share of the bare
    predictor's rate in the same round (medians)."""
    for port in ports.values():
        clients(port, bodies, count=4, each=so_many(20))
    bare.rates()
    rates: list[dict[str, float]] = []
    rows: dict[tuple[str, int], list[tuple[float, float]]] = {}
    answers: dict[tuple[str, int], list[Answer]] = {}
    for _ in range(given.rounds):
        for count in given.clients:
            rates.append(bare.rates())
            for server, port in ports.items():
                begin = time.perf_counter()
                found = clients(port, bodies, count=count, each=so_many(given.requests))
                rate = len(found) / (time.perf_counter() - begin)
                rows.setdefault((server, count), []).append((rate, rate / rates[-1]["predictor"]))
                answers.setdefault((server, count), []).extend(found)
    load = []
    for (server, count), pairs in rows.items():
        its = answers[server, count]
        cuts = statistics.quantiles([1000 * answer.seconds for answer in its], n=100)
        rate, share = (statistics.median(column) for column in zip(*pairs, strict=True))
        load.append({"server": server, "clients": count, "rate": rate, "share": share, "p50": cuts[49], "p95": cuts[94],
                     "p99": cuts[98], "failed": sum(a.status != 200 for a in its)})  # fmt: skip
    return {name: statistics.median(found[name] for found in rates) for name in rates[0]}, load


def swaps(port: int, bodies: Sequence[bytes], move: Callable[[str], None]) -> dict[str, Any]:
    """Six swaps under eight clients: failures, and answers whose labels are not of the version that they name."""
    going = threading.Event()
    going.set()

    def mover() -> None:
        for number in ("2", "1") * 3:
            move(number)
            time.sleep(7)
        going.clear()

    thread = threading.Thread(target=mover)
    thread.start()
    answers = clients(port, bodies, count=8, each=going.is_set)
    thread.join()
    mixed = [a for a in answers if a.status == 200 and not set(a.labels) <= set(NAMES[a.version or ""])]
    return {"requests": len(answers), "failed": sum(a.status != 200 for a in answers), "mixed": len(mixed),
            "by version": Counter(a.version for a in answers)}  # fmt: skip


def rush(port: int, bodies: Sequence[bytes]) -> dict[str, Any]:
    """Two hundred clients at once."""
    answers = clients(port, bodies, count=200, each=so_many(400))
    told = all(answer.retry_after for answer in answers if answer.status == 503)
    return {"requests": len(answers), "by status": Counter(a.status for a in answers), "Retry-After on each 503": told}


def bad_bodies(port: int, bodies: Sequence[bytes]) -> dict[str, Any]:
    """A thousand bodies, each damaged in another way, and a good one behind them."""
    chosen, statuses = random.Random(0), Counter[str]()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for number in range(BAD):
        content = bytearray(bodies[number % len(bodies)])
        kind = number % 4
        if kind == 0:
            content = content[: chosen.randrange(len(content))]
        elif kind == 1:
            for _ in range(50):
                content[chosen.randrange(len(content))] = chosen.randrange(256)
        elif kind == 2:
            odd = {chosen.choice(["inputs", "instances", "x"]): chosen.choice([None, 3, [], {}])}
            content = bytearray(json.dumps(odd).encode())
        else:
            content = bytearray(chosen.randbytes(chosen.randrange(5000)))
        connection.request("POST", "/invocations", bytes(content), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        statuses[f"{answer.status}{' with a traceback' if b'Traceback' in text else ''}"] += 1
    return {"by status": statuses, "a good one after them": ask(connection, bodies[0]).status}


def stop(server: Server, bodies: Sequence[bytes]) -> dict[str, Any]:
    """SIGTERM while sixteen requests are under way."""
    connections = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=60) for _ in range(16)]
    for connection, content in zip(connections, bodies, strict=False):
        connection.request("POST", "/invocations", content, {"Content-Type": "application/json"})
    time.sleep(0.2)
    server.process.send_signal(signal.SIGTERM)
    statuses = Counter(connection.getresponse().status for connection in connections)
    return {"by status": statuses, "exit status": server.process.wait(60)}


def kill(folder: Path, settings: Any, bodies: Sequence[bytes]) -> dict[str, Any]:
    """SIGKILL under load, then the same command again: seconds until it answers."""
    with coop_serve(folder, settings) as server:
        server.process.kill()
        server.process.wait()
    begin = time.monotonic()
    with coop_serve(folder, settings) as again:
        seconds = time.monotonic() - begin
        answer = ask(http.client.HTTPConnection("127.0.0.1", again.port, timeout=60), bodies[0])
    return {"seconds until it answers again": seconds, "status": answer.status}


def show(found: dict[str, Any]) -> None:
    console = Console(width=120)
    rates = found["bare"]
    title = f"bare: tower {rates['tower']:.1f} images/s, with decoding {rates['predictor']:.1f}"
    table = Table("server", "clients", "images/s", "of the bare predictor", "p50", "p95", "p99", "failed", title=title)
    for row in sorted(found["load"], key=lambda row: (row["server"], row["clients"])):
        table.add_row(row["server"], str(row["clients"]), f"{row['rate']:.1f}", f"{row['share']:.2f}",
                      *(f"{row[cut]:.0f} ms" for cut in ("p50", "p95", "p99")), str(row["failed"]))  # fmt: skip
    console.print(table)
    for name in ("swap", "queue", "bad", "stop", "kill"):
        console.print(f"{name}: {found[name]}", highlight=False)


if __name__ == "__main__":
    main()

"""Our client of Prefect: what a server lacks is told with the way to mend it, which depends on whose server it is."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import pytest
from running_services import free_port

ROOT = Path(__file__).parents[1]


class WithoutDeployments(BaseHTTPRequestHandler):
    """Answers as Prefect's server does that nobody has deployed to."""

    def do_GET(self) -> None:
        known = {"/api/admin/version": version("prefect"), "/api/health": True}
        self.reply(200 if self.path in known else 404, known.get(self.path, {"detail": "Deployment not found"}))

    def reply(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """A server of such answers -> its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def port() -> Iterator[int]:
    with serving(WithoutDeployments) as found:
        yield found


def sweep(folder: Path, *, server: int, own: int) -> str:
    """What `coop sweep` says on Prefect's server of one port, where `make up` would use another."""
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    ended = subprocess.run(
        [sys.executable, "-m", "pipelines.commands.cli", "sweep"], cwd=folder, capture_output=True, text=True,
        timeout=120,
        env=os.environ | {"COOP_PREFECT_API_URL": f"http://127.0.0.1:{server}/api", "COOP_PREFECT_PORT": str(own),
                          "COOP_RETRAIN_CRON": "0 4 * * *", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    return ended.stderr


def test_a_server_of_ones_own_without_deployments_is_told_how_to_get_them(tmp_path, port):
    said = sweep(tmp_path, server=port, own=port + 1)

    address = f"http://127.0.0.1:{port}/api"
    assert f"error: Prefect at {address} has no such deployment or run" in said
    assert "`coop up`, which starts workers here as well, or with " \
           f"`python -m pipelines.flows.bootstrap {address}` alone" in said  # fmt: skip
    assert "make up" not in said


@pytest.mark.slow
def test_the_server_of_make_up_without_deployments_gets_them_from_make_up(tmp_path, port):
    assert sweep(tmp_path, server=port, own=port).endswith(": `make up` deploys\n")


@pytest.mark.slow
@pytest.mark.parametrize(("own", "way_out"), [(True, "`make up`"), (False, "start that server")])
def test_a_server_that_is_away_is_started_by_whoever_started_it(tmp_path, port, own, way_out):
    nobody = free_port()
    said = sweep(tmp_path, server=nobody, own=nobody if own else port)

    assert said.endswith(f" does not answer (Connection refused): correct COOP_PREFECT_API_URL or {way_out}\n")


@pytest.mark.slow
def test_a_server_that_says_nothing_is_not_waited_for(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        port = listener.getsockname()[1]
        said = sweep(tmp_path, server=port, own=port)

    assert said == f"error: Prefect at http://127.0.0.1:{port}/api does not answer (nothing in 5 s): correct " \
                   "COOP_PREFECT_API_URL or `make up`\n"  # fmt: skip


RUN = "6f1c1a54-58f4-4d0a-9b0a-000000000001"
LOOK = f"""
import sys
from uuid import UUID
from pipelines.flows import client
client._LOOK_SECONDS = 0.1
print(client.look(UUID("{RUN}"), patience=float(sys.argv[1])).name)
"""


class WithoutDatabase(WithoutDeployments):
    """Prefect's server while PostgreSQL starts again: some answers are its own failure."""

    answers: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        if RUN in self.path:
            status = self.answers.pop(0) if self.answers else 200
            self.reply(status, {"id": RUN, "flow_id": RUN, "name": "brave-otter"} if status == 200 else {})
        else:
            super().do_GET()


@pytest.mark.parametrize(
    ("answers", "patience", "ends_well"), [([500, 500], 30, True), ([500, 500], 0, False), ([401], 30, False)],
    ids=["comes back", "no patience", "refuses"],
)  # fmt: skip
def test_a_server_that_fails_by_itself_is_asked_again_and_one_that_refuses_is_not(answers, patience, ends_well):
    WithoutDatabase.answers[:] = answers
    with serving(WithoutDatabase) as port:
        ended = subprocess.run(
            [sys.executable, "-c", LOOK, str(patience)], capture_output=True, text=True, timeout=120, cwd=ROOT,
            env=os.environ | {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"},
        )  # fmt: skip

    assert (ended.returncode == 0, ended.stdout) == (ends_well, "brave-otter\n" if ends_well else ""), ended.stderr
    assert len(WithoutDatabase.answers) == (1 if patience == 0 else 0)

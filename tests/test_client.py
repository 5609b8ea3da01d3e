"""Our client of Prefect: what a server lacks is told with the way to mend it, which depends on whose server it is."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
from running_services import free_port

ROOT = Path(__file__).parents[1]


class WithoutDeployments(BaseHTTPRequestHandler):
    """Answers as Prefect's server does that nobody has deployed to."""

    def do_GET(self) -> None:
        known = {"/api/admin/version": version("prefect"), "/api/health": True}
        body = json.dumps(known.get(self.path, {"detail": "Deployment not found"})).encode()
        self.send_response(200 if self.path in known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), WithoutDeployments)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


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

"""Roles on a server that asks for logins: one trains, one promotes, one reads; each can do that, and no more."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from running_services import ROOT, free_port, request, wait_until
from toy_images import paint
from toy_prompt import write_prompt

from coop_core.errors import ServiceError
from pipelines.environment import inherited_environment, quiet_libraries
from pipelines.logins import mlflow_server_secrets, mlflow_users, prepare_login
from pipelines.records.claims import claim_promotion
from pipelines.records.runs import RunRecord, track
from pipelines.records.server import Records, connected
from pipelines.settings import Settings

pytestmark = [
    pytest.mark.slow,
    # MLflow's own, of its pages on agents; it appears once, in whichever test imports mlflow.pyfunc first.
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
]

NAMES = ("cat", "dog")
PASSWORD = "a-long-password-of-{}"


@pytest.fixture(scope="module", autouse=True)
def _plain_environment() -> Iterator[None]:
    """No setting of whoever runs the tests; a login that is used ends with them."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("COOP_", "MLFLOW_")):
            del os.environ[name]
    quiet_libraries()
    yield
    os.environ.clear()
    os.environ.update(before)


@dataclass(frozen=True)
class Server:
    url: str
    folder: Path
    admin: str

    def settings(self, user: str, model: str) -> Settings:
        return Settings(_env_file=None, tracking_uri=self.url, tracking_username=user, registered_model=model,
                        tracking_password=PASSWORD.format(user), services_folder=self.folder)  # fmt: skip

    def coop(self, user: str, model: str, *words: str) -> subprocess.CompletedProcess:
        return self.start(user, model, "-m", "pipelines.commands.cli", *words).end()

    def start(self, user: str, model: str, *command: str) -> "Started":
        own = {"COOP_TRACKING_URI": self.url, "COOP_TRACKING_USERNAME": user, "COOP_REGISTERED_MODEL": model,
               "COOP_TRACKING_PASSWORD": PASSWORD.format(user), "PYTHONPATH": str(ROOT)}  # fmt: skip
        return Started([sys.executable, *command], cwd=self.folder, env=os.environ | own, text=True,
                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


class Started(subprocess.Popen):
    def end(self) -> subprocess.CompletedProcess:
        out, err = self.communicate(timeout=300)
        return subprocess.CompletedProcess(self.args, self.returncode, out, err)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A team's: it asks for logins, hands files on itself, and gives everybody READ."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    (folder / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    login, url = prepare_login(folder), f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "2",
               "--app-name", "basic-auth", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
               "--artifacts-destination", (folder / "files").as_uri()]  # fmt: skip
    environment = inherited_environment() | mlflow_users(folder) | mlflow_server_secrets(login)
    with (folder / "log").open("w") as log, subprocess.Popen(
        command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:  # fmt: skip
        try:
            wait_until(lambda: answers(f"{url}/health", process), 120)
            found = Server(url, folder, login)
            for user in ("ann", "bob", "cid"):
                named = {"username": user, "password": PASSWORD.format(user)}
                assert request(f"{url}/api/2.0/mlflow/users/create", named, login=login)[0] == 200
            yield found
        finally:
            os.killpg(process.pid, signal.SIGTERM)


def answers(url: str, process: subprocess.Popen) -> bool:
    assert process.poll() is None, "the server has ended"
    try:
        return request(url)[0] == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def prompt(backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompt(tmp_path_factory.mktemp("prompt") / "prompt", backbone, NAMES)


@pytest.fixture
def train(server: Server, prompt: Path, tmp_path: Path, model: str) -> Callable[[int], str]:
    """What the stage `track` does for ann, of a training after which so many of 60 answers are wrong -> the version."""

    def make(wrong: int) -> str:
        folder = tmp_path / "evaluation"
        folder.mkdir(exist_ok=True)
        evaluation = {"test_digest": "digest", "class_names": NAMES, "classifiers": {"zero-shot": {"accuracy": 0.5}}}
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
        labels = [n % 2 for n in range(60)]
        with (folder / "predictions.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "predicted", "confidence"])
            writer.writerows([f"{n}.png", y, 1 - y if n < wrong else y, 0.9] for n, y in enumerate(labels))
        record = RunRecord(
            name=f"toys-{wrong}", key=f"{model}-{wrong}", params={"seed": 7}, tags={"dataset": "toys"},
            metrics={"accuracy": 1 - wrong / 60, "gain_over_zero_shot": 0.5 - wrong / 60}, epochs=[], datasets=[],
            per_class={"class": list(NAMES)}, files=[(folder, "evaluation")], prompt=prompt, note="toys",
            description="toys", version_tags={},
        )  # fmt: skip
        return track(record, Records(server.settings("ann", model))).model_version

    return make


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    """A registered model of its own for each test."""
    return request.node.name[:60]


@pytest.fixture
def shared(server: Server, train: Callable[[int], str], model: str) -> str:
    """Ann's model with a version, which bob may change, as she allows; and its experiment."""
    train(10)
    with connected(server.settings("ann", model)) as mlflow:
        experiment = mlflow.get_experiment_by_name("coop").experiment_id
    for kind, number in (("registered_model", model), ("experiment", experiment)):
        named = {"username": "bob", "resource_type": kind, "resource_id": number, "permission": "EDIT"}
        path = f"{server.url}/api/3.0/mlflow/users/permissions/grant"
        status, _, said = request(path, named, login=f"ann:{PASSWORD.format('ann')}")
        assert status == 200 or b"already exists" in said, said
    return model


def test_who_may_edit_promotes_and_rolls_back_what_another_has_trained(server, shared, train):
    first = server.coop("bob", shared, "promote")
    train(5)
    second = server.coop("bob", shared, "promote")
    back = server.coop("bob", shared, "rollback")

    assert f"champion  {shared} version 1" in first.stdout, first.stderr
    assert f"champion  {shared} version 2" in second.stdout, second.stderr
    assert f"champion  {shared} version 1, instead of 2" in back.stdout, back.stderr
    assert server.coop("cid", shared, "history").stdout.count("\n") == 3


def test_who_may_read_compares_and_predicts_and_changes_nothing(server, shared, train, tmp_path):
    server.coop("ann", shared, "promote")
    train(5)
    paint(tmp_path / "image.png", 1)
    answer = server.coop("cid", shared, "predict", "--model", f"{shared}@champion", str(tmp_path / "image.png"))

    assert answer.stdout.split("\t")[1].split()[0] in NAMES, answer.stderr
    assert f"{shared}/2" in server.coop("cid", shared, "compare", "--json").stdout
    for command in ("promote", "rollback"):
        refused = server.coop("cid", shared, command)
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"error: MLflow at {server.url} forbids this (403)")
        assert refused.stderr.count("\n") == 1
    records = Records(server.settings("cid", shared))
    for at_once in (False, True):
        with pytest.raises(ServiceError, match=r"forbids this \(403\)"), claim_promotion(records, by="cid",
                                                                                      at_once=at_once):  # fmt: skip
            pass
    with connected(server.settings("ann", shared)) as mlflow:
        found = mlflow.MlflowClient().get_registered_model(shared)
    assert str(found.aliases["champion"]) == "1"
    assert not [key for key in found.tags if key.startswith("claim.")]


HOLD = """
import time
from pipelines.records.claims import claim_promotion
from pipelines.records.server import open_records
with claim_promotion(open_records(), by="ann"):
    print("holds", flush=True)
    time.sleep(600)
"""


def test_what_anns_killed_promotion_left_is_cleared_by_bob(server, shared):
    with server.start("ann", shared, "-c", HOLD) as killed:
        assert killed.stdout.readline() == "holds\n"
        killed.kill()
    assert "another promotion is under way, by ann" in server.coop("bob", shared, "promote").stderr
    with connected(server.settings("ann", shared)) as mlflow:
        client = mlflow.MlflowClient()
        left = {key: json.loads(tag) for key, tag in client.get_registered_model(shared).tags.items()}
        for key, tag in left.items():
            client.set_registered_model_tag(shared, key, json.dumps(tag | {"since": tag["since"] - 600}))

    assert "version 1" in server.coop("bob", shared, "promote").stdout


def test_of_promotions_sent_at_once_one_is_carried_out(server, shared):
    """Two server processes, and a process for each who asks."""
    asked = [server.start(user, shared, "-m", "pipelines.commands.cli", "promote") for user in ("ann", "bob") * 2]
    ended = [process.end() for process in asked]

    assert sorted(done.returncode for done in ended) == [0, 2, 2, 2], [done.stderr for done in ended]
    for done in ended:
        assert done.returncode == 0 or "promotion is under way" in done.stderr or "champion already" in done.stderr
    assert len(json.loads(server.coop("cid", shared, "history", "--json").stdout)) == 1


def test_a_rollback_takes_the_place_of_a_promotion_under_way(server, shared, train):
    server.coop("bob", shared, "promote")
    train(5)
    server.coop("bob", shared, "promote")
    with server.start("ann", shared, "-c", HOLD) as held:
        assert held.stdout.readline() == "holds\n"
        back = server.coop("bob", shared, "rollback")
        held.kill()

    assert f"champion  {shared} version 1, instead of 2" in back.stdout, back.stderr

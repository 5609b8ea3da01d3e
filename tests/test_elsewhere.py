"""Outside the project's folder: a command works there or says where it would, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from running_services import free_port
from toy_images import paint

ROOT = Path(__file__).parents[1]
BOUND = [["sweep"], ["sweep", "--local"], ["promote"], ["up"], ["down"], ["status"], ["ui"]]
RECORDS = [["compare"], ["history"], ["rollback"], ["reconcile"], ["card", "-m", "coop-prompt@champion"],
           ["predict", "a.png", "-m", "coop-prompt/1"]]  # fmt: skip


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    paint(tmp_path / "a.png", 1)
    return tmp_path


def coop(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which leaves nothing but what was there."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COOP_", "MLFLOW_"))}
    ended = subprocess.run(
        [sys.executable, "-m", "pipelines.commands.cli", *words], cwd=folder, capture_output=True, text=True,
        env=environment | variables | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert [path.name for path in folder.iterdir()] == ["a.png"]
    return ended


@pytest.mark.parametrize("words", BOUND + RECORDS, ids=" ".join)
def test_what_needs_the_project_says_so_and_makes_nothing(elsewhere, words):
    ended = coop(elsewhere, *words)

    assert ended.returncode == 2
    assert ended.stdout == ""
    way_out = "" if words in BOUND else ", or name MLflow's server in COOP_TRACKING_URI"
    assert ended.stderr == (f"error: this is not the project's folder: {elsewhere} has neither params.yaml nor "
                            f"dvc.yaml; change into the one that has them{way_out}\n")  # fmt: skip


@pytest.mark.parametrize("words", [["--help"], ["sweep", "--help"], ["compare", "--help"], ["up", "--help"]])
def test_help_is_given_anywhere(elsewhere, words):
    ended = coop(elsewhere, *words)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("words", [["compare"], ["history"], ["card", "-m", "coop-prompt@champion"]], ids=" ".join)
def test_records_on_a_server_are_asked_for_from_anywhere(elsewhere, words):
    server = f"http://127.0.0.1:{free_port()}"
    ended = coop(elsewhere, *words, COOP_TRACKING_URI=server)
    assert ended.stderr.startswith(f"error: MLflow at {server} does not answer")


@pytest.mark.slow
def test_a_database_that_is_there_is_read_from_anywhere(elsewhere, tmp_path_factory):
    database = tmp_path_factory.mktemp("records") / "mlflow.db"
    ended = coop(elsewhere, "compare", COOP_TRACKING_URI=f"sqlite:///{database}")
    assert (ended.returncode, ended.stdout) == (0, "no finished runs yet: `dvc repro` makes one\n"), ended.stderr


def test_a_folder_with_a_prompt_answers_anywhere(elsewhere):
    ended = coop(elsewhere, "predict", "a.png", "-m", "../no-prompt")
    assert ended.stderr.startswith("error: no learned prompt at ../no-prompt: ")


def test_services_in_a_folder_that_is_named_are_looked_at_from_anywhere(elsewhere, tmp_path_factory):
    ended = coop(elsewhere, "status", COOP_SERVICES_FOLDER=str(tmp_path_factory.mktemp("services")))
    assert (ended.returncode, ended.stdout) == (1, "not running: `make up` starts it\n")

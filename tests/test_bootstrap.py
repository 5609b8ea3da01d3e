"""Bootstrap: a person types it, perhaps with another Python than the project's, and always gets one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from running_services import free_port

from pipelines.flows.bootstrap import main

ROOT = Path(__file__).parents[1]


def bootstrap(*words: str, python: tuple[str, ...] = (sys.executable,)) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*python, "-m", "pipelines.flows.bootstrap", *words], capture_output=True, text=True, env=environment
    )
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr
    return ended.stderr


def test_a_python_without_what_the_project_installs_is_a_sentence():
    said = bootstrap("http://127.0.0.1:1/api", python=(sys.executable, "-S"))  # without site-packages
    assert said.startswith("error: No module named '")
    assert said.endswith("lacks what the project installs: put .venv/bin first on PATH, or run `make demo`\n")


@pytest.mark.parametrize("words", [[], ["localhost"], ["http://127.0.0.1:1/api", "--all"]])
def test_words_that_name_no_server_are_a_sentence(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["bootstrap", *words])
    with pytest.raises(SystemExit, match=r"^2$"):
        main()
    assert capsys.readouterr().err == "error: name the server: python -m pipelines.flows.bootstrap http://HOST:4200/api\n"


@pytest.mark.slow
def test_a_server_that_is_away_is_a_sentence():
    address = f"http://127.0.0.1:{free_port()}/api"
    assert bootstrap(address).startswith(f"error: Prefect at {address} says: ")

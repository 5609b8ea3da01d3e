"""Promotion: the champion changes only through the gate or a rollback, one at a time, and every change is on record."""

import csv
import json
import os
import random
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_prompt import write_prompt
from typer.testing import CliRunner

from coop_core.artifact import write_card
from coop_core.backbone import digest_tensors
from coop_core.errors import GateError
from coop_core.files import read_json, read_tensors, write_tensors
from coop_core.judging.gate import Policy
from pipelines.champion import promotion
from pipelines.records import claims
from pipelines.records.claims import Claim, claim_promotion
from pipelines.records.names import model_name, name_after
from pipelines.records.registry import CANDIDATE, find_version, list_events
from pipelines.records.server import Records, connected
from pipelines.settings import Settings

# MLflow's own, of its pages on agents; it appears once, in whichever test imports mlflow.pyfunc first.
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")

POLICY = Policy(min_gain_over_zero_shot=0.0, significance=0.05, max_class_drop=0.5, min_images_a_class=10)
LABELS = [n % 2 for n in range(60)]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Records:
    """One SQLite file for all tests: making its tables takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    return Settings(_env_file=None, tracking_uri=f"sqlite:///{folder}/mlflow.db", cache_folder=folder / "cache",
                    artifact_location=(folder / "mlruns").as_uri())  # fmt: skip


@pytest.fixture
def records(server, request) -> Records:
    """A registered model of its own for each test."""
    name = f"{request.node.originalname[:60]}-{uuid.uuid4().hex[:8]}"
    return Records(server.model_copy(update={"registered_model": name}))


@pytest.fixture(scope="module")
def prompt(backbone, tmp_path_factory) -> Path:
    return write_prompt(tmp_path_factory.mktemp("prompt") / "prompt", backbone, ("cat", "dog"))


@pytest.fixture
def register(records, prompt, tmp_path):
    """A version whose run recorded answers, so many of them wrong; it becomes the candidate."""

    def make(
        wrong: int, *, probe: int | None = None, test_digest: str = "digest",
        class_names: Sequence[str] = ("cat", "dog"), prompt: Path = prompt,
    ) -> str:  # fmt: skip
        folder = tmp_path / "evaluation"
        folder.mkdir(exist_ok=True)
        evaluation = {"test_digest": test_digest, "class_names": list(class_names),
                      "classifiers": {"zero-shot": {"accuracy": 0.5}}}  # fmt: skip
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
        with (folder / "predictions.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            baselines = [] if probe is None else ["zero-shot", "linear probe"]
            writer.writerow(["path", "label", "predicted", "confidence", *baselines])
            for n, y in enumerate(LABELS):
                known = [] if probe is None else [1 - y, 1 - y if n < probe else y]
                writer.writerow([f"{n}.png", y, 1 - y if n < wrong else y, 0.9, *known])
        with connected(records.settings) as mlflow:
            client, name = mlflow.MlflowClient(), records.model
            experiment = client.get_experiment_by_name("toys")
            location = records.settings.artifact_location
            number = experiment.experiment_id if experiment else client.create_experiment("toys", location)
            run = client.create_run(number)
            client.log_artifacts(run.info.run_id, str(folder), "evaluation")
            client.log_artifacts(run.info.run_id, str(prompt), "model/artifacts/prompt")
            if not client.search_registered_models(f"name = '{name}'"):
                client.create_registered_model(name)
            version = client.create_model_version(name, f"{run.info.artifact_uri}/model", run.info.run_id)
            client.set_registered_model_alias(name, CANDIDATE, version.version)
        return str(version.version)

    return make


def champion(records: Records) -> str | None:
    found = find_version("champion", records)
    return found.number if found else None


def test_the_first_candidate_becomes_champion(records, register):
    register(10)

    decision = promotion.promote(records, POLICY)

    assert (decision.promote, champion(records)) == (True, "1")


def test_a_worse_candidate_leaves_the_champion(records, register):
    register(2)
    promotion.promote(records, POLICY)
    register(20)

    decision = promotion.promote(records, POLICY)

    assert (decision.promote, champion(records), len(promotion.history(records))) == (False, "1", 1)


def test_a_candidate_whose_linear_probe_is_better_is_left(records, register):
    register(20, probe=5)

    assert not promotion.promote(records, POLICY).promote
    assert promotion.promote(records, replace(POLICY, against_baselines="tell")).promote


def test_a_version_can_be_named(records, register):
    register(4)
    register(3)

    promotion.promote(records, POLICY, version="1")

    assert champion(records) == "1"


def test_rolling_back_goes_one_champion_further_each_time(records, register):
    for wrong in (9, 6, 3):
        register(wrong)
        promotion.promote(records, POLICY)

    assert promotion.rollback(records) == ("3", "2")
    assert promotion.rollback(records) == ("2", "1")
    with pytest.raises(GateError, match="version 1 is the first champion"):
        promotion.rollback(records)
    assert champion(records) == "1"


def test_history_tells_every_change(records, register):
    for wrong in (9, 6):
        register(wrong)
        promotion.promote(records, POLICY)
    promotion.rollback(records)

    events = promotion.history(records)

    assert [(e["action"], e["previous"], e["version"], e["carried_out"]) for e in events] == [
        ("promote", None, "1", True), ("promote", "1", "2", True), ("rollback", "2", "1", True),
    ]  # fmt: skip


def test_the_decision_lies_with_the_run_in_full(records, register, tmp_path):
    register(9)
    promotion.promote(records, POLICY)
    (event,) = list_events(records)

    with connected(records.settings) as mlflow:
        run_id = find_version("1", records).run_id
        stored = json.loads(mlflow.artifacts.load_text(f"runs:/{run_id}/promotion/{event['time']}.json"))

    assert stored["decision"]["checks"][0]["value"] == pytest.approx(51 / 60 - 0.5)


def test_a_change_cut_short_before_the_alias_moved_is_told_apart(records, register):
    for wrong in (9, 6, 3):
        register(wrong)
    promotion.promote(records, POLICY, version="1")
    first, second = find_version("1", records), find_version("2", records)
    with claim_promotion(records, by="ann") as claim:
        claim.release()
        with pytest.raises(GateError, match="took this one's place"):
            promotion._move(second, first, "promote", records, claim, "ann", None)
    assert find_version("champion", records).number == "1"

    promotion.promote(records, POLICY, version="3")

    assert [event["carried_out"] for event in promotion.history(records)] == [True, False, True]
    assert promotion.rollback(records) == ("3", "1")


def move_by_hand(records: Records, number: str) -> None:
    with connected(records.settings) as mlflow:
        mlflow.MlflowClient().set_registered_model_alias(records.model, "champion", number)


def told(records: Records) -> list[tuple[bool, bool]]:
    return [(event["carried_out"], event["changed_outside"]) for event in promotion.history(records)]


def test_a_champion_that_was_moved_by_hand_is_told_from_a_change_cut_short(records, register):
    for wrong in (9, 6):
        register(wrong)
        promotion.promote(records, POLICY)
    move_by_hand(records, "1")

    assert told(records) == [(True, False), (True, True)]
    assert promotion.was_champion(records, "2")
    promotion.promote(records, POLICY, version="2")
    assert told(records) == [(True, False), (True, True), (True, False)]
    assert promotion.rollback(records) == ("2", "1")


def test_events_of_older_versions_are_read_as_they_were(records, register):
    """They do not say whether they were carried out: the alias that followed tells."""
    for wrong in (9, 6):
        register(wrong)
        promotion.promote(records, POLICY)
    with connected(records.settings) as mlflow:
        client, name = mlflow.MlflowClient(), records.model
        for event in list_events(records):
            old = {key: value for key, value in event.items() if key != "carried_out"}
            client.set_registered_model_tag(name, f"promotion.{event['time']}", json.dumps(old))

    assert told(records) == [(True, False), (True, False)]
    move_by_hand(records, "1")
    assert told(records) == [(True, False), (False, False)]


def test_a_promotion_that_ends_right_after_the_alias_moved_was_carried_out(records, register, monkeypatch, caplog):
    register(9)
    with connected(records.settings) as mlflow:
        write = mlflow.MlflowClient.set_registered_model_tag

    def fail_in_the_end(client: Any, name: str, key: str, value: str) -> None:
        if '"carried_out": true' in value:
            raise mlflow.exceptions.MlflowException("the disk is full")
        write(client, name, key, value)

    monkeypatch.setattr(mlflow.MlflowClient, "set_registered_model_tag", fail_in_the_end)

    assert promotion.promote(records, POLICY).promote
    assert told(records) == [(True, False)]
    assert "its record could not be completed: the disk is full" in caplog.text


def test_a_version_that_a_rollback_brought_back_and_nobody_promoted_has_no_way_further_back(records, register):
    for wrong in (9, 8, 6):
        register(wrong)
    promotion.promote(records, POLICY, version="1")
    move_by_hand(records, "2")
    promotion.promote(records, POLICY, version="3")

    assert promotion.rollback(records) == ("3", "2")
    with pytest.raises(GateError, match="version 2 was made champion outside coop"):
        promotion.rollback(records)


def test_a_user_without_a_name_is_told_by_number(records, register, monkeypatch):
    """As in a container that runs under any number: no entry in passwd, and no variable."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_123)
    for wrong in (9, 6):
        register(wrong)
        promotion.promote(records, POLICY)
    promotion.rollback(records)

    assert {event["by"] for event in promotion.history(records)} == {"uid 4000123"}


def test_of_two_promotions_at_once_one_is_told(records, register):
    register(5)
    with claim_promotion(records, by="ann"), pytest.raises(GateError, match="another promotion is under way, by ann"):
        promotion.promote(records, POLICY)

    assert promotion.promote(records, POLICY).promote


@pytest.fixture
def leave(records):
    """Claim and never release, as a killed process does."""
    left = []

    def make(by: str, *, at_once: bool = False) -> Claim:
        left.append(claim_promotion(records, by=by, at_once=at_once))  # kept, or its end would release it
        return left[-1].__enter__()

    return make


def claim_tags(records: Records) -> dict[str, dict]:
    with connected(records.settings) as mlflow:
        tags = mlflow.MlflowClient().get_registered_model(records.model).tags
    return {key: json.loads(value) for key, value in tags.items() if key.startswith("claim.")}


def grow_old(records: Records) -> None:
    """All claims are as old as if nobody had touched them for ten minutes."""
    with connected(records.settings) as mlflow:
        for key, tag in claim_tags(records).items():
            text = json.dumps(tag | {"since": tag["since"] - 600})
            mlflow.MlflowClient().set_registered_model_tag(records.model, key, text)


def test_what_a_killed_promotion_left_gives_way_after_some_minutes(records, register, leave):
    register(5)
    leave("ann")
    with pytest.raises(GateError, match=r"another promotion is under way, by ann on .* gives way after 5 minutes"):
        promotion.promote(records, POLICY)
    grow_old(records)

    assert promotion.promote(records, POLICY).promote
    assert claim_tags(records) == {}


def test_a_killed_promotion_does_not_hold_up_a_rollback(records, register, leave):
    for wrong in (9, 6):
        register(wrong)
        promotion.promote(records, POLICY)
    killed = leave("ann")

    assert promotion.rollback(records) == ("2", "1")
    assert promotion.was_champion(records, "2")
    assert not promotion.was_champion(records, "1")
    with pytest.raises(GateError, match="took this one's place"):
        killed.confirm()


def test_of_two_rollbacks_that_see_the_same_claim_neither_removes_the_others(records, register, leave, monkeypatch):
    """Ben is through while ann has only looked; she removes what she saw, and not his."""
    register(5)
    leave("zoe")
    clear, of_ben = claims._clear, []

    def late(*seen: Any) -> None:
        monkeypatch.setattr(claims, "_clear", clear)
        of_ben.append(leave("ben", at_once=True))
        clear(*seen)

    monkeypatch.setattr(claims, "_clear", late)
    with (
        pytest.raises(GateError, match="another promotion is under way, by ben"),
        claim_promotion(records, by="ann", at_once=True),
    ):
        pass

    of_ben[0].confirm()
    assert [tag["by"] for tag in claim_tags(records).values()] == ["ben"]


def test_a_rollback_that_comes_while_a_promotion_asks_is_alone(records, register, monkeypatch):
    """The promotion has found itself alone, and writes that it holds the right after its request was cleared."""
    register(5)
    with connected(records.settings) as mlflow:
        slow = Claim(mlflow.MlflowClient(), records.model, "ann")
    slow.ask()
    write = slow._write
    with ExitStack() as rollback:
        monkeypatch.setattr(slow, "_write", lambda state: (
            rollback.enter_context(claim_promotion(records, by="ben", at_once=True)), write(state)
        ))  # fmt: skip
        with pytest.raises(GateError, match="took this one's place"):
            slow.hold()
        slow.release()
        assert [tag["by"] for tag in claim_tags(records).values()] == ["ben"]


def test_a_claim_whose_requests_arrive_twice_holds(records, register, monkeypatch):
    """MLflow's client sends a request again when the answer to it was lost."""
    register(5)
    with connected(records.settings) as mlflow:
        once = mlflow.MlflowClient.set_registered_model_tag
    monkeypatch.setattr(mlflow.MlflowClient, "set_registered_model_tag",
                        lambda *words: (once(*words), once(*words)))  # fmt: skip

    assert promotion.promote(records, POLICY).promote
    assert claim_tags(records) == {}


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"by": "ann", "host": "h", "state": "holding", "since": NaN}',
                                  '{"by": "ann", "host": "h", "state": "holding", "since": 9e99}'],
                         ids=["empty", "nothing", "list", "no time", "far off"])  # fmt: skip
def test_a_claim_that_says_nothing_blocks_nobody(records, register, text):
    register(5)
    with connected(records.settings) as mlflow:
        mlflow.MlflowClient().set_registered_model_tag(records.model, "claim.0", text)

    assert promotion.promote(records, POLICY).promote


def test_what_older_versions_left_blocks_nobody(records, register):
    register(5)
    with connected(records.settings) as mlflow:
        mlflow.MlflowClient().create_registered_model(f"{records.model}.promotion", tags={"owner": "ann"})

    assert promotion.promote(records, POLICY).promote


class Registry:
    """A registered model's tags, which several clients change at once; every request takes its time."""

    def __init__(self, seed: int, tags: dict[str, str]) -> None:
        self.tags = dict(tags)
        self._random, self._lock = random.Random(seed), threading.Lock()

    def get_registered_model(self, name: str) -> Any:
        return SimpleNamespace(tags=self._request(lambda: dict(self.tags)))

    def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
        self._request(lambda: self.tags.update({key: value}))

    def delete_registered_model_tag(self, name: str, key: str) -> None:
        self._request(lambda: self.tags.pop(key, None))

    def _request(self, act: Callable[[], Any]) -> Any:
        with self._lock:
            before, after = self._random.random() / 500, self._random.random() / 500
        time.sleep(before)
        with self._lock:
            answer = act()
        time.sleep(after)
        return answer


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("left", [{}, {"claim.0": '{"by": "zoe", "host": "h", "state": "holding", "since": 0}'}],
                         ids=["alone", "after a killed one"])  # fmt: skip
def test_of_many_who_claim_at_once_one_holds(seed, left, monkeypatch):
    monkeypatch.setattr(claims, "_POLL_SECONDS", 0.001)
    registry, together = Registry(seed, left), threading.Barrier(5)

    def claim(number: int) -> bool:
        own = Claim(registry, "model", f"caller {number}")
        together.wait()
        own.ask()
        try:
            own.hold()
        except GateError:
            own.release()
            return False
        own.confirm()
        return True  # and holds on

    with ThreadPoolExecutor(5) as pool:
        held = list(pool.map(claim, range(5)))

    assert sum(held) == 1
    assert len(registry.tags) == 1


def test_a_champion_from_elsewhere_has_no_way_back_but_by_name(records, register):
    for wrong in (9, 6):
        register(wrong)
    promotion.promote(records, POLICY, version="1")
    with connected(records.settings) as mlflow:
        mlflow.MlflowClient().set_registered_model_alias(records.model, "champion", "2")

    with pytest.raises(GateError, match="version 2 was made champion outside coop"):
        promotion.rollback(records)


def test_a_promotion_that_was_overtaken_leaves_the_champion_alone(records, register, leave):
    register(5)
    claim = leave("ann")
    grow_old(records)
    with claim_promotion(records, by="ben"), pytest.raises(GateError, match="took this one's place"):
        claim.confirm()


def test_every_decision_is_kept_with_the_version(records, register):
    register(5)
    promotion.promote(records, POLICY)
    register(30)
    decision = promotion.judge(records, POLICY)

    assert not decision.promote
    assert [find_version(number, records).gate for number in ("1", "2")] == ["passed", "refused"]


def test_another_test_set_needs_a_word(records, register):
    register(9)
    promotion.promote(records, POLICY)
    register(9, test_digest="other")

    with pytest.raises(GateError, match=r"judged on different test images or classes: .*--without-comparison"):
        promotion.promote(records, POLICY)
    assert promotion.promote(records, POLICY, compare=False).promote


def test_a_champion_may_learn_classes_and_forgets_none(records, register):
    register(9)
    promotion.promote(records, POLICY)
    register(9, test_digest="other", class_names=("cat", "dog", "wolf"))
    with pytest.raises(GateError, match="wolf new: promote with --without-comparison"):
        promotion.promote(records, POLICY)
    promotion.promote(records, POLICY, compare=False)
    register(9)
    for compare in (True, False):
        with pytest.raises(GateError, match="candidate 3 answers with other classes than champion 2: wolf missing"):
            promotion.promote(records, POLICY, compare=compare)

    assert champion(records) == "2"


def damaged(prompt: Path, damage: str) -> None:
    """Damage that the digests do not tell of: the artefact was written so."""
    card = read_json(prompt / "card.json")
    file, key = ("context", "context_vectors") if damage.startswith("context") else ("class_weights", damage)
    tensors, _ = read_tensors(prompt / f"{file}.safetensors")
    if damage == "method":
        card["method"]["name"] = "of next year"
    elif damage == "parameters":
        card["method"]["n_context"] = -1
    elif damage == "learned":
        card["learned"] = {"context_vectors": [3, 99], "meta_net": [1]}
    elif damage == "no classifier":
        (prompt / "class_weights.safetensors").unlink()
        del card["digests"]["class_weights"]
        card["method"]["name"] = "of next year"
    else:
        tensors[key] = torch.full_like(tensors[key], float("nan"))
        write_tensors(prompt / f"{file}.safetensors", tensors)
        card["digests"][file] = digest_tensors(tensors)
    write_card(prompt, card)


@pytest.mark.parametrize(
    ("damage", "said"),
    [("method", "its method 'of next year' is not in this version"), ("parameters", "its parameters of coop are not"),
     ("learned", r"context.safetensors holds .* but its card says .*meta_net"),
     ("no classifier", "its method 'of next year' is not in this version"),
     ("context", "context_vectors in context.safetensors holds values that are no numbers"),
     ("classifier.weights", "class_weights.safetensors holds values that are no numbers"),
     ("classifier.scale", "class_weights.safetensors holds values that are no numbers")],
)  # fmt: skip
def test_a_version_that_cannot_answer_does_not_become_champion(records, register, prompt, tmp_path, damage, said):
    broken = tmp_path / "prompt"
    shutil.copytree(prompt, broken)
    damaged(broken, damage)
    register(5, prompt=broken)

    with pytest.raises(GateError, match=f"version 1 cannot answer, so it cannot be champion: {said}"):
        promotion.promote(records, POLICY)
    assert champion(records) is None


def test_a_rollback_leads_to_no_version_whose_files_are_gone(records, register, tmp_path):
    for wrong in (9, 6):
        register(wrong)
        promotion.promote(records, POLICY)
    with connected(records.settings) as mlflow:
        uri = mlflow.MlflowClient().get_model_version_download_uri(records.model, "1")
    shutil.rmtree(uri.removeprefix("file://"))

    with pytest.raises(GateError, match=r"version 1 cannot answer, .*: model .* holds no prompt artefact"):
        promotion.rollback(records)
    assert champion(records) == "2"


def test_what_is_not_there_is_a_sentence(records):
    for call in (lambda: promotion.promote(records, POLICY), lambda: promotion.rollback(records)):
        with pytest.raises(GateError, match=r"in the registry at sqlite.*`dvc repro` registers a candidate"):
            call()
    assert promotion.history(records) == []


def test_the_champion_is_not_promoted_again(records, register):
    register(9)
    promotion.promote(records, POLICY)

    with pytest.raises(GateError, match="version 1 is the champion already"):
        promotion.promote(records, POLICY)


def test_the_commands_say_what_they_did(records, register, monkeypatch, tmp_path):
    from pipelines.commands.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_bytes((Path(__file__).parents[1] / "params.yaml").read_bytes())
    for name in ("tracking_uri", "registered_model", "cache_folder"):
        monkeypatch.setenv(f"COOP_{name.upper()}", str(getattr(records.settings, name)))
    run = CliRunner()

    assert "no champion yet" in run.invoke(app, ["history"]).output
    for wrong in (9, 6):
        register(wrong)
        shown = run.invoke(app, ["promote"]).output
    assert "pass  not worse than the champion: 90.0 % against the champion's 85.0 %" in shown
    assert f"champion  {records.model} version 2" in shown
    assert "version 1, instead of 2" in run.invoke(app, ["rollback"]).output
    assert "rollback  2 -> 1" in run.invoke(app, ["history"]).output
    move_by_hand(records, "2")
    assert run.invoke(app, ["history"]).output.endswith("(changed outside coop since)\n")
    move_by_hand(records, "1")
    register(40)
    refused = run.invoke(app, ["promote"])
    assert isinstance(refused.exception, GateError)
    assert "FAIL  gain over zero-shot" in refused.output


@pytest.mark.parametrize(
    ("dataset", "name"),
    [("fashion-mnist", "coop-fashion-mnist"), ("UCF101", "coop-ucf101"), ("Pets_2 (new)", "coop-pets-2-new"),
     ("Café", "coop-cafe"), ("models:/x", "coop-models-x")],
)  # fmt: skip
def test_a_model_is_named_after_its_data_set(dataset, name):
    assert name_after(dataset) == name


def test_data_sets_of_other_letters_have_models_of_their_own():
    found = [name_after(name) for name in ("天气", "杂货", "天气 2", "!", "?", "a" * 300, "a" * 301, "\udcff")]

    assert len(set(found)) == len(found)
    assert all(re.fullmatch(r"coop-[a-z0-9-]{1,109}", name) for name in found)


def test_commands_take_the_model_that_is_set_or_was_tracked_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    unset = Settings(_env_file=None, registered_model=None)
    with pytest.raises(GateError, match=r"which model\? set COOP_REGISTERED_MODEL, or run `dvc repro`"):
        model_name(unset)
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/tracked.json").write_text('{"model_name": "coop-weather"}')

    assert model_name(unset) == "coop-weather"
    assert model_name(Settings(_env_file=None, registered_model="mine")) == "mine"

"""Sweep: what is tried, what is compared with what, and the params that make the winner again."""

import dataclasses
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from coop_core.errors import ParamsError
from coop_core.files import write_text
from coop_core.methods import load_method, method_names
from coop_core.params import Params, load_params, parse_params, patch
from coop_core.params.file import changed
from coop_core.sweeps.space import columns
from coop_core.sweeps.sweep import (
    Result,
    Trial,
    choice_key,
    next_choices,
    require_sweep,
    rows,
    scores,
    target_task,
    tasks,
    trials,
    winner,
    winning_values,
)

ROOT = Path(__file__).parents[1]
OWN = load_params(ROOT / "params.yaml").dataset.source


def swept(
    *, split: dict[str, Any] | None = None, tests: dict[str, dict[str, Any]] | None = None, **sweep: Any
) -> Params:
    tree = load_params(ROOT / "params.yaml").model_dump()
    tree["split"], tree["tests"] = {**tree["split"], **(split or {})}, tests or {}
    space = {"train.learning_rate": [0.01, 0.02]}
    return parse_params({**tree, "sweep": {"name": "toy", "space": space, "seeds": [1, 2], **sweep}}, where="toy")


def judged(trial: Trial, val: float, loss: float = 1.0) -> Result:
    return Result(trial, val_accuracy=val, val_loss=loss, accuracy=0.5, zero_shot_accuracy=0.1)


def results(params: Params, val: dict[float, float], loss: dict[float, float] | None = None) -> list[Result]:
    """Every trial, scored by its learning rate; fewer shots score 0.1 more."""
    found = []
    for trial in trials(params, next_choices(params, {})):
        rate = trial.choice["train.learning_rate"]
        easier = 0.1 if trial.params.split.shots < 16 else 0.0
        found.append(judged(trial, val[rate] + easier, (loss or {}).get(rate, 1.0)))
    return found


def test_a_grid_is_every_combination_with_every_seed():
    params = swept(space={"split.shots": [1, 16], "train.learning_rate": [0.01, 0.02], "method.n_context": [4]})

    found = trials(params, next_choices(params, {}))

    assert len(found) == 2 * 2 * 2
    assert {(t.params.split.shots, t.params.train.learning_rate, t.params.seed) for t in found} == {
        (shots, rate, seed) for shots in (1, 16) for rate in (0.01, 0.02) for seed in (1, 2)
    }
    assert {t.params.method.n_context for t in found} == {4}
    assert found[0].name == "shots 1, learning_rate 0.01, n_context 4, seed 1"


def test_a_trial_has_no_few_shot_curve_of_its_own():
    params = swept(space={"split.shots": [1]})
    assert trials(params, next_choices(params, {}))[0].params.split.curve_shots == []


def test_a_value_may_be_a_section_whose_entries_change_together():
    space = {"method": [{"n_context": 4, "class_specific": True}, {"class_token_position": "middle"}]}
    params = swept(space=space)

    first, second = (t.params.method for t in trials(params, next_choices(params, {}))[::2])

    assert (first.n_context, first.class_specific) == (4, True)
    assert (second.n_context, second.class_token_position) == (params.method.n_context, "middle")


METHODS = [{"name": "gda"}, {"name": "probe", "penalty": "none"}, {"name": "coop", "n_context": 4}]


def test_methods_are_tried_as_whole_sections_each_with_its_own_defaults():
    params = swept(space={"method": METHODS}, seeds=[1])

    found = trials(params, next_choices(params, {}))

    gda, probe, coop = (trial.params.method for trial in found)
    assert (gda, probe) == (load_method("gda").Params(), load_method("probe").Params(penalty="none"))
    assert coop == params.method.model_copy(update={"n_context": 4})             # of its own method the rest stays
    assert [trial.name for trial in found] == ["method gda, seed 1", "method probe penalty none, seed 1",
                                               "method coop n_context 4, seed 1"]  # fmt: skip
    assert columns(found[1].choice) == {"method.name": "probe", "method.penalty": "none"}


@pytest.mark.parametrize("order", [1, -1], ids=["name first", "name last"])
def test_methods_are_tried_by_their_names_alone(order):
    space = {"method.name": ["gda", "coop", "tip_adapter"], "train.learning_rate": [0.01]}
    params = swept(space=dict(list(space.items())[::order]), seeds=[1])

    found = [trial.params.method for trial in trials(params, next_choices(params, {}))]

    assert found == [load_method("gda").Params(), params.method, load_method("tip_adapter").Params()]


def test_a_parameter_beside_the_name_is_the_named_methods_whatever_their_order():
    params = swept(space={"method.alpha": [0.5], "method.name": ["gda", "tip_adapter"]}, seeds=[1])

    assert [trial.params.method.alpha for trial in trials(params, next_choices(params, {}))] == [0.5, 0.5]


@pytest.mark.parametrize("name", sorted(set(method_names()) - {"upl"}))
def test_every_method_can_be_named(name):
    params = swept(space={"method.name": [name]}, seeds=[1])

    assert trials(params, next_choices(params, {}))[0].params.method.name == name


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_a_search_draws_whole_methods(search):
    params = swept(search=search, draws=12, space={"method": METHODS})
    known: dict[str, float] = {}
    drawn = []
    while choices := next_choices(params, known):
        drawn += [trial.params.method.name for trial in trials(params, choices)]
        known |= {choice_key(choice): float(choice["method"]["name"] == "gda") for choice in choices}

    assert set(drawn) == {"gda", "probe", "coop"}


@pytest.mark.parametrize(("own", "best"), [("coop", "gda"), ("gda", "coop"), ("coop", "cocoop")])
def test_the_patch_of_a_method_that_wins_leaves_nothing_of_the_former(tmp_path, own, best):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    if own != "coop":
        write_text(tmp_path / "params.yaml", changed((ROOT / "params.yaml").read_text(), {"method": {"name": own}},
                                                     whole=("method",)))  # fmt: skip
    tree = load_params(tmp_path / "params.yaml").model_dump()
    sweep = {"name": "toy", "space": {"method": [{"name": best}, {"name": own}]}, "seeds": [1]}
    params = parse_params({**tree, "sweep": sweep}, where="toy")
    found = [judged(trial, float(trial.params.method.name == best))
             for trial in trials(params, next_choices(params, {}))]  # fmt: skip

    values = winning_values(params, winner(params, found))
    diff = patch((tmp_path / "params.yaml").read_text(), values)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)

    assert list(values) == ["method"]
    after = load_params(tmp_path / "params.yaml")
    assert after.method == load_method(best).Params()
    assert after.model_copy(update={"method": params.method, "sweep": params.sweep}) == params


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ({"method.name": ["gda", "coop"], "method.n_context": [4]},
         r"method.n_context is not a parameter of gda: to try several methods, list whole sections, such as"),
        ({"method.name": ["gdaa"]}, "name is 'gdaa', but the methods are: "),
        ({"method": [{"name": "gda", "n_context": 4}]}, "n_context is not a known key"),
        ({"method": ["gda"]}, "method is a section, but one of its values is 'gda'"),
        ({"train.learning_rat": [1]}, "train.learning_rat is not a parameter of params.yaml"),
        ({"trian.learning_rate": [1]}, "trian.learning_rate is not a parameter"),
        ({"train.learning_rate": [-1]}, "with learning_rate -1.*train.learning_rate.*greater than or equal to 0"),
        ({"train": [5]}, "train is a section, but one of its values is 5"),
        ({"seed": [1, 2]}, "space cannot vary seed: list seeds in sweep.seeds"),
        ({"gate.significance": [0.1]}, "space cannot vary gate.significance"),
        ({"train.learning_rate": {"low": 0.1, "high": 1.0}}, "grid needs lists, but train.learning_rate is a range"),
    ],
)
def test_a_combination_that_is_not_valid_is_told_before_anything_is_trained(space, sentence):
    with pytest.raises(ParamsError, match=sentence):
        trials(params := swept(space=space), next_choices(params, {}))


def test_params_without_the_section_say_what_to_add():
    with pytest.raises(ParamsError, match=r"params.yaml has no section sweep"):
        require_sweep(load_params(ROOT / "params.yaml").model_copy(update={"sweep": None}))


def test_the_key_of_a_trial_changes_with_parameters_images_and_code_and_with_nothing_else():
    first, second = trials(params := swept(), next_choices(params, {}))[:2]
    renamed = trials(other := swept(name="other", max_failed=0.5), next_choices(other, {}))[0]
    same = {"dataset_digest": "images", "weights_digest": "weights", "code": "code"}
    key = first.key(**same)

    assert key == renamed.key(**same)
    others = [first.key(**{**same, name: "other"}) for name in same]
    assert len({key, second.key(**same), *others}) == 5


def test_choices_are_compared_on_the_most_shots_of_the_data_set_of_params():
    params = swept(space={"dataset.source": ["other.csv", "data/source/fashion-mnist.yaml"], "split.shots": [1, 16, 4]})
    assert target_task(params) == {"dataset.source": "data/source/fashion-mnist.yaml", "split.shots": 16}
    assert len(tasks(require_sweep(params))) == 6


def test_the_winner_is_the_best_by_validation_on_the_target_task():
    params = swept(space={"split.shots": [1, 16], "train.learning_rate": [0.01, 0.02]})

    best = winner(params, results(params, {0.01: 0.7, 0.02: 0.6}))

    assert best.choice == {"train.learning_rate": 0.01}
    assert best.task == {"split.shots": 16}
    assert best.mean("val_accuracy") == pytest.approx(0.7)


def test_test_accuracy_chooses_nothing():
    params = swept()
    found = [
        Result(r.trial, val_accuracy=0.5, val_loss=r.trial.choice["train.learning_rate"], zero_shot_accuracy=0.1,
               accuracy=1.0 if r.trial.choice["train.learning_rate"] == 0.02 else 0.0)
        for r in results(params, {0.01: 0.5, 0.02: 0.5})
    ]  # fmt: skip
    assert winner(params, found).choice == {"train.learning_rate": 0.01}


def test_equals_are_told_apart_by_validation_loss():
    params = swept()
    found = results(params, {0.01: 0.7, 0.02: 0.7}, loss={0.01: 0.9, 0.02: 0.8})
    assert winner(params, found).choice == {"train.learning_rate": 0.02}


def test_a_choice_that_lacks_a_seed_cannot_win():
    params = swept()
    found = [r for r in results(params, {0.01: 0.9, 0.02: 0.6})
             if (r.trial.choice["train.learning_rate"], r.trial.params.seed) != (0.01, 2)]  # fmt: skip

    assert winner(params, found).choice == {"train.learning_rate": 0.02}
    assert winner(params, found[:1]) is None


def test_mean_and_spread_are_over_seeds():
    params = swept()
    trial = trials(params, next_choices(params, {}))[0]
    (row,) = rows([judged(trial, 0.6), judged(trial, 0.8)])
    assert (row.mean("val_accuracy"), row.spread("val_accuracy")) == (pytest.approx(0.7), pytest.approx(0.1 * 2**0.5))


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_a_search_draws_what_it_drew_before_from_the_same_scores(search):
    params = swept(search=search, draws=9, space={
        "train.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}, "method.n_context": {"low": 1, "high": 16},
        "method.class_token_position": ["end", "front"],
    })  # fmt: skip
    known: dict[str, float] = {}
    rounds = []
    while choices := next_choices(params, known):
        assert choices == next_choices(params, known)
        rounds.append(choices)
        known |= {choice_key(choice): -abs(math.log10(choice["train.learning_rate"]) + 2) for choice in choices}

    drawn = [choice for one in rounds for choice in one]
    assert len(drawn) == 9
    assert len(rounds) == (1 if search == "random" else 3)
    assert all(1e-4 <= choice["train.learning_rate"] <= 1e-1 for choice in drawn)
    assert {type(choice["method.n_context"]) for choice in drawn} == {int}


def test_a_search_goes_on_past_a_choice_that_failed():
    params = swept(search="tpe", draws=8, space={"train.learning_rate": {"low": 1e-4, "high": 1e-1}})
    first = next_choices(params, {})
    known = {choice_key(choice): math.nan for choice in first}
    assert {choice_key(c) for c in next_choices(params, known)}.isdisjoint(known)


def test_tpe_draws_near_what_went_well():
    space = {"train.learning_rate": {"low": 1e-4, "high": 1.0, "log": True}}
    params = swept(search="tpe", draws=60, space=space)
    known: dict[str, float] = {}
    drawn = []
    while choices := next_choices(params, known):
        drawn += choices
        known |= {choice_key(choice): -abs(math.log10(choice["train.learning_rate"]) + 3) for choice in choices}

    distances = [abs(math.log10(choice["train.learning_rate"]) + 3) for choice in drawn]
    assert sum(distances[-20:]) < 0.7 * sum(distances[:20])


def test_tasks_are_posed_to_every_draw():
    space = {"split.shots": [1, 4], "train.weight_decay": {"low": 0, "high": 1}}
    params = swept(search="random", draws=3, space=space)
    assert len(trials(params, next_choices(params, {}))) == 3 * 2 * 2


def test_scores_are_means_on_the_target_task():
    params = swept(space={"split.shots": [1, 16], "train.learning_rate": [0.01, 0.02]})
    found = scores(params, results(params, {0.01: 0.7, 0.02: 0.6}))
    assert found == {choice_key({"train.learning_rate": 0.01}): pytest.approx(0.7),
                     choice_key({"train.learning_rate": 0.02}): pytest.approx(0.6)}  # fmt: skip


def test_the_winning_values_make_the_winners_params_in_the_seed_of_params_yaml():
    params = swept(seeds=[3, 1], space={"split.shots": [2], "train.learning_rate": [0.01, 0.02]})
    best = winner(params, [judged(t, t.choice["train.learning_rate"] == 0.01)
                           for t in trials(params, next_choices(params, {}))])  # fmt: skip

    values = winning_values(params, best)

    assert values == {"split.shots": 2, "split.curve_shots": [1], "train.learning_rate": 0.01}


def test_a_seed_that_was_not_trained_is_replaced():
    params = swept(seeds=[3, 4], space={"train.learning_rate": [0.02]})
    best = winner(params, [judged(t, 0.5) for t in trials(params, next_choices(params, {}))])
    assert winning_values(params, best) == {"seed": 3}


@pytest.mark.parametrize("style", ["ours", "dvc's"])
def test_the_patch_changes_the_values_and_nothing_else(tmp_path, style):
    text = (ROOT / "params.yaml").read_text()
    if style == "dvc's":  # as `dvc exp run -S` rewrites the file
        text = text.replace("    - ", "  - ").replace(": null", ":")
    (tmp_path / "params.yaml").write_text(text)

    wanted = {"train.learning_rate": 0.005, "split.curve_shots": [1], "method.initial_words": "a photo of a"}
    found = patch(text, wanted)
    subprocess.run(["git", "apply", "-"], input=found, text=True, cwd=tmp_path, check=True)

    changed = [line for line in found.splitlines() if line[0] in "+-"][2:]
    before, after = load_params(ROOT / "params.yaml"), load_params(tmp_path / "params.yaml")
    assert len(changed) == 5
    assert after.train.learning_rate == 0.005
    assert after.split.curve_shots == [1]
    assert after.method.initial_words == "a photo of a"
    assert after.model_copy(update={"train": before.train, "split": before.split, "method": before.method}) == before


# Further test sets


def test_new_classes_follow_the_data_set_that_is_learned_on():
    params = swept(space={"dataset.source": ["one.csv", "two.csv"]}, split={"classes": "base"},
                   tests={"unseen": {"source": OWN, "classes": "new"}, "greys": {"source": "grey.csv"}})  # fmt: skip

    found = [trial.params for trial in trials(params, next_choices(params, {}))]

    assert [(one.tests["unseen"].source, one.tests["greys"].source) for one in found if one.seed == found[0].seed] == [
        ("one.csv", "grey.csv"), ("two.csv", "grey.csv"),
    ]  # fmt: skip


def test_base_and_new_of_a_row_have_a_harmonic_mean_and_other_test_sets_none():
    tests = {"unseen": {"source": OWN, "classes": "new"}}
    params = swept(space={"train.learning_rate": [0.02]}, split={"classes": "base"}, tests=tests)
    results = [
        dataclasses.replace(judged(trial, 0.5), accuracy=0.8, tests={"tests/unseen/learned": 0.4})
        for trial in trials(params, next_choices(params, {}))
    ]

    (row,) = rows(results)

    assert row.harmonic == pytest.approx(2 * 0.8 * 0.4 / 1.2)
    assert rows([dataclasses.replace(one, tests={}) for one in results])[0].harmonic is None


def test_a_trial_with_other_test_images_is_another():
    params = swept(space={"train.learning_rate": [0.02]}, tests={"greys": {"source": "grey.csv"}})
    trial = trials(params, next_choices(params, {}))[0]
    common = {"dataset_digest": "images", "weights_digest": "weights", "code": "code"}

    assert len({trial.key(**common, tests={"greys": digest}) for digest in ("a", "b")}) == 2

"""Summary: what a run's and a version's page say, and what they leave out."""

from typing import Any

import numpy as np
import pytest

from coop_core.judging.evaluation import evaluate
from pipelines.summary import listed, plain, run_note, training_seconds, version_note, version_tags

NAMES = ["river", "forest", "sea|lake"]
TIMING = {"device": "cpu", "seconds": {"1": 2.5, "4": 10.25}}
CURVE = [{"epoch": e, "learning_rate": 0.1, "loss": 1.0, "accuracy": 0.5} for e in range(2)]


def evaluation(method: str = "coop") -> dict[str, Any]:
    """Twelve images: zero-shot has 4 right, the linear probe 9, the method 6."""
    labels = np.arange(12) % 3

    def judged(right: int) -> dict[str, Any]:
        answers = np.where(np.arange(12) < right, labels, (labels + 1) % 3)
        return evaluate(np.eye(3)[answers] * 0.7 + 0.1, labels, NAMES).as_dict()

    return {
        "dataset": "toys_2", "class_names": NAMES, "shots": 4, "seed": 7, "method": method,
        "classifiers": {"zero-shot": judged(4), "linear probe": judged(9), method: judged(6)},
    }  # fmt: skip


def card(prompts: int = 0) -> dict[str, Any]:
    return {"backbone": {"architecture": "mini"}, "answering": {"prompts_per_image": prompts}}


def test_a_run_says_what_was_trained_on_what_and_for_how_long() -> None:
    note = run_note(evaluation(), card(), curve=CURVE, timing=TIMING)

    assert note.startswith(
        "CoOp on the backbone mini, learned from 4 images of each of 3 classes of toys\\_2 (seed 7) in 10.2 seconds "
        "on cpu."
    )


def test_a_run_says_what_speaks_against_it() -> None:
    note = run_note(evaluation(), card(), curve=CURVE, timing=TIMING)

    assert "**CoOp is 25.0 points below the best baseline, the linear probe: 50.0\u202f% against 75.0\u202f%.**" in note


def test_a_run_has_a_row_for_each_classifier_with_its_own_marked() -> None:
    note = run_note(evaluation(), card(), curve=CURVE, timing=TIMING)
    rows = [line.split(" | ")[:2] for line in note.splitlines() if line.startswith("| ")]

    assert [[first, top.removeprefix("&emsp;")] for first, top in rows[2:]] == [
        ["| zero-shot", "33.3 %"], ["| linear probe", "75.0 %"], ["| **coop**", "**50.0 %**"],
    ]  # fmt: skip


@pytest.mark.parametrize(("prompts", "cost"), [(0, "one matrix product"), (3, "3 prompts through the text tower")])
def test_both_pages_say_what_an_answer_costs(prompts: int, cost: str) -> None:
    for note in (
        run_note(evaluation(), card(prompts), curve=CURVE, timing=TIMING),
        version_note(evaluation(), card(prompts)),
    ):
        assert f"Once its image is encoded, an answer costs {cost}." in note


def test_a_version_names_its_classes_as_they_are() -> None:
    assert "3 classes: river, forest, sea\\|lake." in version_note(evaluation(), card())


def test_a_version_has_its_figures_and_the_best_baselines_as_tags() -> None:
    assert version_tags(evaluation()) == {
        "accuracy": "0.5000",
        "n_test": "12",
        "best_baseline": "linear probe: 0.7500",
        "classes": "river, forest, sea|lake",
    }


def test_of_many_classes_the_first_are_named_and_the_rest_counted() -> None:
    assert listed([f"c{i}" for i in range(1000)]).endswith(", c28, c29 and 970 more")
    assert listed(NAMES) == "river, forest, sea|lake"


def test_the_seconds_are_those_of_the_prompt_that_was_evaluated() -> None:
    assert training_seconds(evaluation(), TIMING) == 10.25


@pytest.mark.parametrize("text", ["<script>", "[a](b)", "*a*", "a_b_c", "`a`", "a|b", "~~a~~", "# a", "&lt;"])
def test_other_peoples_words_are_no_markup(text: str) -> None:
    found = plain(text)

    assert "<" not in found
    for sign in "[]*_`|~#":
        assert found.replace(f"\\{sign}", "").count(sign) == 0
    assert found != text

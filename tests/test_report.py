import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from coop_core.errors import DatasetError
from coop_core.judging.evaluation import evaluate
from coop_core.params import TrainParams
from coop_core.report import style
from coop_core.report.findings import shortcomings, unfinished_epochs
from coop_core.report.page import write_report
from coop_core.training import learning_rate_at

NAMES = ["river", "forest", "sea"]
LOADING = {"src", "srcset", "data", "poster", "background", "action", "xlink:href"}


class Page(HTMLParser):
    """The elements of a page, its headings and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def ids(self) -> set[str | None]:
        return {attributes.get("id") for _, attributes in self.elements}


def inputs(folder: Path, names: list[str] = NAMES, *, wrong: int = 2, each: int = 4) -> dict[str, Any]:
    """Arguments of a report on little images; the first `wrong` answers are mistakes."""
    labels = np.arange(each * len(names)) % len(names)
    answers = labels.copy()
    answers[:wrong] = (answers[:wrong] + 1) % len(names)
    learned = np.full((len(labels), len(names)), 0.2 / len(names))
    learned[np.arange(len(labels)), answers] += 0.8
    evaluations = {name: evaluate(learned, labels, names).as_dict() for name in ("linear probe", "coop")}
    zero_shot = evaluate(np.full_like(learned, 1 / len(names)), labels, names).as_dict()
    for i in range(len(labels)):
        Image.new("RGB", (12 + i % 90, 9), (20 * i % 256, 80, 120)).save(folder / f"{i}.png")
    return {
        "evaluations": {
            "dataset": "satellite", "class_names": names, "shots": 4, "seed": 1, "test_digest": "0123456789abcdef",
            "method": "coop", "classifiers": {"zero-shot": zero_shot, **evaluations},
            "few_shot_curve": [{"shots": k, "coop": 0.5, "linear probe": 0.4} for k in (1, 4)],
        },
        "curve": [{"epoch": e, "learning_rate": 0.1, "loss": 1 / e, "accuracy": 0.5, "val_loss": None,
                   "val_accuracy": None} for e in (1, 2)],
        "predictions": [{"path": f"{i}.png", "label": int(labels[i]), "predicted": int(answers[i]), "confidence": 0.8}
                        for i in range(len(labels))],
        "words": {"vectors": [[{"word": "photo", "distance": 1.5}, {"word": "</w>", "distance": 1.6}]],
                  "between_words": 0.5, "norms": [1.2]},
        "card": {
            "method": {"name": "coop", "class_specific": False}, "learned": {"context_vectors": [1, 8]},
            "backbone": {"architecture": "tiny", "weights_digest": "f" * 64, "transform": {"size": 8}},
            "engine": {}, "data": {"test_digest": "0123456789abcdef"}, "params": {"train": {"learning_rate": 0.002}},
            "training": {"epochs": 2, "last": None}, "code_revision": "abc1234", "libraries": {"torch": "2.9.1"},
        },
        "baseline_card": {"template": "a photo of a {}.", "ensemble_templates": ["a {}.", "one {}."],
                          "linear_probe": {"regularisation": 0.5, "val_accuracy": None}},
        "dataset_about": {"title": "Satellite", "licence": "MIT", "homepage": "https://example.org", "notes": ["few"],
                          "name": "satellite",
                          "counts": {name: {"train": 5, "val": 0, "test": each} for name in names}},
        "image_root": folder,
    }  # fmt: skip


def reached(**accuracies: float) -> dict[str, Any]:
    """An evaluation file with nothing but accuracies; underscores stand for spaces."""
    found = {name.replace("_", " "): {"accuracy": accuracy} for name, accuracy in accuracies.items()}
    return {"method": "coop", "classifiers": {"zero-shot": found.pop("zero shot"), **found}}


def trained(losses: list[float], accuracy: float = 0.8, rates: list[float] | None = None) -> list[dict[str, Any]]:
    """A curve with these losses, at a constant rate unless others are given."""
    rates = rates or [0.1] * len(losses)
    return [{"epoch": i, "learning_rate": rate, "loss": loss, "accuracy": accuracy, "val_loss": None,
             "val_accuracy": None} for i, (loss, rate) in enumerate(zip(losses, rates, strict=True))]  # fmt: skip


def published_rates(epochs: int) -> list[float]:
    recipe = TrainParams(epochs=epochs, learning_rate=0.1)
    return [learning_rate_at(epoch, recipe) for epoch in range(epochs)]


ENDED = trained([2.0, 1.0, 0.5] + [0.5] * 17)


def render(arguments: dict[str, Any]) -> str:
    """The page with every picture drawn, which takes most of the time."""
    path = arguments["image_root"] / "report.html"
    write_report(path, **arguments)
    return path.read_text(encoding="utf-8")


def written(arguments: dict[str, Any]) -> str:
    """The page without its pictures, for tests of its words."""
    with mock.patch.object(style, "_draw", lambda figure, buffer, **how: buffer.write("<svg></svg>")):
        return render(arguments)


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the unchanged inputs."""
    return render(inputs(tmp_path_factory.mktemp("report")))


def test_the_page_loads_nothing_from_elsewhere(html: str):
    page = Page(html)
    loaded = [value for _, attributes in page.elements for name, value in attributes.items() if name in LOADING]
    assert loaded
    assert all(value and value.startswith(("data:image/", "#")) for value in loaded)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert not re.search(r"@import|url\((?!#)", html)


def test_equal_inputs_give_equal_bytes(tmp_path: Path):
    arguments = inputs(tmp_path)
    assert render(arguments) == render(arguments)


def test_a_class_name_cannot_become_an_element(tmp_path: Path):
    html = render(inputs(tmp_path, ["<b>x</b>", "forest", "sea"]))
    assert "<b>x</b>" not in html
    assert "&lt;b&gt;x&lt;/b&gt;" in html


def test_a_homepage_that_is_no_web_address_is_no_link(tmp_path: Path):
    arguments = inputs(tmp_path)
    arguments["dataset_about"]["homepage"] = "javascript:alert(1)"
    assert not any(
        "javascript" in (attributes.get("href") or "") for _, attributes in Page(written(arguments)).elements
    )


def test_the_summary_states_the_change_against_the_hand_written_prompt(html: str):
    assert (
        "With 4 labelled images a class, CoOp answers 83.3\u202f% of 12 test images correctly, 50.0 points more than "
        "the hand-written prompt; the best other baseline, the linear probe, reaches 83.3\u202f%."
    ) in Page(html).text


def test_a_method_below_zero_shot_is_called_so(tmp_path: Path):
    text = Page(written(inputs(tmp_path, wrong=12))).text
    assert "33.3 points fewer than the hand-written prompt" in text
    assert "\N{MINUS SIGN}33.3" in text


def test_the_first_lines_say_by_how_much_the_method_is_below_the_best_baseline():
    assert shortcomings(reached(zero_shot=0.3, linear_probe=0.75, coop=0.5), ENDED) == [
        "CoOp is 25.0 points below the best baseline, the linear probe: 50.0\u202f% against 75.0\u202f%."
    ]


def test_the_first_lines_say_by_how_much_the_method_is_below_zero_shot():
    below_best, below_zero_shot = shortcomings(reached(zero_shot=0.6, linear_probe=0.75, coop=0.5), ENDED)
    assert "25.0 points below the best baseline" in below_best
    assert below_zero_shot.startswith("CoOp is 10.0 points below zero-shot: 50.0\u202f% against 60.0\u202f%;")


def test_zero_shot_as_the_best_baseline_is_said_once():
    (said,) = shortcomings(reached(zero_shot=0.6, linear_probe=0.4, coop=0.5), ENDED)
    assert "10.0 points below zero-shot, which is also the best baseline" in said


@pytest.mark.parametrize("coop", [0.75, 0.9, 0.7498])
def test_a_method_that_reaches_the_best_baseline_has_nothing_said_against_it(coop: float):
    assert shortcomings(reached(zero_shot=0.75, linear_probe=0.7, coop=coop), ENDED) == []


def test_a_loss_that_still_falls_is_said_with_its_epochs_and_its_fall():
    curve = trained([3 - 0.05 * i for i in range(40)])
    (said,) = shortcomings(reached(zero_shot=0.3, coop=0.5), curve)
    assert said.startswith(
        "Training had not ended: the loss was still falling over the last 4 epochs of 40 (from 1.25 to 1.05), "
        "and 80\u202f% of the training images were right."
    )


@pytest.mark.parametrize(
    ("curve", "epochs"),
    [
        (trained([3 - 0.05 * i for i in range(40)]), 4),
        (trained([3 - 0.05 * i for i in range(40)], accuracy=0.95), 0),
        (trained([2.0, 1.0]), 1),
        (trained([1.0, 2.0]), 0),
        (trained([1.0]), 0),
        (trained([]), 0),
        (trained([3.0, 1.0], rates=[0.0, 0.0]), 0),
        (trained([2.0] * 36 + [2.0, 1.99, 1.98, 1.97]), 0),
        (trained([1.0 + 0.02 * (i % 2) for i in range(40)]), 0),
        (ENDED, 0),
    ],
    ids=["falling", "fitted", "two", "rising", "one", "none", "no rate", "slightly", "noise", "ended"],
)
def test_training_had_not_ended_when_its_last_tenth_lowered_the_loss_clearly(curve: list[Any], epochs: int):
    assert unfinished_epochs(curve) == epochs


def test_the_last_tenth_is_counted_in_learning_rate_so_that_a_schedule_that_ends_near_zero_hides_nothing():
    rates = published_rates(100)
    learned = np.cumsum(rates) / np.sum(rates)
    curve = trained((3 - 2 * learned).tolist(), rates=rates)
    assert curve[-11]["loss"] - curve[-1]["loss"] < 0.01
    assert unfinished_epochs(curve) == 39


def test_what_speaks_against_a_run_stands_before_all_numbers(tmp_path: Path):
    arguments = inputs(tmp_path, wrong=12)
    html = written({**arguments, "curve": trained([3 - 0.05 * i for i in range(40)])})
    first_lines = html[html.index("<h1>") : html.index('class="tiles"')]
    assert "33.3 points below zero-shot" in first_lines
    assert "Training had not ended" in first_lines


def test_a_run_without_shortcomings_has_no_list_of_them(tmp_path: Path):
    html = written(inputs(tmp_path) | {"curve": ENDED})
    assert not any(attributes.get("class") == "shortcomings" for _, attributes in Page(html).elements)


@pytest.mark.parametrize("best", ["linear probe", "prompt ensemble", "zero-shot"])
def test_the_charts_compare_with_the_best_baseline_and_keep_zero_shot(tmp_path: Path, best: str):
    arguments = inputs(tmp_path, wrong=6)
    found = arguments["evaluations"]["classifiers"]
    found["prompt ensemble"] = {**found["zero-shot"]}
    found[best]["accuracy"] = 0.99
    text = Page(render(arguments)).text
    label = f"{best.capitalize()} (best baseline)"
    assert text.count(label) == 4  # in the few-shot curve and the class bars, each for a wide and a narrow page
    assert text.count("Zero-shot") > text.count("Zero-shot (best baseline)")
    assert f"{best.capitalize()}: ECE" in text


def test_several_numbers_of_shots_show_a_few_shot_curve(html: str):
    assert "shots" in Page(html).ids


def test_one_number_of_shots_shows_no_few_shot_curve(tmp_path: Path):
    arguments = inputs(tmp_path)
    arguments["evaluations"]["few_shot_curve"] = arguments["evaluations"]["few_shot_curve"][-1:]
    assert "shots" not in Page(written(arguments)).ids


def test_mistakes_are_shown_with_what_they_were_taken_for(html: str):
    assert "river → <b>forest</b>" in html
    assert "<b>river</b> was taken for <b>forest</b>" in html


def test_without_a_misclassified_image_the_page_says_so(tmp_path: Path):
    text = Page(written(inputs(tmp_path, wrong=0))).text
    assert "No test image was misclassified" in text
    assert "was taken for" not in text


def test_thumbnails_are_small_and_a_few_dozen(tmp_path: Path):
    arguments = inputs(tmp_path, [f"class {i}" for i in range(9)], wrong=40, each=12)
    sources = [attributes["src"] or "" for tag, attributes in Page(written(arguments)).elements if tag == "img"]
    assert 10 < len(sources) <= 56
    assert all(source.startswith("data:image/jpeg;base64,") and len(source) < 8000 for source in sources)


def test_an_image_in_an_array_can_be_shown(tmp_path: Path):
    arguments = inputs(tmp_path, wrong=1)
    np.save(tmp_path / "test.npy", np.zeros((2, 28, 28), dtype=np.uint8))
    arguments["predictions"][0]["path"] = "test.npy#1"
    assert any(attributes.get("alt") == "Test image test.npy#1" for _, attributes in Page(written(arguments)).elements)


def test_a_missing_image_is_an_error(tmp_path: Path):
    arguments = inputs(tmp_path)
    arguments["predictions"][0]["path"] = "gone.png"
    with pytest.raises(DatasetError, match=r"gone\.png is missing"):
        written(arguments)


def test_nearest_words_stand_beside_the_distance_between_words(html: str):
    text = " ".join(Page(html).text.split())
    assert "photo 1.50, </w> 1.60 3.0 \N{MULTIPLICATION SIGN} 1.20" in text
    assert "Words themselves lie 0.500 from their nearest neighbour" in text
    assert "nearest words may be a coincidence" in text


def vectors(*rows: str) -> dict[str, Any]:
    """Nearest words as rows of words."""
    found = [[{"word": word, "distance": 1.5 + i / 10} for i, word in enumerate(row.split())] for row in rows]
    return {"vectors": found, "between_words": 0.5, "norms": [1.2] * len(rows)}


def test_nearest_words_that_are_the_same_for_all_vectors_are_said_once(tmp_path: Path):
    html = written(inputs(tmp_path) | {"words": vectors("the and of", "and the of", "the of and")})
    text = " ".join(Page(html).text.split())
    assert (
        "There is no table, because it would repeat one row 3 times: every vector has the same nearest words, the, "
        "and, of."
    ) in text
    assert "Nearest words and their distance" not in html


@pytest.mark.parametrize("rows", [("the and",), ("the and", "the of")])
def test_nearest_words_that_tell_vectors_apart_stand_in_a_table(tmp_path: Path, rows: tuple[str, ...]):
    html = written(inputs(tmp_path) | {"words": vectors(*rows)})
    assert "Nearest words and their distance" in html
    assert "There is no table" not in html


def test_each_large_picture_is_drawn_for_a_wide_and_for_a_narrow_page(html: str):
    elements = Page(html).elements
    widths: dict[str | None, list[float]] = {}
    for (_, figure), (_, svg) in itertools.pairwise(elements):
        if (figure.get("class") or "").startswith("picture"):
            widths.setdefault(figure["class"], []).append(float((svg["width"] or "").removesuffix("pt")) / 72)
    assert {name: len(found) for name, found in widths.items()} == {
        "picture wide": 4, "picture narrow": 4, "picture small": 2,
    }  # fmt: skip
    assert max(widths["picture narrow"] + widths["picture small"]) < 4.41


def test_nothing_on_the_page_is_given_a_width_that_a_telephone_lacks(html: str):
    style = html[html.index("<style>") : html.index("</style>")]
    in_rem = re.findall(r"(?<![-\w])(?:min-)?width: *([0-9.]+)rem[;\s}]", style)
    in_pixels = re.findall(r"(?<![-\w])(?:min-)?width: *([0-9.]+)px[;\s}]", style)
    assert in_rem
    assert max(float(width) for width in in_rem) <= 20
    assert all(float(width) <= 320 for width in in_pixels)


def test_every_cell_of_a_stacked_row_says_what_it_is(html: str):
    results = html[html.index('<table class="stacked">') :]
    rows = results[results.index("<tbody>") : results.index("</tbody>")]
    cells = [attributes for tag, attributes in Page(rows).elements if tag == "td"]
    assert len(cells) == 3 * 6
    assert all(cell.get("data-label") or cell.get("class") == "seen-wide" for cell in cells)


def test_class_specific_context_explains_why_no_words_are_listed(tmp_path: Path):
    arguments = inputs(tmp_path)
    arguments["words"] = None
    arguments["card"]["method"]["class_specific"] = True
    text = Page(written(arguments)).text
    assert "the context is class-specific, so each of the 3 classes has learned vectors of its own" in text
    assert "coincidence" not in text


def of_method(arguments: dict[str, Any], method: str, *, is_built: bool = False, prompts: int = 0) -> dict[str, Any]:
    """The arguments of a report as if another method had learned; what is built has no context."""
    evaluations, card = arguments["evaluations"], arguments["card"]
    found = evaluations["classifiers"]
    found[method] = found.pop("coop")
    evaluations["method"] = method
    evaluations["few_shot_curve"] = [
        {method if name == "coop" else name: value for name, value in row.items()}
        for row in evaluations["few_shot_curve"]
    ]
    card["method"] = {"name": method}
    card["training"]["is_built"], card["answering"] = is_built, {"prompts_per_image": prompts}
    if is_built:
        card["learned"] = {"weights": [3, 8]}
        arguments["words"] = None
        arguments["curve"] = arguments["curve"][:1]
    return arguments


@pytest.mark.parametrize(
    ("method", "title", "spoken"),
    [
        ("class_mean", "Class mean", "the class mean"),
        ("linear_probe", "Linear probe (method)", "the linear probe (method)"),
        ("cocoop", "CoCoOp", "CoCoOp"),
    ],
)
def test_every_method_is_named_in_words(tmp_path: Path, method: str, title: str, spoken: str):
    html = written(of_method(inputs(tmp_path, wrong=12), method))
    text = Page(html).text
    assert f"<h1>{title} on Satellite</h1>" in html
    assert f"a class, {spoken} answers" in text
    assert f"{spoken[0].upper()}{spoken[1:]} is 33.3 points below zero-shot" in text
    assert method not in html[: html.index('id="origin"')]


def test_what_is_built_at_once_has_its_accuracies_in_words_and_no_curve(tmp_path: Path):
    arguments = of_method(inputs(tmp_path), "class_mean", is_built=True)
    arguments["curve"][0] |= {"accuracy": 0.75, "val_accuracy": 0.5}
    html = written(arguments)
    text = " ".join(Page(html).text.split())
    assert (
        "The class mean is built from its examples at once. It is right on 75 % of the training "
        "images and on 50 % of the validation images."
    ) in text
    assert "Loss and accuracy by epoch" not in html
    assert "choose nothing" not in text


def test_a_method_without_context_has_no_section_on_it(tmp_path: Path):
    page = Page(written(of_method(inputs(tmp_path), "class_mean", is_built=True)))
    assert "words" not in page.ids
    assert "#words" not in {attributes.get("href") for _, attributes in page.elements}


@pytest.mark.parametrize(("prompts", "cost"), [(0, "one matrix product"), (3, "3 prompts through the text tower")])
def test_the_first_lines_say_what_an_answer_costs(tmp_path: Path, prompts: int, cost: str):
    html = written(of_method(inputs(tmp_path), "cocoop", prompts=prompts))
    first_lines = html[html.index("<h1>") : html.index('class="tiles"')]
    assert f"Once its image is encoded, an answer costs {cost}." in first_lines


def test_context_that_shifts_with_the_image_is_called_the_one_before_the_shift(tmp_path: Path):
    still, shifting = (Page(written(of_method(inputs(tmp_path), "cocoop", prompts=p))).text for p in (0, 3))
    assert "The learned prompt is 1 vector and the class name." in still
    assert "The learned prompt is 1 vector, before the image's own shift, and the class name." in shifting


@pytest.mark.parametrize(("wrong", "verdict"), [(0, "under-confident"), (2, "as confident as"), (9, "over-confident")])
def test_calibration_is_said_in_words(tmp_path: Path, wrong: int, verdict: str):
    assert verdict in Page(written(inputs(tmp_path, wrong=wrong, each=5))).text  # 13 of 15 is the confidence


def test_what_made_it_is_shown_whole(html: str):
    text = Page(html).text
    for expected in ("f" * 64, "0123456789abcdef", "abc1234", "2.9.1", "train.learning_rate", "0.002", "one {}."):
        assert expected in text


@pytest.mark.parametrize("c", [2, 60, 400])
def test_few_and_many_classes_make_a_page_of_moderate_size(tmp_path: Path, c: int):
    html = render(inputs(tmp_path, [f"a class with quite a long name, number {i}" for i in range(c)], each=2))
    assert "Where it is at home" in html
    assert len(html) < 700_000


def test_a_class_without_test_images_is_not_the_worst(tmp_path: Path):
    arguments = inputs(tmp_path)
    for each in arguments["evaluations"]["classifiers"].values():
        each["confusion"] = [[3, 1, 0], [0, 4, 0], [0, 0, 0]]
    assert "0.0\u202f% of 0 correct" not in Page(written(arguments)).text

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coop_core.errors import DatasetError
from coop_core.evaluation import evaluate
from coop_core.report import write_report

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
        Image.new("RGB", (12 + i, 9), (20 * i % 256, 80, 120)).save(folder / f"{i}.png")
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


def render(arguments: dict[str, Any]) -> str:
    path = arguments["image_root"] / "report.html"
    write_report(path, **arguments)
    return path.read_text(encoding="utf-8")


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
    assert not any("javascript" in (attributes.get("href") or "") for _, attributes in Page(render(arguments)).elements)


def test_the_summary_states_the_change_against_the_hand_written_prompt(html: str):
    assert (
        "With 4 labelled images a class, CoOp answers 83.3\u202f% of 12 test images correctly, 50.0 points more than "
        "the hand-written prompt; the best other baseline, the linear probe, reaches 83.3\u202f%."
    ) in Page(html).text


def test_a_method_below_zero_shot_is_called_so(tmp_path: Path):
    text = Page(render(inputs(tmp_path, wrong=12))).text
    assert "33.3 points fewer than the hand-written prompt" in text
    assert "\N{MINUS SIGN}33.3" in text


def test_several_numbers_of_shots_show_a_few_shot_curve(html: str):
    assert "shots" in Page(html).ids


def test_one_number_of_shots_shows_no_few_shot_curve(tmp_path: Path):
    arguments = inputs(tmp_path)
    arguments["evaluations"]["few_shot_curve"] = arguments["evaluations"]["few_shot_curve"][-1:]
    assert "shots" not in Page(render(arguments)).ids


def test_mistakes_are_shown_with_what_they_were_taken_for(html: str):
    assert "river → <b>forest</b>" in html
    assert "<b>river</b> was taken for <b>forest</b>" in html


def test_without_a_misclassified_image_the_page_says_so(tmp_path: Path):
    text = Page(render(inputs(tmp_path, wrong=0))).text
    assert "No test image was misclassified" in text
    assert "was taken for" not in text


def test_thumbnails_are_small_and_a_few_dozen(tmp_path: Path):
    arguments = inputs(tmp_path, [f"class {i}" for i in range(9)], wrong=40, each=12)
    sources = [attributes["src"] or "" for tag, attributes in Page(render(arguments)).elements if tag == "img"]
    assert 10 < len(sources) <= 56
    assert all(source.startswith("data:image/jpeg;base64,") and len(source) < 8000 for source in sources)


def test_an_image_in_an_array_can_be_shown(tmp_path: Path):
    arguments = inputs(tmp_path, wrong=1)
    np.save(tmp_path / "test.npy", np.zeros((2, 28, 28), dtype=np.uint8))
    arguments["predictions"][0]["path"] = "test.npy#1"
    assert any(attributes.get("alt") == "Test image test.npy#1" for _, attributes in Page(render(arguments)).elements)


def test_a_missing_image_is_an_error(tmp_path: Path):
    arguments = inputs(tmp_path)
    arguments["predictions"][0]["path"] = "gone.png"
    with pytest.raises(DatasetError, match=r"gone\.png is missing"):
        render(arguments)


def test_nearest_words_stand_beside_the_distance_between_words(html: str):
    text = " ".join(Page(html).text.split())
    assert "photo 1.50, </w> 1.60 3.0 \N{MULTIPLICATION SIGN} 1.20" in text
    assert "Words themselves lie 0.500 from their nearest neighbour" in text
    assert "nearest words may be a coincidence" in text


def test_class_specific_context_explains_why_no_words_are_listed(tmp_path: Path):
    arguments = inputs(tmp_path)
    arguments["words"] = None
    arguments["card"]["method"]["class_specific"] = True
    text = Page(render(arguments)).text
    assert "the context is class-specific, so each of the 3 classes has learned vectors of its own" in text
    assert "coincidence" not in text


@pytest.mark.parametrize(("wrong", "verdict"), [(0, "under-confident"), (2, "as confident as"), (9, "over-confident")])
def test_calibration_is_said_in_words(tmp_path: Path, wrong: int, verdict: str):
    assert verdict in Page(render(inputs(tmp_path, wrong=wrong, each=5))).text  # 13 of 15 is the confidence


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
    assert "0.0\u202f% of 0 correct" not in Page(render(arguments)).text

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from coop_core import pictures
from coop_core.evaluation import evaluate

POINTS = [{"shots": 1, "coop": 0.4, "linear probe": 0.3}, {"shots": 4, "coop": 0.6, "linear probe": 0.7}]


def epoch(number: int, val_loss: float | None = None) -> dict[str, float | None]:
    return {"epoch": number, "learning_rate": 0.1, "loss": 1 / number, "accuracy": 0.5, "val_loss": val_loss,
            "val_accuracy": None if val_loss is None else 0.4}  # fmt: skip


def texts(figure: Figure) -> list[str]:
    root = ElementTree.fromstring(pictures.as_svg(figure))
    return ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]


def confusion(c: int) -> list[list[int]]:
    return (np.eye(c, dtype=int) * 9 + np.eye(c, k=1, dtype=int)).tolist()


def names(c: int) -> list[str]:
    return [f"class {i}" for i in range(c)]


def test_equal_numbers_give_equal_svg():
    assert len({pictures.as_svg(pictures.few_shot_curve(POINTS, 0.2)) for _ in range(2)}) == 1


def test_equal_numbers_give_equal_png_bytes(tmp_path: Path):
    for name in ("a.png", "b.png"):
        pictures.save_png(pictures.few_shot_curve(POINTS, 0.2), tmp_path / "new" / name)
    first, second = ((tmp_path / "new" / name).read_bytes() for name in ("a.png", "b.png"))
    assert first.startswith(b"\x89PNG")
    assert first == second


def test_svg_is_one_element_without_header_or_date():
    svg = pictures.as_svg(pictures.training_curve([epoch(1), epoch(2)]))
    assert svg.startswith("<svg")
    assert svg.rstrip().endswith("</svg>")
    assert "<metadata" not in svg


def test_svg_takes_its_colours_from_the_page():
    svg = pictures.as_svg(pictures.training_curve([epoch(1), epoch(2)]))
    assert f"var(--figure-first, {pictures.COLOURS['first']})" in svg
    assert f": {pictures.COLOURS['ink']}" not in svg


def test_every_colour_has_one_role():
    assert len(set(pictures.COLOURS.values())) == len(pictures.COLOURS)


def test_training_curve_leaves_out_validation_that_was_not_measured():
    assert "validation" not in texts(pictures.training_curve([epoch(1), epoch(2)]))
    assert "validation" in texts(pictures.training_curve([epoch(1, 0.9), epoch(2, 0.8)]))


def test_training_curve_of_one_epoch_can_be_drawn():
    assert "Loss" in texts(pictures.training_curve([epoch(1)]))


def test_accuracies_are_shown_in_percent():
    assert {"20 %", "40 %"} <= set(texts(pictures.few_shot_curve(POINTS, 0.2)))


def test_few_shot_curve_names_each_classifier_and_each_number_of_shots():
    assert {"CoOp", "Linear probe", "Zero-shot", "1", "4"} <= set(texts(pictures.few_shot_curve(POINTS, 0.2)))


@pytest.mark.parametrize(("c", "named", "counted"), [(2, True, True), (30, True, False), (120, False, False)])
def test_confusion_matrix_writes_what_its_size_can_hold(c: int, named: bool, counted: bool):
    shown = texts(pictures.confusion_matrix(confusion(c), names(c)))
    assert ("class 1" in shown) == named
    assert ("9" in shown) == counted


def test_confusion_matrix_survives_a_class_without_test_images():
    assert "a" in texts(pictures.confusion_matrix([[0, 0], [1, 3]], ["a", "b"]))


@pytest.mark.parametrize("name", ["$x_1$", "<b>x</b>", "手套", "100 %"])
def test_class_names_are_shown_as_they_are(name: str):
    assert name in texts(pictures.confusion_matrix(confusion(2), [name, "b"]))


def test_long_class_names_are_shortened():
    shown = texts(pictures.confusion_matrix(confusion(2), ["a very long name " * 9, "b"]))
    assert "a very long name a very…" in shown


def test_reliability_diagram_says_the_calibration_error():
    evaluation = evaluate(np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 1]), ["a", "b"]).as_dict()
    assert f"CoOp: ECE {100 * evaluation['calibration_error']:.1f} %" in texts(
        pictures.reliability_diagram(evaluation, "CoOp")
    )


def test_class_bars_stand_best_first():
    shown = texts(pictures.class_accuracy_bars({"a": 0.2, "b": 0.9}, {"a": 0.1, "b": 0.3}))
    assert shown.index("a") < shown.index("b")  # from the bottom up


def test_pictures_leave_the_global_style_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    pictures.as_svg(pictures.training_curve([epoch(1)]))
    assert dict(matplotlib.rcParams) == before

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from coop_core.judging.evaluation import evaluate
from coop_core.report import pictures

POINTS = [{"shots": 1, "coop": 0.4, "linear probe": 0.3}, {"shots": 4, "coop": 0.6, "linear probe": 0.7}]


def epoch(number: int, val_loss: float | None = None) -> dict[str, float | None]:
    return {"epoch": number, "learning_rate": 0.1, "loss": 1 / number, "accuracy": 0.5, "val_loss": val_loss,
            "val_accuracy": None if val_loss is None else 0.4}  # fmt: skip


def texts(figure: Figure) -> list[str]:
    root = ElementTree.fromstring(pictures.as_svg(figure))
    return ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]


def corners(text: Text, renderer: object) -> np.ndarray:
    """The four corners (4, 2) of a drawn text in pixels, turned as the text is turned."""
    angle = text.get_rotation()
    text.set_rotation(0)
    upright = text.get_window_extent(renderer)
    text.set_rotation(angle)
    box = text.get_window_extent(renderer)
    turn = np.deg2rad(angle)
    axes = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    half = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [upright.width / 2, upright.height / 2]
    return half @ axes + [(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2]


def overlap(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two turned rectangles (4, 2) share more than a pixel (separating axes)."""
    for box in (one, other):
        for edge in (box[1] - box[0], box[2] - box[1]):
            direction = edge / np.linalg.norm(edge)
            a, b = one @ direction, other @ direction
            if a.max() - 1 < b.min() or b.max() - 1 < a.min():
                return False
    return True


def in_view(axis: Axis, place: float) -> bool:
    low, high = sorted(axis.get_view_interval())
    return low - 1e-9 <= place <= high + 1e-9


def drawn(figure: Figure) -> tuple[list[np.ndarray], float]:
    """Corners of every visible text of a figure, and the figure's width, in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes = [axis for each in figure.axes for axis in (each.xaxis, each.yaxis)]
    outside = {tick.label1 for axis in axes for tick in axis.get_major_ticks() if not in_view(axis, tick.get_loc())}
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in outside]
    return [corners(text, canvas.get_renderer()) for text in found], figure.bbox.width


def touching(figure: Figure) -> int:
    """How many pairs of texts overlap."""
    boxes, _ = drawn(figure)
    return sum(overlap(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def accuracies(c: int, style: str) -> dict[str, float]:
    return dict(zip(NAMED[style](c), np.linspace(0.1, 0.9, c).tolist(), strict=True))


def confusion(c: int) -> list[list[int]]:
    return (np.eye(c, dtype=int) * 9 + np.eye(c, k=1, dtype=int)).tolist()


def names(c: int) -> list[str]:
    return [f"class {i}" for i in range(c)]


NAMED = {
    "short": names,
    "long": lambda c: [f"Boeing {700 + i} passenger aircraft with a long description, variant {i}" for i in range(c)],
    "wide": lambda c: [f"WWWWWWWWWWWWWWWWWW MMMMMM {i}" for i in range(c)],
}
WIDTHS = [pictures.WIDE, pictures.NARROW]


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


def test_training_curve_of_one_epoch_counts_it_and_no_part_of_it():
    figure = pictures.training_curve([epoch(1)])

    assert [axes.get_xticks().tolist() for axes in figure.axes] == [[1], [1]]


def test_accuracies_are_shown_in_percent():
    assert {"20 %", "40 %"} <= set(texts(pictures.few_shot_curve(POINTS, 0.2)))


def test_few_shot_curve_names_each_classifier_and_each_number_of_shots():
    assert {"CoOp", "Linear probe", "Zero-shot", "1", "4"} <= set(texts(pictures.few_shot_curve(POINTS, 0.2)))


def test_few_shot_curve_names_the_best_baseline_in_its_legend():
    shown = texts(pictures.few_shot_curve(POINTS, 0.2, best_baseline=("linear probe", 0.7)))
    assert {"Linear probe (best baseline)", "Zero-shot"} <= set(shown)


def test_a_best_baseline_without_shots_has_a_line_of_its_own():
    assert "Prompt ensemble (best baseline)" in texts(
        pictures.few_shot_curve(POINTS, 0.2, best_baseline=("prompt ensemble", 0.8))
    )


def test_zero_shot_as_the_best_baseline_is_drawn_once():
    shown = texts(pictures.few_shot_curve(POINTS, 0.2, best_baseline=("zero-shot", 0.2)))
    assert [text for text in shown if "Zero-shot" in text] == ["Zero-shot (best baseline)"]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("style", NAMED)
@pytest.mark.parametrize("c", [2, 10, 20, 40, 60])
def test_no_text_of_a_confusion_matrix_covers_another(c: int, style: str, width: float):
    assert touching(pictures.confusion_matrix(confusion(c), NAMED[style](c), width=width)) == 0


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("style", NAMED)
@pytest.mark.parametrize("c", [2, 40])
def test_no_text_of_the_class_bars_covers_another(c: int, style: str, width: float):
    both = accuracies(c, style)
    assert touching(pictures.class_accuracy_bars(both, both, baseline_name="prompt ensemble", width=width)) == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_no_text_of_the_curves_covers_another(width: float):
    best = ("prompt ensemble", 0.8)
    assert touching(pictures.few_shot_curve(POINTS, 0.2, best_baseline=best, width=width)) == 0
    assert touching(pictures.training_curve([epoch(1, 0.9), epoch(2, 0.8)], width=width)) == 0


@pytest.mark.parametrize("style", NAMED)
@pytest.mark.parametrize("c", [2, 40, 200])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_picture_is_no_wider_than_its_page_and_cuts_no_text(width: float, c: int, style: str):
    both = accuracies(min(c, 40), style)
    for figure in (
        pictures.confusion_matrix(confusion(c), NAMED[style](c), width=width),
        pictures.class_accuracy_bars(both, both, width=width),
        pictures.few_shot_curve(POINTS, 0.2, best_baseline=("prompt ensemble", 0.8), width=width),
        pictures.training_curve([epoch(1, 0.9), epoch(2, 0.8)], width=width),
    ):
        boxes, edge = drawn(figure)
        assert figure.get_size_inches()[0] < width + 1e-6
        assert min(box[:, 0].min() for box in boxes) > -2
        assert max(box[:, 0].max() for box in boxes) < edge + 2


@pytest.mark.parametrize(("c", "named", "counted"), [(2, True, True), (40, True, False), (120, False, False)])
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
    assert "a very long…y long name" in shown


def test_names_that_differ_in_the_middle_stay_apart():
    alike = [f"the first twelve letters, {word}, and the last letters" for word in ("one", "two")]
    shown = texts(pictures.class_accuracy_bars(dict.fromkeys(alike, 0.5), dict.fromkeys(alike, 0.4)))
    assert sum("one" in text for text in shown) == sum("two" in text for text in shown) == 1


def test_reliability_diagram_says_the_calibration_error():
    evaluation = evaluate(np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 1]), ["a", "b"]).as_dict()
    assert f"CoOp: ECE {100 * evaluation['calibration_error']:.1f} %" in texts(
        pictures.reliability_diagram(evaluation, "CoOp")
    )


def test_class_bars_stand_best_first():
    shown = texts(pictures.class_accuracy_bars({"a": 0.2, "b": 0.9}, {"a": 0.1, "b": 0.3}))
    assert shown.index("a") < shown.index("b")  # from the bottom up


def test_class_bars_name_the_baseline_in_their_legend():
    shown = texts(pictures.class_accuracy_bars({"a": 0.2}, {"a": 0.1}, name="coop", baseline_name="linear probe"))
    assert {"CoOp", "Linear probe (best baseline)"} <= set(shown)


def test_pictures_leave_the_global_style_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    pictures.as_svg(pictures.training_curve([epoch(1)]))
    assert dict(matplotlib.rcParams) == before

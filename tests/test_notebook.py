"""The notebook in docs/: every cell runs, in an empty folder, and says what the text around it promises."""

import ast
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coop_core import ProgressBar
from coop_core.showing import in_notebook

NOTEBOOK = Path(__file__).parents[1] / "docs" / "example.ipynb"
CELLS: dict[str, dict[str, Any]] = {cell["id"]: cell for cell in json.loads(NOTEBOOK.read_text())["cells"]}


def run(source: str, names: dict[str, Any]) -> Any:
    """As a notebook runs a cell -> the value of its last line, if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


def test_every_cell_runs_and_says_what_is_promised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = {name: run("".join(cell["source"]), names) for name, cell in CELLS.items() if cell["cell_type"] == "code"}

    assert repr(shown["fit"]) == "PromptClassifier('gda', backbone='mini': learned 4 classes from 32 images)"
    assert shown["score"]["gda"] >= 0.9 > shown["score"]["zero-shot"]
    assert len(shown["predict"]) == 7
    assert sum(Path(path).parts[1] == answer for path, answer in shown["predict"].items()) >= 6
    assert shown["save"] is True
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "features", "prompt"}


def test_the_notebook_keeps_no_output_and_no_place_of_a_machine():
    code = [cell for cell in CELLS.values() if cell["cell_type"] == "code"]

    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert re.search(r"/(home|work|tmp|Users|root)\b", NOTEBOOK.read_text()) is None


def test_what_people_look_at_in_a_notebook_is_a_line(tmp_path, monkeypatch):
    """Not pages of tensors, images and modules."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for name in ("draw", "fit"):
        run("".join(CELLS[name]["source"]), names)
    fitted = names["classifier"]

    shown = [repr(its) for its in (fitted.split_, fitted.artifact_, fitted.predictor_, fitted.predictor_.backbone)]

    assert shown == [
        "Split('photos', 4 classes, seed 1: 32 train, 16 val, 32 test images)",
        "Artifact('gda' on mini, 4 classes of 'photos': alpha (), features (32, 1280), labels (32,))",
        "Predictor(4 classes, Backbone('mini (imagenet-minilm)' on cpu, 224 x 224 pixels))",
        "Backbone('mini (imagenet-minilm)' on cpu, 224 x 224 pixels)",
    ]


class Display:
    """What IPython's display keeps of one output: its contents, one after another."""

    def __init__(self) -> None:
        self.contents: list[str] = []

    def __call__(self, content: dict[str, str], *, raw: bool, display_id: bool) -> "Display":
        self.update(content, raw=raw)
        return self

    def update(self, content: dict[str, str], *, raw: bool) -> None:
        self.contents.append(content["text/html"])


@pytest.fixture
def notebook(monkeypatch) -> Display:
    """This process as a notebook's kernel."""
    display = Display()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=True)))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    return display


def test_a_bar_in_a_notebook_moves_in_its_place_and_ends_full(notebook):
    show = ProgressBar()
    for done in range(101):
        show("images <checked>", done, 100)

    assert in_notebook()
    assert notebook.contents[0].startswith('<progress value="0" max="100"></progress> images &lt;checked&gt;: 0 of 100')
    assert '"100" max="100"' in notebook.contents[-1]
    assert len(notebook.contents) < 10


def test_a_bar_outside_a_notebook_and_a_terminal_is_silent(capsys):
    show = ProgressBar()
    for done in range(3):
        show("images checked", done, 2)

    assert not in_notebook()
    assert capsys.readouterr() == ("", "")

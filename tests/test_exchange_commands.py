"""`coop export` and `coop import` as they are typed."""

import os
from pathlib import Path

import pytest
from golden_weights import CLASS_NAMES, WIDTH, draw
from test_cli import coop as coop  # fixtures
from test_golden import clip as clip
from toy_checkpoint import write_dassl
from toy_images import paint
from toy_prompt import write_prompt

from coop_core import conversion
from coop_core.artifact import read_artifact
from coop_core.files import read_json


@pytest.fixture
def project(backbone, tmp_path, monkeypatch) -> Path:
    """A working folder with a learned prompt on a tiny backbone, three images in a folder and a file that is none."""
    for name in os.environ:
        if name.startswith("COOP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COOP_DEVICE", "cpu")
    write_prompt(tmp_path / "artifacts/prompt", backbone, ("cat", "sea lake", "river"))
    for number, name in enumerate("abc"):
        paint(tmp_path / f"images/{name}.png", number, size=(40, 30))
    (tmp_path / "broken.png").write_bytes((tmp_path / "images/a.png").read_bytes()[:200])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_class_weights_are_exported_and_what_is_written_is_told(coop, project):
    said = coop("export", "--only", "weights", "--to", "weights", "--images", "images", "images/a.png")

    assert said.status == 0
    assert [line.split()[-1] for line in said.lines[:4]] == [
        f"weights/{name}" for name in ("answer.json", "card.json", "class_weights.npz", "class_weights.safetensors")
    ]
    assert "checked on 4 images against the artefact: the same answers, probabilities by NumPy within" in said.out
    assert read_json(project / "weights/answer.json")["labels"] == list(read_artifact(project / "artifacts/prompt")
                                                                        .class_names)  # fmt: skip


def test_samples_of_the_report_are_taken_where_no_images_are_given(coop, project):
    (project / "artifacts/report").mkdir()
    (project / "images").rename(project / "artifacts/report/samples")

    assert "checked on 3 images" in coop("export", "--only", "weights").out


def test_without_any_images_a_sentence_asks_for_them(coop):
    assert "there are none: name some with --images" in coop("export", "--only", "weights").sentence


def test_an_unknown_part_is_a_sentence(coop):
    assert coop("export", "--only", "text").sentence.startswith("--only 'text' is unknown")


def test_without_the_extra_a_sentence_says_what_to_type(coop, monkeypatch):
    monkeypatch.setattr(conversion, "PACKAGES", ("no_such_package",))

    assert "pip install -c constraints.txt -e '.[export]'" in coop("export", "--images", "images").sentence


def test_no_prompt_is_a_sentence(coop):
    assert "no learned prompt at nowhere" in coop("export", "nowhere", "--images", "images").sentence


def test_a_checkpoint_is_imported_and_answers(coop, clip, project):
    path = write_dassl(project / "model.pth.tar-50", clip, {"ctx": draw("context", 4, WIDTH, std=0.02)}, CLASS_NAMES)
    Path("names.txt").write_text("\n".join(CLASS_NAMES))

    said = coop("import", str(path), "--backbone", clip.architecture, "--classes", "names.txt")

    assert said.status == 0
    assert "class names given, and those of the file" in said.out
    assert "unknown     data set, split" in said.out
    answers = coop("predict", "--model", "artifacts/imported", "images").lines
    assert len(answers) == 3
    assert "sha256" in coop("card", "--model", "artifacts/imported").out


@pytest.mark.parametrize(("words", "fault"), [
    (("none.pth", "--backbone", "mini", "--classes", "a, b"), "none.pth is missing: name the checkpoint's file"),
    (("broken.png", "--backbone", "mini", "--classes", "a, b"), "is no checkpoint that torch reads, or is damaged"),
    (("none.pth", "--backbone", "mini", "--classes", "a", "--position", "left"), "--position 'left' is unknown: end,"),
])  # fmt: skip
def test_what_cannot_be_imported_is_a_sentence(coop, words, fault):
    assert fault in coop("import", *words).sentence

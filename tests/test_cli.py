"""The command line: images in, lines of labels out; what a user can mend is one sentence and status 2."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from toy_images import paint, toy_image
from toy_split import toy_split

from coop_core.artifact import write_artifact, write_card
from coop_core.card import make_card
from coop_core.files import write_array, write_json
from coop_core.methods import Task
from coop_core.methods import coop as method
from pipelines.commands import cli

HEAVY = {
    "torch", "torchvision", "mlflow", "prefect", "dvc", "transformers", "open_clip", "timm", "boto3", "botocore",
    "pydantic_settings", "sklearn", "numpy", "PIL", "pandas", "matplotlib",
}  # fmt: skip
NAMES = ("tabby cat", "sea lake", "river")
ROOT = Path(__file__).parents[1]


class Said(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def answers(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    @property
    def sentence(self) -> str:
        """The one line of a fault; anything else on stderr fails."""
        assert self.status == 2
        assert self.err.startswith("error: ")
        assert self.err.count("\n") == 1
        return self.err.removeprefix("error: ").rstrip("\n")


@pytest.fixture(scope="session")
def prompts(mini, tmp_path_factory) -> Path:
    """Untrained artefacts on the mini backbone: `shared` and `class-specific`."""
    root = tmp_path_factory.mktemp("prompts")
    for name in ("shared", "class-specific"):
        params = method.Params(n_context=4, class_specific=name == "class-specific")
        generator = torch.Generator().manual_seed(0)
        learner = method.build(params, backbone=mini, task=Task(NAMES, "a photo of a {}."), generator=generator)
        card = make_card(
            learner=learner,
            method=params,
            backbone=mini,
            split=toy_split(NAMES),
            shots=1,
            params={"seed": 7, "train": {"learning_rate": 0.5}},
            curve=[{"epoch": 0, "loss": 1.5}],
            code_revision="abc123",
        )
        write_artifact(root / name, learner, card)
    return root


@pytest.fixture
def project(prompts, tmp_path, monkeypatch) -> Path:
    """A working folder with a learned prompt, three images in a folder and a file that is none."""
    for name in os.environ:
        if name.startswith("COOP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COOP_DEVICE", "cpu")
    shutil.copytree(prompts / "shared", tmp_path / "artifacts/prompt")
    for number, name in enumerate(["b.png", "a.png", "deeper/c.JPG"]):
        paint(tmp_path / "images" / name, number, size=(40, 30))
    (tmp_path / "images/notes.txt").write_text("no image")
    (tmp_path / "broken.png").write_bytes((tmp_path / "images/a.png").read_bytes()[:200])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def coop(monkeypatch, capsys, project):
    """`coop WORDS...` in this process, which is left as it was."""
    names, environment, handler = ("pipelines", "coop_core"), dict(os.environ), signal.getsignal(signal.SIGTERM)
    levels = [logging.getLogger(name).level for name in names]

    def coop(*words: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["coop", *words])
        with pytest.raises(SystemExit, match=r"^\d+$") as ended:
            cli.main()
        return Said(ended.value.code, *capsys.readouterr())

    yield coop
    signal.signal(signal.SIGTERM, handler)
    os.environ.clear()
    os.environ.update(environment)
    for name, level in zip(names, levels, strict=True):
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="session")
def help_and_modules() -> tuple[str, set[str]]:
    """What `coop --help` prints, and the outside packages loaded by then."""
    program = (
        "import sys; sys.argv = ['coop', '--help']\n"
        "from pipelines.commands import cli\n"
        "try:\n    cli.main()\n"
        "finally:\n    print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    shown, _, loaded = done.stdout.partition("LOADED ")
    return shown, set(loaded.split())


def test_help_loads_nothing_heavy(help_and_modules):
    _, loaded = help_and_modules

    assert "typer" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("command", ["predict", "compare", "card", "ui"])
def test_help_names_every_command(help_and_modules, command):
    assert f"  {command} " in help_and_modules[0]


def test_an_answer_loads_torch_and_no_other_large_library(project):
    """Nor does Python look for garbage while torch is imported; afterwards it does again."""
    program = (
        "import gc, sys; sys.argv = ['coop', 'predict', 'images/a.png']\n"
        "from pipelines.commands import cli\n"
        "try:\n    cli.main()\n"
        "finally:\n    print('LOADED', *{name.partition('.')[0] for name in sys.modules})\n"
        "    print('COLLECTS', gc.isenabled(), gc.get_freeze_count() > 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    loaded, _, collects = done.stdout.partition("LOADED ")[2].partition("COLLECTS ")
    assert set(loaded.split()) & HEAVY == {"torch", "numpy", "PIL", "pydantic_settings"}
    assert collects.strip() == "True True"


def test_predict_answers_an_image_with_its_label_and_percent(coop):
    said = coop("predict", "images/a.png")
    path, answer = said.lines[0].split("\t")

    assert (said.status, said.err, len(said.lines), path) == (0, "", 1, "images/a.png")
    assert answer.rsplit(" ", 2)[0] in NAMES
    assert answer.endswith(" %")


def test_predict_answers_a_folder_in_the_order_of_its_paths(coop):
    said = coop("predict", "images")

    assert [line.split("\t")[0] for line in said.lines] == ["images/a.png", "images/b.png", "images/deeper/c.JPG"]


def test_predict_answers_in_the_order_it_was_asked(coop):
    said = coop("predict", "images/b.png", "images/a.png", "--json")

    assert [answer["image"] for answer in said.answers] == ["images/b.png", "images/a.png"]


def test_batches_change_no_answer(coop):
    together, alone = (coop("predict", "images", "--json", "--batch-size", size).answers for size in ("32", "1"))

    assert [answer["label"] for answer in together] == [answer["label"] for answer in alone]
    assert [answer["probability"] for answer in together] == pytest.approx([a["probability"] for a in alone], abs=1e-4)


def test_json_is_one_object_a_line_with_the_most_probable_class_first(coop):
    answer = coop("predict", "images/a.png", "--json", "--top", "3").answers[0]

    assert list(answer) == ["image", "answer", "label", "probability", "labels", "probabilities"]
    assert (answer["label"], answer["probability"]) == (answer["labels"][0], answer["probabilities"][0])
    assert answer["probabilities"] == sorted(answer["probabilities"], reverse=True)
    assert set(answer["labels"]) == set(NAMES)
    assert sum(answer["probabilities"]) == pytest.approx(1)


@pytest.mark.parametrize(("top", "shown"), [("2", 2), ("99", 3)])
def test_top_says_how_many_classes_are_shown(coop, top, shown):
    assert len(coop("predict", "images/a.png", "--top", top).lines[0].split("\t")) == 1 + shown


@pytest.mark.parametrize("option", ["--top", "--batch-size"])
def test_none_is_too_few(coop, option):
    said = coop("predict", "images/a.png", option, "0")

    assert said.status == 2
    assert f"Error: Invalid value for '{option}': Input should be greater than or equal to 1\n" in said.err


def test_other_classes_take_the_place_of_the_learned_ones(coop):
    answer = coop("predict", "images/a.png", "--classes", "pterodactyl, forest", "--top", "9", "--json").answers[0]

    assert set(answer["labels"]) == {"pterodactyl", "forest"}
    assert sum(answer["probabilities"]) == pytest.approx(1)


def test_the_learned_classes_named_again_change_no_answer(coop):
    plain, named = (
        coop("predict", "images", "--top", "3", *more).out for more in ([], ["--classes", ",".join(NAMES)])
    )

    assert plain == named


def test_class_specific_context_answers_its_own_classes(coop, prompts):
    said = coop("predict", "images/a.png", "--model", str(prompts / "class-specific"), "--json")

    assert said.answers[0]["label"] in NAMES


def test_class_specific_context_refuses_other_classes(coop, prompts):
    said = coop("predict", "images/a.png", "-m", str(prompts / "class-specific"), "--classes", "pterodactyl,forest")

    assert "something of its own for each of tabby cat, sea lake, river" in said.sentence
    assert said.out == ""


@pytest.mark.parametrize(
    ("classes", "fault"),
    [("cat", "needs two different names"), (",", "needs two different names"), ("cat,dog, cat", "names a class twice")],
)
def test_class_names_that_make_no_classifier_are_a_sentence(coop, classes, fault):
    assert fault in coop("predict", "images/a.png", "--classes", classes).sentence


def test_missing_images_are_named_together_before_anything_is_loaded(coop):
    said = coop("predict", "none.png", "images/a.png", "nowhere", "-m", "no-model")

    assert said.sentence == "nothing to predict at: none.png, nowhere"


def test_a_folder_without_images_is_a_sentence(coop, project):
    (project / "empty").mkdir()

    assert coop("predict", "empty").sentence == "nothing to predict at: empty (a folder without images)"


def test_an_unreadable_image_stops_no_other_and_counts_in_the_end(coop):
    said = coop("predict", "images/a.png", "broken.png", "images/notes.txt", "images/b.png")

    assert said.sentence == "2 of 4 images could not be read; the others are answered above"
    assert [line.split("\t")[1] == "-" for line in said.lines] == [False, True, True, False]
    assert said.lines[1].startswith("broken.png\t-\tcannot be read (")


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_an_error_names_its_image_once(coop, as_json):
    assert coop("predict", "broken.png", *as_json).lines[0].count("broken.png") == 1


def test_an_unreadable_image_is_an_object_of_its_own_in_json(coop):
    said = coop("predict", "broken.png", "images/a.png", "--json")

    assert said.status == 2
    assert [set(answer) for answer in said.answers] == [
        {"image", "error"},
        {"image", "answer", "label", "probability", "labels", "probabilities"},
    ]


def test_only_unreadable_images_are_a_sentence_too(coop):
    assert coop("predict", "broken.png").sentence.startswith("1 of 1 images could not be read")


def test_an_image_whose_name_is_no_text_is_answered(coop, project):
    odd = os.fsencode(project / "images") + b"/\xff.png"
    os.rename(project / "images/a.png", odd)

    said = coop("predict", "images")

    assert (said.status, len(said.lines)) == (0, 3)


def test_json_brings_back_a_name_that_is_no_text(coop, project):
    odd = os.fsencode(project) + b"/\xff.png"
    os.rename(project / "images/a.png", odd)

    assert os.fsencode(coop("predict", os.fsdecode(odd), "--json").answers[0]["image"]) == odd


def test_a_missing_image_whose_name_is_no_text_is_a_sentence(coop):
    assert "nothing to predict at: " in coop("predict", os.fsdecode(b"\xff.png")).sentence


def test_an_image_whose_name_has_line_breaks_is_one_line(coop, project):
    os.rename(project / "images/a.png", project / "images/a\nb\tc.png")

    said = coop("predict", "images/a\nb\tc.png")

    assert said.lines[0].split("\t")[0] == r"images/a\nb\tc.png"
    assert len(said.lines) == 1


@pytest.mark.parametrize("address", ["https://example.org/a.png", "file:///tmp/a.png", "s3://bucket/a.png"])
def test_an_address_is_a_sentence_that_says_to_download_it_first(coop, address):
    assert coop("predict", "images", address).sentence == (
        f"files are wanted, not addresses: {address} (download first, for instance with `curl -O`, and give the path)"
    )


def test_a_name_too_long_for_a_file_is_missing(coop):
    assert coop("predict", 300 * "a", "-m", 300 * "b").sentence == f"nothing to predict at: {300 * 'a'}"


def test_a_model_whose_name_is_too_long_is_a_sentence(coop):
    assert coop("predict", "images/a.png", "-m", 300 * "b").sentence.startswith(f"no learned prompt at {300 * 'b'}: ")


def test_a_folder_answers_pictures_by_their_content_and_names_what_it_leaves_out(coop, project):
    for name in ("a.avif", "no-suffix"):
        toy_image(5, size=(40, 30)).save(project / "images" / name, format="AVIF")
    for name in ("one.heic", "two.jp2"):
        (project / "images" / name).write_bytes(b"\0\0\0\x18ftypheic")

    said = coop("predict", "images")

    assert [line.split("\t")[0] for line in said.lines] == [
        "images/a.avif", "images/a.png", "images/b.png", "images/deeper/c.JPG", "images/no-suffix"
    ]  # fmt: skip
    assert said.err == "left out: 3 in no format that is read (images/notes.txt, images/one.heic, images/two.jp2)\n"


def test_a_folder_leaves_out_what_is_hidden_and_says_so(coop, project):
    (project / "images/notes.txt").unlink()
    paint(project / "images/.hidden.png", 7)
    paint(project / "images/.folder/a.png", 8)

    said = coop("predict", "images")

    assert (said.status, len(said.lines)) == (0, 3)
    assert said.err == "left out: 2 hidden (images/.folder, images/.hidden.png)\n"


def test_a_folder_names_what_is_no_file_and_does_not_wait_for_it(coop, project):
    (project / "images/notes.txt").unlink()
    os.mkfifo(project / "images/pipe.png")
    (project / "images/dead.png").symlink_to("nowhere")
    (project / "images/link").symlink_to("deeper")

    said = coop("predict", "images")

    assert (said.status, len(said.lines)) == (0, 3)
    assert said.err == ("left out: 1 links to folders (images/link); "
                        "2 dead links, pipes or devices (images/dead.png, images/pipe.png)\n")  # fmt: skip


def test_what_is_left_out_of_many_is_counted_with_three_examples(coop, project):
    for number in range(5):
        (project / f"images/{number}.txt").write_text("no image")

    assert coop("predict", "images").err == (
        "left out: 6 in no format that is read (images/0.txt, images/1.txt, images/2.txt, ...)\n"
    )


def test_a_hidden_image_that_is_asked_for_by_name_is_answered(coop, project):
    paint(project / "images/.hidden.png", 7)

    said = coop("predict", "images/.hidden.png")

    assert (said.status, said.err, len(said.lines)) == (0, "", 1)


def test_a_named_pipe_is_refused_and_the_others_are_answered(coop, project):
    os.mkfifo(project / "pipe.png")

    said = coop("predict", "pipe.png", "images/a.png")

    assert said.lines[0] == "pipe.png\t-\tis no regular file"
    assert said.sentence == "1 of 2 images could not be read; the others are answered above"


def test_a_slice_of_an_array_is_answered_like_a_file(coop, project):
    write_array(project / "x.npy", np.zeros((2, 30, 40), np.uint8))

    assert (coop("predict", "x.npy#1").status, coop("predict", "x.npy#7").status) == (0, 2)
    assert coop("predict", "y.npy#0").sentence == "nothing to predict at: y.npy#0"


def test_a_batch_larger_than_memory_is_refused(coop):
    said = coop("predict", "images/a.png", "--batch-size", "1000000000")

    assert said.status == 2
    assert "less than or equal to 1024" in said.err


def test_a_process_of_its_own_answers_on_stdout_and_complains_on_stderr(project):
    command = [sys.executable, "-m", "pipelines.commands.cli", "predict", "images/a.png", "broken.png"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})

    assert (done.returncode, len(done.stdout.splitlines())) == (2, 2)
    assert done.stderr == "error: 1 of 2 images could not be read; the others are answered above\n"


@pytest.mark.parametrize("command", [["predict", "images/a.png"], ["card"]])
@pytest.mark.parametrize("model", ["nowhere", "images", "images/a.png"])
def test_a_model_that_is_not_there_is_a_sentence_with_the_ways_to_name_one(coop, command, model):
    assert coop(*command, "--model", model).sentence == (
        f"no learned prompt at {model}: run `dvc repro` or wait until it has ended, or give --model a folder or a "
        "registered version such as NAME@candidate or NAME/1"
    )


def test_a_variable_that_is_not_valid_is_a_sentence(coop, monkeypatch):
    monkeypatch.setenv("COOP_DEVICE", "gpu")

    assert "COOP_DEVICE is 'gpu'" in coop("predict", "images/a.png").sentence


def edit_card(folder: Path, **changes: Any) -> None:
    card = json.loads((folder / "card.json").read_text())
    backbone = changes.pop("backbone_part", None)
    if backbone is not None:
        changes["backbone"] = {key: value for key, value in (card["backbone"] | backbone).items() if value is not None}
    card |= changes
    if isinstance(card["digests"], dict):
        write_card(folder, card)                                                  # its own digest is right
    else:
        write_json(folder / "card.json", card)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGES = {
    "no JSON": (lambda f: (f / "card.json").write_text("{"), r"card\.json is not readable JSON"),
    "a list": (lambda f: (f / "card.json").write_text("[]"), r"card\.json is not a card of schema 2"),
    "another schema": (lambda f: edit_card(f, schema=99), r"card\.json is not a card of schema 2"),
    "no class names": (lambda f: edit_card(f, class_names=[]), r"card\.json is not whole \(class_names"),
    "a class name less": (lambda f: edit_card(f, class_names=["a", "b"]), "class names differ in number"),
    "class names as a number": (lambda f: edit_card(f, class_names=3), "class"),
    "digests as a list": (lambda f: edit_card(f, digests=["context"]), "digests"),
    "backbone as a word": (lambda f: edit_card(f, backbone="mini"), "backbone"),
    "no tag": (lambda f: edit_card(f, backbone_part={"pretrained": None}), "pretrained"),
    "no weights digest": (lambda f: edit_card(f, backbone_part={"weights_digest": None}), "weights_digest"),
    "unknown backbone": (lambda f: edit_card(f, backbone_part={"architecture": "ViT-Z"}), "ViT-Z"),
    "other weights": (lambda f: edit_card(f, backbone_part={"weights_digest": "0" * 64}), "weights 000000000000"),
    "context cut short": (lambda f: cut(f / "context.safetensors"), r"context\.safetensors is damaged"),
    "no context": (lambda f: (f / "context.safetensors").unlink(), r"context\.safetensors is missing"),
    "foreign context": (
        lambda f: shutil.copy(f / "class_weights.safetensors", f / "context.safetensors"),
        r"context\.safetensors is not the file its card was written for",
    ),
    "weights cut short": (lambda f: cut(f / "class_weights.safetensors"), r"class_weights\.safetensors is damaged"),
    "no weights": (lambda f: (f / "class_weights.safetensors").unlink(), r"class_weights\.safetensors is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_artefact_is_a_sentence(coop, project, damage):
    change, fault = DAMAGES[damage]
    change(project / "artifacts/prompt")

    assert re.search(fault, coop("predict", "images/a.png").sentence)


def test_a_method_of_another_version_is_a_sentence_when_it_is_needed(coop, project):
    edit_card(project / "artifacts/prompt", method={"name": "telepathy"})

    said = coop("predict", "images/a.png", "--classes", "pterodactyl,forest")

    assert said.sentence == "the artefact's method 'telepathy' is not in this version of the product"


def test_card_shows_a_line_for_each_value(coop):
    lines = coop("card").lines

    assert "class_names: tabby cat, sea lake, river" in lines
    assert "code_revision: abc123" in lines
    assert lines[lines.index("params:") :][:4] == ["params:", "  seed: 7", "  train:", "    learning_rate: 0.5"]


def test_card_as_json_is_the_card_as_it_is_stored(coop, project):
    said = coop("card", "--json")

    assert json.loads(said.out) == json.loads((project / "artifacts/prompt/card.json").read_text())


def test_card_of_a_damaged_artefact_is_a_sentence(coop, project):
    cut(project / "artifacts/prompt/context.safetensors")

    assert "is damaged" in coop("card").sentence


def test_compare_refuses_an_unknown_column_with_the_known_ones(coop, project):
    (project / "params.yaml").touch()
    assert coop("compare", "--sort", "size").sentence == "--sort size is not one of: when, accuracy, gain"


def test_ui_points_to_the_server_when_there_is_one(coop, monkeypatch):
    monkeypatch.setenv("COOP_TRACKING_URI", "http://mlflow.example:5000")

    assert coop("ui").sentence.endswith("open http://mlflow.example:5000 in a browser")


@pytest.mark.parametrize("words", [["fly"], ["predict"], ["predict", "images", "--colour"]])
def test_words_that_are_no_command_end_with_status_2_and_no_traceback(coop, words):
    said = coop(*words)

    assert (said.status, said.out) == (2, "")
    assert "Traceback" not in said.err

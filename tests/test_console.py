"""The console: what a user can mend is one sentence on stderr and a status; everything else stays visible."""

import errno
import io
import logging
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from coop_core import errors
from coop_core.errors import CoopError
from pipelines import console

FAULTS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CoopError)]


@pytest.fixture(autouse=True)
def _leave_the_process_as_it_was():
    """run() sets what a whole process needs: a signal handler, levels and variables."""
    names, environment, handler = ("pipelines", "coop_core"), dict(os.environ), signal.getsignal(signal.SIGTERM)
    levels = [logging.getLogger(name).level for name in names]
    yield
    signal.signal(signal.SIGTERM, handler)
    os.environ.clear()
    os.environ.update(environment)
    for name, level in zip(names, levels, strict=True):
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def run(capsys):
    """What a main leaves behind: its exit status, stdout and stderr."""

    def run(main) -> tuple[int, str, str]:
        with pytest.raises(SystemExit, match=r"^\d+$") as ended:
            console.run(main)
        return ended.value.code, *capsys.readouterr()

    return run


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


def test_a_main_that_returns_ends_with_status_0_and_says_nothing(run):
    assert run(lambda: None) == (0, "", "")


@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault_is_one_sentence_and_status_2(run, kind):
    assert run(raising(kind("split.shots is 8: lower it"))) == (2, "", "error: split.shots is 8: lower it\n")


def test_all_the_faults_of_the_tree_are_tried():
    assert {kind.__name__ for kind in FAULTS} >= {"CoopError", "ParamsError", "ServiceError", "ArtifactError"}


def test_a_long_sentence_is_not_broken_into_lines(run):
    sentence = "images " * 100 + "end"

    assert run(raising(CoopError(sentence)))[2] == f"error: {sentence}\n"


def test_brackets_in_a_sentence_are_shown_as_they_are(run):
    sentence = "class names [bold]cat[/bold] and ['a', 'b'] in [/tmp/x]"

    assert run(raising(CoopError(sentence)))[2] == f"error: {sentence}\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_sentence_about_space_and_status_2(run, number):
    status, out, err = run(raising(OSError(number, os.strerror(number), "artifacts/prompt")))

    assert (status, out) == (2, "")
    assert err == (
        f"error: cannot read or write at artifacts/prompt ({os.strerror(number)}): "
        "free space or correct the rights, then run the same again\n"
    )


def test_a_full_disk_without_a_file_name_is_a_sentence_too(run):
    status, _, err = run(raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))

    assert status == 2
    assert err.startswith("error: cannot read or write (No space left on device): free space")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_missing_rights_are_a_sentence_with_the_file_and_status_2(run, number):
    status, _, err = run(raising(OSError(number, os.strerror(number), "data/raw")))

    assert status == 2
    assert "data/raw" in err
    assert "rights" in err
    assert err.count("\n") == 1


def test_ctrl_c_says_how_to_go_on_and_ends_with_status_130(run):
    status, out, err = run(raising(KeyboardInterrupt()))

    assert (status, out) == (130, "")
    assert err == "error: stopped; what is finished is kept, and the same command goes on from here\n"


def test_a_polite_kill_ends_like_ctrl_c_and_unwinds():
    program = (
        "import time\n"
        "from pipelines import console\n"
        "def main():\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('closed', flush=True)\n"
        "console.run(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    out, err = process.communicate(timeout=30)

    assert (process.returncode, out) == (130, "closed\n")
    assert err.startswith("error: stopped;")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "error", [ValueError("a defect"), FileNotFoundError(errno.ENOENT, "a defect"), RuntimeError("a defect"),
              MemoryError(), RecursionError("a defect")], ids=repr
)  # fmt: skip
def test_what_nobody_foresaw_is_a_sentence_and_its_traceback_is_kept(run, error, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    status, out, err = run(raising(error))
    (kept,) = tmp_path.iterdir()

    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: something unforeseen happened ({type(error).__name__}")
    assert str(kept) in err
    assert "Traceback" in kept.read_text()
    assert "in raising" in kept.read_text() or "in main" in kept.read_text()


@pytest.mark.parametrize("number", [errno.ENOTDIR, errno.EEXIST, errno.EISDIR])
def test_a_file_where_a_folder_should_be_is_a_sentence_with_its_place(run, number):
    status, _, err = run(raising(OSError(number, os.strerror(number), "params.yaml/cache")))

    assert status == 2
    assert "params.yaml/cache" in err
    assert "name another place" in err


def heard(steps: list[tuple[float, int]], *, every: float | None = 30, total: int = 100) -> list[str]:
    """What is said of a job that has done so much at such times."""
    spoken = console.Spoken("coop, 16 shots", every=every)
    return [line for now, done in steps if (line := spoken.line(done, total, now))]


def test_a_job_of_more_than_a_minute_is_announced_once():
    assert heard([(0, 1), (2, 2), (4, 3), (6, 4)], every=None) == ["coop, 16 shots: about 3 minutes"]


def test_a_job_of_less_than_a_minute_is_not_announced():
    assert heard([(0, 1), (4, 50), (8, 100)], every=None) == []


def test_what_an_earlier_attempt_did_is_no_speed():
    assert heard([(0, 90), (20, 91), (21, 92)], every=None) == ["coop, 16 shots: about 3 minutes"]


def test_outside_a_terminal_a_line_now_and_then_says_how_far_it_is():
    steps = [(float(second), 1 + second // 4) for second in range(100)]
    assert heard(steps) == [
        "coop, 16 shots: about 8 minutes",
        "coop, 16 shots: 9 of 100, about 7 minutes left",
        "coop, 16 shots: 17 of 100, about 6 minutes left",
        "coop, 16 shots: 24 of 100, about 5 minutes left",
    ]


@pytest.mark.parametrize(
    ("seconds", "said"), [(1.2, "1 second"), (40, "40 seconds"), (720, "12 minutes"), (12_600, "3.5 hours")]
)
def test_durations_are_told_in_one_unit(seconds, said):
    assert console.duration(seconds) == said


def test_a_stage_s_own_lines_are_heard():
    """A stage's logger bears its module's name, below a package whose lines are shown."""
    program = "import logging; from pipelines import console; console.run({})"
    speak = "lambda: logging.getLogger('pipelines.stages.train').info('text tower: packed')"
    done = subprocess.run([sys.executable, "-c", program.format(speak)], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "text tower: packed\n")


def test_an_interrupt_while_a_stage_is_imported_shows_no_traceback(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.stages", "train"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"},
    )  # fmt: skip

    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_an_exit_of_the_main_itself_keeps_its_status(run):
    assert run(raising(SystemExit(7)))[0] == 7


def test_a_persons_own_environment_wins_over_the_quiet_defaults(run, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "0")
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    seen = {}
    run(lambda: seen.update(os.environ))

    assert (seen["TQDM_DISABLE"], seen["MLFLOW_DISABLE_TELEMETRY"]) == ("0", "true")


def test_progress_goes_to_stderr_so_that_output_can_be_piped(capsys):
    with console.progress("features of toys", 3) as update:
        update(3, details="done")
    out, err = capsys.readouterr()

    assert out == ""
    assert "features of toys" in err
    assert "3/3" in err


@pytest.mark.parametrize("is_terminal", [False, True])
def test_lines_say_how_far_it_is_where_there_is_no_terminal(monkeypatch, caplog, is_terminal):
    monkeypatch.setattr(console, "_stderr", Console(file=io.StringIO(), force_terminal=is_terminal))
    for name in ("_FIRST_SECONDS", "_LINE_SECONDS"):
        monkeypatch.setattr(console, name, 0)
    with caplog.at_level(logging.INFO), console.progress("features of toys", 3) as update:
        for done in range(3):
            update(done)

    assert ("features of toys: 2 of 3, about" in caplog.text) == (not is_terminal)


def test_progress_that_never_starts_shows_nothing(capsys):
    with console.progress("features of toys", 3):
        pass

    assert "features of toys" not in capsys.readouterr().err


def test_pillow_is_quiet_about_an_image_that_we_refuse_in_a_sentence_of_our_own():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        console.prepare()

        said = "Image size (100000000 pixels) exceeds limit of 89478485 pixels"
        warnings.warn(said, Image.DecompressionBombWarning, stacklevel=2)

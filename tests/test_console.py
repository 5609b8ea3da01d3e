"""The console: what a user can mend is one sentence on stderr and a status; everything else stays visible."""

import errno
import logging
import os
import signal
import subprocess
import sys

import pytest

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
    "error", [ValueError("a defect"), FileNotFoundError(errno.ENOENT, "a defect"), RuntimeError("a defect")], ids=repr
)
def test_a_defect_of_the_product_is_not_hidden(error):
    with pytest.raises(type(error), match="a defect"):
        console.run(raising(error))


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


def test_progress_that_never_starts_shows_nothing(capsys):
    with console.progress("features of toys", 3):
        pass

    assert "features of toys" not in capsys.readouterr().err

"""The workspace after a kill, with the real DVC: what would stop it for ever is mended, never below a living DVC."""

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.commands import cli
from pipelines.services.workspace import LOCAL_SETTINGS, RWLOCK, mend_workspace

STAGES = """\
stages:
  slow:
    cmd: touch begun; test ! -e wait || sleep 600; touch done
    deps: [image]
    outs: [done]
"""


def dvc(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dvc", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def initialised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dvc")
    (folder / ".dvc/tmp").mkdir(parents=True)  # as `dvc init` makes it, without the processes it leaves running
    (folder / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n")
    (folder / "dvc.yaml").write_text(STAGES)
    (folder / "image").write_text("1")
    return folder


@pytest.fixture
def project(initialised: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(initialised)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(initialised / "site"))
    yield initialised
    for name in (RWLOCK, LOCAL_SETTINGS, Path("wait"), Path("begun")):
        name.unlink(missing_ok=True)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "pipelines")
    return caplog


def test_dvc_works_again_after_a_kill_while_it_wrote_its_lock(project, said):
    (project / "image").write_text("2")
    RWLOCK.write_text("")
    assert "JSON structure is corrupted" in dvc("repro").stderr

    mend_workspace()

    assert said.messages == [f"removed {RWLOCK}, which a kill had left damaged"]
    again = dvc("repro")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("left", [b"", b'{"write": {"/a', b"null", bytes(40), b"\xff"])
def test_whatever_dvc_cannot_read_is_removed(project, left):
    RWLOCK.write_bytes(left)
    mend_workspace()
    assert not RWLOCK.exists()


def test_what_dvc_can_read_stays(project, said):
    text = json.dumps({"write": {}, "read": {"/a": [{"pid": 1, "cmd": "repro"}]}})
    RWLOCK.write_text(text)
    mend_workspace()
    assert RWLOCK.read_text() == text
    RWLOCK.unlink()
    mend_workspace()
    assert said.messages == []


@pytest.mark.parametrize("below", [".", "deeper"])
def test_nothing_is_removed_while_dvc_runs(project, said, below):
    """A stage may run for hours, and DVC holds no lock meanwhile that another process could see."""
    (project / "image").write_text(below)
    (project / "wait").touch()
    (project / below).mkdir(exist_ok=True)
    command = [sys.executable, "-m", "dvc", "repro", "-q", f"{project}/dvc.yaml"]
    with subprocess.Popen(command, cwd=project / below, start_new_session=True) as running:
        try:
            until = time.monotonic() + 60
            while not (project / "begun").exists():
                assert time.monotonic() < until
                time.sleep(0.1)
            RWLOCK.write_text("")  # as another DVC leaves it that is killed now
            mend_workspace()
            assert RWLOCK.exists()
            assert f"process {running.pid}" in said.text
        finally:
            os.killpg(running.pid, signal.SIGKILL)
    mend_workspace()
    assert not RWLOCK.exists()


def test_nothing_is_removed_while_somebody_writes(project, said):
    RWLOCK.write_text("")
    with RWLOCK.with_name("rwlock.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        mend_workspace()
    assert RWLOCK.exists()
    assert "another process is at work" in said.text


def test_a_folder_without_dvc_is_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mend_workspace()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o604])
def test_keys_in_dvcs_local_settings_are_for_their_owner_alone(project, said, mode):
    LOCAL_SETTINGS.write_text("['remote \"store\"']\n    url = s3://bucket\n    secret_access_key = xyzzy\n")
    LOCAL_SETTINGS.chmod(mode)

    mend_workspace()
    mend_workspace()

    assert LOCAL_SETTINGS.stat().st_mode & 0o777 == 0o600
    assert said.messages == [f"closed {LOCAL_SETTINGS} to other users: it may hold keys"]


def test_reconcile_mends_too(project, monkeypatch, capsys):
    monkeypatch.setenv("COOP_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    RWLOCK.write_text("")
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.app(["reconcile"])
    assert not RWLOCK.exists()
    assert capsys.readouterr().out == "no run has lost its process\n"

"""Revision: which changes of a checkout make another code of it, in real repositories."""

import subprocess
from pathlib import Path

import pytest

from pipelines.revision import code_revision

FILES = [
    ".gitignore", "coop_core/__init__.py", "coop_core/report/report.html.jinja", "pipelines/__init__.py", "dvc.yaml",
    "pyproject.toml", "constraints.txt", "params.yaml", "README.md", "data.dvc", "docs/benchmarks.md",
    "catalog/eurosat.yaml", "tests/test_revision.py",
]  # fmt: skip


def git(folder: Path, *words: str) -> str:
    own = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *own, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def write(folder: Path, name: str, text: str = "changed\n") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with the product's files, in one commit."""
    folder = tmp_path / "checkout"
    for name in FILES:
        write(folder, name, "__pycache__/\n" if name == ".gitignore" else "first\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_code_as_it_was_committed_is_its_commit(checkout: Path) -> None:
    assert code_revision(checkout) == git(checkout, "rev-parse", "HEAD")


@pytest.mark.parametrize(
    "name",
    [
        "params.yaml", "README.md", "data.dvc", "docs/benchmarks.md", "catalog/eurosat.yaml", "tests/test_revision.py",
        "dvc.lock", "catalog/mine.yaml", "notes.py", "coop_core/notes.txt", "coop_core/__pycache__/page.py",
    ],
)  # fmt: skip
def test_what_is_no_code_does_not_change_the_revision(checkout: Path, name: str) -> None:
    write(checkout, name)

    assert code_revision(checkout) == git(checkout, "rev-parse", "HEAD")


@pytest.mark.parametrize(
    "name",
    [
        "coop_core/__init__.py", "coop_core/report/report.html.jinja", "pipelines/__init__.py", "dvc.yaml",
        "pyproject.toml", "constraints.txt", "coop_core/methods/mine.py", "pipelines/stages/mine.py",
        "coop_core/with space/münze.py",
    ],
)  # fmt: skip
def test_changed_and_new_code_is_dirty(checkout: Path, name: str) -> None:
    write(checkout, name)

    assert code_revision(checkout) == git(checkout, "rev-parse", "HEAD") + "-dirty"


def test_code_that_is_gone_is_dirty(checkout: Path) -> None:
    (checkout / "pipelines/__init__.py").unlink()

    assert code_revision(checkout).endswith("-dirty")


def test_a_change_that_is_staged_is_dirty(checkout: Path) -> None:
    git(checkout, "mv", "coop_core/__init__.py", "coop_core/moved.py")
    write(checkout, "coop_core/__init__.py", "first\n")
    git(checkout, "add", "coop_core")

    assert code_revision(checkout).endswith("-dirty")


def test_the_revision_is_of_the_code_wherever_one_works(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q", "another")
    monkeypatch.chdir(tmp_path / "another")

    assert code_revision(checkout) == git(checkout, "rev-parse", "HEAD")


def test_code_that_was_installed_into_a_repository_is_not_that_repositorys(checkout: Path) -> None:
    installed = checkout / ".venv/lib"
    write(installed, "coop_core/__init__.py")

    assert code_revision(installed) == "unknown"


def test_code_outside_a_repository_is_unknown(tmp_path: Path) -> None:
    write(tmp_path, "coop_core/__init__.py")

    assert code_revision(tmp_path) == "unknown"

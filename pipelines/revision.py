"""The code that made an artefact: the git revision, or what is known without git."""

import subprocess
from pathlib import Path

import coop_core
from coop_core.files import digest_code

_ROOT = Path(coop_core.__file__).parents[1]
_CODE = ("coop_core", "pipelines", "pyproject.toml", "constraints.txt", "dvc.yaml")
"""What decides results beside images and parameters: the packages, what they are installed by, and the stages."""


def code_revision(root: Path = _ROOT) -> str:
    """The commit, with `-dirty` when the code in `root` differs from it; `unknown` where git does not have the code.

    A Python file beside the code that git does not know counts, since it may be imported. Parameters, data sets and
    documents do not count: they are no code, and cards name by digest what of them decides a result.
    """
    try:
        _git(root, "ls-files", "--error-unmatch", "coop_core/__init__.py")
        commit = _git(root, "rev-parse", "HEAD")
        found = _git(root, "status", "--porcelain", "-z", "--untracked-files=all", "--", *_CODE)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    changed = any(not entry.startswith("?? ") or entry.endswith(".py") for entry in found.split("\0") if entry)
    return f"{commit}-dirty" if changed else commit


def core_digest() -> str:
    """Digest of the library's code, which with parameters and images decides every result."""
    return digest_code(Path(coop_core.__file__).parent)


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()

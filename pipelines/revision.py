"""The code that made an artefact: the git revision, or what is known without git."""

import subprocess
from pathlib import Path

import coop_core
from coop_core.files import digest_file, digest_json


def code_revision() -> str:
    """The commit, with `-dirty` when tracked code differs from it; `unknown` outside a checkout.

    Changes that a run makes itself (dvc.lock, data.dvc) do not count.
    """
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock", ":!data.dvc")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def core_digest() -> str:
    """Digest of the library's code, which with parameters and images decides every result."""
    root = Path(coop_core.__file__).parent
    return digest_json([[path.relative_to(root).as_posix(), digest_file(path)] for path in sorted(root.rglob("*.py"))])


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout.strip()

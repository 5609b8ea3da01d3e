"""The code that made an artefact: the git revision, or what is known without git."""

import subprocess


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


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout.strip()

"""Names: settings, or what the last `dvc repro` wrote -> the registered model that versions belong to."""

import hashlib
import re
import unicodedata

from coop_core.errors import GateError
from coop_core.files import read_json
from pipelines import paths
from pipelines.settings import Settings

_LENGTH = 100


def model_name(settings: Settings) -> str:
    """The registered model of this project: the one that is set, or the one that was tracked here last.

    Raises
    ------
    GateError
        When neither says which.
    """
    found = find_model_name(settings)
    if found is None:
        raise GateError(f"which model? set COOP_REGISTERED_MODEL, or run `dvc repro`, which leaves its name in "
                        f"{paths.TRACKED}")  # fmt: skip
    return found


def find_model_name(settings: Settings) -> str | None:
    """The same, or None."""
    if settings.registered_model or not paths.TRACKED.exists():
        return settings.registered_model
    return str(read_json(paths.TRACKED)["model_name"])


def name_after(dataset_name: str, *, project: str | None = None) -> str:
    """`coop-` or `PROJECT-`, and a data set's name in a-z, 0-9 and dashes: versions of one model answer one question.

    Letters that have no such form are told apart by a digest, so that no two data sets share a model by accident.
    """
    plain = unicodedata.normalize("NFKD", dataset_name.lower())
    words = re.sub(r"[^a-z0-9]+", "-", "".join(c for c in plain if not unicodedata.combining(c))).strip("-")
    lost = any(c.isalnum() and not c.isascii() for c in plain) or not words or len(words) > _LENGTH
    digest = [hashlib.sha256(dataset_name.encode("utf-8", "backslashreplace")).hexdigest()[:8]] if lost else []
    return "-".join(filter(None, [project or "coop", words[:_LENGTH].strip("-"), *digest]))

"""Descriptions: sentences a class, from a dataset card or a JSON file -> one tuple a class, in label order."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coop_core.data.dataset import shown, words
from coop_core.errors import DatasetError

log = logging.getLogger(__name__)

Descriptions = tuple[tuple[str, ...], ...]
LONGEST = 1000
"""Characters; whether a sentence fits the text tower is known when there is one."""
_SHOWN = 5


def read_descriptions(path: Path) -> Any:
    """What a JSON file holds; whether these are descriptions is for `check_descriptions` to say.

    Raises
    ------
    DatasetError
        When there is no such file, or no JSON in it.
    """
    try:
        return parse_descriptions(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(f"descriptions {path} do not exist: correct the card, or make them with `coop describe`") \
            from None  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"descriptions {path} are no JSON ({shown(str(error))}): `coop describe` checks an answer") \
            from None  # fmt: skip


def parse_descriptions(text: str) -> Any:
    """JSON as it stands; ValueError, too, where a name stands twice: Python's reader would keep the last one."""
    return json.loads(text, object_pairs_hook=_without_repetition)


def check_descriptions(content: Any, class_names: Sequence[str], *, where: str) -> Descriptions:
    """{class name: [sentence, ...]} -> the sentences of each class, without repetitions, which are told.

    Names are compared as words: `forest_floor` is "forest floor". Classes may have different numbers of sentences.

    Raises
    ------
    DatasetError
        With all faults at once: no such mapping, a class without sentences, an unknown class, what is no sentence.
    """
    if not isinstance(content, dict):
        raise DatasetError(f"{where}: an object of class names, each with a list of sentences, is wanted")
    given = {words(str(name)): sentences for name, sentences in content.items()}
    faults = [f"a name stands twice ({', '.join(map(repr, content))})"] if len(given) < len(content) else []
    if missing := [name for name in class_names if not given.get(name)]:
        faults.append(f"no sentence for {_few(missing)}")
    if unknown := [name for name in given if name not in class_names]:
        faults.append(f"no such class: {_few(unknown)}")
    found, repeated = [], []
    for name in class_names:
        sentences = given.get(name) or []
        if not isinstance(sentences, list):
            faults.append(f"{name!r} has no list of sentences")
            continue
        if wrong := [s for s in sentences if not isinstance(s, str) or not s.strip() or len(s) > LONGEST]:
            faults.append(f"{name!r} has {shown(repr(wrong[0])[:60])} where a sentence of at most {LONGEST} characters "
                          "is wanted")  # fmt: skip
            continue
        own = tuple(dict.fromkeys(" ".join(sentence.split()) for sentence in sentences))
        repeated += [name] * (len(own) < len(sentences))
        found.append(own)
    if faults:
        raise DatasetError(f"{where}: {'; '.join(faults)}")
    if repeated:
        log.warning("%s: sentences that stand twice are used once (%s)", where, _few(repeated))
    return tuple(found)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(names := dict(pairs)) < len(pairs):
        raise ValueError(f"a name stands twice among {_few([name for name, _ in pairs])}")
    return names


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")

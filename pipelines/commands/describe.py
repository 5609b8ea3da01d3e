"""Describing: class names -> what to ask a language model for sentences, and its answer -> checked JSON.

The model is whichever the user likes; nothing is sent anywhere.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from coop_core.data.dataset import read_dataset
from coop_core.data.descriptions import Descriptions, check_descriptions, parse_descriptions
from coop_core.errors import DatasetError
from pipelines import paths

_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


def question_or_file(answer: Path | None, *, sentences: int) -> str:
    """What to ask about the project's data set, or, of an answer in a file, the JSON for its card.

    Raises
    ------
    DatasetError
        Where the data set or the file is not there, or the answer is not right.
    """
    if not (paths.RAW / "dataset.json").exists():
        raise DatasetError(f"{paths.RAW} is not here yet, which has the class names: `dvc repro download` brings it")
    dataset = read_dataset(paths.RAW)
    if answer is None:
        return question(dataset.class_names, title=dataset.about.get("title", dataset.name), sentences=sentences)
    if not answer.is_file():
        raise DatasetError(f"there is no file {answer}: save the answer of the language model there")
    found = read_answer(answer.read_text(encoding="utf-8", errors="replace"), dataset.class_names)
    return as_json(found, dataset.class_names)


def question(class_names: Sequence[str], *, title: str, sentences: int) -> str:
    """What to ask: plain visual sentences in JSON, keyed by class name."""
    names = "\n".join(f"- {name}" for name in class_names)
    shape = json.dumps({class_names[0]: ["first sentence", "second sentence"], "...": []}, ensure_ascii=False)
    return f"""\
The data set "{title}" has images of these {len(class_names)} classes:

{names}

For each class, write {sentences} different sentences that describe what an image of it shows: shape, colour, texture,
where it is and how it differs from the other classes. One plain sentence of at most 30 words each, with the name of the
class in it. Nothing that cannot be seen in an image.

Answer with one JSON object and nothing else. Its keys are the class names exactly as above, its values are lists of
sentences:

{shape}
"""


def read_answer(text: str, class_names: Sequence[str]) -> Descriptions:
    """A language model's answer, bare or in a fenced block -> sentences a class.

    Raises
    ------
    DatasetError
        When it holds no JSON object, or not one of these classes; all faults at once.
    """
    fenced = _FENCE.findall(text)
    body = fenced[0] if len(fenced) == 1 else text
    start, end = body.find("{"), body.rfind("}")
    try:
        content = parse_descriptions(body[start : end + 1])
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"the answer holds no whole JSON object ({error}): ask again for nothing but JSON") from None
    return check_descriptions(content, class_names, where="the answer")


def as_json(descriptions: Descriptions, class_names: Sequence[str]) -> str:
    """The file that a dataset card names under `descriptions`."""
    return json.dumps(dict(zip(class_names, descriptions, strict=True)), indent=2, ensure_ascii=False) + "\n"

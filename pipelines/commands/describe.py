"""Describing: class names -> what to ask a language model for sentences, and its answer -> checked JSON.

The model is whichever the user likes; nothing is sent anywhere.
"""

import json
import re
from collections.abc import Sequence

from coop_core.data.descriptions import Descriptions, check_descriptions
from coop_core.errors import DatasetError

_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


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
        content = json.loads(body[start : end + 1])
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"the answer holds no whole JSON object ({error}): ask again for nothing but JSON") from None
    return check_descriptions(content, class_names, where="the answer")


def as_json(descriptions: Descriptions, class_names: Sequence[str]) -> str:
    """The file that a dataset card names under `descriptions`."""
    return json.dumps(dict(zip(class_names, descriptions, strict=True)), indent=2, ensure_ascii=False) + "\n"

"""params.yaml as text: read as DVC reads it, its faults as sentences, and changed without losing a comment."""

import difflib
import io
import itertools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

from coop_core.errors import ParamsError
from coop_core.params.run import Params

_SHOWN = 80
"""Characters of a wrong value that an error repeats."""


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read params.yaml as DVC does (YAML 1.2), so that 1e-3 is a number and no is a word.

    Raises
    ------
    ParamsError
        With every fault of the file in one message.
    """
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path} is missing: run in the project's folder, or restore it with git") from None
    except RecursionError:
        raise ParamsError(f"{path} is nested too deeply to be a file of parameters") from None
    except Exception as error:  # what does not fit its own tag, such as a 13th month, ends in errors of many kinds
        raise ParamsError(f"{path} is not readable YAML: {' '.join(str(error).split())[:300]}") from None
    return parse_params(tree, where=str(path))


def parse_params(tree: Any, *, where: str) -> Params:
    """A parsed tree -> Params; `where` names its origin in errors."""
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        faults = "; ".join(_sentence(fault) for fault in error.errors(include_url=False))
        raise ParamsError(f"{where}: {faults}") from None


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested parameters -> dotted names.

    >>> flat({"seed": 1, "train": {"epochs": 4}})
    {'seed': 1, 'train.epochs': 4}
    """
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def patch(text: str, values: dict[str, Any], *, path: str = "params.yaml") -> str:
    """A params file's text and new values by dotted name -> a unified diff that `git apply` understands.

    Comments, order and style stay as they are. A method that is given as a whole section replaces the former.
    """
    before, after = text.splitlines(True), changed(text, values, whole=("method",)).splitlines(True)
    return "".join(difflib.unified_diff(before, after, f"a/{path}", f"b/{path}"))


def changed(text: str, values: dict[str, Any], *, whole: Collection[str] = ()) -> str:
    """The text with new values by dotted name; comments, order and style stay as they are.

    A section in `whole` that is given as a mapping holds no other keys afterwards.
    """
    yaml = next((style for style in _styles() if _dumped(style, style.load(text)) == text), next(_styles()))
    tree = yaml.load(text)
    for section in whole:
        if isinstance(given := values.get(section), dict):
            for key in [key for key in tree.get(section, {}) if key not in given]:
                del tree[section][key]
    for name, value in values.items():
        for key, single in flat(value, f"{name}.").items() if isinstance(value, dict) else [(name, value)]:
            *sections, last = key.split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
            if last not in node or node[last] != single:  # what stays keeps its style
                node[last] = single
    return _dumped(yaml, tree)


def _styles() -> Iterator[YAML]:
    """Ways to write the same YAML: lists set in or not (as DVC does), null as a word or as nothing."""
    for (sequence, offset), null in itertools.product(((4, 2), (2, 0)), ("null", "")):
        yaml = YAML()
        yaml.preserve_quotes, yaml.width = True, 4096
        yaml.indent(mapping=2, sequence=sequence, offset=offset)
        yaml.Representer = type("Representer", (RoundTripRepresenter,), {})  # what is added to it stays with it
        yaml.representer.add_representer(
            type(None), lambda to, _, word=null: to.represent_scalar("tag:yaml.org,2002:null", word)
        )
        yield yaml


def _dumped(yaml: YAML, tree: Any) -> str:
    text = io.StringIO()
    yaml.dump(tree, text)
    return text.getvalue()


def _sentence(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"]) or "the file"
    if fault["type"] == "extra_forbidden":
        return f"{key} is not a known key (check its spelling and its section)"
    if fault["type"] == "missing":
        return f"{key} is missing"
    message = fault["msg"].removeprefix("Value error, ")
    given = "" if isinstance(fault["input"], dict | BaseModel) else f" (it is {_shown(fault['input'])})"
    return f"{key}: {message[0].lower()}{message[1:]}{given}"


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**30:  # Python itself refuses to write very long ones
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except RecursionError:
        return "nested too deeply"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

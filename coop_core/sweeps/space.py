"""Space: values by dotted parameter name -> the parameters of one run, and words for a table or a trial's name."""

from typing import Any

from coop_core.errors import ParamsError
from coop_core.methods import load_method, method_names
from coop_core.params import Params, flat, parse_params

Values = dict[str, Any]
"""By dotted parameter name, such as {"train.learning_rate": 0.02}; a value may be a section."""


def with_values(params: Params, values: Values) -> Params:
    """The parameters of a run without a few-shot curve, with these values.

    Raises
    ------
    ParamsError
        Naming what is no parameter, or the combination that is not valid.
    """
    tree = params.model_dump(exclude={"sweep"})
    tree["split"]["curve_shots"] = []
    for name, value in sorted(values.items(), key=lambda one: one[0] not in ("method", "method.name")):
        *sections, last = name.split(".")
        node: Any = tree
        for section in sections:
            node = node.get(section)
            if not isinstance(node, dict):
                raise _unknown(name)
        if name == "method.name":
            tree["method"] = _of_method(tree["method"], {"name": value})
        elif isinstance(node.get(last), dict):
            if not isinstance(value, dict):
                raise ParamsError(f"sweep.space: {name} is a section, but one of its values is {value!r}: "
                                  "write its entries (key: value)")  # fmt: skip
            node[last] = _of_method(node[last], value) if name == "method" else node[last] | value
        elif last not in node:
            raise _not_of_method(name, tree["method"]) if sections == ["method"] else _unknown(name)
        else:
            node[last] = value
    for test in tree["tests"].values():  # new classes of the data set that is learned on follow it
        if test["source"] == params.dataset.source:
            test["source"] = tree["dataset"]["source"]
    return parse_params(tree, where=f"sweep.space with {shown(values)}")


def short(name: str) -> str:
    """The last word, but a name stands for its section.

    >>> short("train.learning_rate"), short("method.name")
    ('learning_rate', 'method')
    """
    return (name.removesuffix(".name") if name.endswith(".name") else name).rpartition(".")[2]


def columns(values: Values) -> dict[str, str]:
    """A choice or task for a table: leaf names and shown values."""
    return {name: shown(value) for name, value in flat(values).items()}


def shown(value: Any) -> str:
    if isinstance(value, dict):
        named = [shown(value["name"])] if "name" in value else []                # a method's, in front
        rest = {name: one for name, one in flat(value).items() if name != "name"}
        return " ".join([*named, *(f"{short(name)} {shown(one)}" for name, one in rest.items())])
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _of_method(own: Values, value: Values) -> Values:
    """A method's section with these entries; of another method they have nothing in common but its defaults."""
    name = value.get("name", own["name"])
    if name == own["name"]:
        return own | value
    return (load_method(name).Params().model_dump() if name in method_names() else {}) | value


def _not_of_method(name: str, section: Values) -> ParamsError:
    return ParamsError(f"sweep.space: {name} is not a parameter of {section['name']}: to try several methods, list "
                       "whole sections, such as method: [{name: gda}, {name: coop, n_context: 4}]")  # fmt: skip


def _unknown(name: str) -> ParamsError:
    return ParamsError(f"sweep.space: {name} is not a parameter of params.yaml (check its spelling and its section)")

"""Grid: a recipe's protocol -> the sweeps that run it, one a data set and schedule."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coop_core.errors import ParamsError
from coop_core.files import digest_json
from coop_core.params import Params, parse_params
from coop_core.params.recipes import Protocol, ProtocolName, Recipe

NEW = "new"
"""The test set of new classes in base-to-new."""
_ACCEPT = ["duplicate-across-subsets", "duplicate-class-names"]
"""Published splits are taken as they are, with copies of images and with ImageNet's two pairs of equal names."""


@dataclass(frozen=True)
class Asked:
    """What of a recipe is to be run."""

    name: str
    recipe: Recipe
    protocol: ProtocolName
    variant: str | None
    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    datasets: tuple[str, ...]
    overrides: Mapping[str, Any]
    """By dotted name: what is not as the recipe has it."""

    @property
    def how(self) -> Protocol:
        return self.recipe.protocols[self.protocol]

    @property
    def own_backbone(self) -> str:
        """The recipe's, as `published/tables.csv` calls it."""
        return backbone_label(self.values(self.datasets[0], self.shots[0], overridden=False))

    @property
    def backbone(self) -> str:
        return backbone_label(self.values(self.datasets[0], self.shots[0]))

    def values(self, dataset: str, shots: int, *, overridden: bool = True) -> dict[str, Any]:
        """Sections and dotted names of params.yaml for one data set and number of shots."""
        found = self.recipe.values(shots=shots or None, variant=self.variant, dataset=dataset)
        return found | self.how.set | (dict(self.overrides) if overridden else {})


def ask(
    name: str,
    recipe: Recipe,
    *,
    protocol: str | None = None,
    variant: str | None = None,
    shots: Sequence[int] = (),
    seeds: Sequence[int] = (),
    datasets: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> Asked:
    """What is not given is as the recipe has it.

    Raises
    ------
    ParamsError
        For a protocol, a variant or a number of shots that the recipe does not have.
    """
    if not recipe.protocols:
        raise ParamsError(f"recipe {name} has no protocols, so it does not say what its paper ran: add them to it")
    chosen = next((one for one in recipe.protocols if protocol in (None, one)), None)
    if chosen is None:
        raise ParamsError(f"--protocol {protocol} is not in recipe {name}: it has {', '.join(recipe.protocols)}")
    how = recipe.protocols[chosen]
    for what, given in (("--shots", shots), ("--seeds", seeds), ("--datasets", datasets)):
        if len(set(given)) != len(given):
            raise ParamsError(f"{what} {' '.join(map(str, given))} names one twice")
    if how.shots == [0] and tuple(shots) not in ((), (0,)):
        raise ParamsError(f"--shots is not for recipe {name}, which learns nothing: leave it out")
    asked = Asked(name, recipe, chosen, variant, tuple(shots) or tuple(how.shots), tuple(seeds) or tuple(recipe.seeds),
                  tuple(datasets) or tuple(how.datasets), dict(overrides or {}))  # fmt: skip
    for dataset, count in itertools.product(asked.datasets, asked.shots):
        asked.values(dataset, count)
    return asked


def sweeps(asked: Asked, base: Params, *, dataset: str, sources: Mapping[str, str]) -> list[Params]:
    """The sweeps of one data set: of those shots together that are trained alike.

    `base` gives what the recipe does not say; `sources` the places of the data set and of the protocol's tests.

    Raises
    ------
    ParamsError
        When the recipe with its overrides is no valid setting.
    """
    groups: dict[str, list[int]] = {}
    for shots in asked.shots:
        alike = {key: value for key, value in asked.values(dataset, shots).items() if key != "split.shots"}
        groups.setdefault(digest_json(alike), []).append(shots)
    return [_sweep(asked, base, dataset=dataset, shots=shots, sources=sources) for shots in groups.values()]


def _sweep(
    asked: Asked, base: Params, *, dataset: str, shots: list[int], sources: Mapping[str, str]
) -> Params:  # fmt: skip
    tree = base.model_dump(exclude={"tests", "sweep"})
    tree["dataset"] = _place(sources[dataset], base)
    for name, value in asked.values(dataset, shots[0]).items():
        _put(tree, name, value)
    tree["backbone"].pop("files", None)  # follows from the backbone, which may be another
    tree["split"]["curve_shots"] = []
    tree["tests"] = {name: _place(sources[name], base) for name in asked.how.tests}
    if asked.protocol == "base-to-new":
        tree["tests"] = {NEW: {**_place(sources[dataset], base), "classes": "new",
                               "test_per_class": tree["split"]["test_per_class"]}}  # fmt: skip
    named = [count or tree["split"]["shots"] for count in shots]
    label = "-".join(filter(None, ["reproduce", asked.name, asked.protocol, asked.variant, dataset,
                                   *map(str, named)]))  # fmt: skip
    tree["sweep"] = {"name": label[:100], "space": {"split.shots": named}, "seeds": list(asked.seeds),
                     "max_failed": 1.0}
    return parse_params(tree, where=f"recipe {asked.name} on {dataset}")


def _place(source: str, base: Params) -> dict[str, Any]:
    return {"source": source, "test_fraction": base.dataset.test_fraction, "accept": _ACCEPT}


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set a section whole, or one value of it."""
    *sections, last = name.split(".")
    node = tree
    for section in sections:
        if not isinstance(node.get(section), dict):
            raise ParamsError(f"{name} is not a parameter of params.yaml (check its spelling and its section)")
        node = node[section]
    node[last] = dict(value) if isinstance(value, dict) else value


def backbone_label(values: Mapping[str, Any]) -> str:
    """`architecture (pretrained tag)` of a recipe's values."""
    section = dict(values.get("backbone", {}))
    section |= {key.removeprefix("backbone."): value for key, value in values.items() if key.startswith("backbone.")}
    tag = section.get("pretrained")
    return f"{section.get('architecture')} ({tag})" if tag else str(section.get("architecture"))

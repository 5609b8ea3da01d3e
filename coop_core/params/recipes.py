"""Recipes: a published setting by name -> params.yaml with that setting, as a diff to read."""

import difflib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML

from coop_core.errors import ParamsError
from coop_core.params.file import changed, load_params, parse_params

ProtocolName = Literal["few-shot", "base-to-new", "cross-dataset", "domain-generalisation", "zero-shot"]


class Protocol(BaseModel):
    """How a paper judges a setting: what `coop reproduce` runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    datasets: list[str] = Field(min_length=1)
    """Cards of the catalogue that are learned on."""
    shots: list[int] = Field(min_length=1)
    """0: nothing is learned."""
    tests: list[str] = []
    """Cards that are judged on besides, with what was learned."""
    average: str = ""
    """What the published mean over all `tests`, or else `datasets`, is called in `published/tables.csv`."""
    set: dict[str, Any] = {}
    """What this protocol changes in the recipe."""


class Recipe(BaseModel):
    """A setting as a paper or its released code has it, and in what a run of it here differs from theirs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    paper: str
    code: str
    """The files that the values were read from."""
    seeds: list[int] = Field(min_length=1)
    set: dict[str, Any]
    """Whole sections of params.yaml, or single parameters by dotted name."""
    by_shots: dict[int, dict[str, Any]] = {}
    """What changes with the number of shots."""
    variants: dict[str, dict[str, Any]] = {}
    """What the paper varies. One with the name of a dataset card is what the paper sets for that data set."""
    protocols: dict[ProtocolName, Protocol] = {}
    """The first is what `coop reproduce` takes where none is named."""
    differs: list[str] = Field(min_length=1)

    def values(
        self, *, shots: int | None = None, variant: str | None = None, dataset: str | None = None
    ) -> dict[str, Any]:
        """Sections and dotted names -> values, with `split.shots` where it is asked for, and with what the paper sets
        for a `dataset` by the name of its card.

        Raises
        ------
        ParamsError
            For a number of shots or a variant that the recipe does not have.
        """
        found = dict(self.set)
        for what, key, known in (("--shots", shots, self.by_shots), ("--variant", variant, self.variants)):
            if key is not None and key not in known and (what == "--variant" or known):
                raise ParamsError(f"{what} {key} is not in the recipe: it has {', '.join(map(str, known)) or 'none'}")
        if shots is not None:
            found |= self.by_shots.get(shots, {}) | {"split.shots": shots, "split.curve_shots": []}
        found |= self.variants.get(dataset or "", {})
        return found | (self.variants[variant] if variant is not None else {})


def recipe_names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_recipe(folder: Path, name: str) -> Recipe:
    """Raises ParamsError for a name that is not there and for a file that is no recipe."""
    path = folder / f"{name}.yaml"
    if name not in recipe_names(folder):
        raise ParamsError(f"no recipe {name!r}: there are {', '.join(recipe_names(folder)) or f'none in {folder}'}")
    try:
        return Recipe.model_validate(YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ParamsError(f"recipe {path}: {faults}") from None


def apply_recipe(path: Path, values: dict[str, Any]) -> tuple[str, str]:
    """A params file and a recipe's values -> (its new text, the unified diff to it); nothing is written.

    Raises
    ------
    ParamsError
        When the file is no valid one, before or with the recipe.
    """
    load_params(path)
    before = path.read_text(encoding="utf-8")
    after = changed(before, values, whole=("backbone", "method", "split", "train"))
    parse_params(YAML(typ="safe", pure=True).load(after), where=f"{path} with the recipe")
    lines = before.splitlines(True), after.splitlines(True)
    return after, "".join(difflib.unified_diff(*lines, f"a/{path}", f"b/{path}"))

"""Published figures: tables.csv and tolerances.csv -> typed rows, and the row that a result is held against.

Percent and points are as printed. Nothing here is measured by this project.
"""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from coop_core.errors import ParamsError
from coop_core.params.recipes import ProtocolName

Provenance = Literal["read", "quoted", "reconstructed"]
"""read: where its authors or users printed it; quoted: in a third party's table; reconstructed: from other figures."""


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any, info: Any) -> Any:
        """An empty cell is the field's default."""
        field = cls.model_fields[info.field_name]
        return field.default if value == "" and not field.is_required() else value


class Figure(_Row):
    """One printed number."""

    method: str = Field(min_length=1)
    recipe: str = ""
    """The file of `recipes/` that makes it; empty where none does."""
    variant: str = ""
    dataset: str = Field(min_length=1)
    """A card of the catalogue, or average-N over N of them."""
    protocol: ProtocolName
    shots: int = Field(ge=0)
    """0 where nothing is learned."""
    backbone: str = Field(min_length=1)
    """architecture (pretrained tag)."""
    setting: str = ""
    """What else tells it from a row of the same name."""
    metric: str = Field(min_length=1)
    value_percent: float = Field(ge=0, le=100)
    spread_percent: float | None = Field(default=None, ge=0)
    source: str = Field(min_length=1)
    provenance: Provenance


class Tolerance(_Row):
    """How far a result of a recipe may be from the published figure, in points; an empty cell fits everything."""

    recipe: str = Field(min_length=1)
    protocol: ProtocolName
    dataset: str = ""
    shots: int | None = None
    metric: str = ""
    points_below: float = Field(ge=0)
    points_above: float = Field(ge=0)
    reason: str = Field(min_length=1)

    def holds(self, difference: float) -> bool:
        """Of ours less the published one, in points."""
        return -self.points_below <= difference <= self.points_above


@dataclass(frozen=True)
class Cell:
    """What a result is of: everything that finds its published figure but the backbone."""

    recipe: str
    variant: str
    protocol: str
    dataset: str
    shots: int
    metric: str

    def matches(self, figure: Figure) -> bool:
        return self == Cell(figure.recipe, figure.variant, figure.protocol, figure.dataset, figure.shots, figure.metric)


@dataclass(frozen=True)
class Published:
    """All figures and tolerances."""

    figures: tuple[Figure, ...]
    tolerances: tuple[Tolerance, ...]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises ParamsError naming the file, the line and the column that is wrong."""
        return cls(_read(folder / "tables.csv", Figure), _read(folder / "tolerances.csv", Tolerance))

    def figure(self, cell: Cell, *, backbone: str) -> Figure | None:
        return next((one for one in self.figures if cell.matches(one) and one.backbone == backbone), None)

    def tolerance(self, cell: Cell) -> Tolerance | None:
        """The first that fits."""
        return next((one for one in self.tolerances if _fits(one, cell)), None)


def _fits(tolerance: Tolerance, cell: Cell) -> bool:
    asked = (cell.dataset, cell.shots, cell.metric)
    given = (tolerance.dataset or cell.dataset, cell.shots if tolerance.shots is None else tolerance.shots,
             tolerance.metric or cell.metric)  # fmt: skip
    return (tolerance.recipe, tolerance.protocol) == (cell.recipe, cell.protocol) and asked == given


_Kind = TypeVar("_Kind", bound=_Row)


def _read(path: Path, kind: type[_Kind]) -> tuple[_Kind, ...]:
    if not path.is_file():
        raise ParamsError(f"{path} is missing: restore it with git")
    lines: Iterable[dict[str, Any]] = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
    found = []
    for number, line in enumerate(lines, start=2):
        try:
            found.append(kind.model_validate(line))
        except ValidationError as error:
            fault = error.errors()[0]
            raise ParamsError(f"{path}, line {number}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None
    return tuple(found)

"""The sweep section: what `coop sweep` varies."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from coop_core.params.sections import Section


class Range(Section):
    """Numbers a search may draw; whole ones where the parameter is one."""

    low: Annotated[int, Field(ge=-(10**15), le=10**15)] | float
    high: Annotated[int, Field(ge=-(10**15), le=10**15)] | float
    log: bool = False
    """Drawn evenly on a logarithmic scale."""

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError(f"low {self.low} must be below high {self.high}" + ", and above 0 with log" * self.log)
        return self


class SweepParams(Section):
    """What `coop sweep` varies; `dvc repro` takes no notice."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    search: Literal["grid", "random", "tpe"] = "grid"
    """grid takes every combination; random draws; tpe draws near what went well (Bergstra et al. 2011, by Optuna)."""
    space: dict[str, Annotated[list[Any], Field(min_length=1)] | Range] = Field(min_length=1)
    """Values by dotted parameter name. A value may be a section, whose entries then change together; of `method` it may
    be another method's. Data set and split are tasks: whatever the search, every one of them is posed to every choice
    of the others."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(min_length=1)
    """Each choice is trained with every seed."""
    draws: int = Field(default=20, ge=1, le=10_000)
    """Choices that random and tpe draw."""
    max_failed: float = Field(default=0.2, ge=0, le=1)
    """Share of the trials that may fail before the sweep gives up."""

    @model_validator(mode="after")
    def _plain_values(self) -> "SweepParams":
        for name, values in self.space.items():
            if isinstance(values, list) and not _is_plain(values):
                raise ValueError(f"space.{name} holds something else than numbers, words, lists and sections "
                                 "(a date? write it in quotes)")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _possible(self) -> "SweepParams":
        ranges = [name for name, values in self.space.items() if isinstance(values, Range)]
        if self.search == "grid" and ranges:
            raise ValueError(f"grid needs lists, but {', '.join(ranges)} is a range: list values, or take random")
        if tasks := [name for name in ranges if poses_a_task(name)]:
            raise ValueError(f"{', '.join(tasks)} poses a task and needs a list of values, not a range")
        for name in self.space:
            if name.split(".")[0] in ("seed", "gate", "sweep"):
                raise ValueError(f"space cannot vary {name}" + ": list seeds in sweep.seeds" * (name == "seed"))
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} names a seed twice")
        return self


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    return value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def poses_a_task(name: str) -> bool:
    """Whether a parameter says what is to be recognised, rather than how."""
    return name.split(".")[0] in ("dataset", "split")

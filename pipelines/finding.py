"""Finding: what `coop doctor` says of one thing that the product needs."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    name: str
    """What was looked at, such as `registry write`."""
    state: Literal["well", "wrong", "unused"]
    """Unused is what the settings do not ask for, or what cannot be tried yet."""
    said: str
    """What was found; for what is wrong, with the way out. No secret."""


def well(name: str, said: str) -> Finding:
    return Finding(name, "well", said)


def wrong(name: str, said: str) -> Finding:
    return Finding(name, "wrong", said)


def unused(name: str, said: str) -> Finding:
    return Finding(name, "unused", said)

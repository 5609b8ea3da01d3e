"""Validation: listed images -> their digests, and every fault of the data set in one report."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from coop_core.dataset import Subset
from coop_core.errors import DatasetError
from coop_core.files import digest_file
from coop_core.images import read_image

SHOWN = 10
"""Examples a fault lists before it only counts."""


@dataclass(frozen=True)
class Sample:
    """One image as its source lists it."""

    file: Path
    label: int
    subset: Subset | None
    """None when the source does not say."""


@dataclass
class Findings:
    """What is wrong (faults), what was accepted or left out (notes)."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, problem: str, where: Collection[str], *, accepted: bool = False) -> None:
        """Record a problem with its places, if there are any."""
        if not where:
            return
        shown = sorted(where)[:SHOWN]
        more = f" and {len(where) - len(shown)} more" if len(where) > len(shown) else ""
        (self.notes if accepted else self.faults).append(f"{problem}: {', '.join(shown)}{more}")

    def raise_faults(self, name: str) -> None:
        if self.faults:
            count = f"{len(self.faults)} fault{'s' if len(self.faults) > 1 else ''}"
            raise DatasetError(f"data set {name} has {count}:" + "".join(f"\n  - {fault}" for fault in self.faults))


def check_classes(class_names: Sequence[str], findings: Findings, *, accept: Collection[str]) -> None:
    """Class names must differ: two equal ones are the same prompt, and only one can ever be answered."""
    seen = Counter(name.casefold() for name in class_names)
    findings.add(
        "class names stand twice (rename one, or accept duplicate-class-names)",
        [name for name, count in seen.items() if count > 1],
        accepted="duplicate-class-names" in accept,
    )
    findings.add("class names are empty", [repr(name) for name in class_names if not name.strip()])
    if len(class_names) < 2:
        findings.add("a classifier needs two classes or more, but these are all", [*class_names, "(end of list)"])


def check_files(
    samples: Sequence[Sample], findings: Findings, *, progress: Callable[[int, int], object] = lambda done, total: None
) -> list[str]:
    """Decode every image -> its SHA-256 ("" where it cannot be read); unreadable ones are a fault."""
    digests: list[str] = []
    unreadable: list[str] = []
    with ThreadPoolExecutor() as pool:
        for digest, error in pool.map(_decode, (sample.file for sample in samples)):
            digests.append(digest)
            if error:
                unreadable.append(error)
            progress(len(digests), len(samples))
    findings.add("images cannot be read (replace or remove them)", unreadable)
    return digests


def check_duplicates(
    samples: Sequence[Sample], digests: Sequence[str], subsets: Sequence[Subset], findings: Findings,
    *, accept: Collection[str],
) -> None:  # fmt: skip
    """The same bytes must not be both trained and tested on, nor carry two labels."""
    by_digest: dict[str, list[int]] = defaultdict(list)
    for position, digest in enumerate(digests):
        if digest:
            by_digest[digest].append(position)
    across, contradictory = [], []
    for positions in by_digest.values():
        if len(positions) > 1:
            names = " = ".join(_short(samples[position].file) for position in positions)
            if len({samples[position].label for position in positions}) > 1:
                contradictory.append(names)
            if len({subsets[position] for position in positions}) > 1:
                across.append(names)
    findings.add(
        "the same image is in more than one of train, val and test "
        "(remove one, or accept duplicate-across-subsets)",
        across,
        accepted="duplicate-across-subsets" in accept,
    )
    findings.add("the same image is in two classes", contradictory)


def check_counts(counts: dict[str, dict[str, int]], findings: Findings) -> None:
    """Every class needs images to train and to test on."""
    for subset in ("train", "test"):
        findings.add(
            f"classes have no {subset} image", [name for name, count in counts.items() if not count[subset]]
        )


def _decode(file: Path) -> tuple[str, str]:
    try:
        read_image(file)
        return digest_file(file), ""
    except DatasetError as error:
        return "", str(error).removeprefix("image ").removesuffix(": replace or remove it")


def _short(file: Path) -> str:
    return "/".join(file.parts[-2:])

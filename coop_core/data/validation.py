"""Validation: listed images -> their digests, and every fault of the data set in one report."""

import re
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from coop_core.data.catalog import Card
from coop_core.data.dataset import NO_LABEL, SUBSETS, Subset, shown, words
from coop_core.data.images import decoded
from coop_core.errors import DatasetError
from coop_core.files import digest_file

SHOWN = 10
"""Examples a fault lists before it only counts."""
TOKENIZER_SIGNS = (
    "<|startoftext|>", "<|endoftext|>", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "<s>", "</s>", "<pad>", "<mask>",
)  # fmt: skip
"""What tokenizers write for themselves, at the ends of a text and in its gaps; a prompt cannot hold it as words."""


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
    explained: set[int] = field(default_factory=set)
    """Labels that lost images to another fault; that they lack images is no fault of its own."""

    def add(self, problem: str, where: Collection[str], *, accepted: bool = False) -> None:
        """Record a problem with its places, if there are any."""
        if not where:
            return
        examples = sorted(where)[:SHOWN]
        more = f" and {len(where) - len(examples)} more" if len(where) > len(examples) else ""
        (self.notes if accepted else self.faults).append(f"{problem}: {', '.join(map(shown, examples))}{more}")

    def raise_faults(self, name: str) -> None:
        if self.faults:
            count = f"{len(self.faults)} fault{'s' if len(self.faults) > 1 else ''}"
            raise DatasetError(f"data set {name} has {count}:" + "".join(f"\n  - {fault}" for fault in self.faults))


def file_fault(path: Path) -> str:
    """Why a path cannot be opened as a file ("" when it can); a pipe would be waited for without end."""
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return "is a link that leads nowhere" if path.is_symlink() else "is missing"
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    except ValueError:
        return "has a name that no file can have"
    return "" if regular else "is no regular file"


def check_classes(class_names: Sequence[str], findings: Findings, *, accept: Collection[str]) -> None:
    """Class names must be words, and differ: two equal ones are the same prompt, and only one can be answered."""
    seen = Counter(name.casefold() for name in class_names)
    findings.add(
        "class names stand twice (rename one, or accept duplicate-class-names)",
        [name for name, count in seen.items() if count > 1],
        accepted="duplicate-class-names" in accept,
    )
    findings.add("class names are empty", [repr(name) for name in class_names if not name.strip()])
    findings.add(
        "class names hold a character that is no text (rename the class)",
        [name for name in class_names if shown(name) != name],
    )
    findings.add(
        "class names hold a tokenizer's own sign (rename the class)",
        [name for name in class_names if any(sign in name or sign in name.lower() for sign in TOKENIZER_SIGNS)],
    )
    if len(class_names) == 1 and not findings.explained:
        findings.add("a classifier needs two classes or more, but there is only one", class_names)


def check_files(
    samples: Sequence[Sample], findings: Findings, *, progress: Callable[[int, int], object] = lambda done, total: None
) -> list[str]:
    """Decode every image -> its SHA-256 ("" where it cannot be read); unreadable ones are a fault."""
    digests: list[str] = []
    unreadable: list[str] = []
    remarks: dict[str, list[str]] = defaultdict(list)
    with ThreadPoolExecutor() as pool:
        for sample, (digest, error, notes) in zip(
            samples, pool.map(_decode, (sample.file for sample in samples)), strict=True
        ):
            digests.append(digest)
            if error:
                unreadable.append(error)
            for note in notes:
                remarks[note].append(_short(sample.file))
            progress(len(digests), len(samples))
    findings.add("images cannot be read (replace or remove them)", unreadable)
    for note, files in remarks.items():
        findings.add(f"in {len(files)} image{'s' if len(files) > 1 else ''}, {note}", files, accepted=True)
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
            if len({samples[position].label for position in positions} - {NO_LABEL}) > 1:
                contradictory.append(names)
            elif len({subsets[position] for position in positions}) > 1:
                across.append(names)
    findings.add(
        "the same image is in more than one of train, val and test "
        "(remove one, or accept duplicate-across-subsets)",
        across,
        accepted="duplicate-across-subsets" in accept,
    )
    findings.add("the same image is in two classes", contradictory)


def check_counts(
    counts: dict[str, dict[str, int]], findings: Findings, *, trains: bool = True, tests: bool = True
) -> None:
    """Every class needs images to train and to test on, as far as the data set is for that; `counts` is in label
    order."""
    judged = {name: count for label, (name, count) in enumerate(counts.items()) if label not in findings.explained}
    findings.add("classes have no image", [name for name, count in judged.items() if not any(count.values())])
    for subset in ["train"] * trains + ["test"] * tests:
        findings.add(
            f"classes have no {subset} image (each needs one to train on and another to test on)",
            [name for name, count in judged.items() if any(count.values()) and not count[subset]],
        )


def check_published(card: Card, class_names: Sequence[str], subsets: Sequence[Subset], findings: Findings) -> None:
    """What was found must be what its authors published, where the card says that; one fault names all differences."""
    wanted = card.published
    if wanted is None or findings.faults:
        return
    found = Counter(subsets)
    counts = [("classes", len(class_names), wanted.number),
              *((subset, found[subset], getattr(wanted, subset)) for subset in SUBSETS)]  # fmt: skip
    wrong = [f"{what} {has}, published {should}" for what, has, should in counts if should not in (None, has)]
    wrong += [f"{name} has no words" for name in class_names if re.fullmatch(r"n\d{8}", name)][:3]
    if not wrong and isinstance(wanted.classes, list):
        wrong = [f"class {label} is {name!r}, published {words(should)!r}"
                 for label, (name, should) in enumerate(zip(class_names, wanted.classes, strict=True))
                 if name != words(should)][:3]  # fmt: skip
    if wrong:
        findings.faults.append(f"this is not the published {card.title or card.name} ({'; '.join(wrong)}): complete "
                               "it, or take `published` out of the card")  # fmt: skip


def _decode(file: Path) -> tuple[str, str, tuple[str, ...]]:
    """-> (digest, why it cannot be read, what was done to it that a person might not expect)."""
    if fault := file_fault(file):                            # asked here, as `decoded` would take slices of arrays too
        return "", f"{file} {fault}", ()
    try:
        with decoded(file) as found:
            notes = found.notes
        return digest_file(file), "", notes
    except DatasetError as error:
        return "", str(error).removeprefix("image ").removesuffix(": replace or remove it"), ()
    except OSError as error:
        return "", f"{file} cannot be read ({error.strerror})", ()


def _short(file: Path) -> str:
    return "/".join(file.parts[-2:])

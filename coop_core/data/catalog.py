"""Dataset cards: a YAML card, a folder or a CSV file -> what the data set is and how to read it."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticSerializationError
from ruamel.yaml import YAML

from coop_core.data.archives import MAX_BYTES
from coop_core.data.dataset import Subset, has_one_hole, shown, words
from coop_core.errors import DatasetError

Layout = Literal["folders", "csv", "split-json", "lists", "idx", "unlabelled"]
"""unlabelled: all images below `path`, without labels; `class_names` lists what they may show, and nothing judges."""
GENERIC_TEMPLATE = "a photo of a {}."


class CardFile(BaseModel):
    """A file the card needs and where it may come from; the first source with the right bytes wins."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[\w][\w.+-]*$", max_length=100)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    sources: list[str] = Field(min_length=1)
    """https://..., s3://bucket/key, debian:PACKAGE/path/inside, or a path beside the card."""
    unpack: bool = False
    """Extract the archive (zip or tar) instead of keeping it as it is."""
    max_bytes: int = Field(MAX_BYTES, gt=0)
    """A source that has more is not read further."""

    @property
    def unpacked_name(self) -> str:
        """The folder for the archive's content: images.zip and images.tar.gz -> images."""
        return Path(self.name).stem.removesuffix(".tar")


class PublishedCounts(BaseModel):
    """What the published data set has: another tree is not that data set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    classes: int | list[str]
    """How many, or their names in label order."""
    train: int | None = None
    val: int | None = None
    test: int | None = None

    @property
    def number(self) -> int:
        return self.classes if isinstance(self.classes, int) else len(self.classes)


class Card(BaseModel):
    """What a data set is, in one file a person can review."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    title: str = ""
    licence: str = "not stated"
    homepage: str = ""
    layout: Layout = "folders"
    path: str = "."
    """Where the images are: below the fetched files when there are any, else relative to the card."""
    index: str = ""
    """The CSV or split JSON that lists the images, relative to `path`'s root; of layout lists, their common name with a
    * for train, val and test."""
    subsets: dict[str, Subset] = {}
    """What a folder train, val or test is for, where its source means something else; `*`: what all images are for."""
    unlabelled: str = ""
    """A folder of images without labels to learn from, relative as `path` is; those of `path` then judge only."""
    class_names: dict[str, str] | list[str] | str | None = None
    """Words for class folders {folder: words}, or all class names in label order; or the file beside the card that
    holds one of them: a line a class, `wnid words` or `words`."""
    template: str = GENERIC_TEMPLATE
    published: PublishedCounts | None = None
    """What must be found; a data set of one's own leaves it out."""
    descriptions: dict[str, list[str]] | str | None = None
    """Sentences a class, {class name: [sentence, ...]}, or the JSON file beside the card that holds them."""
    files: list[CardFile] = []

    @field_validator("template")
    @classmethod
    def _one_hole(cls, template: str) -> str:
        if not has_one_hole(template):
            raise ValueError("needs exactly one {} for the class name")
        return template

    @model_validator(mode="after")
    def _names_of_what_has_no_folders(self) -> Self:
        if self.layout == "unlabelled" and isinstance(self.class_names, dict | None):
            raise ValueError("layout unlabelled has no class folders: list the names of all classes in class_names")
        if self.layout == "unlabelled" and self.unlabelled:
            raise ValueError("layout unlabelled reads the images at path: leave unlabelled out")
        return self

    @model_validator(mode="after")
    def _files_keep_apart(self) -> Self:
        """No file takes the place of another, nor of the note that says which archive was unpacked."""
        archives = [file for file in self.files if file.unpack]
        kept = [file.name for file in self.files] + [f"{file.name}.unpacked" for file in archives]
        for what, names in (("file", kept), ("unpacked folder", [file.unpacked_name for file in archives])):
            if twice := [name for name, times in Counter(names).items() if times > 1]:
                raise ValueError(f"files: two of them would become the {what} {', '.join(twice)}: rename one")
        return self

    def class_words(self, class_folder: str) -> str:
        """The words for one class folder."""
        if isinstance(self.class_names, dict):
            return words(self.class_names.get(class_folder, class_folder))
        return words(class_folder)


def read_source(source: Path) -> tuple[Card, Path]:
    """What `dataset.source` names -> (its card, the folder that relative paths start from).

    A folder or a CSV file needs no card: the generic template and the folders' own names are taken.

    Raises
    ------
    DatasetError
        When there is nothing there, or a card is not valid; all faults of a card at once.
    """
    if source.is_dir():
        splits = sorted(source.glob("split_zhou_*.json"))
        if len(splits) > 1:
            raise DatasetError(f"{source} has {len(splits)} split_zhou_*.json files: name one in a dataset card")
        index, layout = (splits[0].name, "split-json") if splits else ("", "folders")
        return Card(name=_plain_name(source), layout=layout, index=index), source
    suffix = source.suffix.lower()
    if suffix == ".csv" and source.is_file():
        return Card(name=_plain_name(source.parent), layout="csv", index=source.name), source.parent
    if suffix in {".yaml", ".yml"} and source.is_file():
        return _read_card(source), source.parent
    if not source.exists():
        kind = "does not exist"
    else:
        kind = "has no suffix .yaml or .csv" if source.is_file() else "is neither a folder nor a regular file"
    raise DatasetError(
        f"dataset.source {source} {kind}: name a dataset card (.yaml), a folder of class folders or a CSV file"
    )


def read_class_names(path: Path) -> dict[str, str] | list[str]:
    """A file of class names: lines `n01440764 tench` -> {wnid: words}, by line number from 0 too, as ImageNet-V2 calls
    its folders; any other lines -> names in label order.

    Raises
    ------
    DatasetError
        When the file is missing or empty, or is of both kinds.
    """
    if not path.is_file():
        raise DatasetError(f"{path} with the class names is missing: put it there, or correct the card's class_names")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    named = [match for line in lines if (match := re.fullmatch(r"(n\d{8})\s+(\S.*)", line))]
    if not lines or (named and len(named) < len(lines)):
        raise DatasetError(f"{path} is no list of class names: expected a line a class, each `wnid words` or each "
                           "`words`")  # fmt: skip
    if not named:
        return lines
    found = {match[1]: match[2] for match in named}
    return found | {str(number): match[2] for number, match in enumerate(named)}


def class_labels(card: Card, class_folders: Iterable[str]) -> tuple[dict[str, int], list[str], list[str]]:
    """({class folder: label}, class names in label order, folders that are missing in the card's list of them).

    The order is the card's list, else the alphabet. Composed and decomposed Unicode, as Linux and macOS write file
    names, are one folder.

    >>> class_labels(Card(name="animals", class_names={"n1": "tench"}), ["n2", "n1"])
    ({'n2': 1, 'n1': 0}, ['tench', 'n2'], [])
    """
    composed = {folder: unicodedata.normalize("NFC", folder) for folder in class_folders}
    folders = sorted(set(composed.values()))
    name_of = {folder: card.class_words(folder) for folder in folders}
    if not isinstance(card.class_names, list):
        label_of = {folder: label for label, folder in enumerate(folders)}
        return {folder: label_of[key] for folder, key in composed.items()}, list(name_of.values()), []
    names = [words(name) for name in card.class_names]
    unknown = [folder for folder in folders if name_of[folder] not in names]
    names += [name_of[folder] for folder in unknown]
    return {folder: names.index(name_of[key]) for folder, key in composed.items()}, names, unknown


def _read_card(path: Path) -> Card:
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))  # deep nesting crashes the C one
    except Exception as error:  # the parser lets out ValueError, KeyError, IndexError, RecursionError beside its own
        if isinstance(error, OSError):
            raise
        reason = shown(" ".join(str(error).split())) or type(error).__name__
        raise DatasetError(f"dataset card {path} is not readable YAML: {reason}") from None
    try:
        card = Card.model_validate(content)
        card.model_dump_json()
        return card
    except PydanticSerializationError:
        raise DatasetError(f"dataset card {path} has half a character, such as \\ud800: write the whole one") from None
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors())
        raise DatasetError(f"dataset card {path}: {shown(faults)}") from None


def _plain_name(folder: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name).strip(".-") or "images"

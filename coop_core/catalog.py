"""Dataset cards: a YAML card, a folder or a CSV file -> what the data set is and how to read it."""

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from coop_core.dataset import has_one_hole, words
from coop_core.errors import DatasetError

Layout = Literal["folders", "csv", "split-json", "idx"]
GENERIC_TEMPLATE = "a photo of a {}."


class CardFile(BaseModel):
    """A file the card needs and where it may come from; the first source with the right bytes wins."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[\w][\w.+-]*$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    sources: list[str] = Field(min_length=1)
    """https://..., s3://bucket/key, debian:PACKAGE/path/inside, or a path beside the card."""
    unpack: bool = False
    """Extract the archive (zip or tar) instead of keeping it as it is."""


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
    """The CSV or split JSON that lists the images, relative to `path`'s root."""
    class_names: dict[str, str] | list[str] | None = None
    """Words for class folders {folder: words}, or all class names in label order."""
    template: str = GENERIC_TEMPLATE
    files: list[CardFile] = []

    @field_validator("template")
    @classmethod
    def _one_hole(cls, template: str) -> str:
        if not has_one_hole(template):
            raise ValueError("needs exactly one {} for the class name")
        return template

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
    if source.suffix == ".csv" and source.is_file():
        return Card(name=_plain_name(source.parent), layout="csv", index=source.name), source.parent
    if source.suffix in {".yaml", ".yml"} and source.is_file():
        return _read_card(source), source.parent
    kind = "has no suffix .yaml or .csv" if source.exists() else "does not exist"
    raise DatasetError(
        f"dataset.source {source} {kind}: name a dataset card (.yaml), a folder of class folders or a CSV file"
    )


def _read_card(path: Path) -> Card:
    try:
        return Card.model_validate(YAML(typ="safe").load(path.read_text(encoding="utf-8")))
    except (YAMLError, UnicodeDecodeError) as error:
        raise DatasetError(f"dataset card {path} is not readable YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors())
        raise DatasetError(f"dataset card {path}: {faults}") from None


def _plain_name(folder: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name).strip(".-") or "images"

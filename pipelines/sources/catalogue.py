"""Catalogue: the name of a data set and a folder with data sets -> what `dataset.source` names there, or why not.

A folder that was laid out for the papers' own code (`oxford_flowers/`, `caltech-101/`, ...) holds no cards; those of
the catalogue then say what is in it.
"""

from pathlib import Path

from ruamel.yaml import YAML

from coop_core.data.catalog import Card, read_source
from coop_core.errors import DatasetError
from coop_core.files import write_json
from pipelines import paths

_CATALOG = Path("catalog")
"""Where the cards are kept, for a clone that has not imported them yet."""


def source_of(name: str, folder: Path, *, cards: Path) -> Path:
    """A card, a folder with its images, or nothing that can be used.

    `cards` is where a card is written that the catalogue has and `folder` lacks.

    Raises
    ------
    DatasetError
        When the images are not here, with where they belong.
    """
    own = folder / f"{name}.yaml"
    if own.is_file():
        card, beside = read_source(own)
        _require_images(name, card, beside, own)
        return own
    known = _known(name)
    if known is not None:
        card, _ = read_source(known)
        if card.path != "." and (folder / card.path).is_dir():
            return _placed(known, folder, cards)
    if (folder / name).is_dir():
        return folder / name
    if known is None:
        raise DatasetError(f"{name} is not in {folder} and has no card in the catalogue: put {name}.yaml or {name}/ "
                           "with a folder a class there")  # fmt: skip
    raise DatasetError(f"{name} needs its images in {folder / read_source(known)[0].path}: {known} says where they are "
                       "from and what must be there")  # fmt: skip


def _known(name: str) -> Path | None:
    return next((path for folder in (paths.SOURCE, _CATALOG) if (path := folder / f"{name}.yaml").is_file()), None)


def _require_images(name: str, card: Card, beside: Path, path: Path) -> None:
    if not card.files and not (beside / card.path).is_dir():
        raise DatasetError(f"{name} needs its images in {beside / card.path}: {path} says where they are from and what "
                           "must be there")  # fmt: skip


def _placed(known: Path, folder: Path, cards: Path) -> Path:
    """The catalogue's card with the places of its files written out, so that it may stand anywhere."""
    tree = YAML(typ="safe", pure=True).load(known.read_text(encoding="utf-8"))
    tree["path"] = str((folder / tree["path"]).resolve())
    for field in ("descriptions", "class_names"):
        if isinstance(tree.get(field), str):
            beside = (folder / tree[field], known.parent / tree[field])
            tree[field] = str(next((path for path in beside if path.is_file()), beside[1]).resolve())
    target = cards / known.name
    write_json(target, tree)  # which is YAML too
    return target

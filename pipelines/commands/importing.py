"""`coop import`: another program's checkpoint -> an artefact in our own form and, if asked, a registered version."""

from pathlib import Path
from typing import cast, get_args

import typer

from coop_core.backbone import load_backbone
from coop_core.errors import ArtifactError
from coop_core.exchange.dassl import read_checkpoint
from coop_core.exchange.imported import import_checkpoint
from coop_core.prompts.layout import Position
from pipelines.revision import code_revision


def run_import(
    checkpoint: Path,
    folder: Path,
    *,
    architecture: str,
    pretrained: str | None,
    classes: str,
    position: str,
    register: str,
) -> None:
    if position not in get_args(Position):
        raise ArtifactError(f"--position {position!r} is unknown: {', '.join(get_args(Position))}")
    names, found = class_names(classes), read_checkpoint(checkpoint)
    backbone = load_backbone(architecture, pretrained)
    card = import_checkpoint(found, folder, backbone=backbone, class_names=names,
                             position=cast(Position, position), code_revision=code_revision())  # fmt: skip
    told = card["imported"]
    typer.echo(f"imported    {found.method}, {tuple(found.context.shape)} context vectors in {found.precision}\n"
               f"class names {told['class_names']}\n"
               f"unknown     {', '.join(told['unknown'])}\n"
               f"predict     coop predict --model {folder} IMAGE...")  # fmt: skip
    if register:
        from pipelines.records.imported import register_import
        from pipelines.records.server import open_records

        number = register_import(folder, register, open_records())
        typer.echo(f"registered  {register} version {number}, alias candidate; the gate cannot pass it yet, because no "
                   "answers to test images are on record for it")  # fmt: skip


def class_names(told: str) -> list[str]:
    """`cat, dog`, or a file of one name a line."""
    try:
        text = Path(told).read_text(encoding="utf-8") if Path(told).is_file() else told.replace(",", "\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ArtifactError(f"--classes {told[:100]} cannot be read ({reason}): give names, or a file of one a "
                            "line") from None  # fmt: skip
    return [line.strip() for line in text.splitlines() if line.strip()]

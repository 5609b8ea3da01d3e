"""What people type to take a prompt out of the product, or one of others in; nothing heavy yet."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.beginning import DEFAULT_MODEL, asks_mlflow, reachable


def export(
    model: Annotated[
        str,
        typer.Argument(callback=reachable,
                       help="An artefact's folder, or NAME@ALIAS or NAME/VERSION in the registry."),
    ] = DEFAULT_MODEL,
    to: Annotated[Path, typer.Option(help="The folder to write; an earlier export there is replaced.")] = Path(
        "artifacts/export"
    ),
    images: Annotated[
        list[str] | None,
        typer.Option(help="Image files or folders to check it on; else the report's samples, else test images."),
    ] = None,
    only: Annotated[str, typer.Option(help="`weights`: the class weights alone, without the image tower.")] = "",
) -> None:
    """Write a prompt as ONNX and OpenVINO models that answer without this product, checked on real images."""
    from pipelines.commands.exporting import run_export

    run_export(model, to, images=images or [], only=only)


def import_(
    checkpoint: Annotated[Path, typer.Argument(help="CoOp's or CoCoOp's `model.pth.tar-N`.")],
    backbone: Annotated[str, typer.Option(help="The architecture it was learned on, such as ViT-B-16-quickgelu.")],
    classes: Annotated[str, typer.Option(help="Its class names in order, comma-separated, or a file of one a line.")],
    pretrained: Annotated[str, typer.Option(help="The weights' tag, such as openai, or a checkpoint file.")] = "",
    position: Annotated[str, typer.Option(help="Where the class name stands: end, middle or front.")] = "end",
    to: Annotated[Path, typer.Option(help="The folder to write; an earlier import there is replaced.")] = Path(
        "artifacts/imported"
    ),
    register: Annotated[
        str, typer.Option(callback=asks_mlflow, help="Register it under this name, with the alias candidate.")
    ] = "",
) -> None:
    """Make an artefact of a published CoOp or CoCoOp checkpoint; nothing in the checkpoint is run."""
    from pipelines.commands.importing import run_import

    run_import(checkpoint, to, architecture=backbone, pretrained=pretrained or None, classes=classes,
               position=position, register=register)  # fmt: skip

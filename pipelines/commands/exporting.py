"""`coop export`: an artefact or registered version -> a folder for programs without this product."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import typer

from coop_core.artifact import read_artifact
from coop_core.conversion import require_packages
from coop_core.data.split import read_split
from coop_core.errors import ArtifactError
from coop_core.exchange.exported import Exported, export_model, export_weights
from pipelines import paths
from pipelines.commands.predict import find_artifact, image_files
from pipelines.settings import load_settings

ENOUGH = 32
"""Images that are checked at most, unless they are given."""


def run_export(model: str, folder: Path, *, images: Sequence[str], only: str) -> None:
    if only not in ("", "weights"):
        raise ArtifactError(f"--only {only!r} is unknown: `weights` writes the class weights alone")
    if not only:
        require_packages()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as workspace:
        artifact = read_artifact(find_artifact(model, load_settings(), Path(workspace)))
    asked = image_files(images).files if images else real_images()
    write = export_weights if only else export_model
    found = write(artifact, artifact.load_backbone(), folder, images=asked)
    typer.echo(said(found, folder, seconds=time.perf_counter() - begin))


def real_images() -> list[Path]:
    """The report's samples, or test images of the project; none where there are neither."""
    if paths.SAMPLES.is_dir():
        return image_files([str(paths.SAMPLES)]).files[:ENOUGH]
    if not paths.SPLIT.exists():
        return []
    test = read_split(paths.SPLIT).test
    return [paths.RAW / image.path for image in test[:: -(-len(test) // ENOUGH)]]


def said(found: Exported, folder: Path, *, seconds: float) -> str:
    lines = [f"{size / 1e6:10.3f} MB  {folder / name}" for name, size in found.files.items()]
    differences = ", ".join(f"{name} within {difference:.0e}" for name, difference in found.differences.items())
    return "\n".join([*lines, f"checked on {found.images} images against the artefact: the same answers, "
                      f"probabilities by {differences}", f"{seconds:.0f} s"])  # fmt: skip

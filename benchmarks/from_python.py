"""From Python: what PromptClassifier learns of the images that the stages train on, against what the stages learn.

    python benchmarks/from_python.py FOLDER... --methods gda coop --shots 16

Each folder of class folders goes through the stages download, split, features and train in a project of its own, with
half of each class held out. Then its images, as train/ and test/, are given to `fit`, and the artefacts' tensors are
compared by digest. `all` is the test accuracy with every training image, and no shots asked for.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from coop_core import PromptClassifier
from coop_core.artifact import read_artifact
from coop_core.data.dataset import Dataset, read_dataset
from coop_core.files import write_text
from coop_core.params.file import changed
from pipelines import paths

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("download", "split", "features", "train")
PATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--methods", nargs="+", default=["gda", "coop"])
    parser.add_argument("--shots", type=int, default=16)
    arguments = parser.parse_args()
    table = Table("data set", "method", "equal tensors", "test accuracy", "fit (s)", "stages (s)", "all", "fit (s)")
    for folder in arguments.folders:
        for method in arguments.methods:
            with tempfile.TemporaryDirectory() as place:
                table.add_row(folder.name, method, *compare(folder.resolve(), method, arguments.shots, Path(place)))
    Console(width=110).print(table)


def compare(folder: Path, method: str, shots: int, project: Path) -> list[str]:
    started = time.monotonic()
    run_stages(folder, method, shots, project)
    stages = time.monotonic() - started
    theirs = read_artifact(project / paths.PROMPT).card["digests"]
    images = lay_out(read_dataset(project / paths.RAW), project / "given")
    started = time.monotonic()
    ours = PromptClassifier(method, shots=shots, device="cpu").fit(images)
    seconds = time.monotonic() - started
    equal = [name for name in theirs if name != "card" and ours.artifact_.card["digests"].get(name) == theirs[name]]
    started = time.monotonic()
    whole = PromptClassifier(method, device="cpu").fit(images)
    all_seconds = time.monotonic() - started
    return [", ".join(equal) or "none", f"{ours.score(images):.3f}", f"{seconds:.1f}", f"{stages:.1f}",
            f"{whole.score(images):.3f}", f"{all_seconds:.1f}"]  # fmt: skip


def run_stages(folder: Path, method: str, shots: int, project: Path) -> None:
    values = {"dataset.source": str(folder), "split.shots": shots, "split.curve_shots": [],
              "split.test_per_class": None, "method": {"name": method}}  # fmt: skip
    write_text(project / paths.PARAMS, changed((ROOT / paths.PARAMS).read_text(), values, whole=["method"]))
    for stage in STAGES:
        subprocess.run([sys.executable, "-m", "pipelines.stages", stage], cwd=project, check=True, capture_output=True,
                       env={**os.environ, "COOP_DEVICE": "cpu", "PYTHONPATH": PATH})  # fmt: skip


def lay_out(dataset: Dataset, folder: Path) -> Path:
    """train/ and test/ with class folders inside, of links."""
    for number, image in enumerate(dataset.images):
        file = (dataset.root / image.path).resolve()
        link = folder / image.subset / dataset.class_names[image.label] / f"{number}{file.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    return folder


if __name__ == "__main__":
    main()

"""The watch's alarms, counted: images like the test images, and others -> how often `coop watch` would raise one.

    python benchmarks/watching.py CLOTHING --other CLOTHING-GREYSCALE
    ... --draws 20 --sizes 50 200 500 --set method.name=coop --json FILE

One champion is trained on the few shots of a data set, of which four fifths are test images. Each draw takes 300 of
them at random for what the champion carries, and what it is sent from the others, so that no image is on both sides.
Then it is sent as many images of the other set. The limits are those of params.yaml. Last stands what recording costs.
"""

import argparse
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import changed
from methods import features
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from coop_core.answering import Answerer, answer_with
from coop_core.data.split import SplitImage, few_shot_split
from coop_core.features.examples import CachedFeatures
from coop_core.files import write_json
from coop_core.judging.drift import compare
from coop_core.judging.seen import Seen, seen_of
from coop_core.params import DatasetParams, parse_params
from coop_core.predictor import Prediction
from coop_core.preparing import prepare
from coop_core.training import fit
from pipelines import paths
from pipelines.serving.metrics import Metrics
from pipelines.serving.recorder import Recorder
from pipelines.serving.versions import Version
from pipelines.settings import choose_device, load_settings
from pipelines.sources.datasets import bring_dataset

REFERENCE = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="card, folder or CSV of what the champion learns")
    parser.add_argument("--other", required=True, help="the same of what it did not")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 200, 500])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="change a parameter")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    tree = changed(YAML(typ="safe").load(paths.PARAMS.read_text()), given.set)
    same, other = sent_images(tree | {"sweep": None, "tests": {}}, given.source, given.other)
    limits = parse_params(tree, where="params.yaml with --set").watch.limits()
    found: list[dict[str, Any]] = []
    for size in given.sizes:
        for draw in range(given.draws):
            random = np.random.default_rng(draw)
            rows = random.permutation(len(same))
            reference, left = same.rows(rows[:REFERENCE]), same.rows(rows[REFERENCE : REFERENCE + size])
            others = other.rows(random.permutation(len(other))[:size])
            for kind, sent in (("same", left), ("other", others)):
                drift = compare(reference, sent, limits, random=random)
                found.append({"kind": kind, "size": size, "draw": draw, **drift.as_dict()})
        show([one for one in found if one["size"] == size], size)
    Console(width=120).print(recording())
    if given.json:
        write_json(given.json, found)


def recording(*, answers: int = 300, size: int = 400_000) -> str:
    """What an answer waits for its record, and what one thread writes, for photographs of 400 kB."""
    said = Prediction(("a", "b"), (0.75, 0.25), 0.5, np.full(1280, 0.02, np.float16))
    pictures, waits = [np.random.default_rng(i).bytes(size) for i in range(answers)], []
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        recorder = Recorder(Path(folder), Metrics(), megabytes=64, pictures=False)
        for picture in pictures:
            started = time.perf_counter()
            recorder.put(Version("1", "run", None), picture, said)                # type: ignore[arg-type]
            waits.append(time.perf_counter() - started)
        recorder.close()
        seconds = time.perf_counter() - begin
        kept = sum(file.stat().st_size for file in Path(folder).iterdir())
    longest, usual = 1000 * max(waits), 1000 * statistics.median(waits)
    return (f"recording: an answer waits {usual:.2f} ms ({longest:.1f} ms at most), "
            f"{answers / seconds:.0f} a second are written, {kept / answers / 1000:.1f} kB each")  # fmt: skip


def sent_images(tree: dict[str, Any], source: str, other: str) -> tuple[Seen, Seen]:
    """What a champion that learned from one data set sees of its test images, and of all images of the other set."""
    params, settings = parse_params(tree, where="params.yaml with --set"), load_settings()
    backbone = params.backbone.load(device=choose_device(settings))
    store = settings.cache_folder / paths.FEATURE_STORE
    with tempfile.TemporaryDirectory() as folder:
        learned, unknown = (
            bring_dataset(DatasetParams(source=place, test_fraction=0.8), Path(folder) / name, settings)
            for place, name in ((source, "learned"), (other, "other"))
        )
        split = few_shot_split(learned, shots=params.split.shots, seed=params.seed)
        images = tuple(SplitImage(image.path, image.label, image.digest) for image in unknown.images)
        train, val, test, others = (
            features(backbone, dataset, its, params, store, views=views)
            for dataset, its, views in ((learned, split.train, params.features.views), (learned, split.val, 1),
                                        (learned, split.test, 1), (unknown, images, 1))
        )  # fmt: skip
    examples, validation = (CachedFeatures.of(its, found, device=backbone.device)
                            for its, found in ((split.train, train), (split.val, val)))  # fmt: skip
    training = prepare(params, split=split, backbone=backbone, examples=examples, validation=validation)
    fit(training)
    answerer = answer_with(training.learner, class_names=split.class_names)
    return seen_by(answerer, test, split.test), seen_by(answerer, others, images)


def seen_by(answerer: Answerer, its: np.ndarray, images: tuple[SplitImage, ...]) -> Seen:
    probabilities, own = answerer.with_features(torch.from_numpy(np.array(its[:, 0])))
    digests = [image.digest for image in images]
    return seen_of(own, probabilities, digests, class_names=answerer.class_names, threshold=answerer.threshold)


def show(rows: list[dict[str, Any]], size: int) -> None:
    """Of each kind: alarms, which signs were raised how often, and each sign's values, the least to the greatest."""
    table = Table(title=f"{size} images sent, or all there are")
    for column in ("sent", "images", "alarms", *(sign["name"] for sign in rows[0]["signs"])):
        table.add_column(column, justify="right")
    for kind in ("same", "other"):
        own = [row for row in rows if row["kind"] == kind]
        raised = Counter(name for row in own for name in row["raised"])
        cells = []
        for number, sign in enumerate(own[0]["signs"]):
            values = [row["signs"][number]["value"] for row in own]
            cells.append(f"{raised[sign['name']]} ({min(values):.2f} to {max(values):.2f})")
        alarms = sum(bool(row["raised"]) for row in own)
        table.add_row(kind, str(own[0]["images"]), f"{alarms} of {len(own)}", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

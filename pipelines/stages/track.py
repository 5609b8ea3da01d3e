"""track: the finished run -> MLflow and its registry, and the table that ends a run.

The only stage that talks to a service. When it does not answer, everything before is done and kept.
"""

import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coop_core.artifact import read_artifact, write_card
from coop_core.data.dataset import NO_LABEL, read_dataset
from coop_core.data.split import Split, SplitImage, read_split
from coop_core.errors import ArtifactError
from coop_core.files import digest_json, read_json, write_json
from coop_core.judging.transfer import collect
from coop_core.params import Params, flat, load_params
from coop_core.reference import add_reference
from pipelines import console, paths
from pipelines.records.runs import DatasetInput, RunRecord, run_link, track
from pipelines.records.server import open_records
from pipelines.stages.report import read_table, read_targets
from pipelines.summary import headline_table, run_note, training_seconds, transfer_table, version_note, version_tags

_FIGURES = ("accuracy", "macro_f1", "calibration_error")


def main() -> None:
    records = open_records()
    evaluation = read_json(paths.EVALUATION / "evaluation.json")
    if not (paths.REPORT / "report.html").exists():
        raise ArtifactError(f"{paths.REPORT / 'report.html'} is missing: run the stage that writes it with `dvc repro`")
    with tempfile.TemporaryDirectory() as folder:
        prompt = with_metrics(paths.PROMPT, Path(folder) / "prompt", evaluation)
        add_reference(prompt, paths.REFERENCE)
        tracked = track(make_record(evaluation, prompt, flow_run=records.settings.flow_run), records)
    write_json(paths.TRACKED, {**asdict(tracked), "tracking_uri": records.address})
    console.console.print(headline_table(evaluation))
    if targets := read_targets(load_params(paths.PARAMS)):
        console.console.print(transfer_table(evaluation, targets))
    console.console.print(
        f"registered  {tracked.model_name} version {tracked.model_version}, alias candidate\n"
        f"report      {paths.REPORT / 'report.html'}\n"
        f"MLflow      {run_link(tracked, records)}"
        + ("" if records.address.startswith("http") else "  (after `make ui` or `make up`)")
        + f"\npredict     {own_command()} predict {paths.SAMPLES} --top 3",
        highlight=False,
        soft_wrap=True,
    )


def own_command() -> Path:
    """`coop` as this Python has it, from the working folder where it lies below."""
    command = Path(sys.executable).with_name("coop")
    return command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command


def with_metrics(prompt: Path, target: Path, evaluation: dict[str, Any]) -> Path:
    """A copy of the artefact whose card carries the test metrics of it and of its baselines."""
    read_artifact(prompt)  # whole, or a sentence
    shutil.copytree(prompt, target)
    card = read_json(target / "card.json")
    metrics = {
        name: {key: e[key] for key in ("n", "accuracy", "interval", "macro_f1", "calibration_error")}
        for name, e in evaluation["classifiers"].items()
    }
    write_card(target, {**card, "metrics": metrics})
    return target


def make_record(evaluation: dict[str, Any], prompt: Path, *, flow_run: str | None = None) -> RunRecord:
    params, split = load_params(paths.PARAMS), read_split(paths.SPLIT)
    card = read_json(prompt / "card.json")
    method = evaluation["method"]
    targets = read_targets(params)
    curve, timing = read_table(paths.PROMPT / "curve.csv"), read_json(paths.TIMING)
    learned_tensors = {name: digest for name, digest in card["digests"].items() if name != "card"}
    lock = Path("dvc.lock")
    reference = f"{split.dataset_name}-{method}-{params.split.shots}shots-seed{params.seed}"
    return RunRecord(
        name=reference,
        key=digest_json([learned_tensors, card["metrics"], params.of_run(), split.test_digest, *targets.values()]),
        params=recorded_params(params, is_built=card["training"]["is_built"]),
        tags={
            "dataset": split.dataset_name,
            "method": method,
            "backbone": card["backbone"]["architecture"],
            "shots": str(params.split.shots),
            "seed": str(params.seed),
            "dataset_digest": split.dataset_digest,
            "test_digest": split.test_digest,
            "code_revision": card["code_revision"],
        }
        | ({"prefect.flow_run_id": flow_run} if flow_run else {}),
        metrics=metrics_of(evaluation, card, targets, seconds=training_seconds(evaluation, timing)),
        epochs=curve,
        datasets=_datasets(split),
        per_class=_per_class(evaluation),
        files=[
            (paths.REPORT, "report"), (paths.EVALUATION, "evaluation"), (prompt / "card.json", ""),
            (paths.PARAMS, ""), (paths.SPLIT, ""), *([(lock, "")] if lock.exists() else []),
            *([(paths.LABELS, "labels")] if split.is_unlabelled else []),
            *((paths.JUDGED / name, f"tests/{name}") for name in targets),
        ],
        prompt=prompt,
        note=run_note(evaluation, card, curve=curve, timing=timing),
        description=version_note(evaluation, card),
        version_tags=version_tags(evaluation),
    )  # fmt: skip


def metrics_of(
    evaluation: dict[str, Any], card: dict[str, Any], targets: dict[str, dict[str, Any]], *, seconds: float
) -> dict[str, float]:
    """The first is what MLflow's comparison shows first; no accuracy of a run that was not judged, and none of
    validation images that were not there."""
    found, method = evaluation["classifiers"], evaluation["method"]
    if not found:
        return {"training/seconds": seconds, **(collect(evaluation, targets).metrics() if targets else {})}
    names = [method, *(name for name in found if name != method)]  # where both are called alike, the baseline's stand
    validated = (card["training"]["last"] or {}).get("val_accuracy")
    return {
        **{key: found[method][key] for key in _FIGURES},
        "gain_over_zero_shot": found[method]["accuracy"] - found["zero-shot"]["accuracy"],
        **({} if validated is None else {"val_accuracy": validated}),
        "training/seconds": seconds,
        **{f"test/{name.replace(' ', '_')}/{key}": found[name][key] for name in names for key in _FIGURES},
        **(collect(evaluation, targets).metrics() if targets else {}),
    }


def recorded_params(params: Params, *, is_built: bool) -> dict[str, Any]:
    """By dotted name; the recipe of training is none of what was built at once."""
    tree = params.of_run()
    return flat({name: section for name, section in tree.items() if not (is_built and name == "train")})


def _datasets(split: Split) -> list[DatasetInput]:
    about = read_dataset(paths.RAW).about
    source = about["homepage"] or None

    def rows(images: tuple[SplitImage, ...]) -> dict[str, list[Any]]:
        return {
            "path": [image.path for image in images],
            "class_name": [split.class_names[image.label] if image.label != NO_LABEL else "" for image in images],
            "sha256": [image.digest for image in images],
        }

    return [
        DatasetInput(split.dataset_name, "training", split.train_digest, source, rows(split.train)),
        DatasetInput(split.dataset_name, "test", split.test_digest, source, rows(split.test)),
    ][: 2 if split.test else 1]


def _per_class(evaluation: dict[str, Any]) -> dict[str, list[Any]]:
    classifiers = evaluation["classifiers"]
    if not classifiers:
        return {"class": evaluation["class_names"]}
    names = list(classifiers["zero-shot"]["class_accuracy"])
    images = [sum(row) for row in classifiers["zero-shot"]["confusion"]]
    return {"class": names, "test_images": images} | {
        name: [e["class_accuracy"][key] for key in names] for name, e in classifiers.items()
    }


if __name__ == "__main__":
    console.run(main)

"""evaluate: learned prompt, baselines and test features -> metrics; the only stage that judges on the test images."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from coop_core.answering import answerer
from coop_core.artifact import Artifact, read_artifact
from coop_core.backbone import Backbone, digest_tensors
from coop_core.data.split import Split, SplitImage, read_split
from coop_core.errors import ArtifactError
from coop_core.features.examples import DecodedImages
from coop_core.features.extract import load_features
from coop_core.files import as_csv, read_json, read_tensors, write_json, write_tensors, write_text
from coop_core.judging.classifier import LinearClassifier
from coop_core.judging.confidence import at_temperature, selective
from coop_core.judging.evaluation import Evaluation, evaluate
from coop_core.judging.seen import Seen, seen_of, seen_of_nothing, spread
from coop_core.params import Params, load_params
from pipelines import console, paths
from pipelines.settings import choose_device, load_settings

BASELINES = ("zero-shot", "prompt ensemble", "linear probe")
NO_LABELLED_IMAGES = "no labelled images"
"""Why a run was not judged."""
log = logging.getLogger(__name__)


def main() -> None:
    params = load_params(paths.PARAMS)
    split = read_split(paths.SPLIT)
    prompt = read_artifact(paths.PROMPT)
    curve_prompts = {shots: read_artifact(paths.CURVE_PROMPTS / f"{shots}_shots") for shots in params.split.curve_shots}
    for artifact in (prompt, *curve_prompts.values()):
        check_origin(artifact.card["data"], artifact.feature_key, prompt, split, what="prompt")
    tensors, baseline_card = read_baselines()
    check_origin(baseline_card, baseline_card.get("feature_key"), prompt, split, what="baselines")
    if split.test:
        judge_all(params, split, prompt, curve_prompts, tensors)
    else:
        write_not_judged(params, split)


def judge_all(
    params: Params, split: Split, prompt: Artifact, curve_prompts: Mapping[int, Artifact],
    tensors: dict[str, torch.Tensor],
) -> None:  # fmt: skip
    """Judge the prompt, those of fewer shots, and the baselines (their `tensors`) on the test images."""
    test = load_features(paths.FEATURES, "test", split, key=prompt.feature_key)[:, 0]
    features = torch.from_numpy(np.array(test))                                   # (n, d)
    labels = np.array([image.label for image in split.test])

    def judge(probabilities: np.ndarray) -> Evaluation:
        return evaluate(
            probabilities, labels, split.class_names, calibration_bins=params.evaluate.calibration_bins
        )

    def baseline(name: str) -> np.ndarray:
        return LinearClassifier.from_tensors(tensors, name).probabilities(features).numpy()

    needs_backbone = any(one.classifier is None for one in (prompt, *curve_prompts.values()))
    backbone = prompt.load_backbone() if needs_backbone else None

    def learned(artifact: Artifact) -> np.ndarray:
        return answers_of(artifact, split, features, backbone)[0].numpy()

    method = params.method.name
    answered, seen = answers_of(prompt, split, features, backbone)
    found = {
        "zero-shot": baseline("zero-shot"),
        "prompt ensemble": baseline("prompt ensemble"),
        "linear probe": baseline(f"linear probe {params.split.shots}"),
        method: answered.numpy(),
    }
    evaluations = {name: judge(probabilities) for name, probabilities in found.items()}
    few_shot_curve = [
        {
            "shots": shots,
            method: judge(learned(curve_prompts[shots])).accuracy,
            "linear probe": judge(baseline(f"linear probe {shots}")).accuracy,
        }
        for shots in sorted(params.split.curve_shots)
    ]
    few_shot_curve.append(
        {"shots": params.split.shots, **{name: evaluations[name].accuracy for name in (method, "linear probe")}}
    )
    answering = {
        "temperature": prompt.temperature,
        "threshold": prompt.threshold,
        "validation_images": prompt.card.get("answering", {}).get("validation_images"),
        "calibration_error_before": judge(at_temperature(found[method], 1 / prompt.temperature)).calibration_error,
        **selective(found[method], labels, threshold=prompt.threshold),
    }
    report = {**_report(params, split, evaluations, few_shot_curve), "answering": answering}
    write_json(paths.EVALUATION / "evaluation.json", report)
    write_text(paths.EVALUATION / "predictions.csv", predictions(split.test, found, method=method))
    write_json(paths.METRICS, headline(evaluations))
    write_tensors(paths.REFERENCE, reference_of(prompt, split, answered, seen).tensors())


def write_not_judged(params: Params, split: Split) -> None:
    """What there is to say of a run without labelled test images: that it was not judged, and no figure."""
    report = {**_report(params, split, {}, []), "not_judged": NO_LABELLED_IMAGES}
    write_json(paths.EVALUATION / "evaluation.json", report)
    write_text(paths.EVALUATION / "predictions.csv", predictions((), {}, method=params.method.name))
    write_json(paths.METRICS, {"not_judged": NO_LABELLED_IMAGES})
    write_tensors(paths.REFERENCE, seen_of_nothing().tensors())
    log.warning("%s was not judged: %s", split.dataset_name, NO_LABELLED_IMAGES)


def answers_of(
    prompt: Artifact, split: Split, features: torch.Tensor, backbone: Backbone | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Its probabilities for the test images (n, c), from their features (n, d) or from what it reads in their place;
    and the features that it answered from.

    `backbone` is for answers from features that need one.
    """
    if prompt.reads == "unprojected":
        seen = load_features(paths.FEATURES, "test", split, key=prompt.feature_key, unprojected=True)[:, 0]
        features = torch.from_numpy(np.array(seen))                               # (n, p)
    if prompt.reads != "pixels":
        return answerer(prompt, backbone=backbone).with_features(features)
    backbone = prompt.load_backbone(device=choose_device(load_settings()))
    images = DecodedImages(split.test, paths.RAW, backbone.transform, backbone.device)
    return answerer(prompt, backbone=backbone).of_examples_with_features(images)


def reference_of(prompt: Artifact, split: Split, probabilities: torch.Tensor, features: torch.Tensor) -> Seen:
    """What the prompt saw of a part of the test images, of every class."""
    rows = spread(len(split.test))
    images = [split.test[row].digest for row in rows]
    return seen_of(
        features[rows], probabilities[rows], images, class_names=prompt.class_names, threshold=prompt.threshold
    )


def read_baselines() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The classifiers and their card, which is theirs."""
    tensors, _ = read_tensors(paths.BASELINES / "classifiers.safetensors")
    card = read_json(paths.BASELINES / "card.json")
    if card.get("classifiers_digest") != digest_tensors(tensors):
        raise ArtifactError(f"{paths.BASELINES} holds other classifiers than its card says: run `dvc repro -f`")
    return tensors, card


def check_origin(data: Mapping[str, Any], key: str | None, prompt: Artifact, split: Split, *, what: str) -> None:
    """Everything that is judged here was made from this split's images, by the backbone of the prompt.

    Raises
    ------
    ArtifactError
    """
    ours = {f"{name}_digest": getattr(split, f"{name}_digest") for name in ("train", "val")}
    if {name: data.get(name) for name in ours} != ours:
        raise ArtifactError(f"the {what} in artifacts/ belong to another split: run `dvc repro`")
    if data.get("labels_digest") != prompt.card["data"].get("labels_digest"):
        raise ArtifactError(f"the {what} in artifacts/ belong to other labels than the prompt that is judged: run "
                            "`dvc repro`")  # fmt: skip
    if key != prompt.feature_key:
        raise ArtifactError(f"the {what} in artifacts/ were made on other weights than the prompt: run `dvc repro`")


def headline(evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    """The few numbers a classifier that `dvc metrics` compares."""
    zero_shot = evaluations["zero-shot"].accuracy
    return {
        name: {
            "accuracy": e.accuracy,
            "gain_over_zero_shot": e.accuracy - zero_shot,
            "macro_f1": e.macro_f1,
            "calibration_error": e.calibration_error,
        }
        for name, e in evaluations.items()
    }


def _report(
    params: Params, split: Split, evaluations: dict[str, Evaluation], few_shot_curve: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "dataset": split.dataset_name,
        "class_names": list(split.class_names),
        "shots": params.split.shots,
        "seed": params.seed,
        "classes": split.classes,
        "dataset_digest": split.dataset_digest,
        "test_digest": split.test_digest,
        "method": params.method.name,
        **({"labelled_by": "zero-shot"} if split.is_unlabelled else {}),
        "classifiers": {name: e.as_dict() for name, e in evaluations.items()},
        "few_shot_curve": few_shot_curve,
    }


def predictions(images: Sequence[SplitImage], probabilities: Mapping[str, np.ndarray], *, method: str) -> str:
    """A line an image: what the method says and how surely, and what each baseline says, as a CSV."""
    others = [name for name in probabilities if name != method]
    rows: list[list[Any]] = [["path", "label", "predicted", "confidence", *others]]
    if not images:
        return as_csv(rows)
    said = [probabilities[name].argmax(axis=1).tolist() for name in others]
    for image, row, *rest in zip(images, probabilities[method], *said, strict=True):
        rows.append([image.path, image.label, int(row.argmax()), float(row.max()), *rest])
    return as_csv(rows)


if __name__ == "__main__":
    console.run(main)

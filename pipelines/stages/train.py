"""train: few-shot features -> artifacts/prompt, what the method learned, with its card and curve.

Smaller numbers of shots, for the few-shot curve, go to artifacts/curve_prompts; how long each took, to
artifacts/timing.json.
"""

import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from coop_core.answering import answer_with
from coop_core.artifact import Artifact, read_artifact, write_artifact
from coop_core.backbone import Backbone
from coop_core.card import make_card
from coop_core.data.split import Split, read_split
from coop_core.errors import TrainingError
from coop_core.features.examples import FRESH, CachedFeatures, DecodedImages
from coop_core.features.extract import feature_key, load_features
from coop_core.files import digest_json, table_as_csv, write_json, write_text
from coop_core.judging.confidence import Confidence, fit_confidence
from coop_core.judging.label_file import origin_of, read_labels, require_asked
from coop_core.judging.pseudo_labels import PoolLabels, training_examples
from coop_core.methods import Examples
from coop_core.params import Params, load_params
from coop_core.preparing import prepare
from coop_core.prompts.interpretation import nearest_words
from coop_core.training import Checkpoint, Epoch, Training, fit
from pipelines import console, paths
from pipelines.revision import code_revision, core_digest
from pipelines.settings import choose_device, load_settings

log = logging.getLogger(__name__)


def main() -> None:
    params, settings = load_params(paths.PARAMS), load_settings()
    split = read_split(paths.SPLIT)
    device = choose_device(settings)
    backbone = params.backbone.load(device=device)
    checkpoints = settings.cache_folder / paths.CHECKPOINTS
    paths.CURVE_PROMPTS.mkdir(parents=True, exist_ok=True)
    places = {shots: paths.CURVE_PROMPTS / f"{shots}_shots" for shots in params.split.curve_shots}
    seconds = {}
    for shots, folder in {**places, params.split.shots: paths.PROMPT}.items():
        started = time.monotonic()
        train_prompt(folder, params, split, backbone, shots, checkpoints)
        seconds[str(shots)] = round(time.monotonic() - started, 3)
    write_json(paths.TIMING, {"device": str(device), "seconds": seconds})
    write_json(paths.PROMPT / "words.json", shared_words(read_artifact(paths.PROMPT), backbone))


def train_prompt(
    folder: Path, params: Params, split: Split, backbone: Backbone, shots: int, checkpoints: Path
) -> list[Epoch]:
    """Train on the first `shots` images a class and write the artefact into `folder`."""
    labels = read_labels(paths.LABELS, split)
    require_asked(labels, paths.LABELS, key=feature_key(backbone), **params.split.asked_of_labels)
    labelled = origin_of(paths.LABELS, labels)
    key = checkpoint_key(params, split, backbone, shots, code=core_digest(), labels=labelled.get("labels_digest", ""))
    checkpoint = Checkpoint(checkpoints / f"{key}.safetensors", key)
    log.info("training %s with %d shots on %s", params.method.name, shots, backbone.device)
    examples = examples_for(params, split, backbone, shots, labels)
    training = prepare(
        params,
        split=split,
        backbone=backbone,
        examples=examples,
        validation=validation_examples(params, split, backbone),
        checkpoint=checkpoint,
    )
    if encoder := getattr(training.learner, "encoder", None):
        log.info("text tower: %s", encoder)
    with console.progress(f"{params.method.name}, {shots} shots", training.epochs) as update:
        curve = fit(replace(training, on_epoch=lambda e: update(e.epoch + 1, details=details(e))))
    card = make_card(
        confidence=confidence_of(training, params, split),
        learner=training.learner,
        method=training.found or params.method,
        backbone=backbone,
        split=split,
        shots=shots,
        params=params.of_run(),
        curve=[asdict(epoch) for epoch in curve],
        code_revision=code_revision(),
    )
    card["data"] |= labelled
    write_curve(folder / "curve.csv", curve)
    write_artifact(folder, training.learner, card)
    checkpoint.remove()
    return curve


def confidence_of(training: Training, params: Params, split: Split) -> Confidence | None:
    """The temperature and threshold that `answering` asks for, fitted on the validation images.

    Raises
    ------
    TrainingError
        When there are none.
    """
    asked, validation = params.answering, training.validation
    if not asked.is_fitted:
        return None
    if validation is None or not len(validation.labels):
        raise TrainingError("answering.* is fitted on validation images, and the split has none: add images, or set "
                            "temperature to false and the targets to null")  # fmt: skip
    probabilities = answer_with(training.learner, class_names=split.class_names).of_examples(validation).numpy()
    found = fit_confidence(probabilities, validation.labels.cpu().numpy(), **asked.model_dump(), seed=params.seed)
    log.info("fitted on %d validation images: temperature %.2f, answers from %.1f %% on (%.0f %% of them, %.1f %% "
             "right, 95 %% interval %.1f to %.1f)", found.validation_images, found.temperature, 100 * found.threshold,
             100 * found.share, 100 * found.accuracy, *(100 * edge for edge in found.accuracy_interval))  # fmt: skip
    if not found.is_reached:
        log.warning("no confidence reaches answering.target_accuracy %g on the validation images: the threshold is "
                    "where most answers are right", asked.target_accuracy)  # fmt: skip
    return found


def details(epoch: Epoch) -> str:
    return f"loss {epoch.loss:.3f}, accuracy {100 * epoch.accuracy:.1f} %"


def examples_for(
    params: Params, split: Split, backbone: Backbone, shots: int, labels: PoolLabels | None
) -> Examples:
    """The first `shots` images a class, as the method reads them; of a pool, those that have one of `labels`."""
    if params.method.reads == "pixels":
        images = split.shots_subset(shots)
        return DecodedImages(images, paths.RAW, backbone.transform, backbone.device, FRESH, params.seed)
    unprojected = params.method.reads == "unprojected"
    features = load_features(paths.FEATURES, "train", split, key=feature_key(backbone), unprojected=unprojected)
    return training_examples(split, features, labels, shots=shots, device=backbone.device)


def validation_examples(params: Params, split: Split, backbone: Backbone) -> Examples:
    if params.method.reads == "pixels":
        return DecodedImages(split.val, paths.RAW, backbone.transform, backbone.device)
    unprojected = params.method.reads == "unprojected"
    features = load_features(paths.FEATURES, "val", split, key=feature_key(backbone), unprojected=unprojected)
    return CachedFeatures.of(split.val, features, device=backbone.device)


def checkpoint_key(
    params: Params, split: Split, backbone: Backbone, shots: int, *, code: str, labels: str = ""
) -> str:
    """What decides a training to the last bit, and the curve beside it; only a checkpoint of this key is taken up."""
    images = [split.train_digest, split.val_digest, split.descriptions, labels]
    machine = [str(backbone.device), torch.__version__]
    return digest_json([params.of_run(), images, feature_key(backbone), machine, shots, code])


def shared_words(artifact: Artifact, backbone: Backbone) -> dict[str, Any] | None:
    """The nearest words of a shared context; a context a class would fill pages and say nothing."""
    context = artifact.state.get("context_vectors")
    return None if context is None or context.ndim != 2 else nearest_words(backbone.text_tower, context)


def write_curve(path: Path, curve: list[Epoch]) -> None:
    write_text(path, table_as_csv([asdict(epoch) for epoch in curve], list(Epoch.__dataclass_fields__)))


if __name__ == "__main__":
    console.run(main)

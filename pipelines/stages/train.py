"""train: few-shot features -> artifacts/prompt, the learned context vectors with their card and curve.

Smaller numbers of shots, for the few-shot curve, go to artifacts/curve_prompts.
"""

import csv
import io
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from coop_core.artifact import Artifact, make_card, read_artifact, write_artifact
from coop_core.backbone import Backbone
from coop_core.data.split import Split, read_split
from coop_core.features.extract import feature_key, load_features, normalised
from coop_core.files import digest_json, write_json, write_text
from coop_core.methods import load_method
from coop_core.params import Params, load_params
from coop_core.prompts.interpretation import nearest_words
from coop_core.training import Checkpoint, Epoch, fit, generator_for
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
    for shots in params.split.curve_shots:
        train_prompt(paths.CURVE_PROMPTS / f"{shots}_shots", params, split, backbone, shots, checkpoints)
    train_prompt(paths.PROMPT, params, split, backbone, params.split.shots, checkpoints)
    write_json(paths.PROMPT / "words.json", shared_words(read_artifact(paths.PROMPT), backbone))


def train_prompt(
    folder: Path, params: Params, split: Split, backbone: Backbone, shots: int, checkpoints: Path
) -> list[Epoch]:
    """Train on the first `shots` images a class and write the artefact into `folder`."""
    images = split.shots_subset(shots)
    made_by = feature_key(backbone)
    train_features = load_features(paths.FEATURES, "train", split, key=made_by)
    features = normalised(train_features[: len(images)], device=backbone.device)
    labels = torch.tensor([image.label for image in images], device=backbone.device)
    val_features = normalised(load_features(paths.FEATURES, "val", split, key=made_by)[:, 0], device=backbone.device)
    val_labels = torch.tensor([image.label for image in split.val], device=backbone.device)
    learner = load_method(params.method.name).build(
        params.method,
        backbone=backbone,
        class_names=split.class_names,
        generator=generator_for(params.seed, "context"),
        engine=params.engine.engine(),
    )
    key = checkpoint_key(params, split, backbone, shots, code=core_digest())
    checkpoint = Checkpoint(checkpoints / f"{key}.safetensors", key)
    log.info("training %s with %d shots on %s", params.method.name, shots, backbone.device)
    if encoder := getattr(learner, "encoder", None):
        log.info("text tower: %s", encoder)
    with console.progress(f"{params.method.name}, {shots} shots", params.train.epochs) as update:
        curve = fit(
            learner,
            features,
            labels,
            recipe=params.train,
            seed=params.seed,
            val_features=val_features,
            val_labels=val_labels,
            checkpoint=checkpoint,
            on_epoch=lambda e: update(e.epoch + 1, details=f"loss {e.loss:.3f}, accuracy {100 * e.accuracy:.1f} %"),
        )
    card = make_card(
        learner=learner,
        method=params.method,
        backbone=backbone,
        split=split,
        shots=shots,
        params=params.of_run(),
        curve=[asdict(epoch) for epoch in curve],
        code_revision=code_revision(),
    )
    write_curve(folder / "curve.csv", curve)
    write_artifact(folder, learner, card, logit_scale=backbone.logit_scale)
    checkpoint.path.unlink(missing_ok=True)
    return curve


def checkpoint_key(params: Params, split: Split, backbone: Backbone, shots: int, *, code: str) -> str:
    """What decides a training to the last bit, and the curve beside it; only a checkpoint of this key is taken up."""
    images = [split.train_digest, split.val_digest]
    machine = [str(backbone.device), torch.__version__]
    return digest_json([params.of_run(), images, feature_key(backbone), machine, shots, code])


def shared_words(artifact: Artifact, backbone: Backbone) -> dict[str, Any] | None:
    """The nearest words of a shared context; a context a class would fill pages and say nothing."""
    context = artifact.state.get("context_vectors")
    return None if context is None or context.ndim != 2 else nearest_words(backbone.text_tower, context)


def write_curve(path: Path, curve: list[Epoch]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(Epoch.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(epoch) for epoch in curve)
    write_text(path, table.getvalue())


if __name__ == "__main__":
    console.run(main)

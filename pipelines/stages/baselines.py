"""baselines: class names and few-shot features -> artifacts/baselines, three classifiers to beat."""

import numpy as np

from coop_core.backbone import digest_tensors
from coop_core.data.split import read_split
from coop_core.features.extract import feature_key, load_features
from coop_core.files import write_json, write_tensors
from coop_core.judging import baselines
from coop_core.judging.label_file import origin_of, read_labels, require_asked
from coop_core.judging.pseudo_labels import training_examples
from coop_core.params import load_params
from pipelines import console, paths
from pipelines.settings import choose_device, load_settings


def main() -> None:
    params = load_params(paths.PARAMS)
    split = read_split(paths.SPLIT)
    backbone = params.backbone.load(device=choose_device(load_settings()))
    templates = params.baselines.ensemble_templates
    zero_shot = baselines.zero_shot(backbone, split.class_names, split.template)
    ensemble = baselines.prompt_ensemble(backbone, split.class_names, templates, own_template=split.template)
    tensors = zero_shot.tensors("zero-shot") | ensemble.tensors("prompt ensemble")
    labels = read_labels(paths.LABELS, split)
    require_asked(labels, paths.LABELS, key=feature_key(backbone), **params.split.asked_of_labels)
    origin = {"train_digest": split.train_digest, "val_digest": split.val_digest, "feature_key": feature_key(backbone),
              **origin_of(paths.LABELS, labels)}  # fmt: skip
    train, val = (load_features(paths.FEATURES, name, split, key=origin["feature_key"]) for name in ("train", "val"))
    probes = {}
    for shots in [params.split.shots, *params.split.curve_shots]:
        examples = training_examples(split, train, labels, shots=shots, device=backbone.device)
        with console.progress(f"linear probe of {shots} images a class") as update:
            probe = baselines.linear_probe(
                examples.features[:, 0].cpu().numpy(),
                examples.labels.cpu().numpy(),
                np.asarray(val[:, 0]),
                np.array([image.label for image in split.val]),
                classes=len(split.class_names),
                steps=params.baselines.linear_probe_steps,
                progress=update,
            )
        tensors |= probe.classifier.tensors(f"linear probe {shots}")
        probes[str(shots)] = {"regularisation": probe.regularisation, "val_accuracy": probe.val_accuracy}
    write_tensors(paths.BASELINES / "classifiers.safetensors", tensors)
    card = {
        **origin,
        "classifiers_digest": digest_tensors(tensors),
        "template": split.template,
        "ensemble_templates": templates,
        "linear_probes": probes,
    }
    write_json(paths.BASELINES / "card.json", {**card, "linear_probe": probes[str(params.split.shots)]})


if __name__ == "__main__":
    console.run(main)

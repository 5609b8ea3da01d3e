"""judge: a further test set of params.yaml -> artifacts/judged/NAME, how the learned prompt answers there."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coop_core.answering import answerer
from coop_core.artifact import check_backbone, read_artifact
from coop_core.backbone import Backbone
from coop_core.data.split import read_split
from coop_core.errors import ParamsError
from coop_core.features.examples import DecodedImages
from coop_core.features.extract import extract_features
from coop_core.files import read_array, write_json, write_text
from coop_core.judging.classifier import LinearClassifier
from coop_core.judging.evaluation import evaluate
from coop_core.params import Params, load_params
from coop_core.transfer import Target, judge, target_of
from pipelines import console, paths
from pipelines.settings import Settings, choose_device, load_settings
from pipelines.sources.datasets import cached_dataset
from pipelines.stages.evaluate import check_origin, predictions, read_baselines


def main() -> None:
    name = sys.argv[2] if len(sys.argv) > 2 else ""
    params, settings = load_params(paths.PARAMS), load_settings()
    if name not in params.tests:
        raise ParamsError(f"params.yaml has no tests.{name or 'NAME'}: give one of {', '.join(params.tests) or 'none'}")
    dataset = cached_dataset(params.tests[name], settings)
    target = target_of(dataset, params.tests[name])
    split, prompt = read_split(paths.SPLIT), read_artifact(paths.PROMPT)
    tensors, card = read_baselines()
    check_origin(card, card.get("feature_key"), prompt, split, what="baselines")
    backbone = params.backbone.load(device=choose_device(settings))
    check_backbone(prompt, backbone)
    features = features_of(target, dataset.root, params, backbone, settings, name=name)
    probe = LinearClassifier.from_tensors(tensors, f"linear probe {params.split.shots}")
    found = judge(
        target,
        features,
        backbone=backbone,
        answerer=answerer(prompt, backbone=backbone, class_names=target.class_names, template=target.template,
                          engine=params.engine.engine()),
        method=params.method.name,
        templates=params.baselines.ensemble_templates,
        known={"linear probe": (probe, split.class_names)},
        pixels=pixels_of(target, dataset.root, params, backbone),
    )
    folder = paths.JUDGED / name
    probabilities = {one: its.cpu().numpy() for one, its in found.items()}
    write_json(folder / "evaluation.json", report_of(target, probabilities, params))
    write_text(folder / "predictions.csv", predictions(target.images, probabilities, method=params.method.name))


def pixels_of(target: Target, root: Path, params: Params, backbone: Backbone) -> DecodedImages | None:
    """The images themselves where the method reads them."""
    if params.method.reads != "pixels":
        return None
    return DecodedImages(target.images, root, backbone.transform, backbone.device)


def features_of(
    target: Target, root: Path, params: Params, backbone: Backbone, settings: Settings, *, name: str
) -> torch.Tensor:
    """Image tower outputs of the target's images: (n, d), or (n, p) where the method reads these."""
    store = settings.cache_folder / paths.FEATURE_STORE
    store.mkdir(parents=True, exist_ok=True)
    with (
        console.progress(f"features of {name}", len(target.images)) as update,
        tempfile.TemporaryDirectory(dir=store) as folder,
    ):
        file = Path(folder) / "features.npy"
        extract_features(backbone, target.images, root=root, target=file, store_folder=store,
                         batch_size=params.features.batch_size, progress=update,
                         unprojected=params.method.reads == "unprojected")  # fmt: skip
        return torch.from_numpy(np.array(read_array(file))[:, 0])


def report_of(target: Target, probabilities: dict[str, np.ndarray], params: Params) -> dict[str, Any]:
    bins = params.evaluate.calibration_bins
    labels = np.array(target.labels)
    return {
        "dataset": target.dataset_name,
        "dataset_digest": target.dataset_digest,
        "class_names": list(target.class_names),
        "classes": target.classes,
        "test_digest": target.digest,
        "method": params.method.name,
        "classifiers": {
            name: evaluate(its, labels, target.class_names, calibration_bins=bins).as_dict()
            for name, its in probabilities.items()
        },
    }


if __name__ == "__main__":
    console.run(main)

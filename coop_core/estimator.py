"""Estimator: labelled images -> a classifier that learned from them; the way of the data in one call (docs/api.md).

It calls the parts that the stages call, so what it learns and saves is what `dvc repro` would write for the same images
and parameters. It does not judge on test images: `score` takes any images that it was not fitted on.
"""

import inspect
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coop_core.artifact import Artifact, copy_artifact, read_artifact, write_artifact
from coop_core.backbone import Backbone
from coop_core.card import make_card
from coop_core.data.catalog import GENERIC_TEMPLATE
from coop_core.data.dataset import words
from coop_core.data.given import Images, image_pairs, read_given
from coop_core.data.images import Source
from coop_core.data.split import Split, SplitImage, split_to_learn
from coop_core.errors import ArtifactError, DatasetError, ParamsError, TrainingError
from coop_core.features.examples import FRESH, CachedFeatures, DecodedImages
from coop_core.features.extract import extract_features
from coop_core.files import digest_code, read_array
from coop_core.methods import Examples
from coop_core.params import Params
from coop_core.params.defaults import default_params
from coop_core.predictor import Prediction, Predictor
from coop_core.preparing import prepare
from coop_core.training import Epoch, fit

Progress = Callable[[str, int, int], object]
"""Told what is being done, how much of it is done, and of how much; `ProgressBar()` shows it."""


def _silent(what: str, done: int, total: int) -> None:
    pass


class PromptClassifier:
    """Learns class names and a few images a class; shaped like a scikit-learn classifier, without needing it.

    After `fit` or `load` it has `classes_` (class names in label order), `artifact_` (what was learned, with its card)
    and `predictor_`; after `fit` also `split_` (which images trained, which validated) and `curve_` (a row an epoch).
    """

    classes_: np.ndarray
    artifact_: Artifact
    predictor_: Predictor
    split_: Split
    curve_: list[Epoch]

    def __init__(
        self,
        method: str | dict[str, Any] = "gda",
        *,
        backbone: str | Backbone = "mini",
        shots: int | None = None,
        template: str = GENERIC_TEMPLATE,
        descriptions: dict[str, list[str]] | None = None,
        device: str = "auto",
        seed: int = 1,
        train: dict[str, Any] | None = None,
        cache: str | Path | None = None,
        progress: Progress = _silent,
    ) -> None:
        """Parameters are looked at by `fit`.

        Parameters
        ----------
        method
            A method's name, or its section of params.yaml: `{"name": "coop", "n_context": 4}`.
        backbone
            `mini`, `ARCHITECTURE:PRETRAINED` such as `ViT-B-16-quickgelu:openai`, or a loaded backbone that several
            classifiers share.
        shots
            Training images a class; None takes all that are given.
        template
            The hand-written prompt, with one {} for the class name.
        descriptions
            Sentences a class, {class name: [sentence, ...]}, for `biomedcoop`.
        device
            A device of torch, or `auto`: CUDA where there is some. A loaded backbone stays where it is.
        train
            What differs from 100 epochs at learning rate 0.02 (mini) or 0.002, for methods that learn by epochs; the
            keys are those of the `train` section.
        cache
            A folder that keeps image features from one fit to the next.
        progress
            Called with what is done, how much of it, and of how much.
        """
        self.method, self.backbone, self.shots, self.template = method, backbone, shots, template
        self.descriptions, self.device, self.seed = descriptions, device, seed
        self.train, self.cache, self.progress = train, cache, progress

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's parameters as they were given; `deep` is there for scikit-learn and changes nothing."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> "PromptClassifier":
        """Change parameters by name; the next `fit` reads them.

        Raises
        ------
        ParamsError
            For a name that is none.
        """
        if unknown := sorted(params.keys() - self.get_params().keys()):
            raise ParamsError(f"PromptClassifier has no parameter {unknown[0]!r}: there are "
                              f"{', '.join(self.get_params())}")  # fmt: skip
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def fit(self, images: Images, labels: Iterable[str] | None = None) -> "PromptClassifier":
        """Learn from a folder of class folders or a CSV file, or from pictures and the class name of each.

        Images in a folder `test` beside `train` are not learned from. Of the others, a few a class validate where there
        are enough (`data.split.split_to_learn`).

        Raises
        ------
        CoopError
            With all faults of the images, or of the parameters, in one message.
        """
        params = default_params(
            method=self.method, backbone=self.backbone, shots=self.shots, template=self.template, seed=self.seed,
            train=self.train,
        )  # fmt: skip
        given = self.backbone if isinstance(self.backbone, Backbone) else None
        backbone = given or params.backbone.load(device=_device(self.device))
        params.method.check_backbone(backbone)
        with tempfile.TemporaryDirectory(prefix="coop-") as name:
            folder = Path(name)
            dataset = read_given(
                images, labels, folder, template=self.template, descriptions=self.descriptions,
                progress=lambda done, total: self.progress("images checked", done, total),
            )  # fmt: skip
            split = split_to_learn(dataset, shots=self.shots, seed=self.seed)
            taken = params.split.model_copy(update={"shots": split.shots})
            params = params.model_copy(update={"split": taken})
            store = folder if self.cache is None else Path(self.cache)
            read = partial(_examples, params, backbone, dataset.root, store / "features", self.progress)
            training = prepare(
                params, split=split, backbone=backbone, examples=read(split.train, augmented=True),
                validation=read(split.val, augmented=False) if split.val else None,
            )  # fmt: skip
            curve = fit(replace(training, on_epoch=self._tell(params.method.name, training.epochs)))
            card = make_card(
                learner=training.learner, method=training.found or params.method, backbone=backbone, split=split,
                shots=split.shots, params=params.of_run(), curve=[asdict(epoch) for epoch in curve],
                code_revision=f"coop_core {digest_code(Path(__file__).parent)[:12]}",
            )  # fmt: skip
            write_artifact(folder / "prompt", training.learner, card)
            learned = read_artifact(folder / "prompt")
        self._take(learned, backbone)
        self.split_, self.curve_ = split, curve
        return self

    def predict(self, images: Iterable[Source | str]) -> np.ndarray:
        """The most probable class name of each image (n,); None where a loaded prompt abstains.

        Raises
        ------
        DatasetError
            For the first image that cannot be read.
        """
        return np.array([prediction.answer for prediction in self._predictions(images)])

    def predict_proba(self, images: Iterable[Source | str]) -> np.ndarray:
        """Probabilities (n, c), in the order of `classes_`; faults as `predict` has them."""
        found = [dict(zip(one.labels, one.probabilities, strict=True)) for one in self._predictions(images)]
        rows = [[one[name] for name in self.classes_] for one in found]
        return np.array(rows).reshape(len(rows), len(self.classes_))

    def score(self, images: Images, labels: Iterable[str] | None = None) -> float:
        """The share of images that are answered with their own class; images and labels as `fit` takes them.

        Of a folder or CSV file with test images, these alone are judged.

        Raises
        ------
        DatasetError
            For images that cannot be read, and classes that were not learned.
        """
        self._check_fitted()
        with tempfile.TemporaryDirectory(prefix="coop-") as name:
            if labels is None:
                dataset = read_given(images, None, Path(name), template=GENERIC_TEMPLATE)
                tested = [image for image in dataset.images if image.subset == "test"] or dataset.images
                images = [dataset.root / image.path for image in tested]
                labels = [dataset.class_names[image.label] for image in tested]
            given, names = image_pairs(images, labels)
            wanted = [words(name) for name in names]
            if unknown := sorted(set(wanted) - set(self.classes_)):
                raise DatasetError(f"{unknown[0]!r} was not learned: there are {', '.join(self.classes_)}")
            return float(np.mean([answer == name for answer, name in zip(self.predict(given), wanted, strict=True)]))

    def save(self, folder: str | Path) -> None:
        """Write the artefact that `coop predict --model FOLDER` and `load` read.

        Raises
        ------
        ArtifactError
            When the place is a file.
        """
        self._check_fitted()
        if Path(folder).exists() and not Path(folder).is_dir():
            raise ArtifactError(f"{folder} is a file, and a prompt is saved as a folder: give another place")
        copy_artifact(self.artifact_, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "auto") -> "PromptClassifier":
        """What `save`, or the stage `train`, wrote; parameters are those that its card knows.

        Raises
        ------
        CoopError
            When the artefact is missing, damaged or foreign, or its backbone cannot be had.
        """
        learned = read_artifact(Path(folder))
        card = learned.card
        name = ":".join(filter(None, (card["backbone"]["architecture"], card["backbone"]["pretrained"])))
        template = card.get("template", GENERIC_TEMPLATE)
        found = cls(card["method"], backbone=name, template=template, device=device)
        found._take(learned, learned.load_backbone(device=_device(device)))
        return found

    def __repr__(self) -> str:
        method = self.method["name"] if isinstance(self.method, dict) and "name" in self.method else self.method
        backbone = self.backbone.name if isinstance(self.backbone, Backbone) else self.backbone
        state = "not fitted"
        if hasattr(self, "artifact_"):
            state = f"learned {len(self.classes_)} classes"
        if hasattr(self, "split_"):
            state += f" from {len(self.split_.train)} images"
        return f"PromptClassifier({method!r}, backbone={backbone!r}: {state})"

    def _take(self, learned: Artifact, backbone: Backbone) -> None:
        self.artifact_, self.predictor_ = learned, Predictor(learned, backbone)
        self.classes_ = np.array(learned.class_names)

    def _predictions(self, images: Iterable[Source | str]) -> list[Prediction]:
        self._check_fitted()
        return self.predictor_.predict(images)

    def _check_fitted(self) -> None:
        if not hasattr(self, "predictor_"):
            raise TrainingError("this PromptClassifier has learned nothing yet: call fit, or PromptClassifier.load")

    def _tell(self, method: str, epochs: int) -> Callable[[Epoch], object]:
        return lambda epoch: self.progress(f"epochs of {method}", epoch.epoch + 1, epochs)


def _device(name: str) -> str:
    """Raises ParamsError for a device that torch does not have."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:                       # AssertionError: torch was built without CUDA
        raise ParamsError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}): take auto or cpu") from None
    return name


def _examples(
    params: Params, backbone: Backbone, root: Path, store: Path, progress: Progress, images: Sequence[SplitImage], *,
    augmented: bool,
) -> Examples:  # fmt: skip
    """Images as the method reads them."""
    if params.method.reads == "pixels":
        views = FRESH if augmented else 1
        return DecodedImages(images, root, backbone.transform, backbone.device, views, params.seed)
    with tempfile.TemporaryDirectory(prefix="coop-") as name:
        target = Path(name) / "features.npy"
        extract_features(
            backbone, images, root=root, target=target, store_folder=store, seed=params.seed,
            batch_size=params.features.batch_size, unprojected=params.method.reads == "unprojected",
            progress=lambda done: progress("features computed", done, len(images)),
        )  # fmt: skip
        return CachedFeatures.of(images, read_array(target), device=backbone.device)

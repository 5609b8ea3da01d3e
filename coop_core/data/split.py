"""Few-shot split: a data set -> k training images a class, chosen by seed, with validation and test images.

The order in which a class's images are taken is a hash of seed and image digest. It depends on nothing else:
not on file names, other classes, the library or a global random state; and the images of fewer shots are part
of those of more.

A split without labels (`split.unlabelled`) has a pool instead of training images: their digests alone, because paths
name classes too.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Literal

from coop_core.data.dataset import NO_LABEL, Dataset, LabelledImage
from coop_core.errors import SplitError
from coop_core.files import digest_bytes, digest_json, read_json, write_json

MAX_VALIDATION_SHOTS = 4
"""Validation images a class are min(shots, 4), as in CoOp."""


@dataclass(frozen=True)
class SplitImage:
    path: str
    """Empty in a pool without labels; `located` finds it."""
    label: int
    """Position in the split's own class names; `NO_LABEL` in a pool."""
    digest: str


@dataclass(frozen=True)
class Split:
    dataset_name: str
    dataset_digest: str
    template: str
    class_names: tuple[str, ...]
    shots: int
    seed: int
    classes: str
    train: tuple[SplitImage, ...]
    """Round by round: the first image of every class, then the second, so that fewer shots are a prefix."""
    val: tuple[SplitImage, ...]
    test: tuple[SplitImage, ...]
    label_noise: float = 0.0
    """Share of the training labels that are of another class on purpose."""
    descriptions: tuple[tuple[str, ...], ...] = ()
    """Sentences a class, as in the data set; empty where it has none."""

    def __repr__(self) -> str:
        """For people: images would fill pages."""
        sizes = ", ".join(f"{len(getattr(self, name))} {name}" for name in ("train", "val", "test"))
        return f"Split({self.dataset_name!r}, {len(self.class_names)} classes, seed {self.seed}: {sizes} images)"

    @property
    def is_unlabelled(self) -> bool:
        """Whether the training images are a pool without labels."""
        return any(image.label == NO_LABEL for image in self.train)

    def shots_subset(self, shots: int) -> tuple[SplitImage, ...]:
        """The training images of fewer shots; of a pool, all, because what is learned from it is chosen later."""
        if self.is_unlabelled:
            return self.train
        return self.train[: shots * len(self.class_names)]

    @property
    def test_digest(self) -> str:
        """Equal for two runs exactly when they are judged on the same images, labels and class names."""
        return _images_digest(self.class_names, self.test)

    @property
    def train_digest(self) -> str:
        return _images_digest(self.class_names, self.train)

    @property
    def val_digest(self) -> str:
        return _images_digest(self.class_names, self.val)


def few_shot_split(
    dataset: Dataset,
    *,
    shots: int | None,
    seed: int,
    classes: Literal["all", "base", "new"] = "all",
    test_per_class: int | None = None,
    label_noise: float = 0.0,
    unlabelled: int | Literal["all"] | None = None,
    val_shots: int | None = None,
) -> Split:
    """Choose the images that train, validate and test.

    Validation images come from the data set's own val subset, else from the training images that were not
    taken. Test images are limited to `test_per_class` by a choice that does not depend on the seed, so that
    runs of different seeds are judged on the same images. Copies of an image within a class count once. Base
    and new classes are the first ceil(c/2) labels and the rest, relabelled from 0 (CoCoOp, Zhou et al. 2022,
    section 4.1). `label_noise`: this share of the training labels, chosen by seed, becomes another class's; validation
    and test labels never do, and what is noise at a smaller share is noise at a larger.

    `unlabelled`: so many of all training images become a pool, and no label of theirs is read; validation images then
    come from the data set's own val subset alone.

    `shots` None takes all training images that do not validate, of some classes perhaps more than of others.
    `val_shots` is the number of validation images a class, min(shots, 4) unless given.

    Raises
    ------
    SplitError
        When classes have too few images, all of them in one message.
    """
    names, pools = _pools(dataset, classes)
    own_val = any(subset == "val" for _, subset in pools)
    if val_shots is None:
        val_shots = MAX_VALIDATION_SHOTS if shots is None else min(shots, MAX_VALIDATION_SHOTS)
    if unlabelled is None:
        if {image.label for image in dataset.images if image.subset == "train"} == {NO_LABEL}:
            raise SplitError(f"the training images of {dataset.name} have no labels: set split.unlabelled, for instance"
                             " to all, and method.name: upl, or add class folders to train on")  # fmt: skip
        reserve = 0 if own_val else val_shots
        _check_pools(pools, names, shots=shots or 1, reserve=reserve)
        ordered = [_ordered(pools[label, "train"], label, seed=str(seed)) for label in range(len(names))]
        taken = [len(images) - reserve if shots is None else shots for images in ordered]
        rounds = [images[number] for number in range(max(taken))
                  for images, count in zip(ordered, taken, strict=True) if number < count]  # fmt: skip
        train = _with_noise(rounds, len(names), label_noise, seed)
        spare = [images[count:] for images, count in zip(ordered, taken, strict=True)]
        shots = max(taken)
    elif shots is None:
        raise SplitError("images without labels need split.shots: how many of each class are learned from")
    else:
        train, spare = _without_labels(dataset, seed=seed, count=unlabelled), [[] for _ in names]
    if own_val:
        spare = [_ordered(pools[label, "val"], label, seed=str(seed)) for label in range(len(names))]
    val = tuple(image for images in spare for image in images[:val_shots])
    test = tuple(image for label in range(len(names)) for image in _test(pools, label, test_per_class))
    return Split(dataset.name, dataset.digest, dataset.template, names, shots, seed, classes, train, val, test,
                 label_noise, _descriptions(dataset, classes))  # fmt: skip


def split_to_learn(dataset: Dataset, *, shots: int | None, seed: int) -> Split:
    """`few_shot_split` of images that are all there to learn from: all of them, or `shots` a class.

    Validation images are the data set's own, else what `shots` leave of the smallest class, or a fifth of it where all
    are taken: four a class at most, none where there are too few.

    >>> files = [("a.png", 0), ("b.png", 0), ("c.png", 1), ("d.png", 1)]
    >>> images = tuple(LabelledImage(file, label, "train", digest=file) for file, label in files)
    >>> photos = Dataset(Path("photos"), "photos", ("cat", "dog"), "a photo of a {}.", images, {})
    >>> few_shot_split(photos, shots=2, seed=1)
    Traceback (most recent call last):
    coop_core.errors.SplitError: split.shots 2 needs 2 training and 2 validation images a class, but 'cat' has 2,
    'dog' has 2: lower split.shots or add images
    >>> [image.path for image in split_to_learn(photos, shots=2, seed=1).train]
    ['b.png', 'd.png', 'a.png', 'c.png']

    Raises
    ------
    SplitError
        When a class has fewer images than `shots`.
    """
    names, pools = _pools(dataset, "all")
    smallest = min(len(pools[label, "train"]) for label in range(len(names)))
    spare = smallest // 5 if shots is None else max(0, smallest - shots)
    if any(subset == "val" for _, subset in pools):
        spare = MAX_VALIDATION_SHOTS
    val_shots = min(spare, shots or spare, MAX_VALIDATION_SHOTS)
    return few_shot_split(dataset, shots=shots, seed=seed, val_shots=val_shots)


def judged_images(
    dataset: Dataset, *, classes: Literal["all", "base", "new"] = "all", per_class: int | None = None
) -> tuple[tuple[str, ...], tuple[SplitImage, ...]]:
    """-> (class names, test images) of a data set that is only judged on; the images `few_shot_split` would test.

    Raises
    ------
    SplitError
        When a class has no test image.
    """
    names, pools = _pools(dataset, classes)
    if empty := [name for label, name in enumerate(names) if not pools[label, "test"]]:
        raise SplitError(f"{dataset.name} has no test image of {', '.join(map(repr, empty[:10]))}: add some, or take "
                         "the class out")  # fmt: skip
    return names, tuple(image for label in range(len(names)) for image in _test(pools, label, per_class))


def located(images: Sequence[SplitImage], dataset: Dataset) -> tuple[SplitImage, ...]:
    """Images of a split of this data set, each with its path.

    Raises
    ------
    SplitError
        When the data set no longer has one of them.
    """
    if all(image.path for image in images):
        return tuple(images)
    path_of = {image.digest: image.path for image in reversed(dataset.images)}
    if lost := [image.digest for image in images if image.digest not in path_of]:
        raise SplitError(f"{dataset.name} has no image with digest {lost[0][:12]}: run `dvc repro split`")
    return tuple(replace(image, path=image.path or path_of[image.digest]) for image in images)


def write_split(path: Path, split: Split) -> None:
    tree = asdict(split)
    digests = {f"{name}_digest": getattr(split, f"{name}_digest") for name in ("train", "val", "test")}
    write_json(path, {**tree, **digests, "digest": digest_json(tree)})


def read_split(path: Path) -> Split:
    """Read what `write_split` wrote; a split that was edited by hand is refused."""
    tree = read_json(path)
    fields = {name: tree[name] for name in Split.__dataclass_fields__ if name in tree}
    if digest_json(fields) != tree.get("digest"):
        raise SplitError(f"{path} does not carry the digest of its own content: run `dvc repro -f split`")
    for subset in ("train", "val", "test"):
        fields[subset] = tuple(SplitImage(**image) for image in fields[subset])
    fields["descriptions"] = tuple(map(tuple, fields.get("descriptions", ())))
    return Split(**{**fields, "class_names": tuple(fields["class_names"])})


def _class_labels(count: int, classes: str) -> range:
    half = ceil(count / 2)
    return {"all": range(count), "base": range(half), "new": range(half, count)}[classes]


def _descriptions(dataset: Dataset, classes: str) -> tuple[tuple[str, ...], ...]:
    if not dataset.descriptions:
        return ()
    return tuple(dataset.descriptions[label] for label in _class_labels(len(dataset.class_names), classes))


def _pools(dataset: Dataset, classes: str) -> tuple[tuple[str, ...], dict[tuple[int, str], list[LabelledImage]]]:
    """Class names, and the images by new label and subset."""
    labels = _class_labels(len(dataset.class_names), classes)
    relabelled = {label: position for position, label in enumerate(labels)}
    found: dict[tuple[int, str], list[LabelledImage]] = defaultdict(list)
    for image in dataset.images:
        if image.label in relabelled:
            found[relabelled[image.label], image.subset].append(image)
    pools = defaultdict(list, {key: _without_copies(images) for key, images in found.items()})
    return tuple(dataset.class_names[label] for label in labels), pools


def _test(pools: dict[tuple[int, str], list[LabelledImage]], label: int, per_class: int | None) -> list[SplitImage]:
    return _ordered(pools[label, "test"], label, seed="test")[:per_class]


def _without_labels(dataset: Dataset, *, seed: int, count: int | Literal["all"]) -> tuple[SplitImage, ...]:
    """Training images in an order that depends on seed and digests alone; copies count once."""
    digests = {image.digest for image in dataset.images if image.subset == "train"}
    ranked = sorted(digests, key=lambda digest: digest_bytes(f"{seed}:{digest}".encode()))
    if count != "all" and count > len(ranked):
        raise SplitError(f"split.unlabelled is {count}, but {dataset.name} has {len(ranked)} different training images"
                         ": lower it or set all")  # fmt: skip
    return tuple(SplitImage("", NO_LABEL, digest) for digest in ranked[: None if count == "all" else count])


def _with_noise(images: Sequence[SplitImage], classes: int, share: float, seed: int) -> tuple[SplitImage, ...]:
    """A share of the images (rounded to a whole number) gets one of the other labels, each as likely."""

    def drawn(image: SplitImage) -> int:
        return int(digest_bytes(f"noise:{seed}:{image.digest}:{image.label}".encode())[:15], 16)

    wrong = set(sorted(images, key=drawn)[: round(share * len(images))])
    return tuple(
        replace(image, label=(image.label + 1 + drawn(image) % (classes - 1)) % classes) if image in wrong else image
        for image in images
    )


def _check_pools(
    pools: dict[tuple[int, str], list[LabelledImage]], names: Sequence[str], *, shots: int, reserve: int
) -> None:
    few = [(name, len(pools[label, "train"])) for label, name in enumerate(names)
           if len(pools[label, "train"]) < shots + reserve]  # fmt: skip
    if few:
        spare = f" and {reserve} validation" if reserve else ""
        found = ", ".join(f"{name!r} has {count}" for name, count in few[:10]) + (", ..." if len(few) > 10 else "")
        raise SplitError(
            f"split.shots {shots} needs {shots} training{spare} images a class, but {found}: "
            "lower split.shots or add images"
        )


def _without_copies(images: Iterable[LabelledImage]) -> list[LabelledImage]:
    """One image a digest, the first by path."""
    return list({image.digest: image for image in sorted(images, key=lambda i: i.path, reverse=True)}.values())


def _ordered(images: Iterable[LabelledImage], label: int, *, seed: str) -> list[SplitImage]:
    ranked = sorted(images, key=lambda image: (digest_bytes(f"{seed}:{image.digest}".encode()), image.path))
    return [SplitImage(image.path, label, image.digest) for image in ranked]


def _images_digest(class_names: Sequence[str], images: Iterable[SplitImage]) -> str:
    return digest_json([list(class_names), sorted((image.digest, image.label) for image in images)])

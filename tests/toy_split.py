"""A split of one image a class, for artefacts that are made without a data set."""

from collections.abc import Sequence

from coop_core.data.split import Split, SplitImage


def toy_split(class_names: Sequence[str]) -> Split:
    images = tuple(SplitImage(f"{label}.png", label, f"digest-{label}") for label in range(len(class_names)))
    return Split(
        dataset_name="toys",
        dataset_digest="0" * 64,
        template="a photo of a {}.",
        class_names=tuple(class_names),
        shots=1,
        seed=7,
        classes="all",
        train=images,
        val=images,
        test=images,
        descriptions=tuple((f"this shows {name}.", f"an image of {name}.", "a colour.") for name in class_names),
    )

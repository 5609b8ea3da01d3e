"""split: data/raw -> artifacts/split.json, the images that train, validate and test."""

from coop_core.data.dataset import read_dataset
from coop_core.data.split import few_shot_split, write_split
from coop_core.params import load_params
from pipelines import console, paths


def main() -> None:
    params = load_params(paths.PARAMS)
    split = few_shot_split(
        read_dataset(paths.RAW),
        shots=params.split.shots,
        seed=params.seed,
        classes=params.split.classes,
        test_per_class=params.split.test_per_class,
        label_noise=params.split.label_noise,
        unlabelled=params.split.unlabelled,
    )
    write_split(paths.SPLIT, split)


if __name__ == "__main__":
    console.run(main)

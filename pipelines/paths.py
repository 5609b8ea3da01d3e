"""Where the stages read and write, relative to the project's folder; dvc.yaml names the same places."""

from pathlib import Path

PARAMS = Path("params.yaml")
RECIPES = Path("recipes")
PUBLISHED = Path("published")
SOURCE = Path("data/source")
RAW = Path("data/raw")
SPLIT = Path("artifacts/split.json")
FEATURES = Path("artifacts/features")
LABELS = Path("artifacts/labels")
BASELINES = Path("artifacts/baselines")
PROMPT = Path("artifacts/prompt")
CURVE_PROMPTS = Path("artifacts/curve_prompts")
TIMING = Path("artifacts/timing.json")
"""How long training took: no part of the prompt, whose bytes are the same every time. After an interruption,
from where it went on."""
JUDGED = Path("artifacts/judged")
"""A folder a test set: its name in params.yaml, or `own` for the data set that was learned on."""
EVALUATION = Path("artifacts/judged/own")
METRICS = Path("artifacts/metrics.json")
REFERENCE = Path("artifacts/reference.safetensors")
"""What the prompt saw of its test images, for `coop watch`; it goes with the registered version."""
REPORT = Path("artifacts/report")
SAMPLES = Path("artifacts/report/samples")
TRACKED = Path("artifacts/tracked.json")
SWEEPS = Path("artifacts/sweeps")
CHOICE = Path("artifacts/choice")
REPRODUCE = Path("artifacts/reproduce")

DOWNLOADS = Path("downloads")
"""Below the cache folder, as are the next ones."""
DATASETS = Path("datasets")
FEATURE_STORE = Path("features")
CHECKPOINTS = Path("checkpoints")
SWEEP_LOCKS = Path("sweeps")
TRAINER_LOGS = Path("trainers")
CARDS = Path("cards")
"""Of the catalogue, with the places of the images on this machine."""
DVC_LOG = Path("logs/dvc.log")

"""docs/adding-a-method.md: the method it shows is whole, from training to an answer, without a line elsewhere."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_methods import NAMES, images, kept, training_of
from test_trials import dataset  # noqa: F401
from toy_params import toy_params

from coop_core import methods
from coop_core.answering import answerer
from coop_core.judging.baselines import zero_shot
from coop_core.predictor import Predictor
from coop_core.sweeps.trials import Scores, TrialRunner

TEXT = (Path(__file__).parents[1] / "docs/adding-a-method.md").read_text(encoding="utf-8")


@pytest.fixture
def method(tmp_path, monkeypatch) -> Any:
    """The page's own words, as a file among the methods."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "task_residual.py").write_text(code)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    yield {"name": "task_residual", "alpha": 0.5}
    sys.modules.pop("coop_core.methods.task_residual", None)


def test_the_method_of_the_page_trains_is_kept_and_answers(method, backbone, zoo, tmp_path):
    params = toy_params(zoo.architecture("flat"), method=method, train={"epochs": 8, "learning_rate": 0.5})
    params, training, curve = training_of(params, backbone)
    artifact = kept(params, training, curve, backbone, tmp_path / "prompt")
    features = images(9).features[:, 0]

    found = answerer(artifact, backbone=backbone).probabilities(features)

    before = zero_shot(backbone, NAMES, "a photo of a {}.").probabilities(features)
    assert curve[-1].loss < curve[0].loss
    assert not torch.allclose(found, before)
    picture = torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()
    assert set(Predictor(artifact, backbone).predict([picture])[0].labels) == set(NAMES)


def test_the_method_of_the_page_can_be_swept(method, zoo, tmp_path, dataset):  # noqa: F811
    runner = TrialRunner(store_folder=tmp_path / "store", device="cpu")
    trials = [toy_params(zoo.architecture("flat"), method=method, seed=seed) for seed in (1, 2)]

    found = runner.run(trials, dataset)

    assert all(isinstance(one, Scores) for one in found)

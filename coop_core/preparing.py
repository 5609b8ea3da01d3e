"""Preparing: parameters, a split, a backbone and examples -> a training; the one place where a run is put together."""

from collections.abc import Callable

from coop_core.backbone import Backbone
from coop_core.data.split import Split
from coop_core.methods import Examples, Task, load_method
from coop_core.params import Params
from coop_core.prompts.engine import Engine
from coop_core.training import Checkpoint, Epoch, Training, generator_for


def prepare(
    params: Params,
    *,
    split: Split,
    backbone: Backbone,
    examples: Examples,
    validation: Examples | None = None,
    engine: Engine | None = None,
    checkpoint: Checkpoint | None = None,
    on_epoch: Callable[[Epoch], object] = lambda epoch: None,
) -> Training:
    """An untrained learner of the method that `params` name, with all that its training needs.

    `engine` is that of `params` unless another is given. A method that is built from examples is finished here.

    Raises
    ------
    PromptError
        When the class names or the context do not fit the text tower.
    TrainingError
        When a method that is built from examples lacks some.
    """
    learner = load_method(params.method.name).build(
        params.method,
        backbone=backbone,
        task=Task(split.class_names, split.template, split.descriptions),
        generator=generator_for(params.seed, "context"),
        engine=engine or params.engine.engine(),
        examples=examples,
        validation=validation,
    )
    return Training(
        learner, examples, params.train, params.seed,
        validation=validation, checkpoint=checkpoint, on_epoch=on_epoch,
    )  # fmt: skip

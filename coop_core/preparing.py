"""Preparing: parameters, a split, a backbone and examples -> a training; the one place where a run is put together."""

import logging
from collections.abc import Callable
from typing import Any

from coop_core.backbone import Backbone
from coop_core.data.split import Split
from coop_core.methods import Examples, MethodParams, Task, load_method
from coop_core.params import Params
from coop_core.prompts.engine import Engine
from coop_core.searching import search
from coop_core.training import Checkpoint, Epoch, Training, generator_for

log = logging.getLogger(__name__)


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

    `engine` is that of `params` unless another is given. A method that is built from examples is finished here, and a
    search that comes before the training is done here; it takes up its own checkpoint beside the training's.

    Raises
    ------
    PromptError
        When the class names or the context do not fit the text tower.
    TrainingError
        When a method that is built from examples lacks some.
    """
    task, engine = Task(split.class_names, split.template, split.descriptions), engine or params.engine.engine()
    found = _searched(params, task, backbone, examples, validation, engine, checkpoint)
    learner = load_method(params.method.name).build(
        found or params.method,
        backbone=backbone,
        task=task,
        generator=generator_for(params.seed, "context"),
        engine=engine,
        examples=examples,
        validation=validation,
    )
    return Training(
        learner, examples, params.train, params.seed,
        validation=validation, checkpoint=checkpoint, on_epoch=on_epoch, found=found,
    )  # fmt: skip


def _searched(
    params: Params, task: Task, backbone: Backbone, examples: Examples, validation: Examples | None, engine: Engine,
    checkpoint: Checkpoint | None,
) -> MethodParams | None:  # fmt: skip
    """The method's parameters with what a search found, where it asks for one."""
    method: Any = params.method
    if not method.is_searched:
        return None
    asked = method.search
    supernet = load_method(method.name).supernet(
        method, backbone=backbone, task=task, generator=generator_for(params.seed, "search"), engine=engine
    )
    recipe = params.train.model_copy(update={
        "epochs": asked.epochs, "batch_size": asked.batch_size, "learning_rate": asked.learning_rate,
        "warmup_epochs": min(1, asked.epochs - 1), "warmup_learning_rate": 1e-5,
    })  # fmt: skip
    search(
        supernet, examples, validation, recipe=recipe, seed=params.seed,
        mixing_learning_rate=asked.mixing_learning_rate, validation_batch_size=asked.validation_batch_size,
        rotate=not method.strict_upstream, checkpoint=checkpoint and checkpoint.of_search,
    )  # fmt: skip
    found: MethodParams = supernet.found(method)
    log.info("found: %s", found.model_dump(exclude={"search"}))
    return found

"""Model: requests as MLflow's scoring server hands them over -> answers of the version that each request was given.

The scoring server parses, and MLflow's own wrapper enforces the signature of a registered version. What answers behind
it is this module: nothing that lies in the registry is executed.
"""

import logging
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel, scoring_server

from coop_core.predictor import Prediction
from pipelines.records.prompt_model import COLUMNS, checked_top, files_of, row
from pipelines.records.served import signature
from pipelines.serving.batching import Batcher
from pipelines.serving.metrics import Metrics
from pipelines.serving.recorder import Recorder
from pipelines.serving.versions import Version

log = logging.getLogger(__name__)

MAX_IMAGES = 64
"""Of one request."""


@dataclass
class Call:
    """A request on its way; MLflow knows nothing of it, so it travels beside."""

    version: Version
    failed: bool = False
    """Whether it was our fault, which MLflow would call the caller's."""


CALL: ContextVar[Call] = ContextVar("CALL")


def scoring_app(batcher: Batcher, metrics: Metrics, recorder: Recorder | None = None) -> Any:
    """MLflow's ASGI application; `CALL` must be set around each request."""
    logging.getLogger(scoring_server.__name__).setLevel(logging.ERROR)            # a bad body is its sender's to hear
    return scoring_server.init(PyFuncModel(Model(signature=signature()), _Answers(batcher, metrics, recorder)))


class _Answers:
    def __init__(self, batcher: Batcher, metrics: Metrics, recorder: Recorder | None) -> None:
        self._batcher, self._metrics, self._recorder = batcher, metrics, recorder

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """As a registered version answers, with the column `version` beside."""
        call, top, files = CALL.get(), checked_top(params), files_of(model_input)
        if len(files) > MAX_IMAGES:
            raise MlflowException.invalid_parameter_value(
                f"the request has {len(files)} images, and one may have {MAX_IMAGES}: send them in several"
            )
        try:
            waiting = [self._ask(file, call.version) for file in files]
            rows = [row(self._answer(found, file, call.version, top))
                    for found, file in zip(waiting, files, strict=True)]  # fmt: skip
        except Exception:
            call.failed = True
            log.exception("version %s failed to answer", call.version.number)
            raise
        return pd.DataFrame(rows, columns=COLUMNS, index=files.index).assign(version=call.version.number)

    def _ask(self, file: bytes | str, version: Version) -> Future[Prediction] | str:
        """Decoded here, in the request's own thread; the tower is the batcher's."""
        if isinstance(file, str):
            return file
        view = version.predictor.view(file)
        return str(view) if isinstance(view, Exception) else self._batcher.submit(version.predictor, view)

    def _answer(
        self, found: Future[Prediction] | str, file: bytes | str, version: Version, top: int | None
    ) -> Prediction | str:
        if isinstance(found, str) or isinstance(file, str):
            self._metrics.images.labels("unreadable").inc()
            return str(found)
        all_classes = found.result()
        self._metrics.images.labels("answered" if all_classes.answer is not None else "abstained").inc()
        self._metrics.probability.observe(all_classes.probabilities[0])
        if self._recorder is not None:
            self._recorder.put(version, file, all_classes)
        return replace(all_classes, labels=all_classes.labels[:top], probabilities=all_classes.probabilities[:top])

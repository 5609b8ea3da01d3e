"""Prompt learning for frozen CLIP-like models: images and class names in, context vectors and reports out.

The way of the data, room by room (CONTRIBUTING.md):

    data -> backbone, features -> prompts -> methods, training -> artifact, answering -> judging -> report

`PromptClassifier` goes this way in one call, from Python (docs/api.md).
Nothing here reads an environment variable or talks to a service; that is what `pipelines` is for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coop_core.estimator import PromptClassifier
    from coop_core.showing import ProgressBar

__all__ = ["ProgressBar", "PromptClassifier"]


def __getattr__(name: str) -> Any:
    """What is asked for, when it is first asked for: importing the package alone imports no torch."""
    if name == "PromptClassifier":
        from coop_core.estimator import PromptClassifier

        return PromptClassifier
    if name == "ProgressBar":
        from coop_core.showing import ProgressBar

        return ProgressBar
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

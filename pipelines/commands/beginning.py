"""Beginning: the words of a command line -> its command, once it is known that it can work here; nothing heavy yet."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

_ASK_MLFLOW = {"compare", "promote", "rollback", "history", "reconcile", "gc"}
_WAITED_FOR = _ASK_MLFLOW | {"predict", "card", "serve", "export", "import", "doctor"}
"""Commands that a person waits for: they do not ask a silent server for minutes."""
_ANSWER = {"predict", "serve", "export"}
"""Commands that take images through a tower, one or a few at a time."""


class Several(TyperCommand):
    """A command whose repeated options may be given once with several values: `--shots 1 16`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeated = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        told: list[str] = []
        current, taken = "", 0
        for word in args:
            if word.startswith("-"):
                current, taken = (word, 0) if word in repeated else ("", 0)
            elif current:
                taken += 1
                told += [current] if taken > 1 else []
            told.append(word)
        return super().parse_args(ctx, told)


class Commands(TyperGroup):
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the words name; a sweep asks for MLflow in haste here, and is patient once under way."""
        from pipelines.environment import hurried, let_idle_threads_sleep

        name, command, rest = super().resolve_command(ctx, args)
        if name in _WAITED_FOR:
            ctx.with_resource(hurried())
        if name in _ANSWER:
            let_idle_threads_sleep()
        if "--help" not in rest:
            _require_place(str(name))
            if name in _ASK_MLFLOW | {"sweep"} or (name == "reproduce" and "--plan" not in rest):
                _require_mlflow()
        return name, command, rest


def _require_place(command: str) -> None:
    """What needs params.yaml, or keeps something beside it, works in the project's folder alone."""
    from pipelines.console import require_project
    from pipelines.settings import load_settings

    if (
        command in {"sweep", "promote", "up", "describe", "recipe", "reproduce", "gc", "backup", "restore"}
        or (command in {"down", "status"} and not load_settings().services_folder.is_absolute())
        or (command == "ui" and not load_settings().tracking_uri.startswith("http"))
    ):
        require_project()


def _require_mlflow() -> None:
    """Whether MLflow's server answers is known before anything slow is imported."""
    from pipelines.environment import hurried
    from pipelines.records.server import require_answer
    from pipelines.settings import load_settings

    with hurried():
        require_answer(load_settings())


def reachable(model: str) -> str:
    """The option --model as it is, once a server that must give the version answers."""
    if re.fullmatch(r"(models:/)?[^/@:\s]+(@[^/@:\s]+|/\d+)", model) and not Path(model).is_dir():
        _require_mlflow()
    return model


def asks_mlflow(name: str) -> str:
    """An option's value as it is, once the server that it is for answers; without a value nobody is asked."""
    if name:
        _require_mlflow()
    return name


Model = Annotated[
    str,
    typer.Option("--model", "-m", callback=reachable,
                 help="An artefact's folder, or NAME@ALIAS or NAME/VERSION in the registry."),
]  # fmt: skip
DEFAULT_MODEL = "artifacts/prompt"

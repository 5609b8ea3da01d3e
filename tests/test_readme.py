"""README against the project: what it tells to type and to open is there."""

import re
from pathlib import Path

import pytest

from pipelines.commands.cli import app
from pipelines.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_two_commands_are_the_demo_and_the_tests() -> None:
    first = re.search(r"```sh\n(.*?)```", README, re.DOTALL)
    assert first is not None
    assert [line.split("#")[0].strip() for line in first[1].splitlines()] == ["make demo", "make test"]


def test_every_make_target_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets


def test_every_command_it_names_exists_and_every_command_is_named() -> None:
    named = set(re.findall(r"`(?:\.venv/bin/)?coop ([a-z]+)", README))
    known = app.registered_commands
    assert named == {command.name or command.callback.__name__ for command in known if command.callback}


def test_every_setting_is_named() -> None:
    named = set(re.findall(r"`COOP_([A-Z0-9_]+)`", README))
    assert named == {name.upper() for name in Settings.model_fields}


@pytest.mark.parametrize("target", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_every_link_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_every_stage_of_dvc_yaml_is_on_the_way_of_the_data() -> None:
    stages = re.findall(r"^  ([a-z]+):\n    cmd", (ROOT / "dvc.yaml").read_text(), re.MULTILINE)
    way = re.search(r"## The way of the data\n(.*?)\n## ", README, re.DOTALL)
    assert way is not None
    assert re.findall(r"^      ([a-z]+) ", way[1], re.MULTILINE) == stages

"""Dataset cards: what a folder, a CSV file or a card says about a data set, and the faults of a card."""

import os
from pathlib import Path

import pytest

from coop_core.data.catalog import GENERIC_TEMPLATE, Card, read_source
from coop_core.errors import DatasetError

CATALOG = sorted((Path(__file__).parents[1] / "catalog").glob("*.yaml"))
SHA256 = "a" * 64
CARD = f"""
name: rivers
title: Rivers and forests
licence: CC0
homepage: https://example.org
layout: csv
path: images
index: images.csv
class_names: {{forest_1: "forest", river_1: "river"}}
template: a satellite photo of a {{}}.
files:
  - name: images.zip
    sha256: {SHA256}
    sources:
      - https://example.org/images.zip
      - local.zip
    unpack: true
"""


def write_card(folder: Path, text: str) -> Path:
    path = folder / "card.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_folder_needs_no_card(tmp_path: Path) -> None:
    (tmp_path / "My rivers (2)").mkdir()
    card, folder = read_source(tmp_path / "My rivers (2)")
    assert (card.name, card.layout, card.template) == ("My-rivers-2", "folders", GENERIC_TEMPLATE)
    assert folder == tmp_path / "My rivers (2)"


@pytest.mark.parametrize("name", ["rivers", ".hidden", "été", "照片", "m²", "---", "+"])
def test_a_folder_of_any_name_gives_a_card(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert read_source(tmp_path / name)[0].name


def test_a_csv_file_needs_no_card(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label\n")
    card, folder = read_source(tmp_path / "list.csv")
    assert (card.layout, card.index, folder) == ("csv", "list.csv", tmp_path)


def test_a_folder_with_one_of_the_papers_split_files_is_read_by_it(tmp_path: Path) -> None:
    (tmp_path / "split_zhou_OxfordPets.json").write_text("{}")
    card, _ = read_source(tmp_path)
    assert (card.layout, card.index) == ("split-json", "split_zhou_OxfordPets.json")


def test_a_folder_with_two_split_files_asks_for_a_card(tmp_path: Path) -> None:
    for name in ("OxfordPets", "DTD"):
        (tmp_path / f"split_zhou_{name}.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"has 2 split_zhou_\*\.json files: name one in a dataset card"):
        read_source(tmp_path)


def test_a_card_says_all_it_can_say(tmp_path: Path) -> None:
    card, folder = read_source(write_card(tmp_path, CARD))
    assert (card.name, card.layout, card.path, card.index) == ("rivers", "csv", "images", "images.csv")
    assert card.files[0].sources == ["https://example.org/images.zip", "local.zip"]
    assert card.files[0].unpack
    assert folder == tmp_path


def test_a_card_needs_no_more_than_a_name(tmp_path: Path) -> None:
    card, _ = read_source(write_card(tmp_path, "name: rivers"))
    assert (card.layout, card.path, card.licence, card.template) == ("folders", ".", "not stated", GENERIC_TEMPLATE)


def test_a_mapping_of_class_names_gives_words_and_leaves_other_folders_their_own() -> None:
    card = Card(name="rivers", class_names={"n01": "great_river"})
    assert [card.class_words(folder) for folder in ("n01", "forest_floor")] == ["great river", "forest floor"]


def test_class_words_are_composed_unicode_with_single_spaces() -> None:
    assert Card(name="cafes").class_words("cafe\N{COMBINING ACUTE ACCENT}__noir ") == "café noir"


@pytest.mark.parametrize("template", ["a photo", "a {} or a {}", "", "a {0}"])
def test_a_template_needs_one_hole(tmp_path: Path, template: str) -> None:
    with pytest.raises(DatasetError, match=r"template: .*needs exactly one \{\} for the class name"):
        read_source(write_card(tmp_path, f'name: rivers\ntemplate: "{template}"'))


def test_a_template_with_another_kind_of_hole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="template"):
        read_source(write_card(tmp_path, 'name: rivers\ntemplate: "a {colour} {}"'))


def test_all_faults_of_a_card_come_at_once(tmp_path: Path) -> None:
    text = "name: ../x\nlayuot: csv\nlayout: tfrecord\ntemplate: no hole\nfiles: [{name: a/b, sha256: a, sources: []}]"
    with pytest.raises(DatasetError, match=r"dataset card .+card\.yaml: ") as caught:
        read_source(write_card(tmp_path, text))
    for key in ("name: ", "layuot: ", "layout: ", "template: ", "files.0.name: ", "files.0.sha256: ", "files.0.source"):
        assert key in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", "rivers"], ids=["empty", "list", "word"])
def test_a_card_that_is_no_mapping_is_a_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(DatasetError, match=r"card\.yaml: the file: "):
        read_source(write_card(tmp_path, text))


@pytest.mark.parametrize("text", ["name: [", "name: a\nname: b", "\tname: a"], ids=["open", "twice", "tab"])
def test_a_card_that_is_no_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(DatasetError, match=r"^dataset card .+card\.yaml is not readable YAML: [^\n]+$"):
        read_source(write_card(tmp_path, text))


@pytest.mark.parametrize("value", [
    "2001-99-99", "!!int abc", "!!int ''", "!!bool maybe", "!!float abc", "9" * 5_000,
    "[" * 20_000, "!!python/object:os.system x", "*nowhere",
], ids=lambda value: value[:20])  # fmt: skip
def test_a_value_that_yaml_cannot_read_is_one_line(tmp_path: Path, value: str) -> None:
    with pytest.raises(DatasetError, match=r"^dataset card .+card\.yaml is not readable YAML: [^\n]+$"):
        read_source(write_card(tmp_path, f"name: rivers\ntitle: {value}"))


@pytest.mark.parametrize("value", ["2001-01-01", ".inf", "!!set {a, b}", "&x [*x]", "1", "{1: 2}"])
def test_a_value_of_another_type_is_a_sentence_with_its_key(tmp_path: Path, value: str) -> None:
    with pytest.raises(DatasetError, match=r"card\.yaml: title: Input should be a valid string"):
        read_source(write_card(tmp_path, f"name: rivers\ntitle: {value}"))


@pytest.mark.parametrize("name", ["card.yaml", "list.csv", "list.yml"])
def test_a_pipe_is_a_sentence_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DatasetError, match=rf"{name} is neither a folder nor a regular file: name a dataset card"):
        read_source(tmp_path / name)


@pytest.mark.parametrize(("name", "layout"), [("LIST.CSV", "csv"), ("card.YAML", "folders")])
def test_a_suffix_counts_in_any_case(tmp_path: Path, name: str, layout: str) -> None:
    (tmp_path / name).write_text("name: rivers")
    assert read_source(tmp_path / name)[0].layout == layout


def test_half_a_character_in_a_card_is_a_sentence_that_can_be_printed(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"card\.yaml has half a character, such as \\ud800: write the whole one"):
        read_source(write_card(tmp_path, 'name: rivers\ntitle: "\\ud800"'))


def test_a_key_with_a_control_character_is_a_sentence_that_can_be_printed(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"card\.yaml: a\\x00b: Extra inputs") as caught:
        read_source(write_card(tmp_path, 'name: rivers\n"a\\0b": 1'))
    assert "\0" not in str(caught.value)


def test_a_card_that_is_not_utf_8_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "card.yaml").write_bytes("name: rivers\ntitle: Flüsse".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"card\.yaml is not readable YAML"):
        read_source(tmp_path / "card.yaml")


def test_a_source_that_does_not_exist_names_what_may_stand_there(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"dataset\.source .+rivers does not exist: name a dataset card \(\.yaml\)"):
        read_source(tmp_path / "rivers")


def test_a_card_that_does_not_exist_is_the_same_sentence(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"rivers\.yaml does not exist: name a dataset card"):
        read_source(tmp_path / "rivers.yaml")


def test_a_source_of_another_kind_names_what_may_stand_there(tmp_path: Path) -> None:
    (tmp_path / "rivers.zip").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"rivers\.zip has no suffix \.yaml or \.csv: name a dataset card"):
        read_source(tmp_path / "rivers.zip")


def test_the_catalog_has_cards() -> None:
    assert len(CATALOG) >= 10


@pytest.mark.parametrize("path", CATALOG, ids=lambda path: path.stem)
def test_a_card_of_the_catalog_is_valid_and_called_as_its_file(path: Path) -> None:
    assert read_source(path)[0].name == path.stem


@pytest.mark.parametrize("path", CATALOG, ids=lambda path: path.stem)
def test_a_template_of_the_catalog_has_one_hole_for_the_class_name(path: Path) -> None:
    filled = read_source(path)[0].template.format("river")
    assert filled.count("river") == 1
    assert "{" not in filled


@pytest.mark.parametrize("path", CATALOG, ids=lambda path: path.stem)
def test_a_card_of_the_catalog_says_first_what_it_is_and_where_its_licence_stands(path: Path) -> None:
    card, _ = read_source(path)
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert card.licence != "not stated"
    assert card.homepage.startswith("https://")


@pytest.mark.parametrize("path", CATALOG, ids=lambda path: path.stem)
def test_a_card_of_the_catalog_names_the_index_its_layout_needs(path: Path) -> None:
    card, _ = read_source(path)
    assert bool(card.index) == (card.layout in {"csv", "split-json", "lists"})


def test_the_four_files_of_fashion_mnist_have_two_sources_each() -> None:
    card, _ = read_source(next(path for path in CATALOG if path.stem == "fashion-mnist"))
    assert [(file.name, [source.rsplit("/", 1)[1] for source in file.sources]) for file in card.files] == [
        (name, [name, name])
        for name in (
            "train-images-idx3-ubyte.gz",
            "train-labels-idx1-ubyte.gz",
            "t10k-images-idx3-ubyte.gz",
            "t10k-labels-idx1-ubyte.gz",
        )
    ]

"""Safe files: whole or absent, digests that stay, and sentences for damaged ones."""

import hashlib
import json
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from coop_core.errors import ArtifactError
from coop_core.files import (
    digest_bytes,
    digest_file,
    digest_json,
    digest_path,
    read_array,
    read_json,
    read_tensors,
    write_array,
    write_json,
    write_tensors,
    write_text,
)


class NoJson:
    """A value that JSON cannot hold."""


class FailingText(str):
    """Text that fails while it is written, as a full disk would."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        raise OSError("no space left on device")


def test_json_comes_back_as_it_went(tmp_path: Path) -> None:
    value = {"name": "Süßwasser", "shots": [1, 2, 4], "seed": None, "share": 0.1}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_json_is_written_for_people_indented_and_in_plain_letters(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "Süß"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "name": "Süß"\n}\n'


def test_tensors_come_back_bit_for_bit_with_their_metadata(tmp_path: Path) -> None:
    tensors = {"context_vectors": torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), "n": torch.tensor(3)}
    write_tensors(tmp_path / "a.safetensors", tensors, {"method": "coop"})
    found, metadata = read_tensors(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert metadata == {"method": "coop"}


def test_tensors_without_metadata_have_an_empty_one(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    assert read_tensors(tmp_path / "a.safetensors")[1] == {}


def test_a_transposed_tensor_that_needs_gradients_can_be_written(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).requires_grad_().T
    write_tensors(tmp_path / "a.safetensors", {"a": tensor})
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")[0]["a"], tensor.detach())


def test_arrays_come_back_mapped_into_memory(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_array(tmp_path / "a.npy", array)
    found = read_array(tmp_path / "a.npy")
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, array)


def test_arrays_of_objects_are_never_pickled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        write_array(tmp_path / "a.npy", np.array([NoJson()], dtype=object))
    assert list(tmp_path.iterdir()) == []


def test_folders_that_lack_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "er" / "a.txt", "x")
    assert (tmp_path / "deep" / "er" / "a.txt").read_text() == "x"


def test_a_written_file_can_be_read_by_others(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "x")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="no space left"):
        write_text(path, FailingText("new"))
    assert path.read_text() == "old"


def test_a_write_that_fails_leaves_nothing_beside_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no space left"):
        write_text(tmp_path / "a.txt", FailingText("new"))
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", "old")
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "a.json", {"good": 1, "bad": NoJson()})
    assert read_json(tmp_path / "a.json") == "old"


def test_the_digest_of_bytes_is_sha256() -> None:
    assert digest_bytes(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_digest_of_a_file_larger_than_one_read_is_that_of_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "a.bin").write_bytes(content)
    assert digest_file(tmp_path / "a.bin") == hashlib.sha256(content).hexdigest()


def test_the_digest_of_json_ignores_the_order_of_keys() -> None:
    assert digest_json({"a": 1, "b": [1, 2]}) == digest_json({"b": [1, 2], "a": 1})


def test_the_digest_of_json_heeds_the_order_of_lists() -> None:
    assert digest_json([1, 2]) != digest_json([2, 1])


def test_the_digest_of_json_never_changes_between_releases() -> None:
    expected = hashlib.sha256('{"a": "ü", "b": [1, 2.5, null]}'.encode()).hexdigest()
    assert digest_json({"b": [1, 2.5, None], "a": "ü"}) == expected


def test_a_missing_json_file_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"split\.json is missing: run the stage that writes it with `dvc repro`"):
        read_json(tmp_path / "split.json")


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"{'a': 1}", b"\xff\xfe{}"], ids=["empty", "cut", "odd", "utf16"])
def test_damaged_json_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"a\.json is not readable JSON \(.+\): delete it and run `dvc repro`"):
        read_json(tmp_path / "a.json")


def test_a_missing_safetensors_file_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"state\.safetensors is missing: run the stage"):
        read_tensors(tmp_path / "state.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_a_truncated_safetensors_file_is_a_sentence(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(64)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=r"a\.safetensors is damaged \(.+\): delete it and write it again"):
        read_tensors(path)


def test_a_json_file_named_safetensors_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text(json.dumps({"a": [0.0] * 100}))
    with pytest.raises(ArtifactError, match=r"a\.safetensors is damaged"):
        read_tensors(tmp_path / "a.safetensors")


def test_a_missing_array_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"train\.npy is missing: run the stage"):
        read_array(tmp_path / "train.npy")


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_a_truncated_array_is_a_sentence(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.npy"
    write_array(path, np.zeros((8, 8), dtype=np.float32))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=r"a\.npy is damaged \(.+\): delete it and run `dvc repro`"):
        read_array(path)


def test_a_pickled_array_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ArtifactError, match=r"a\.npy is damaged"):
        read_array(tmp_path / "a.npy")


def test_the_digest_of_a_folder_is_that_of_its_files_and_their_names(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "deep").mkdir(parents=True)
        (tmp_path / folder / "deep/weights.bin").write_bytes(b"1")
    first = digest_path(tmp_path / "a")
    assert first == digest_path(tmp_path / "b") != ""

    (tmp_path / "b/deep/weights.bin").write_bytes(b"2")
    (tmp_path / "a/deep/weights.bin").rename(tmp_path / "a/deep/other.bin")
    assert len({first, digest_path(tmp_path / "a"), digest_path(tmp_path / "b"), digest_path(tmp_path / "none")}) == 4
    assert digest_path(tmp_path / "a/deep/other.bin") == digest_file(tmp_path / "a/deep/other.bin")

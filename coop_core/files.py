"""Safe files: values -> JSON, npy and safetensors that are whole or absent, and digests of all of them."""

import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from coop_core.errors import ArtifactError


def digest_bytes(data: bytes | memoryview) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_path(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files with their names; "" where there is nothing."""
    if path.is_file():
        return digest_file(path)
    inside = [[found.relative_to(path).as_posix(), digest_file(found)] for found in path.rglob("*") if found.is_file()]
    return digest_json(sorted(inside)) if path.is_dir() else ""


def digest_code(folder: Path) -> str:
    """SHA-256 of a folder's Python files with their names, at any depth."""
    sources = sorted(folder.rglob("*.py"))
    return digest_json([[path.relative_to(folder).as_posix(), digest_file(path)] for path in sources])


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value; the order of keys does not matter."""
    return digest_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def write_text(path: Path, text: str) -> None:
    _write_whole(path, lambda file: file.write(text.encode()))


def as_csv(rows: Iterable[Iterable[Any]]) -> str:
    """Rows, the head first -> a CSV of lines that end as on Unix; None is an empty cell."""
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    return table.getvalue()


def table_as_csv(lines: Sequence[Mapping[str, Any]], fields: Sequence[str] | None = None) -> str:
    """Lines by field -> a CSV; without `fields`, those of all lines in the order they are first seen."""
    fields = list(dict.fromkeys(name for line in lines for name in line)) if fields is None else fields
    return as_csv([fields, *([line.get(name) for name in fields] for line in lines)])


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    _write_whole(path, lambda file: np.save(file, array, allow_pickle=False))


def write_array_in_pieces(
    path: Path, pieces: Iterable[np.ndarray], *, shape: tuple[int, ...], dtype: type[np.generic]
) -> None:
    """Pieces that together fill `shape`, row after row -> the file `write_array` makes of the whole, never held.

    Written as a stream, not through a mapping: a full disk is then an error and not a signal that kills.
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}

    def write(file: IO[bytes]) -> None:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype=dtype).tobytes())

    _write_whole(path, write)


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Torch tensors -> one safetensors file; they are copied to the CPU and made contiguous."""
    from safetensors.torch import save

    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write_whole(path, lambda file: file.write(save(on_cpu, metadata)))


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """One npz file."""
    _write_whole(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: run the stage that writes it with `dvc repro`") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path} is not readable JSON ({error}): delete it and run `dvc repro`") from None


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A safetensors file -> (tensors on the CPU, its text metadata)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: run the stage that writes it with `dvc repro`") from None
    except SafetensorError as error:
        raise ArtifactError(f"{path} is damaged ({error}): delete it and write it again") from None


def read_array(path: Path) -> np.ndarray:
    """A npy file, mapped into memory rather than read."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: run the stage that writes it with `dvc repro`") from None
    except (ValueError, EOFError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): delete it and run `dvc repro`") from None


@contextmanager
def whole_folder(target: Path, *, marker: str) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends; after a fault nothing of it is left.

    `target` may be absent, empty, or what an earlier call made of the same kind, told by the file `marker`.

    Raises
    ------
    ArtifactError
        When `target` holds anything else.
    """
    if target.exists() and not (target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))):
        raise ArtifactError(f"{target} is there already and holds something else: name another folder with --to")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
        made, earlier = Path(beside) / "made", Path(beside) / "earlier"
        made.mkdir()
        yield made
        if target.exists():
            os.rename(target, earlier)
        try:
            os.rename(made, target)
        except OSError:
            if earlier.exists():
                os.rename(earlier, target)
            raise


def _write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write beside the target and rename, so that a kill or a full disk leaves the old file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; an artefact is to be shared
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

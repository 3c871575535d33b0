"""A data set as a tree of image files, ``{train,test}/CLASS/*``, or as a tar of such a tree."""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from bdhf.data.download import one_line
from bdhf.data.images import Data, DataError, digest

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_PARTS = ("train", "test")


def find_tree(root: Path, name: str) -> Path | None:
    """A folder or tar under ``root`` that holds the tree of data set ``name``.

    Looks for ``train`` and ``test`` in ``root/<name>``, then for ``<name>*.tar*`` in both, and
    only then for ``train`` and ``test`` in ``root`` itself, which may be another data set's.
    """
    if _is_tree(root / name):
        return root / name
    for folder in (root, root / name):
        archives = sorted(p for p in folder.glob(f"{name}*.tar*") if p.is_file())
        if archives:
            return archives[0]
    return root if _is_tree(root) else None


def _is_tree(folder: Path) -> bool:
    return all((folder / part).is_dir() for part in _PARTS)


def load_tree(path: Path, mode: str) -> tuple[Data, Data]:
    """Training and test data of a tree or tar: pixels (rows, channels, height, width) and labels.

    Files are verified against a ``SHA256SUMS`` beside them where there is one. Decoded pixels
    are kept in a cache of their own (`cache_folder`), never beside the data.

    Args:
        path: the folder or tar.
        mode: PIL's mode of the decoded images, ``"RGB"`` or ``"L"``.

    Returns:
        uint8 tensors; labels number the classes in alphabetical order.

    Raises:
        DataError: a file is corrupt, or classes or sizes do not fit together.
    """
    if path.is_dir():
        return _decoded(_files_of_folder(path, _sums_beside(path)), path, mode)
    sha256 = _verified(path, _sums_beside(path))
    cache = cache_folder() / f"{sha256}-{mode}.pt"
    cached = _from_cache(cache)
    if cached is None:
        cached = _decoded(_files_of_tar(path), path, mode)
        _to_cache(cache, cached)
    return cached


def cache_folder() -> Path:
    """Where decoded archives are kept: ``$XDG_CACHE_HOME/bdhf``, by default ``~/.cache/bdhf``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bdhf"


def _files_of_folder(root: Path, sums: dict[Path, str]) -> Iterator[tuple[str, bytes]]:
    for path in sorted(p for part in _PARTS for p in (root / part).glob("*/*") if p.is_file()):
        content = path.read_bytes()
        expected = sums.get(path.resolve())
        if expected is not None and hashlib.sha256(content).hexdigest() != expected:
            raise DataError(_mismatch(path))
        yield path.relative_to(root).as_posix(), content


def _files_of_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None:
                    yield member.name, file.read()
    except (tarfile.TarError, lzma.LZMAError, zlib.error, OSError, EOFError) as error:
        raise DataError(
            f"{path} is corrupt or cut short ({one_line(error)}). Put the right file there, or "
            "delete it"
        ) from error


def _decoded(files: Iterator[tuple[str, bytes]], source: Path, mode: str) -> tuple[Data, Data]:
    pixels: dict[str, list[np.ndarray]] = {part: [] for part in _PARTS}
    labels: dict[str, list[str]] = {part: [] for part in _PARTS}
    for name, content in sorted(files):  # the order in a tar is an accident
        path = PurePosixPath(name)
        if len(path.parts) < 3 or path.suffix.lower() not in _SUFFIXES:
            continue
        part, label = path.parts[-3:-1]
        if part in _PARTS:
            pixels[part].append(_decode(f"{source}: {name}", content, mode))
            labels[part].append(label)
    classes = sorted(set(labels["train"]))
    if not classes or classes != sorted(set(labels["test"])):
        raise DataError(
            f"{source} must hold train/CLASS/* and test/CLASS/* with the same classes; it has "
            f"{len(classes)} classes in train and {len(set(labels['test']))} in test"
        )
    number = {label: position for position, label in enumerate(classes)}

    def data(part: str) -> Data:
        sizes = {image.shape for image in pixels[part]}
        if len(sizes) > 1:
            raise DataError(f"{source}: images of different sizes in {part}: {sorted(sizes)}")
        numbers = torch.tensor([number[label] for label in labels[part]], dtype=torch.uint8)
        return torch.from_numpy(np.stack(pixels[part])), numbers

    return data("train"), data("test")


def _decode(name: str, content: bytes, mode: str) -> np.ndarray:
    """An image as (channels, height, width)."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            values = np.asarray(image.convert(mode))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{name} is not an image that can be read ({one_line(error)})") from error
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def _sums_beside(path: Path) -> dict[Path, str]:
    """The sums of a ``SHA256SUMS`` in the folder or the one above, by absolute path."""
    for folder in (path, path.parent) if path.is_dir() else (path.parent,):
        file = folder / "SHA256SUMS"
        if file.is_file():
            return dict(_sum(file, line) for line in file.read_bytes().splitlines() if line.strip())
    return {}


def _sum(file: Path, line: bytes) -> tuple[Path, str]:
    match = re.fullmatch(rb"([0-9a-fA-F]{64}) [ *](.+)", line.strip())
    if match is None:
        raise DataError(
            f"{file} has a line that is not 'SHA256  NAME': {line!r}. Correct or delete the file"
        )
    return (file.parent / os.fsdecode(match[2])).resolve(), match[1].decode().lower()


def _verified(path: Path, sums: dict[Path, str]) -> str:
    """The sha256 of a file, which is the one expected where one is."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if sums.get(path.resolve(), found) != found:
        raise DataError(_mismatch(path))
    return found


def _mismatch(path: Path) -> str:
    return (
        f"{path} is corrupt: its sha256 is not the one in the SHA256SUMS beside it. Put the right "
        "file there"
    )


def _from_cache(path: Path) -> tuple[Data, Data] | None:
    try:
        train, test, expected = torch.load(path, weights_only=True)
    except Exception:  # not there, or not whole: it will be made again
        return None
    return (train, test) if digest(train, test) == expected else None


def _to_cache(path: Path, data: tuple[Data, Data]) -> None:
    """Keep decoded data; where that is not possible, decoding again is all it costs."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            torch.save((*data, digest(*data)), Path(temporary) / path.name)
            os.replace(Path(temporary) / path.name, path)
    except (OSError, RuntimeError):
        pass

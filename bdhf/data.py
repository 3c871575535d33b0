"""The data sets, as whole tensors: found in a folder, downloaded, or shipped with a dependency."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class DataError(RuntimeError):
    """Data that is missing or corrupt; the message names the file and what to do."""


@dataclass(frozen=True)
class Images:
    """A labelled data set of grey images.

    Attributes:
        train_images, test_images: float32 (rows, height, width), from 0 to 1.
        train_labels, test_labels: int64 (rows,).
        source: where it came from, for the run's provenance.
        sha256: over the decoded bytes, so that it does not depend on how they were stored.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    source: str
    sha256: str


def load(name: str, root: str) -> Images:
    """The data set ``name``, from the folder ``root`` where it needs one.

    Raises:
        DataError: there is no such data set, or it is neither there nor to be downloaded, or a
            file of it is corrupt.
    """
    if name not in LOADERS:
        raise DataError(f"data.name={name}: must be one of {', '.join(sorted(LOADERS))}")
    return LOADERS[name](Path(root).expanduser())


# MNIST (LeCun, Cortes, Burges). The md5 sums are those of the original unpacked files.
_MNIST = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def _mnist(root: Path) -> Images:
    folder = _mnist_folder(root)
    if folder is None:
        _download_mnist(root)
        folder = _mnist_folder(root)
    if folder is None:
        raise DataError(f"MNIST was downloaded to {root}, but its four files are not there")
    digest = hashlib.sha256()
    tensors = []
    for name, md5 in _MNIST.items():
        path = _stored(folder, name)
        assert path is not None
        content = _unpacked(path)
        if hashlib.md5(content).hexdigest() != md5:
            raise DataError(
                f"{path} is corrupt or is not MNIST's {name}: its unpacked md5 is not {md5}. "
                "Delete it to have it downloaded again, or put the right file there"
            )
        digest.update(content)
        tensors.append(_idx(content))
    train_images, train_labels, test_images, test_labels = tensors
    return Images(
        train_images / 255,
        train_labels.long(),
        test_images / 255,
        test_labels.long(),
        source=f"MNIST, idx files in {folder}",
        sha256=digest.hexdigest(),
    )


def _mnist_folder(root: Path) -> Path | None:
    """The first folder that holds all four files, plain or gzipped."""
    for folder in _mnist_folders(root):
        if all(_stored(folder, name) for name in _MNIST):
            return folder
    return None


def _mnist_folders(root: Path) -> list[Path]:
    return [root, root / "mnist", root / "MNIST", root / "MNIST" / "raw"]


def _stored(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _unpacked(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read ({error}). Delete it to have it downloaded again, or put the "
            "right file there"
        ) from error


def _idx(content: bytes) -> Tensor:
    """Decode the idx format: two zero bytes, the type (8: unsigned byte), the rank, the sizes."""
    rank = content[3]
    shape = np.frombuffer(content, ">i4", count=rank, offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    return torch.from_numpy(values.reshape(tuple(shape)).copy())


def _download_mnist(root: Path) -> None:
    from torchvision.datasets import MNIST

    try:
        MNIST(str(root), download=True)
    except (OSError, RuntimeError) as error:
        places = ", ".join(str(folder) for folder in _mnist_folders(root))
        raise DataError(
            f"MNIST is not there and cannot be downloaded ({error}). Looked for "
            f"{', '.join(_MNIST)} (plain or .gz) in {places}. Put the four files into one of "
            "these, or name their folder with data.root=FOLDER or BDHF_DATA=FOLDER"
        ) from error


def _digits(root: Path) -> Images:
    """The 1,797 8x8 digits that ship with scikit-learn; every fifth, in a fixed shuffle, tests."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    test, train = order[::5], order[torch.arange(len(order)) % 5 != 0]
    images = torch.from_numpy(digits.images).float() / 16
    labels = torch.from_numpy(digits.target).long()
    return Images(
        images[train],
        labels[train],
        images[test],
        labels[test],
        source="scikit-learn's digits (UCI optical recognition of handwritten digits)",
        sha256=hashlib.sha256(digits.images.tobytes() + digits.target.tobytes()).hexdigest(),
    )


#: Data sets by name: a function of the folder in which they lie.
LOADERS: dict[str, Callable[[Path], Images]] = {"mnist": _mnist, "digits": _digits}

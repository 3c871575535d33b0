"""MNIST (LeCun, Cortes, Burges), from its four idx files."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bdhf.data.download import download, one_line
from bdhf.data.images import DataError, Images, images_from_bytes

#: The files with the md5 sums of the original ones, unpacked.
FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def load_mnist(root: Path) -> Images:
    """MNIST from ``root``, downloaded to it where it is not there.

    Raises:
        DataError: it is not there and cannot be downloaded, or a file is corrupt.
    """
    from torchvision.datasets import MNIST

    folder = _folder(root)
    if folder is None:
        _refuse_a_part(root)
        places = ", ".join(map(str, _folders(root)))
        download(
            lambda folder: MNIST(folder, download=True),
            root,
            "MNIST",
            f"{', '.join(FILES)} (plain or .gz) in {places}",
            "Put the four files into one of these",
        )
        folder = _folder(root)
    if folder is None:
        raise DataError(f"MNIST was downloaded to {root}, but its four files are not there")
    train_images, train_labels, test_images, test_labels = (
        _checked(folder, name, md5) for name, md5 in FILES.items()
    )
    return images_from_bytes(
        (train_images.unsqueeze(1), train_labels),
        (test_images.unsqueeze(1), test_labels),
        "MNIST, idx files",
    )


def _folder(root: Path) -> Path | None:
    """The first folder that holds all four files, plain or gzipped."""
    for folder in _folders(root):
        if all(_stored(folder, name) for name in FILES):
            return folder
    return None


def _refuse_a_part(root: Path) -> None:
    """Some of the files are somebody's own, which a download would overwrite."""
    for folder in _folders(root):
        missing = [name for name in FILES if _stored(folder, name) is None]
        if len(missing) < len(FILES):
            raise DataError(
                f"{folder} holds a part of MNIST only: {', '.join(missing)} is missing. Put it "
                "there, or delete the others to have all downloaded"
            )


def _folders(root: Path) -> list[Path]:
    return [root, root / "mnist", root / "MNIST", root / "MNIST" / "raw"]


def _stored(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _checked(folder: Path, name: str, md5: str) -> Tensor:
    path = _stored(folder, name)
    assert path is not None
    remedy = "Delete it to have it downloaded again, or put the right file there"
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({one_line(error)}). {remedy}") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise DataError(
            f"{path} is corrupt or is not MNIST's {name}: its unpacked md5 is not {md5}. {remedy}"
        )
    return _idx(content)


def _idx(content: bytes) -> Tensor:
    """Decode the idx format: two zero bytes, the type (8: unsigned byte), the rank, the sizes."""
    rank = content[3]
    shape = np.frombuffer(content, ">i4", count=rank, offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    return torch.from_numpy(values.reshape(tuple(shape)).copy())

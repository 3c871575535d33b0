"""The data sets, as whole tensors: found in a folder, downloaded, or shipped with a dependency.

What lies in the folder already is used as it is and never written to.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock

from bdhf.data.cifar import load_cifar10
from bdhf.data.digits import load_digits
from bdhf.data.images import Data, DataError, Images, with_validation
from bdhf.data.mnist import load_mnist

__all__ = [
    "LOADERS",
    "SHAPES",
    "TRAIN_ROWS",
    "Data",
    "DataError",
    "Images",
    "load",
    "stand_in",
]

#: Data sets by name: a function of the folder in which they lie.
LOADERS: dict[str, Callable[[Path], Images]] = {
    "mnist": load_mnist,
    "cifar10": load_cifar10,
    "digits": load_digits,
}


#: The sizes of their training sets, to check others against before anything is loaded.
TRAIN_ROWS = {"mnist": 60_000, "cifar10": 50_000, "digits": 1_437}

#: The shapes of their images: channels, height, width.
SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "digits": (1, 8, 8)}


def stand_in(name: str, rows: int) -> Images:
    """Random images of a data set's shape, to time work on before there is any data."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(rows, *SHAPES[name], generator=generator)
    data = pixels, torch.randint(10, (rows,), generator=generator)
    return Images(data, data, "random", "")


def load(name: str, root: str, validation_rows: int | None = None) -> Images:
    """The data set ``name``, from the folder ``root`` where it needs one.

    With ``validation_rows`` so many rows of the training set take the place of the test set.

    Raises:
        DataError: there is no such data set, or it is neither there nor to be downloaded, or a
            file of it is corrupt.
    """
    if name not in LOADERS:
        raise DataError(f"data.name={name}: must be one of {', '.join(sorted(LOADERS))}")
    folder = Path(root).expanduser()
    digest = hashlib.sha256(f"{name} {folder.absolute()}".encode()).hexdigest()
    # What several processes miss, one downloads. Not in the folder, which may be someone else's.
    lock = Path(tempfile.gettempdir()) / f"bdhf-{os.getuid()}-{digest[:16]}.lock"
    with FileLock(lock):
        images = LOADERS[name](folder)
    return images if validation_rows is None else with_validation(images, validation_rows)

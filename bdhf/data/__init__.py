"""The data sets, as whole tensors: found in a folder, downloaded, or shipped with a dependency.

What lies in the folder already is used as it is and never written to.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bdhf.data.cifar import load_cifar10
from bdhf.data.digits import load_digits
from bdhf.data.images import Data, DataError, Images
from bdhf.data.mnist import load_mnist

__all__ = ["LOADERS", "TRAIN_ROWS", "Data", "DataError", "Images", "load"]

#: Data sets by name: a function of the folder in which they lie.
LOADERS: dict[str, Callable[[Path], Images]] = {
    "mnist": load_mnist,
    "cifar10": load_cifar10,
    "digits": load_digits,
}


#: The sizes of their training sets, to check others against before anything is loaded.
TRAIN_ROWS = {"mnist": 60_000, "cifar10": 50_000, "digits": 1_437}


def load(name: str, root: str) -> Images:
    """The data set ``name``, from the folder ``root`` where it needs one.

    Raises:
        DataError: there is no such data set, or it is neither there nor to be downloaded, or a
            file of it is corrupt.
    """
    if name not in LOADERS:
        raise DataError(f"data.name={name}: must be one of {', '.join(sorted(LOADERS))}")
    return LOADERS[name](Path(root).expanduser())

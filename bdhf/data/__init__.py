"""The data sets, as whole tensors: found in a folder, downloaded, or shipped with a dependency.

What lies in the folder already is used as it is and never written to.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bdhf.data.cifar import load_cifar10
from bdhf.data.digits import load_digits
from bdhf.data.images import Data, DataError, Images
from bdhf.data.mnist import load_mnist

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

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
    folder = Path(root).expanduser()
    with _alone(name, folder):
        return LOADERS[name](folder)


@contextmanager
def _alone(name: str, folder: Path) -> Iterator[None]:
    """Wait for other processes that load the same, so that what is missing is downloaded once."""
    if fcntl is None:
        yield
        return
    digest = hashlib.sha256(f"{name} {folder.absolute()}".encode()).hexdigest()
    # Not in the folder itself, which may be someone else's.
    with (Path(tempfile.gettempdir()) / f"bdhf-{os.getuid()}-{digest[:16]}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

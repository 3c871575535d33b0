"""CIFAR-10 (Krizhevsky 2009): the standard archive, or a tree of images."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch

from bdhf.data.download import download, one_line
from bdhf.data.folders import find_tree, load_tree
from bdhf.data.images import Data, DataError, Images, images_from_bytes

ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
ROWS = (50_000, 10_000)

#: The archive's files with their md5 sums, as torchvision lists them.
_TRAIN = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
_TEST = {"test_batch": "40351d587109b95175f43aff81a1287e"}

_REMEDY = "Put the right file there, or delete it to have it downloaded again"


def load_cifar10(root: Path) -> Images:
    """CIFAR-10 from ``root``, downloaded to it where it is not there.

    Raises:
        DataError: it is not there and cannot be downloaded, or a file is corrupt.
    """
    from torchvision.datasets import CIFAR10

    found = _found(root)
    if found is None:
        download(
            lambda folder: CIFAR10(folder, download=True),
            root,
            "CIFAR-10",
            f"{ARCHIVE}, {FOLDER}/, cifar10/{{train,test}}/CLASS/*, {{train,test}}/CLASS/* and "
            f"cifar10*.tar* in {root}",
            "Put one of these there",
        )
        found = _found(root)
    if found is None:
        raise DataError(f"CIFAR-10 was downloaded to {root}, but is not there")
    return found


def _found(root: Path) -> Images | None:
    for folder in (root, root / "cifar10"):
        if (folder / FOLDER).is_dir():
            read = _FolderFiles(folder / FOLDER)
            return _standard(read, "CIFAR-10, standard files")
        if (folder / ARCHIVE).is_file():
            return _standard(_ArchiveFiles(folder / ARCHIVE), "CIFAR-10, standard files")
    tree = find_tree(root, "cifar10")
    return None if tree is None else _from_tree(tree)


def _from_tree(path: Path) -> Images:
    train, test = load_tree(path, "RGB")
    for data, rows, part in zip((train, test), ROWS, ("train", "test"), strict=True):
        shape = (rows, 3, 32, 32)
        classes = len(data[1].unique())
        if data[0].shape != shape or classes != 10:
            raise DataError(
                f"{path} is not the whole of CIFAR-10: {part} has {classes} classes and pixels "
                f"{tuple(data[0].shape)}, where 10 classes and {shape} are expected"
            )
    return images_from_bytes(
        train, test, f"CIFAR-10 as image files ({path.name}), pixels as their compression left them"
    )


class _FolderFiles:
    """The standard files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str) -> tuple[str, bytes]:
        path = self.folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing. {_REMEDY}")
        return str(path), path.read_bytes()


class _ArchiveFiles:
    """The standard files in the standard archive, read without unpacking it to disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, bytes] = {}
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    file = archive.extractfile(member) if member.isfile() else None
                    if file is not None:
                        self.files[Path(member.name).name] = file.read()
        except (tarfile.TarError, zlib.error, OSError, EOFError) as error:
            raise DataError(
                f"{path} is corrupt or cut short ({one_line(error)}). {_REMEDY}"
            ) from error

    def __call__(self, name: str) -> tuple[str, bytes]:
        if name not in self.files:
            raise DataError(f"{self.path} has no file {name}. {_REMEDY}")
        return f"{self.path}: {name}", self.files[name]


def _standard(read: _FolderFiles | _ArchiveFiles, source: str) -> Images:
    return images_from_bytes(_batches(read, _TRAIN), _batches(read, _TEST), source)


def _batches(read: _FolderFiles | _ArchiveFiles, sums: dict[str, str]) -> Data:
    pixels, labels = [], []
    for name, md5 in sums.items():
        path, content = read(name)
        # Before it is unpickled: a pickle may run anything.
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise DataError(f"{path} is corrupt: its md5 is not {md5}. {_REMEDY}")
        batch = pickle.loads(content, encoding="latin1")
        pixels.append(np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32))
        labels.append(np.asarray(batch["labels"], np.uint8))
    return torch.from_numpy(np.concatenate(pixels)), torch.from_numpy(np.concatenate(labels))

"""Data that is found, downloaded, missing, corrupt or cut short, in every form that is read."""

from __future__ import annotations

import functools
import gc
import gzip
import hashlib
import http.server
import io
import pickle
import tarfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from suite import data_folder, write_idx

from bdhf.data import LOADERS, TRAIN_ROWS, DataError, cifar, load, mnist
from bdhf.data.folders import find_tree, load_tree

NAMES = list(mnist.FILES)
CLASSES = ("cat", "dog", "owl")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "bdhf"


def random_bytes(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# MNIST


def small_mnist() -> dict[str, np.ndarray]:
    """Four small arrays that pass for MNIST where their md5 sums are expected."""
    shapes = ((5, 28, 28), (5,), (3, 28, 28), (3,))
    arrays = [random_bytes(*shape, seed=k) for k, shape in enumerate(shapes)]
    return {name: a if a.ndim > 1 else a % 10 for name, a in zip(NAMES, arrays, strict=True)}


def write_mnist(folder: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = {
        name: hashlib.md5(write_idx(folder / f"{name}{suffix}", values)).hexdigest()
        for name, values in small_mnist().items()
    }
    monkeypatch.setattr(mnist, "FILES", sums)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", [".", "mnist", "MNIST/raw"])
def test_mnist_is_read_from_the_usual_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, suffix: str
) -> None:
    write_mnist(tmp_path / folder, suffix, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    images = load("mnist", str(tmp_path))
    expected = torch.from_numpy(small_mnist()[NAMES[0]]).float() / 255
    assert torch.equal(images.train[0], expected.unsqueeze(1))
    assert torch.equal(images.test[1], torch.from_numpy(small_mnist()[NAMES[3]]).long())
    assert sorted(tmp_path.rglob("*")) == before  # never written to


def test_checksum_does_not_depend_on_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = set()
    for folder, suffix in (("a", ""), ("b", ".gz")):
        write_mnist(tmp_path / folder, suffix, monkeypatch)
        sums.add(load("mnist", str(tmp_path / folder)).sha256)
    assert len(sums) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip", "empty"])
@pytest.mark.parametrize("name", NAMES)
def test_corrupt_mnist_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    write_mnist(tmp_path, ".gz", monkeypatch)
    path = tmp_path / f"{name}.gz"
    content = path.read_bytes()
    flipped = bytearray(gzip.decompress(content))
    flipped[-1] ^= 1
    path.write_bytes(
        {
            "cut": content[: len(content) // 2],
            "flipped": gzip.compress(bytes(flipped)),
            "not gzip": b"<html>404</html>",
            "empty": b"",
        }[damage]
    )
    with pytest.raises(DataError, match=name) as caught:
        load("mnist", str(tmp_path))
    assert "Delete it to have it downloaded again, or put the right file there" in str(caught.value)


def test_unknown_data_set_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.name=svhn: must be one of cifar10, digits, mnist"):
        load("svhn", "data")


# Downloads, from a server on loopback


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; a file whose name is in ``halved`` ends after half its bytes."""

    halved = False

    def log_message(self, format: str, *args: object) -> None: ...

    def copyfile(self, source, outputfile) -> None:
        content = source.read()
        outputfile.write(content[: len(content) // 2] if self.halved else content)


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder and the address at which it is served."""
    folder = tmp_path_factory.mktemp("served")
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{httpd.server_address[1]}/"
        httpd.shutdown()
        thread.join()
    with warnings.catch_warnings():  # torchvision leaves sockets of failed downloads open
        warnings.simplefilter("ignore")
        gc.collect()


def serve_mnist(folder: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import MNIST

    write_mnist(folder, ".gz", monkeypatch)
    files = [folder / f"{name}.gz" for name in NAMES]
    resources = [(f.name, hashlib.md5(f.read_bytes()).hexdigest()) for f in files]
    monkeypatch.setattr(MNIST, "mirrors", [address])
    monkeypatch.setattr(MNIST, "resources", resources)


def serve_cifar(folder: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    archive = write_cifar(folder, monkeypatch)
    monkeypatch.setattr(CIFAR10, "url", address + cifar.ARCHIVE)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [list(row) for row in cifar._TRAIN.items()])
    monkeypatch.setattr(CIFAR10, "test_list", [list(row) for row in cifar._TEST.items()])
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)


SERVED = {"mnist": serve_mnist, "cifar10": serve_cifar}


@pytest.mark.parametrize("name", SERVED)
def test_download_of_the_right_files(
    tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    SERVED[name](*server, monkeypatch)
    downloaded = load(name, str(tmp_path / "data"))
    assert downloaded.sha256 == load(name, str(server[0])).sha256
    monkeypatch.setattr(QuietHandler, "do_GET", None)  # a second time needs no network
    assert load(name, str(tmp_path / "data")).sha256 == downloaded.sha256


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("fault", ["wrong", "half", "missing"])
@pytest.mark.parametrize("name", SERVED)
def test_download_of_something_else_is_refused(
    tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, name: str, fault: str
) -> None:
    SERVED[name](*server, monkeypatch)
    for path in server[0].glob("*.gz"):
        if fault == "wrong":
            path.write_bytes(gzip.compress(b"something else"))
        elif fault == "missing":
            path.unlink()
    monkeypatch.setattr(QuietHandler, "halved", fault == "half")
    with pytest.raises(DataError, match="is not there and cannot be downloaded") as caught:
        load(name, str(tmp_path / "data"))
    assert f"{tmp_path / 'data'}" in str(caught.value)
    assert "data.root=FOLDER or BDHF_DATA=FOLDER" in str(caught.value)
    # Once the server is right, the next attempt is not hindered by what came before.
    monkeypatch.setattr(QuietHandler, "halved", False)
    SERVED[name](*server, monkeypatch)
    load(name, str(tmp_path / "data"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("answer", [b"<html>log in first</html>\n", b"HTTP/1.0 200 OK\r\n\r\nno"])
@pytest.mark.parametrize("name", SERVED)
def test_server_that_does_not_speak_http_is_an_error_like_any_other(
    tmp_path: Path,
    server: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    answer: bytes,
) -> None:
    SERVED[name](*server, monkeypatch)
    monkeypatch.setattr(QuietHandler, "do_GET", lambda self: self.wfile.write(answer))
    monkeypatch.setattr(QuietHandler, "do_HEAD", lambda self: self.wfile.write(answer))
    with pytest.raises(DataError, match="is not there and cannot be downloaded"):
        load(name, str(tmp_path / "data"))


def test_a_part_of_mnist_is_neither_used_nor_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path / "mnist", "", monkeypatch)
    (tmp_path / "mnist" / NAMES[2]).unlink()
    with pytest.raises(
        DataError, match=rf"mnist holds a part of MNIST only: {NAMES[2]} is missing"
    ):
        load("mnist", str(tmp_path))
    assert len(list((tmp_path / "mnist").iterdir())) == 3


def test_without_a_network_the_message_names_files_and_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10, MNIST

    nobody = "http://127.0.0.1:9/"  # nothing listens there
    monkeypatch.setattr(MNIST, "mirrors", [nobody])
    monkeypatch.setattr(CIFAR10, "url", nobody)
    with pytest.raises(DataError, match="cannot be downloaded"):
        load("mnist", str(tmp_path / "mistyped"))
    assert not (tmp_path / "mistyped").exists()
    with pytest.raises(DataError) as caught:
        load("mnist", str(tmp_path))
    for part in (*NAMES, str(tmp_path / "MNIST" / "raw"), "Put the four files into one of these"):
        assert part in str(caught.value)
    with pytest.raises(DataError) as caught:
        load("cifar10", str(tmp_path))
    for part in (cifar.ARCHIVE, cifar.FOLDER, "{train,test}/CLASS/*", "cifar10*.tar*", "one of"):
        assert part in str(caught.value)


# CIFAR-10's standard files


def write_cifar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The standard archive with few images in it, and the md5 sums that go with it."""
    files = {}
    for k, name in enumerate((*cifar._TRAIN, *cifar._TEST)):
        batch = {"data": random_bytes(2, 3072, seed=k), "labels": [k, 9 - k]}
        files[name] = pickle.dumps(batch)
    archive = folder / cifar.ARCHIVE
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{cifar.FOLDER}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    for attribute in ("_TRAIN", "_TEST"):
        sums = {n: hashlib.md5(files[n]).hexdigest() for n in getattr(cifar, attribute)}
        monkeypatch.setattr(cifar, attribute, sums)
    return archive


@pytest.mark.parametrize("folder", [".", "cifar10"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_standard_cifar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, unpacked: bool
) -> None:
    archive = write_cifar(tmp_path / folder, monkeypatch)
    if unpacked:
        with tarfile.open(archive) as tar:
            tar.extractall(archive.parent, filter="data")
        archive.unlink()
    before = sorted(tmp_path.rglob("*"))
    images = load("cifar10", str(tmp_path))
    assert images.train[0].shape == (10, 3, 32, 32) and images.test[0].shape == (2, 3, 32, 32)
    expected = torch.from_numpy(random_bytes(2, 3072, seed=1)).view(2, 3, 32, 32) / 255
    assert torch.equal(images.train[0][2:4], expected)
    assert images.train[1].tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert sorted(tmp_path.rglob("*")) == before
    assert images.source == "CIFAR-10, standard files"


@pytest.mark.parametrize("damage", ["cut", "not a tar", "other pixels", "file missing"])
def test_corrupt_standard_archive_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    archive = write_cifar(tmp_path, monkeypatch)
    if damage == "cut":
        archive.write_bytes(archive.read_bytes()[:-3000])
    elif damage == "not a tar":
        archive.write_bytes(b"<html>")
    elif damage == "other pixels":
        monkeypatch.setattr(cifar, "_TRAIN", {**cifar._TRAIN, "data_batch_3": "0" * 32})
    else:
        monkeypatch.setattr(cifar, "_TEST", {"test_batch_2": "0" * 32})
    with pytest.raises(DataError, match=cifar.ARCHIVE) as caught:
        load("cifar10", str(tmp_path))
    assert "Put the right file there, or delete it" in str(caught.value)


def test_missing_standard_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_cifar(tmp_path, monkeypatch)
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (tmp_path / cifar.FOLDER / "data_batch_2").unlink()
    with pytest.raises(DataError, match=r"data_batch_2 is missing"):
        load("cifar10", str(tmp_path))


# Trees of image files


def write_tree(root: Path, per_class: tuple[int, int] = (3, 2), size: int = 4) -> dict[str, bytes]:
    files = {}
    for part, count in zip(("train", "test"), per_class, strict=True):
        for k, label in enumerate(CLASSES):
            for row in range(count):
                image = Image.fromarray(random_bytes(size, size, 3, seed=100 * k + row))
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
                files[f"{part}/{label}/{row:04}.png"] = buffer.getvalue()
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return files


def write_tar(path: Path, files: dict[str, bytes], prefix: str = "") -> None:
    with tarfile.open(path, "w:" + path.suffix[1:]) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_tree_and_tars_of_it_give_the_same_data(tmp_path: Path, cache: Path) -> None:
    tree = tmp_path / "tree" / "pets"
    files = write_tree(tree)
    assert find_tree(tmp_path / "tree", "pets") == tree == find_tree(tree, "pets")
    (pixels, labels), (test_pixels, test_labels) = load_tree(tree, "RGB")
    assert pixels.shape == (9, 3, 4, 4) and test_pixels.shape == (6, 3, 4, 4)
    assert labels.tolist() == 3 * [0] + 3 * [1] + 3 * [2] and len(test_labels) == 6
    expected = torch.from_numpy(random_bytes(4, 4, 3, seed=101)).permute(2, 0, 1)
    assert torch.equal(pixels[4], expected)
    for suffix, prefix in (("xz", ""), ("gz", "some/where/")):
        files = dict(reversed(files.items()))  # the order in a tar does not matter
        archive = tmp_path / suffix / f"pets-images.tar.{suffix}"
        archive.parent.mkdir()
        write_tar(archive, files, prefix)
        assert find_tree(archive.parent, "pets") == archive
        for _ in range(2):  # decoded, then from the cache
            (again, _), _ = load_tree(archive, "RGB")
            assert torch.equal(again, pixels)
        assert list(archive.parent.iterdir()) == [archive]
    assert len(list(cache.iterdir())) == 2


def test_cache_is_used_and_a_broken_one_is_made_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "pets.tar.gz"
    write_tar(archive, write_tree(tmp_path / "x"))
    (expected, _), _ = load_tree(archive, "RGB")
    with monkeypatch.context() as patch:
        patch.setattr("bdhf.data.folders._decode", None)  # would fail if it were called
        load_tree(archive, "RGB")
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    (pixels, labels), test, digest = torch.load(file, weights_only=True)
    torch.save(((pixels, labels.flip(0)), test, digest), file)
    for broken in (whole[:100], file.read_bytes()):
        file.write_bytes(broken)
        (again, other), _ = load_tree(archive, "RGB")
        assert torch.equal(again, expected) and torch.equal(other, labels)


def test_data_is_read_where_no_cache_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write_tar(tmp_path / "pets.tar.gz", write_tree(tmp_path / "x"))
    (pixels, _), _ = load_tree(tmp_path / "pets.tar.gz", "RGB")
    assert len(pixels) == 9


def test_sums_beside_an_archive_and_a_tree_are_verified(tmp_path: Path) -> None:
    archive = tmp_path / "pets.tar.gz"
    files = write_tree(tmp_path / "tree")
    write_tar(archive, files)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  pets.tar.gz\n")
    load_tree(archive, "RGB")
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"pets\.tar\.gz is corrupt: its sha256 is not the one in"):
        load_tree(archive, "RGB")

    (tmp_path / "SHA256SUMS").write_text(f"{digest.upper()}  pets.tar.gz\n")
    archive.write_bytes(archive.read_bytes()[:-1])
    load_tree(archive, "RGB")
    (tmp_path / "SHA256SUMS").write_text("not a sum\n")
    with pytest.raises(DataError, match=r"SHA256SUMS has a line that is not 'SHA256  NAME'"):
        load_tree(archive, "RGB")

    name = "train/dog/0001.png"
    sums = tmp_path / "tree" / "SHA256SUMS"
    sums.write_text(f"{hashlib.sha256(files[name]).hexdigest()} *{name}\n")
    load_tree(tmp_path / "tree", "RGB")
    sums.write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(DataError, match=r"train/dog/0001\.png is corrupt: its sha256"):
        load_tree(tmp_path / "tree", "RGB")


@pytest.mark.parametrize("form", ["tree", "tar"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("not an image", r"train/dog/0001\.png is not an image that can be read"),
        ("cut image", r"train/dog/0001\.png is not an image that can be read"),
        ("class missing", "must hold train/CLASS/.* 3 classes in train and 2 in test"),
        ("empty", "must hold train/CLASS/.* 0 classes in train and 0 in test"),
        ("other size", r"images of different sizes in train: \[\(3, 4, 4\), \(3, 5, 5\)\]"),
    ],
)
def test_faulty_trees_are_refused(tmp_path: Path, form: str, damage: str, message: str) -> None:
    files = write_tree(tmp_path / "source")
    victim = "train/dog/0001.png"
    if damage == "not an image":
        files[victim] = b"<html>"
    elif damage == "cut image":
        files[victim] = files[victim][:-30]
    elif damage == "class missing":
        files = {n: c for n, c in files.items() if not n.startswith("test/owl")}
    elif damage == "empty":
        files = {"train/readme.txt": b"", "test/readme.txt": b""}
    else:
        buffer = io.BytesIO()
        Image.fromarray(random_bytes(5, 5, 3)).save(buffer, "PNG")
        files[victim] = buffer.getvalue()
    path = tmp_path / ("pets.tar.gz" if form == "tar" else "pets")
    if form == "tar":
        write_tar(path, files)
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tree(path, "RGB")


@pytest.mark.parametrize("suffix", ["gz", "xz"])
def test_tar_cut_short_is_named(tmp_path: Path, suffix: str, cache: Path) -> None:
    archive = tmp_path / f"pets.tar.{suffix}"
    write_tar(archive, write_tree(tmp_path / "x", per_class=(20, 20)))
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size * 2 // 3])
    with pytest.raises(DataError, match=rf"pets\.tar\.{suffix} is corrupt or cut short"):
        load_tree(archive, "RGB")
    assert not cache.exists()


def test_a_tree_that_is_only_part_of_cifar10_is_refused(tmp_path: Path) -> None:
    write_tree(tmp_path / "cifar10", size=32)
    with pytest.raises(DataError, match=r"is not the whole of CIFAR-10: train has 3 classes and"):
        load("cifar10", str(tmp_path))


# What ships with a dependency, and the real sets


def test_digits_ship_with_a_dependency() -> None:
    images = load("digits", "/nowhere")
    assert images.train[0].shape == (1437, 1, 8, 8) and images.test[0].shape == (360, 1, 8, 8)
    assert images.train[0].min() == 0 and images.train[0].max() == 1
    assert images.test[1].bincount(minlength=10).min() > 20  # every class is tested
    assert torch.equal(images.train[0], load("digits", "/nowhere").train[0])
    assert len(images.train[0]) == TRAIN_ROWS["digits"]
    assert set(TRAIN_ROWS) == set(LOADERS)


def test_real_mnist() -> None:
    images = load("mnist", data_folder("mnist"))
    assert images.train[0].shape == (60000, 1, 28, 28) and images.test[0].shape[0] == 10000
    assert images.train[1][:5].tolist() == [5, 0, 4, 1, 9]
    assert images.train[0].mean().item() == pytest.approx(0.1307, abs=1e-4)


@pytest.mark.slow
def test_real_cifar10() -> None:
    images = load("cifar10", data_folder("*cifar*10*"))
    assert images.train[0].shape == (50000, 3, 32, 32) and images.test[0].shape[0] == 10000
    assert images.train[1].bincount().tolist() == [5000] * 10
    mean = images.train[0].mean((0, 2, 3))
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=2e-3)


def test_what_is_missing_is_downloaded_once_by_several_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, most = [0], [0]

    def slow(root: Path) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        inside[0] -= 1

    monkeypatch.setitem(LOADERS, "mnist", slow)  # type: ignore[arg-type]
    workers = [threading.Thread(target=load, args=("mnist", str(tmp_path))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert most == [1]

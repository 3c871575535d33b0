"""Downloading through torchvision, which checks what it gets and shows its progress."""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from tarfile import TarError

from bdhf.data.images import DataError


def download(
    fetch: Callable[[str], object], root: Path, name: str, looked_for: str, remedy: str
) -> None:
    """Have ``fetch`` download to a temporary folder, then move what came into ``root``.

    So what a failed download leaves behind is never taken for data.

    Raises:
        DataError: the data set cannot be downloaded, or what came is not what it should be.
    """
    was_there = root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as temporary:
            fetch(temporary)
            for path in [p for p in Path(temporary).rglob("*") if p.is_file()]:
                target = root / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
    except (OSError, RuntimeError, EOFError, HTTPException, TarError, zlib.error) as error:
        if not was_there and root.exists() and not any(root.iterdir()):
            root.rmdir()  # perhaps a mistyped name
        raise DataError(
            f"{name} is not there and cannot be downloaded ({one_line(error)}). Looked for "
            f"{looked_for}. {remedy}, or name their folder with data.root=FOLDER or "
            f"BDHF_DATA=FOLDER (now {os.environ.get('BDHF_DATA', 'not set')})"
        ) from error


def one_line(error: Exception) -> str:
    """An error's message without line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__

"""Checking a data set's pictures when it is indexed, so that none fails in the middle of a training."""

import json
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal

from PIL import Image

from minigpt4.errors import InputError
from minigpt5.images import UNREADABLE, open_picture

logger = logging.getLogger(__name__)

Check = Literal["decode", "header", "exists", "none"]
CACHE_WORTH = 1000
"""Decoding fewer pictures than this is quicker than it is worth a cache file."""


class PictureChecker:
    """Check pictures once each, in threads; decoded ones are remembered between runs.

    Args:
        how: decode the whole picture, read its header, look for the file, or nothing.
        cache: JSON file of pictures that decoded, with their size and modification time; used and written
            only for large data sets. A folder that cannot be written goes without.
    """

    def __init__(self, how: Check, cache: Path | None = None) -> None:
        self.how: Check = how
        self._cache = cache if how == "decode" else None
        self._known = self._load()
        self._decoded: dict[str, list[int]] = {}
        self._results: dict[str, str | None] = {}

    def check(self, paths: Iterable[Path]) -> dict[Path, str]:
        """Return the pictures that cannot be used and why."""
        if self.how == "none":
            return {}
        paths = set(paths)
        new = [path for path in paths if str(path) not in self._results]
        with ThreadPoolExecutor() as pool:
            for path, reason in zip(new, pool.map(self._check_one, new), strict=True):
                self._results[str(path)] = reason
        found = {path: self._results[str(path)] for path in paths}
        return {path: reason for path, reason in found.items() if reason is not None}

    def save(self) -> None:
        """Write the cache if enough pictures were decoded to be worth it."""
        if self._cache is None or len(self._decoded) < CACHE_WORTH:
            return
        # Written beside and moved, as several processes may check the same data set.
        temporary = self._cache.with_name(f"{self._cache.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self._known | self._decoded), encoding="utf-8")
            temporary.replace(self._cache)
        except OSError as error:
            logger.info("%s: checked pictures are not remembered (%s)", self._cache, error.strerror)

    def _load(self) -> dict[str, list[int]]:
        if self._cache is not None:
            with suppress(OSError, ValueError):
                values = json.loads(self._cache.read_text(encoding="utf-8"))
                return values if isinstance(values, dict) else {}
        return {}

    def _check_one(self, path: Path) -> str | None:
        try:
            status = path.stat()
        except OSError:
            return f"{path}: no such picture"
        if self.how == "exists":
            return None
        if self.how == "header":
            return _header_fault(path)
        stamp = [status.st_size, status.st_mtime_ns]
        if self._known.get(str(path)) == stamp:
            return None
        try:
            open_picture(path)
        except InputError as error:
            return str(error)
        self._decoded[str(path)] = stamp
        return None


def _header_fault(path: Path) -> str | None:
    try:
        with Image.open(path):
            return None
    except UNREADABLE as error:
        return f"{path}: not a readable picture ({error})"

"""Reads samples by their number in the index, from wherever they lie in the shards."""

import os
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from iccld.data.decode import LABEL_EXTENSION, decode_sample
from iccld.data.index import ShardIndex

MAX_OPEN_SHARDS = 64


class ShardReader:
    """Random access to the samples of a set, by `pread` at the index's offsets.

    Shards are opened when they are first needed, and at most 64 at a time. Forked processes may share the open files:
    `pread` moves no file position.
    """

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._files: dict[int, BinaryIO] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"index": self.index, "_files": {}}

    def read(self, position: int, *, with_labels: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """The image, `(H, W, 3)` uint8 RGB, and the train ids, `(H, W)` uint8, or None without labels."""
        extension = self.index.header.image_extension
        shard = self._path(int(self.index.samples["shard"][position]))
        raw: dict[str, str | bytes] = {"__key__": self.index.key(position), "__url__": str(shard)}
        raw[extension] = self._member(position, "image")
        if with_labels:
            raw[LABEL_EXTENSION] = self._member(position, "label")
        fields = decode_sample(raw)
        image, labels = fields[extension], fields.get(LABEL_EXTENSION)
        assert isinstance(image, np.ndarray) and not isinstance(labels, str)
        return image, labels

    def _member(self, position: int, kind: str) -> bytes:
        """The bytes of a sample's "image" or "label"."""
        record = self.index.samples[position]
        shard, size = int(record["shard"]), int(record[f"{kind}_size"])
        data = os.pread(self._file(shard).fileno(), size, int(record[f"{kind}_offset"]))
        if zlib.crc32(data) != record[f"{kind}_checksum"]:
            raise ValueError(
                f"{self._path(shard)}: the {kind} of sample {self.index.key(position)!r} is not what was indexed "
                f"(checksum); restore the shard, or make it again."
            )
        return data

    def _path(self, shard: int) -> Path:
        return self.index.folder / self.index.header.shards[shard].name

    def _file(self, shard: int) -> BinaryIO:
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN_SHARDS:
                self._files.pop(next(iter(self._files))).close()
            self._files[shard] = self._path(shard).open("rb", buffering=0)
        return self._files[shard]

"""Reading of samples' bytes by their position in the index, checked against it."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from iccld.data.deflate import crc32
from iccld.data.storage.base import MissingShard, ShortRead, Storage
from iccld.data.storage.cache import SampleCache
from iccld.data.storage.index import ShardIndex

MAX_GAP = 1 << 16
"""Members of a sample that lie this close (bytes) are fetched by one read."""
MAX_SAMPLE_BYTES = 1 << 30
_NUM_THREADS = 16


class BadSample(ValueError):
    """Error: a sample that cannot be used, with its key, its shard, and the reason."""

    def __init__(self, key: str, shard: str, what: str) -> None:
        super().__init__(
            f"{shard}: sample {key!r}: {what}; restore the shard or make it again, or set data.on_error=replace."
        )
        self.key, self.shard, self.what = key, shard, what


class RawSample(NamedTuple):
    """Encoded image and label of a sample; the label is empty if it was not asked for."""

    image: bytes
    label: bytes = b""


class ShardReader:
    """Random access to the encoded samples of a set. Every byte is checked against the index."""

    def __init__(self, index: ShardIndex, storage: Storage, cache: SampleCache | None = None) -> None:
        self.index, self.storage, self.cache = index, storage, cache
        self._fingerprint = str(index.fingerprint())

    def read(self, position: int, *, with_labels: bool) -> RawSample:
        """Read the sample at `position`.

        Raises BadSample if its bytes are not those that were indexed, and StorageError if the storage cannot be read.
        """
        kinds = ("image", "label") if with_labels else ("image",)
        record = self.index.samples[position]
        name = f"{self._fingerprint}/{position}/{len(kinds)}"
        cached = self.cache.get(name) if self.cache else None
        if cached is not None and self.cache is not None:
            sample = _split(cached, record)
            if not _damage(sample, record):
                return sample
            self.cache.discard(name)
        sample = RawSample(*self._members(position, record, kinds))
        if damage := _damage(sample, record):
            raise self.bad(position, damage)
        if self.cache:
            self.cache.put(name, b"".join(sample))
        return sample

    def read_all(self, positions: list[int], *, with_labels: bool) -> list[RawSample | BadSample]:
        """Read several samples, from remote storage all at once. A bad one is in the list instead of being raised."""

        def one(position: int) -> RawSample | BadSample:
            try:
                return self.read(position, with_labels=with_labels)
            except BadSample as bad:
                return bad

        if self.storage.is_local or len(positions) < 2:
            return [one(position) for position in positions]
        with ThreadPoolExecutor(min(len(positions), _NUM_THREADS)) as pool:
            return list(pool.map(one, positions))

    def bad(self, position: int, what: str) -> BadSample:
        """Make the error that says `what` is wrong with the sample at `position`."""
        shard = self.index.shard_name(int(self.index.samples["shard"][position]))
        return BadSample(self.index.key(position), self.storage.describe(shard), what)

    def _members(self, position: int, record: np.void, kinds: tuple[str, ...]) -> list[bytes]:
        """Read the sample's members by as few reads as their places allow."""
        places = [(int(record[f"{kind}_offset"]), int(record[f"{kind}_size"])) for kind in kinds]
        start, end = min(offset for offset, _ in places), max(offset + size for offset, size in places)
        if sum(size for _, size in places) > MAX_SAMPLE_BYTES or int(record["shard"]) >= len(self.index.shards):
            raise ValueError(f"{self.index.folder}: the index of sample {position} is damaged; {self.index.remedy}.")
        shard = self.index.shards[int(record["shard"])]
        name = self.index.shard_name(int(record["shard"]))
        if end > int(shard["size"]):
            raise self.bad(position, f"the index places it beyond the shard's {int(shard['size'])} bytes")
        try:
            if end - start > sum(size for _, size in places) + MAX_GAP:
                return [self.storage.read(name, offset, size) for offset, size in places]
            span = self.storage.read(name, start, end - start)
        except (MissingShard, ShortRead) as error:
            raise self.bad(position, str(error)) from error
        return [span[offset - start : offset - start + size] for offset, size in places]


def _split(data: bytes, record: np.void) -> RawSample:
    size = int(record["image_size"])
    return RawSample(data[:size], data[size:])


def _damage(sample: RawSample, record: np.void) -> str:
    """Name the member that is not what was indexed; "" if all is well. Skips a label that was not asked for."""
    if crc32(sample.image) != record["image_checksum"]:
        return "its image is not what was indexed (checksum)"
    if sample.label and crc32(sample.label) != record["label_checksum"]:
        return "its label is not what was indexed (checksum)"
    return ""

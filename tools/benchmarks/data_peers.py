"""The loaders that bench_data.py compares: ours, and how others read the same images with one worker process.

All cut a uniformly drawn square out of image and label, mirror half of them, and hand over batches of uint8 tensors:
images (B, 3, C, C) and labels (B, C, C).
"""

import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from webdataset.autodecode import handle_extension
from webdataset.compat import WebDataset, WebLoader

from iccld.batch_layout import BatchLayout
from iccld.data.config import DataConfig, DatasetConfig
from iccld.data.stream.stream import TrainingStream

Pair = tuple[Tensor, Tensor]
ENDLESS = 10**9


@dataclass(frozen=True)
class Settings:
    """Settings: the folders of the sets, the crop's side, and the samples of a batch."""

    pngs: Path
    shards: Path
    mds: Path
    crop: int
    batch_size: int


def ours(settings: Settings, *, shards: Path | None = None, start_step: int = 0) -> Iterator[Pair]:
    """The training stream, in its shuffled order, from any step on."""
    config = DataConfig(
        source=DatasetConfig("bench", str(shards or settings.shards)),
        crop_size=[settings.crop, settings.crop],
        num_workers=1,
        rare_class_sampling=False,
        max_class_share=1.0,  # one crop is drawn, as everywhere here
    )
    layout = BatchLayout(settings.batch_size, settings.batch_size)
    for batch in TrainingStream(config, seed=0, layout=layout, with_target=False).batches(start_step):
        yield batch["source"]["images"], batch["source"]["labels"]


def decode_pil(data: bytes) -> np.ndarray:
    """`(H, W, 3)` uint8, as webdataset's "pilrgb" and most data sets do it."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def decode_label(data: bytes) -> np.ndarray:
    """`(H, W)` uint8 train ids."""
    return np.asarray(Image.open(io.BytesIO(data)))


def augment(sample: tuple[np.ndarray, np.ndarray], crop: int) -> Pair:
    """A random window of image and label, mirrored or not."""
    image, label = sample
    top, left = (np.random.randint(side - crop + 1) for side in label.shape)  # noqa: NPY002 - seeded by the loader
    image, label = (array[top : top + crop, left : left + crop] for array in (image, label))
    if np.random.rand() < 0.5:  # noqa: NPY002
        image, label = image[:, ::-1], label[:, ::-1]
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    return torch.from_numpy(planes), torch.from_numpy(np.ascontiguousarray(label))


def after(samples: Iterable[Any], count: int) -> Iterator[Any]:
    """Leave out the first `count`."""
    return itertools.islice(samples, count, None)


def webdataset_loader(
    settings: Settings, decode: Callable[[bytes], np.ndarray] = decode_pil, *, shards: Path | None = None, skip: int = 0
) -> Iterator[Pair]:
    """webdataset's pipeline over the tars in their order, again and again; `skip` passes over encoded samples."""
    tars = sorted(str(path) for path in (shards or settings.shards).glob("*.tar"))
    source: Any = WebDataset(tars, shardshuffle=False)
    dataset = (
        source.repeat()
        .compose(partial(after, count=skip))
        .decode(handle_extension("jpg", decode), handle_extension("label.png", decode_label))
        .to_tuple("jpg", "label.png")
        .map(partial(augment, crop=settings.crop))
        .batched(settings.batch_size)
    )
    yield from WebLoader(dataset, batch_size=None, num_workers=1)


class PngFolder(Dataset[Pair]):
    """PNGs of images and labels, as DAFormer's data sets read them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.names = sorted(path.name for path in (settings.pngs / "images").iterdir())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Pair:
        image, label = (Image.open(self.settings.pngs / kind / self.names[index]) for kind in ("images", "labels"))
        return augment((np.asarray(image.convert("RGB")), np.asarray(label)), self.settings.crop)


def folder_loader(settings: Settings) -> Iterator[Pair]:
    """A map-style data set behind PyTorch's loader, shuffled."""
    dataset = PngFolder(settings)
    sampler = RandomSampler(dataset, num_samples=ENDLESS)
    yield from DataLoader(dataset, settings.batch_size, sampler=sampler, num_workers=1)


def write_mds(settings: Settings) -> None:
    """The bytes of the tars in MosaicML's format. Raises ImportError or RuntimeError where it cannot be imported."""
    writer_class = import_module("streaming").MDSWriter
    tars = sorted(str(path) for path in settings.shards.glob("*.tar"))
    with writer_class(out=str(settings.mds), columns={"jpg": "bytes", "label": "bytes"}) as writer:
        for sample in WebDataset(tars, shardshuffle=False):
            writer.write({"jpg": sample["jpg"], "label": sample["label.png"]})


def streaming_loader(settings: Settings) -> Iterator[Pair]:
    """MosaicML's StreamingDataset over local MDS files, shuffled."""
    streaming: Any = import_module("streaming")

    class Mds(streaming.StreamingDataset):
        def __getitem__(self, at: Any) -> Pair:
            sample = super().__getitem__(at)
            return augment((decode_pil(sample["jpg"]), decode_label(sample["label"])), settings.crop)

    dataset = Mds(local=str(settings.mds), shuffle=True, batch_size=settings.batch_size, epoch_size=10**5)
    loader = DataLoader(dataset, settings.batch_size, num_workers=1)
    while True:
        yield from loader


LOADERS: dict[str, Callable[[Settings], Iterator[Pair]]] = {
    "ours": ours,
    "webdataset": webdataset_loader,
    "webdataset, simplejpeg": partial(webdataset_loader, decode=simplejpeg.decode_jpeg),
    "streaming": streaming_loader,
    "folder of PNGs": folder_loader,
}

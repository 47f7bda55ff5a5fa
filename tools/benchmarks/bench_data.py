"""Speed of the training data, ours and others' side by side: the same images and crops, one worker process each.

    python tools/benchmarks/bench_data.py                          draws street scenes; two minutes on two cores
    python tools/benchmarks/bench_data.py --images A --labels B    images, and PNGs of train ids of the same stems

The loaders take turns, so that whatever else the machine does hits all of them; ratios are of the same round. The sets
are small and lie in the page cache: this measures decoding and handing over, not the disk.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from data_peers import LOADERS, Pair, Settings, ours, webdataset_loader, write_mds
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

from iccld.data.processes import in_processes, usable_cpus
from iccld.data.shards.making import MakeShardsConfig, make_shards
from iccld.data.storage.index import ShardIndex, shard_dtype, write_index
from iccld.demo.scenes import Domain, render

NUM_READY = 4  # batches that a waiting worker has made already; they are not counted
NUM_DRAWN_ALONE = 16  # images in the time that it takes to start another process


def height_x_width(text: str) -> tuple[int, int]:
    height, width = (int(side) for side in text.split("x"))
    return height, width


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=Path, help="a folder of images (default: scenes are drawn)")
    add("--labels", type=Path, help="a folder of PNGs of train ids, with the images' stems")
    add("--samples", type=int, default=48, help="images that are drawn, or taken of --images (default %(default)s)")
    add("--size", type=height_x_width, default="720x1280", help="of drawn scenes (default %(default)s)")
    add("--quality", type=int, default=95, help="of the JPEGs in the shards (default %(default)s)")
    add("--crop", type=int, default=512, help="side of the crop, in pixels (default %(default)s)")
    add("--batch-size", type=int, default=8, help="default %(default)s")
    add("--rounds", type=int, default=10, help="turns of each loader (default %(default)s)")
    add("--seconds", type=float, default=1.0, help="of one turn (default %(default)s)")
    add("--epoch", type=int, default=4096, help="samples of the epoch that is resumed half-way (default %(default)s)")
    add("--png", type=Path, default=Path("bench_data.png"), help="the chart (default %(default)s)")
    add("--json", type=Path, help="all figures")
    return parser.parse_args()


def write_pair(number: int, *, folder: Path, size: tuple[int, int], files: list[tuple[Path, Path]]) -> None:
    """Image and label `number` as PNGs, drawn or copied."""
    if files:
        image, label = (Image.open(path) for path in files[number])
        image = image.convert("RGB")
    else:
        drawn = render(seed=0, domain=Domain.CAMERA, number=number, height=size[0], width=size[1])
        image, label = (Image.fromarray(array) for array in drawn)
    for kind, picture in (("images", image), ("labels", label)):
        picture.save(folder / kind / f"{number:05d}.png")


def given_files(settings: argparse.Namespace) -> list[tuple[Path, Path]]:
    """The images that have a label, at most --samples of them; none if scenes are to be drawn."""
    if not settings.images and not settings.labels:
        return []
    if not (settings.images and settings.labels):
        raise ValueError("--images and --labels belong together; give both, or neither to have scenes drawn.")
    images = sorted(path for path in settings.images.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    pairs = [(path, settings.labels / f"{path.stem}.png") for path in images]
    pairs = [pair for pair in pairs if pair[1].is_file()][: settings.samples]
    if not pairs:
        raise ValueError(f"--images {settings.images} and --labels {settings.labels} have no stem in common.")
    return pairs


def prepare(settings: argparse.Namespace, folder: Path) -> tuple[Settings, str]:
    """Write the sets, and say why MosaicML's is not among them ("": it is)."""
    sets = Settings(folder / "png", folder / "shards", folder / "mds", settings.crop, settings.batch_size)
    for kind in ("images", "labels"):
        (sets.pngs / kind).mkdir(parents=True)
    files = given_files(settings)
    write = partial(write_pair, folder=sets.pngs, size=settings.size, files=files)
    count = len(files) or settings.samples
    with in_processes(write, usable_cpus() if count > NUM_DRAWN_ALONE else 1) as map_:
        for _ in map_(range(count)):
            pass
    config = MakeShardsConfig(
        "folder", str(sets.pngs), str(sets.shards), classes="cityscapes", quality=settings.quality
    )
    if make_shards(config, progress=lambda line: None).index is None:
        raise ValueError("the labels cannot be used: they must be PNGs of train ids, 0-18 or 255, of the images' size.")
    try:
        write_mds(sets)
    except (ImportError, RuntimeError) as error:
        return sets, f"cannot be imported here: {error}"
    return sets, ""


def repeat_shards(shards: Path, copies: int, folder: Path) -> None:
    """The set `copies` times over, as one with hard links to its tars."""
    index = ShardIndex.open(shards)
    samples = np.tile(index.samples, copies)
    samples["shard"] += np.repeat(np.arange(copies, dtype=np.uint32) * len(index.shards), len(index))
    records = np.tile(index.shards, copies).astype(shard_dtype(16))
    for number in range(len(records)):
        records["name"][number] = f"{number:06d}.tar".encode()
        (folder / f"{number:06d}.tar").hardlink_to(shards / index.shard_name(number % len(index.shards)))
    (folder / "index").mkdir()
    write_index(folder / "index", dataset="", shards=records, samples=samples)


def one_turn(batches: Iterator[Pair], seconds: float) -> float:
    """Samples a second."""
    for _ in range(NUM_READY):
        next(batches)
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        count += len(next(batches)[0])
    return count / elapsed


def measure_rates(sets: Settings, settings: argparse.Namespace, names: list[str]) -> dict[str, list[float]]:
    """Samples a second of each loader in each round."""
    running = {name: LOADERS[name](sets) for name in names}
    rates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(settings.rounds):
        for name, batches in running.items():
            rates[name].append(one_turn(batches, settings.seconds))
    return rates


def seconds_to_first(batches: Iterator[Pair], *, skip: int = 0) -> float:
    """Measure from starting the loader to its first batch, or to the one after `skip` others."""
    started = time.perf_counter()
    next(itertools.islice(batches, skip, None))
    return time.perf_counter() - started


def measure_resume(sets: Settings, settings: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds to the first batch of the second half of an epoch."""
    folder.mkdir()
    copies = -(-settings.epoch // len(ShardIndex.open(sets.shards)))
    repeat_shards(sets.shards, copies, folder)
    half = settings.epoch // 2 // settings.batch_size
    return {
        "ours": statistics.median(seconds_to_first(ours(sets, shards=folder, start_step=half)) for _ in range(3)),
        "webdataset, replayed": seconds_to_first(webdataset_loader(sets, shards=folder), skip=half),
        "webdataset, skipped encoded": seconds_to_first(
            webdataset_loader(sets, shards=folder, skip=half * settings.batch_size)
        ),
    }


def ratio(rates: dict[str, list[float]], name: str) -> float | None:
    """Ours over the other: the median of the rounds' ratios."""
    if name not in rates:
        return None
    return statistics.median(mine / other for mine, other in zip(rates["ours"], rates[name], strict=True))


def tables(rates: dict[str, list[float]], resume: dict[str, float], absent: str, half: int) -> Iterator[Table]:
    table = Table("loader, 1 worker", "samples/s", "lowest - highest", "ours / it", title="Samples a second")
    for name in LOADERS:
        if name in rates:
            own = rates[name]
            spread = f"{min(own):.0f} - {max(own):.0f}"
            table.add_row(name, f"{statistics.median(own):.0f}", spread, f"{ratio(rates, name):.2f}")
        else:
            table.add_row(name, "-", absent, "-")
    yield table
    table = Table("loader", "seconds", "ours / it", title=f"First batch after resuming at sample {half:,}")
    for name, seconds in resume.items():
        table.add_row(name, f"{seconds:.2f}", f"{resume['ours'] / seconds:.4f}")
    yield table


def draw(rates: dict[str, list[float]], resume: dict[str, float], path: Path) -> None:
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    medians = [statistics.median(own) for own in rates.values()]
    left.bar_label(left.barh(list(rates), medians, color="#4477aa"), fmt="%.0f", padding=2)
    left.set(xlabel="samples/s, 1 worker, median", xlim=(0, 1.15 * max(medians)))
    seconds = list(resume.values())
    right.bar_label(right.barh(list(resume), seconds, color="#ee6677"), fmt="%.2f", padding=2)
    right.set(xlabel="seconds to the first batch after resuming", xlim=(0, 1.15 * max(seconds)))
    for axes in (left, right):
        axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    settings = arguments()
    with tempfile.TemporaryDirectory(prefix="bench_data-") as name:
        sets, absent = prepare(settings, Path(name))
        rates = measure_rates(sets, settings, [name for name in LOADERS if name != "streaming" or not absent])
        resume = measure_resume(sets, settings, Path(name) / "epoch")
    for table in tables(rates, resume, absent, settings.epoch // 2):
        Console().print(table)
    draw(rates, resume, settings.png)
    figures: dict[str, Any] = {
        "ours_over_folder": ratio(rates, "folder of PNGs"),
        "ours_over_webdataset": ratio(rates, "webdataset"),
        "ours_over_webdataset_simplejpeg": ratio(rates, "webdataset, simplejpeg"),
        "ours_over_streaming": ratio(rates, "streaming"),
        "resume_over_webdataset": resume["ours"] / resume["webdataset, replayed"],
        "samples_per_s": rates,
        "resume_s": resume,
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(settings).items()},
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "webdataset", "simplejpeg", "pillow")},
    }
    if settings.json:
        settings.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"bench_data: {error}")

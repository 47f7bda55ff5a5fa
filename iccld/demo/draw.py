"""Drawing of the embedded data set, in GTA5's layout for the source and Cityscapes' for the target; it can resume."""

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path

from iccld.data.processes import usable_cpus
from iccld.demo.scenes import write_cityscapes, write_gta5
from iccld.outcome import status_of, words


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="gets the folders gta5 and cityscapes")
    parser.add_argument("--source", type=int, default=400, help="game images")
    parser.add_argument("--target", type=int, default=400, help="camera images to train on")
    parser.add_argument("--validation", type=int, default=60, help="camera images to score")
    parser.add_argument("--size", type=_size, default=(256, 512), metavar="HEIGHTxWIDTH", help="default 256x512")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=usable_cpus())
    arguments = parser.parse_args(argv)
    try:
        _draw(arguments)
    except (ValueError, OSError) as error:
        parser.exit(status_of(error), f"draw: {words(error)}\n")


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text} must be HEIGHTxWIDTH, as in 256x512")
    return int(found[1]), int(found[2])


def _draw(arguments: argparse.Namespace) -> None:
    height, width = arguments.size
    shape = {"seed": arguments.seed, "height": height, "width": width, "workers": arguments.workers}
    started = time.perf_counter()
    write_gta5(arguments.output / "gta5", count=arguments.source, **shape)
    source_s = time.perf_counter() - started
    write_cityscapes(arguments.output / "cityscapes", train=arguments.target, val=arguments.validation, **shape)
    target_s = time.perf_counter() - started - source_s
    print(
        f"game: {arguments.source} images in {source_s:.1f} s; camera: {arguments.target + arguments.validation} in "
        f"{target_s:.1f} s ({height}x{width}, {arguments.workers} workers, starting them included)"
    )


if __name__ == "__main__":
    main()

"""Packs a data set into shards; the same as `iccld shards make`.

python tools/make_shards.py --dataset gta5 --input GTA5 --output shards/gta5 --max-side 1280 --accept-bad
"""

import sys

from iccld.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["shards", "make", *sys.argv[1:]]))

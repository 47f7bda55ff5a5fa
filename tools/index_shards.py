"""Indexes tars that were made elsewhere, so that training can use them; the same as `iccld shards index`.

python tools/index_shards.py tars/ --dataset mine --label-extension seg.png
"""

import sys

from iccld.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["shards", "index", *sys.argv[1:]]))

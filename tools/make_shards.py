"""Packs a data set into shards; the same as `iccld shards make`.

python tools/make_shards.py --dataset gta5 --input GTA5 --output shards/gta5 --max-side 1280 --accept-bad
"""

from iccld.data.shards import main

if __name__ == "__main__":
    raise SystemExit(main())

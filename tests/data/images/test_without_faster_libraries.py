"""simplejpeg and zlib-ng make reading faster, and nothing else: PIL and zlib give the same pixels and checksums."""

import importlib
import io
import sys

import numpy as np
import pytest
from PIL import Image

from iccld.data import deflate
from iccld.data.images import decode, grey_png
from tests.data.pictures import IMAGES, ids


@pytest.mark.parametrize("kind", [kind for kind in IMAGES if "jpeg" in kind])
def test_pil_reads_the_pixels_that_simplejpeg_reads(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = decode.decode_image(IMAGES[kind])
    monkeypatch.setattr(decode, "simplejpeg", None)
    np.testing.assert_array_equal(decode.decode_image(IMAGES[kind]), fast)


@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_they_agree_on_every_usual_sampling_and_quality(
    quality: int, subsampling: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rough = np.random.default_rng(quality).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    smooth = Image.fromarray(rough).resize((203, 151), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    smooth.save(file, "jpeg", quality=quality, subsampling=subsampling, progressive=quality == 75)
    fast = decode.decode_image(file.getvalue())
    monkeypatch.setattr(decode, "simplejpeg", None)
    np.testing.assert_array_equal(decode.decode_image(file.getvalue()), fast)


def test_a_jpeg_that_is_cut_off_is_refused_by_pil_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "simplejpeg", None)
    with pytest.raises(ValueError, match="PIL cannot read it"):
        decode.decode_image(IMAGES["jpeg"][:-200])


def test_zlib_gives_the_checksums_and_labels_of_zlib_ng(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = grey_png.encode_grey_png(ids())
    checksum = deflate.crc32(b"some bytes", 7)
    monkeypatch.setitem(sys.modules, "zlib_ng", None)
    importlib.reload(deflate)
    try:
        assert deflate.library.__name__ == "zlib"
        assert deflate.crc32(b"some bytes", 7) == checksum
        for data in (fast, grey_png.encode_grey_png(ids())):
            read = grey_png.decode_grey_png(data)
            assert read is not None
            np.testing.assert_array_equal(read, ids())
        assert grey_png.decode_grey_png(fast[:40] + b"\0" + fast[41:]) is None, "damage is refused"
    finally:
        monkeypatch.undo()
        importlib.reload(deflate)

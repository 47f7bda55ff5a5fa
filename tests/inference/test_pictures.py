"""Pictures of label maps: colours, and grids to compare predictions."""

import numpy as np
import pytest

from iccld.inference.pictures import colourise, comparison_picture, overlay
from iccld.labels import CITYSCAPES_PALETTE


def test_colourise_paints_classes_and_leaves_ignored_pixels_black():
    colours = colourise(np.array([[0, 18, 255]], np.uint8), CITYSCAPES_PALETTE)
    assert colours.tolist() == [[[128, 64, 128], [119, 11, 32], [0, 0, 0]]]
    assert overlay(np.full((1, 1, 3), 255, np.uint8), np.zeros((1, 1), np.uint8), [(255, 1, 0)]).tolist() == [
        [[255, 128, 128]]
    ]


def test_comparison_picture_shows_every_cell_once_in_place():
    colours = [[(250, 0, 0), (0, 250, 0), (0, 0, 250)], [(90, 0, 0), (0, 90, 0), (0, 0, 90)]]
    rows = [[np.full((20, 40, 3), colour, np.uint8) for colour in row] for row in colours]
    rows[1][2] = rows[1][2][::2, ::2]  # another size
    pixels = np.array(comparison_picture(rows, ["image", "truth", "a title that is far too long for it"]))
    for y, row in enumerate(colours):
        for x, colour in enumerate(row):
            where = np.argwhere((pixels == colour).all(-1))
            assert len(where) == 20 * 40
            assert (where.max(0) - where.min(0) == (19, 39)).all()
            assert (where.min(0) == (16 + 24 * y, 4 + 44 * x)).all()
    assert (pixels[:16] < 128).any()  # there is text


def test_comparison_picture_refuses_rows_that_do_not_fit_the_titles():
    with pytest.raises(ValueError, match="row 0 has 1 pictures and there are 2 titles"):
        comparison_picture([[np.zeros((6, 8, 3), np.uint8)]], ["image", "truth"])

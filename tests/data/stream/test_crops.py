import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iccld.data.stream.crops import CROP_TRIES, Crop, apply_crop, draw_crop, source_merit, valid_rows


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(height=st.integers(8, 40), width=st.integers(8, 40), seed=st.integers(0, 10**6))
def test_crops_lie_inside_and_flips_mirror(height: int, width: int, seed: int) -> None:
    crop = draw_crop((height, width), (8, 8), flip=0.5, generator=generator(seed))
    image = np.arange(height * width).reshape(height, width)
    window = apply_crop(image, crop, (8, 8))
    assert window.shape == (8, 8)
    upright = window[:, ::-1] if crop.flip else window
    np.testing.assert_array_equal(upright, image[crop.top : crop.top + 8, crop.left : crop.left + 8])


def test_every_position_and_half_of_the_flips_occur() -> None:
    crops = [draw_crop((10, 9), (8, 8), flip=0.5, generator=generator(i)) for i in range(600)]
    positions, counts = np.unique([(crop.top, crop.left) for crop in crops], axis=0, return_counts=True)
    assert len(positions) == 6 and counts.min() > 60
    assert 0.4 < np.mean([crop.flip for crop in crops]) < 0.6


@pytest.mark.parametrize(("chance", "expected"), [(0.0, False), (1.0, True)])
def test_flip_is_a_probability(chance: float, expected: bool) -> None:
    assert all(draw_crop((8, 8), (8, 8), flip=chance, generator=generator(i)).flip is expected for i in range(50))


def test_merit_counts_the_wanted_class_and_the_largest_share() -> None:
    window = np.full((4, 4), 255, np.uint8)
    assert source_merit(window, max_class_share=0.75) == 2, "nothing labelled is not varied"
    window[:2] = 0
    assert source_merit(window, max_class_share=0.75) == 2, "one class is all that is labelled"
    window[1, :2] = 1
    assert source_merit(window, max_class_share=0.75) == 3, "6 of 8 are not above 75 %"
    assert source_merit(window, max_class_share=0.7) == 2
    assert source_merit(window, max_class_share=0.75, wanted_class=1, wanted_pixels=2) == 3
    assert source_merit(window, max_class_share=0.75, wanted_class=1, wanted_pixels=3) == 1


def test_crops_are_drawn_again_until_they_are_good_and_at_most_ten_times() -> None:
    tried: list[Crop] = []

    def never(crop: Crop) -> int:
        tried.append(crop)
        return 2 if len(tried) == 4 else 1

    best = draw_crop((64, 64), (8, 8), flip=0.5, generator=generator(), merit=never)
    assert len(tried) == CROP_TRIES and best == tried[3], "the best of ten bad ones"
    tried.clear()
    found = draw_crop((64, 64), (8, 8), flip=0.5, generator=generator(), merit=lambda crop: 3 * (crop.left > 40))
    assert found.left > 40


def test_margins_stay_with_the_image() -> None:
    rows = np.concatenate(
        [valid_rows(64, Crop(top, 0, False), 16, margin_top=0.1, margin_bottom=0.25) for top in (0, 16, 32, 48)]
    )
    np.testing.assert_array_equal(rows, (np.arange(64) >= 6) & (np.arange(64) < 48))
    assert valid_rows(64, Crop(3, 0, True), 61, margin_top=0.0, margin_bottom=0.0).all()

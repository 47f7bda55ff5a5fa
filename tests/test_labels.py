"""Id maps, palettes and class subsets, by the numbers of the field."""

import numpy as np
import pytest

from iccld import labels
from iccld.labels import CITYSCAPES_19, IGNORE_INDEX, ClassSet, lookup_table, merged_class_set


def test_cityscapes_ids_map_to_train_ids_and_all_others_are_ignored():
    table = lookup_table(labels.CITYSCAPES_ID_TO_TRAIN_ID)
    of_id = {
        7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
        20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car",
        27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
    }  # fmt: skip
    assert table.dtype == np.uint8 and table.shape == (256,)
    for label_id in range(256):
        expected = CITYSCAPES_19.names.index(of_id[label_id]) if label_id in of_id else IGNORE_INDEX
        assert table[label_id] == expected


def test_a_table_maps_a_label_image_by_indexing():
    image = np.array([[7, 0], [33, 255]], np.uint8)
    mapped = lookup_table(labels.CITYSCAPES_ID_TO_TRAIN_ID)[image]
    assert mapped.tolist() == [[0, 255], [18, 255]]


def test_the_palette_has_19_distinct_colours_in_train_id_order():
    assert len(set(CITYSCAPES_19.palette)) == len(CITYSCAPES_19.palette) == CITYSCAPES_19.num_classes == 19
    colours = {name: CITYSCAPES_19.palette[CITYSCAPES_19.names.index(name)] for name in ("road", "sky", "bicycle")}
    assert colours == {"road": (128, 64, 128), "sky": (70, 130, 180), "bicycle": (119, 11, 32)}


def test_subsets_leave_out_the_classes_of_the_16_and_13_class_protocols():
    def left_out(num_classes):
        return {CITYSCAPES_19.names[i] for i in set(range(19)) - set(CITYSCAPES_19.subset(num_classes))}

    assert left_out(19) == set()
    assert left_out(16) == {"terrain", "truck", "train"}
    assert left_out(13) == {"terrain", "truck", "train", "wall", "fence", "pole"}
    assert all(len(CITYSCAPES_19.subset(n)) == n for n in (19, 16, 13))


def test_a_merged_class_set_maps_train_ids_and_takes_the_first_ones_colour():
    merged = merged_class_set(["flat", "vehicle"], {1: 0, 0: 0, 14: 1, 13: 1})
    assert merged.num_classes == 2
    assert merged.palette == (CITYSCAPES_19.palette[0], CITYSCAPES_19.palette[13])
    table = merged.table()
    assert table[[0, 1, 13, 14]].tolist() == [0, 0, 1, 1]
    assert (np.delete(table, [0, 1, 13, 14]) == IGNORE_INDEX).all()
    assert merged.subset(2) == (0, 1)


def test_the_table_of_all_classes_is_the_identity():
    table = CITYSCAPES_19.table()
    assert table[:19].tolist() == list(range(19)) and (table[19:] == IGNORE_INDEX).all()


@pytest.mark.parametrize(
    ("class_set", "num_classes", "message"),
    [
        (CITYSCAPES_19, 12, r"evaluation.num_classes=12 does not fit a model of 19 classes; use .*16 or 13"),
        (
            merged_class_set(["all"], {0: 0}),
            16,
            r"evaluation.num_classes=16 does not fit a model of 1 classes; use 1\.",
        ),
    ],
)
def test_a_subset_that_does_not_exist_is_refused(class_set, num_classes, message):
    with pytest.raises(ValueError, match=message):
        class_set.subset(num_classes)


@pytest.mark.parametrize("of_train_id", [{19: 0}, {-1: 0}, {0: 2}, {0: -1}])
def test_a_merge_table_out_of_range_is_refused(of_train_id):
    with pytest.raises(
        ValueError, match=r"data.class_set: \[.*\] out of range; map train ids 0-18 to class indices 0-1"
    ):
        merged_class_set(["a", "b"], {0: 0, 1: 1, **of_train_id})


def test_a_class_without_a_train_id_or_colour_is_refused():
    with pytest.raises(ValueError, match=r"2 names, 1 colours .* at least one train id"):
        merged_class_set(["a", "b"], {0: 0})
    with pytest.raises(ValueError, match=r"1 names, 2 colours"):
        ClassSet(("a",), ((0, 0, 0), (1, 1, 1)), {0: 0})

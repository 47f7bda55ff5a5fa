"""The sets of a domain."""

import pytest

from iccld.data.stream.sets import open_sets, sets_kept_open
from tests.data.factory import config


def test_within_a_run_each_set_is_opened_once(folders: dict[str, str]) -> None:
    data = config(folders)
    with sets_kept_open():
        (first,) = open_sets(data, "source", with_labels=True)
        (again,) = open_sets(data, "source", with_labels=False)
        assert again is first
        (other,) = open_sets(config(folders, max_bad_share=0.5), "source", with_labels=True)
        assert other is first, "what does not concern the set opens it no second time"
    (later,) = open_sets(data, "source", with_labels=True)
    assert later is not first


def test_labels_are_asked_for_also_of_a_set_that_is_open(folders: dict[str, str]) -> None:
    with sets_kept_open():
        open_sets(config(folders), "target", with_labels=False)
        with pytest.raises(ValueError, match=r"data.target.shards=.* has no labels"):
            open_sets(config(folders), "target", with_labels=True)

"""What the versions of transformers disagree about, told apart by what is at hand."""

import pytest
import torch

from kvhybrid.model import versions
from kvhybrid.model.versions import CACHE, CACHE_NAMES, columns_fed, columns_kept, over, with_cache_named


def test_a_cache_has_this_versions_name_whichever_it_came_under():
    (other,) = set(CACHE_NAMES) - {CACHE}
    rest = {"input_ids": 1}
    assert with_cache_named(rest) is rest
    assert with_cache_named(rest | over(2)) == rest | {CACHE: 2}
    assert with_cache_named(rest | {other: 2}) == rest | {CACHE: 2}
    assert with_cache_named(rest | {other: 2, CACHE: 3}) == rest | {CACHE: 3}
    assert with_cache_named(rest | {other: 2, CACHE: None}) == rest | {CACHE: 2}
    assert with_cache_named(rest | {other: None}) == rest | {CACHE: None}


def test_columns_fed_are_a_number_or_as_many_as_positions():
    assert columns_fed(5) == columns_fed(torch.arange(30, 35)) == 5


@pytest.mark.parametrize("counts", [True, False])
def test_crop_takes_what_goes_or_what_stays(counts, monkeypatch):
    monkeypatch.setattr(versions, "_CROP_COUNTS", counts)
    assert columns_kept(10, -3) == 7
    assert columns_kept(10, 4) == 4
    assert columns_kept(10, 40) == 10
    assert columns_kept(10, -11) < 0
    assert columns_kept(10, 0) == (10 if counts else 0)


@pytest.mark.parametrize("version", ["4.57.0", "4.57.6", "5.0.0rc1", "5.23.0", "10.1"])
def test_versions_from_the_oldest_on_are_taken(version):
    versions._check(version)


@pytest.mark.parametrize("version", ["4.56.2", "4.9.0", "3.5"])
def test_an_older_version_is_refused_with_both_numbers(version):
    with pytest.raises(ImportError, match=rf"{version} is installed, kvhybrid needs 4\.57"):
        versions._check(version)

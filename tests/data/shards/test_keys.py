"""A key in a tar is flat ASCII; everywhere else it is the name that a person wrote."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multidomain_cct.data.shards.keys import escape_key, unescape_key


@pytest.mark.parametrize("name", ["a-b_1", "Tag 1/Foto ü 0", "img26_jpg.rf.98d", "a=b", "a=2Fb", "写真/一", "(1)"])
def test_a_name_comes_back_from_its_key(name: str) -> None:
    assert re.fullmatch("[A-Za-z0-9_=-]+", escape_key(name))
    assert unescape_key(escape_key(name)) == name


@given(st.text(min_size=1), st.text(min_size=1))
def test_different_names_have_different_keys(one: str, other: str) -> None:
    assert (escape_key(one) == escape_key(other)) == (one == other)


@pytest.mark.parametrize("key", ["x=41", "a b", "a=2fb", "a=2", "ü"])
def test_a_key_that_pack_did_not_write_stays_as_it_is(key: str) -> None:
    assert unescape_key(key) == key


@pytest.mark.parametrize("name", ["../a", "/etc/a", "a/..", "a\x1b[31m", "a\nb", "\udcff"])
def test_a_name_that_could_leave_a_folder_or_control_a_terminal_stays_escaped(name: str) -> None:
    assert unescape_key(escape_key(name)) == escape_key(name)

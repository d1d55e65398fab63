"""escape.py: any name of a process is shown as one visible line, and an argument is only data."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.escape import argument, printable

RAW = st.binary(max_size=64).map(lambda raw: raw.decode("utf-8", "surrogateescape"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ora_pmon_DB", "ora_pmon_DB"),
        ("a b", "a b"),
        ("naïve 日本", "naïve 日本"),
        ("a\nb", "a\\x0ab"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x7f", "\\x7f"),
        ("\x9b31m", "\\u009b31m"),
        ("a\\x0ab", "a\\x5cx0ab"),
        (b"\xff\x80".decode("utf-8", "surrogateescape"), "\\xff\\x80"),
        ("\ud800", "\\ud800"),
        ("a\u2028b", "a\\u2028b"),
        ("\u202egpj", "\\u202egpj"),
        ("a\u200bb", "a\\u200bb"),
        ("\U000e0041", "\\U000e0041"),
        ("", ""),
    ],
)
def test_what_could_deceive_is_shown_as_its_number(text, shown):
    assert printable(text) == shown


@given(RAW)
def test_a_printable_text_is_valid_utf8_on_one_visible_line(text):
    shown = printable(text)
    shown.encode("utf-8")  # raises where a surrogate is left
    assert len(shown.splitlines()) <= 1
    assert not any(unicodedata.category(ch) in ("Cc", "Cf", "Cs", "Zl", "Zp") for ch in shown)


@given(RAW, RAW)
def test_different_texts_never_look_the_same(one, other):
    assert (printable(one) == printable(other)) == (one == other)


@given(RAW)
def test_visible_text_without_a_backslash_stays_as_it_is(text):
    if text.isprintable() and "\\" not in text:
        assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--help", "\\x2d-help"),
        ("-rf", "\\x2drf"),
        ("../../etc", "\\x2e.\\x2f..\\x2fetc"),
        (".", "\\x2e"),
        ("a-b.c", "a-b.c"),
        ("/bin/sh", "\\x2fbin\\x2fsh"),
        ("$(reboot)", "$(reboot)"),
    ],
)
def test_an_argument_is_no_option_and_no_path(text, shown):
    assert argument(text) == shown


def test_a_path_field_keeps_its_slashes_but_not_a_leading_dash():
    assert argument("/usr/bin/x", keep_slash=True) == "/usr/bin/x"
    assert argument("-/x", keep_slash=True) == "\\x2d/x"


@given(RAW)
def test_no_text_becomes_an_option_a_path_or_a_second_line(text):
    shown = argument(text)
    assert not shown.startswith(("-", "."))
    assert "/" not in shown
    assert "\n" not in shown
    assert json.loads(json.dumps(shown)) == shown

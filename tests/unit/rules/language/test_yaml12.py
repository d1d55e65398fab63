"""The YAML parser: 1.2 types, positions and problems, the same with libyaml's parser and with PyYAML's own."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.rules.language import yaml12
from cnprocd.rules.language.yaml12 import Mark
from cnprocd.rules.values import Octal

LOADERS = [yaml.SafeLoader, yaml12.FAST_LOADER]
both = pytest.mark.parametrize("loader", LOADERS, ids=["python", "libyaml"])


def problems(text, loader=yaml12.FAST_LOADER):
    return [(f.mark.line, f.mark.column, f.problem.message) for f in yaml12.read(text, loader).problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"), ("on", "on"), ("No", "No"), ("off", "off"), ("y", "y"),
        ("true", True), ("True", True), ("TRUE", True), ("tRUE", "tRUE"), ("false", False),
        ("010", 10), ("0o17", 15), ("0x1F", 31), ("-9", -9), ("+3", 3), ("1_000", "1_000"), ("0b11", "0b11"),
        ("1:30", "1:30"), ("2026-11-23", "2026-11-23"), ("1.5", 1.5), ("1e3", 1000.0), (".5", 0.5),
        ("-.inf", float("-inf")),
        ("9" * 5000, "9" * 5000), ("1e999", float("inf")), ("0o8", "0o8"), ("=", "="), ("1.2.3", "1.2.3"),
        ("'010'", "010"), ('"true"', "true"), ("''", ""), ("'null'", "null"), ("-", "-"),
    ],
)  # fmt: skip
@both
def test_meanings_of_the_core_schema(text, value, loader):
    document = yaml12.read(f"k: {text}\n" if text != "-" else "k: '-'\n", loader)
    assert not document.problems
    read = yaml12.plain_data(document.root)["k"]
    assert (read, type(read)) == (value, Octal if text == "0o17" else type(value))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: *x\n", (2, 4, "aliases are not supported")),
        ("a: &x 1\n", (1, 4, "anchors are not supported")),
        ("a: &x {b: 1}\n", (1, 4, "anchors are not supported")),
        ("a: !!str 1\n", (1, 4, "tags are not supported")),
        ("a: 1\nb: 2\na: 3\n", (3, 1, 'duplicate key "a"')),
        ("x: {a: 1, 'a': 2}\n", (1, 11, 'duplicate key "a"')),
        ("x: {<<: {a: 1}}\n", (1, 5, "merge keys (<<) are not supported")),
        ("a:\nb: 1\n", (1, 1, '"a" has no value')),
        ("a: null\n", (1, 1, '"a" has no value')),
        ("a: [1, ~]\n", (1, 8, "the item has no value")),
        ("a: 1\n---\nb: 1\n", (2, 1, "a second document begins here")),
        ("? [a]\n: 1\n", (1, 3, "a key cannot be a list or a mapping")),
        ("a: >\nb: 1\n", (1, 4, "> begins a block of text, but the block is empty")),
        ("a: \x1b[31m\n", (1, 4, "the character U+001B is not allowed")),
        ("ok: 1\r\na: \u2028x\n", (2, 4, "the character U+2028 is not allowed")),
        ("a:\n\tb: 1\n", (2, 1, "this line is indented with a tab")),
        ("a:\n  b: 1\n \tc: 1\n", (3, 2, "this line is indented with a tab")),
    ],
)
@both
def test_problems_and_their_positions(text, expected, loader):
    assert problems(text, loader) == [expected]


@both
def test_a_rejected_value_is_not_in_the_tree(loader):
    root = yaml12.read("a: {<<: {x: 1}, b: 1, b: 2}\nc: *x\n", loader).root
    assert yaml12.plain_data(root) == {"a": {"b": 1}, "c": None}


@both
def test_all_problems_are_found(loader):
    assert [place[:2] for place in problems("a: *x\nb: &y 1\nc:\nb: !t 1\n", loader)] == [
        (1, 4),
        (2, 4),
        (3, 1),
        (4, 1),
        (4, 4),
    ]


@pytest.mark.parametrize(
    ("text", "place"),
    [("a: 'x\n", None), ("a: [1\nb: 2\n", None), ("a: b: c\n", (1, 5)), ("a: @x\n", (1, 4)), ("a: {b: 1}}\n", (1, 10))],
)
@both
def test_broken_text_has_one_problem_and_is_marked_broken(text, place, loader):
    document = yaml12.read(text, loader)
    assert document.broken
    assert len(document.problems) == 1
    assert document.problems[0].problem.message.startswith("invalid YAML")
    assert place is None or (document.problems[0].mark.line, document.problems[0].mark.column) == place


@both
def test_the_broken_line_gives_the_hint(loader):
    def hint(text):
        return yaml12.read(text, loader).problems[-1].problem.hint

    assert '"> 3"' in hint("a:\n  exit_code: > 500M\n")
    assert "{comm}" in hint("a: {comm}[{pid}] died\n")
    assert "begins with {" in hint("message: {comm}\n")
    assert "begins with !" in hint("a: {exit_code: !=0}\n")


@both
def test_depth_is_bounded_however_deep(loader):
    for text in ("[" * 100_000, "{a: " * 100_000, "- " * 10_000):
        found = problems(text, loader)
        assert len(found) == 1
        assert "nested deeper than 50" in found[0][2]
    assert not problems("[" * 50 + "]" * 50, loader)


@both
def test_too_deep_is_reported_at_the_first_level_too_many(loader):
    """libyaml 0.2.6 stops at level 1000 before its first event; the place must be the one of level 51 all the same."""
    message = "nested deeper than 50 levels"
    assert problems("[" * 5000, loader) == [(1, 51, message)]
    assert problems("a: *x\nb:\n  - " + "[" * 5000, loader) == [
        (1, 4, "aliases are not supported"),
        (3, 53, message),
    ]


@both
def test_no_document(loader):
    assert yaml12.read("", loader).root is None
    assert yaml12.read("# only a comment\n", loader).root is None


def test_half_a_surrogate_pair():
    # libyaml refuses the escape itself; PyYAML's scanner lets it through.
    assert "surrogate" in problems('a: "\\ud800"\n', yaml.SafeLoader)[0][2]
    assert len(problems('a: "\\ud800"\n')) == 1


keys = st.text("abc \t\u00e4\U0001f600", min_size=1, max_size=4)
trees = st.recursive(
    st.one_of(
        st.integers(-(10**9), 10**9), st.booleans(), st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@given(trees, st.booleans())
def test_dumped_yaml_reads_back_with_every_value_in_place(tree, flow):
    text = yaml.safe_dump({"top": tree}, default_flow_style=flow, allow_unicode=True, default_style='"', width=10**6)
    if yaml12._CONTROL.search(text):
        return
    results = [yaml12.read(text.replace("!!int ", "").replace("!!bool ", ""), loader) for loader in LOADERS]
    assert results[0] == results[1]

    def as_text(value):
        if isinstance(value, dict):
            return {key: as_text(item) for key, item in value.items()}
        if isinstance(value, list):
            return [as_text(item) for item in value]
        return value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)

    assert yaml12.plain_data(results[0].root) == {"top": as_text(tree)}


def test_locate():
    root = yaml12.read("a: 1\nbb:\n  - c: {d: 2}\n").root
    assert yaml12.locate(root, ("a",), on_key=False) == Mark(1, 4)
    assert yaml12.locate(root, ("a",), on_key=True) == Mark(1, 1)
    assert yaml12.locate(root, ("bb", 0, "c", "d"), on_key=False) == Mark(3, 12)
    assert yaml12.locate(root, ("bb", 0), on_key=True) == Mark(3, 5)
    # A single item that a model reads as a list of one, and what is not there at all.
    assert yaml12.locate(root, ("a", 0), on_key=False) == Mark(1, 4)
    assert yaml12.locate(root, (), on_key=False) == Mark(1, 1)


@pytest.mark.parametrize("text", ["a: 1\nfoo", "- a\nb", "a: |\n x\r\nfoo", "a: 1\rfoo"])
@both
def test_found_by_fuzzing_an_error_without_a_last_newline(text, loader):
    document = yaml12.read(text, loader)
    assert document.broken
    assert document.problems[-1].mark.line <= 2 + text.count("\r\n")

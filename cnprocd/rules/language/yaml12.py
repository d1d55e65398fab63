"""A YAML 1.2 parser that keeps the position of every value and rejects surprising syntax.

PyYAML only parses, into events with marks; the tree is built here, with an explicit stack. So scalars have the types of
the YAML 1.2 core schema (PyYAML's own resolver is 1.1: `on` is a boolean, 010 octal, 1:30 sexagesimal), and no nesting
can exhaust the C or Python stack. Anchors, tags, merge keys, duplicate keys and empty values are problems, and all of
them are reported with their positions. libyaml's parser and PyYAML's own give the same positions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from cnprocd.rules.language.value_problem import ValueProblem
from cnprocd.rules.values import Octal

DEEPEST = 50
# The C parser is about 20 times faster. Debian's python3-yaml and the wheels have it; a build without libyaml does not.
FAST_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True, order=True)
class Mark:
    """A position in a text. Both numbers count from 1, columns in characters. Line 0 means the whole file."""

    line: int = 0
    column: int = 0


@dataclass(frozen=True, slots=True)
class Scalar:
    """A leaf: its value in the core schema, or None if it was rejected (and reported)."""

    mark: Mark
    value: str | int | float | bool | None


@dataclass(slots=True)
class Sequence:
    """A list."""

    mark: Mark
    items: list[Node] = field(default_factory=list)


@dataclass(slots=True)
class Mapping:
    """A mapping. Its keys are strings, in file order."""

    mark: Mark
    entries: dict[str, tuple[Mark, Node]] = field(default_factory=dict)


Node = Scalar | Sequence | Mapping


@dataclass(frozen=True, slots=True)
class MarkedProblem:
    """A problem of the YAML text, and its position."""

    mark: Mark
    problem: ValueProblem


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed document; without a document there is no root. If `broken`, parsing stopped and the tree is partial."""

    root: Node | None
    problems: tuple[MarkedProblem, ...] = ()
    broken: bool = False


def read(text: str, loader: Any = FAST_LOADER) -> Document:  # noqa: ANN401 (PyYAML's two loaders share no type)
    """Parse one YAML document. Never raises: a rejected value is a problem, and the root has the rest."""
    control = _CONTROL.search(text)
    if control:
        found = ValueProblem(f"the character U+{ord(control[0]):04X} is not allowed", hint=_CONTROL_HINT)
        return Document(None, (MarkedProblem(_mark_of_offset(text, control.start()), found),), broken=True)
    builder = _Builder()
    try:
        for event in yaml.parse(text, Loader=loader):
            if not builder.take(event):
                break
    except yaml.MarkedYAMLError as error:
        if _too_deep_for_scanner(error) and loader is not yaml.SafeLoader:
            return read(text, yaml.SafeLoader)
        problem = _syntax_problem(error, text)
        return Document(builder.root, (*builder.problems, problem), broken=True)
    return Document(builder.root, tuple(builder.problems), broken=bool(builder.stack))


def plain_data(node: Node) -> Any:  # noqa: ANN401 (what pydantic validates)
    """Return the tree without its marks: dict, list, str, int, float, bool, and None for a rejected value."""
    if isinstance(node, Mapping):
        return {key: plain_data(value) for key, (_, value) in node.entries.items()}
    if isinstance(node, Sequence):
        return [plain_data(item) for item in node.items]
    return node.value


def locate(root: Node, path: tuple[str | int, ...], on_key: bool) -> Mark:
    """Return the position of the value at a path of keys and indexes, or with `on_key` of its key.

    A step that the tree does not have is skipped: a single item in the file is a list of one for the model.
    """
    node, mark = root, root.mark
    for step in path:
        if isinstance(node, Mapping) and step in node.entries:
            key_mark, node = node.entries[str(step)]
            mark = key_mark if on_key else node.mark
        elif isinstance(node, Sequence) and isinstance(step, int) and step < len(node.items):
            node = node.items[step]
            mark = node.mark
    return mark


# The types of plain scalars (YAML 1.2, section 10.3.2).

_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
}
_DECIMAL = re.compile(r"[-+]?[0-9]{1,18}", re.ASCII)
_OCTAL = re.compile(r"0o[0-7]{1,20}")
_HEX = re.compile(r"0x[0-9a-fA-F]{1,16}")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]{1,18}|[0-9]{1,18}(\.[0-9]{0,18})?)([eE][-+]?[0-9]{1,3})?|[-+]?\.(inf|Inf|INF)", re.ASCII
)


def core_value(text: str) -> str | int | float | bool | None:
    """Return the value of a plain scalar in the core schema. A number of excessive length stays text."""
    if text in _WORDS:
        return _WORDS[text]
    if _DECIMAL.fullmatch(text):
        return int(text)
    if _OCTAL.fullmatch(text):
        return Octal(text[2:], 8)
    if _HEX.fullmatch(text):
        return int(text[2:], 16)
    if _FLOAT.fullmatch(text):
        return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf"))
    return text


# From events to the tree.


@dataclass(slots=True)
class _Open:
    """A container that is not complete. For a mapping, `key` is the key whose value comes next."""

    node: Sequence | Mapping
    key: str | None = None
    key_mark: Mark = Mark()
    dropping: bool = False
    in_braces: bool = False


@dataclass(slots=True)
class _Builder:
    """Builds the tree from parser events. `take` returns False to stop."""

    root: Node | None = None
    problems: list[MarkedProblem] = field(default_factory=list)
    stack: list[_Open] = field(default_factory=list)

    def take(self, event: Any) -> bool:  # noqa: ANN401
        mark = Mark(event.start_mark.line + 1, event.start_mark.column + 1)
        match event:
            case yaml.DocumentStartEvent():
                return self._document(mark)
            case yaml.AliasEvent():
                hint = f'text that begins with * needs quotes: "*{event.anchor}"'
                self._report(mark, "aliases are not supported", "the value itself", hint)
                self._place(Scalar(mark, None), mark)
            case yaml.ScalarEvent():
                self._refuse_anchor_and_tag(event, mark)
                self._scalar(event, mark)
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                self._refuse_anchor_and_tag(event, mark)
                node = Sequence(mark) if isinstance(event, yaml.SequenceStartEvent) else Mapping(mark)
                return self._open(node, in_braces=bool(event.flow_style))
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                self.stack.pop()
        return True

    def _report(self, mark: Mark, message: str, accepted: str = "", hint: str = "") -> None:
        self.problems.append(MarkedProblem(mark, ValueProblem(message, accepted, hint)))

    def _document(self, mark: Mark) -> bool:
        if self.root is not None:
            self._report(mark, "a second document begins here", "one document per file", "move it to its own file")
        return self.root is None

    def _refuse_anchor_and_tag(self, event: Any, mark: Mark) -> None:  # noqa: ANN401
        if event.anchor is not None:
            hint = f'use lists: and "$name" to share values; text that begins with & needs quotes: "&{event.anchor}"'
            self._report(mark, "anchors are not supported", "the value itself", hint)
        if event.tag is not None:
            self._report(
                mark, "tags are not supported", "the value itself", 'text that begins with ! needs quotes: "!= 0"'
            )

    def _open(self, node: Sequence | Mapping, in_braces: bool) -> bool:
        if len(self.stack) >= DEEPEST:
            self._report(node.mark, f"nested deeper than {DEEPEST} levels", "a flatter structure")
            return False
        self._place(node, node.mark)
        self.stack.append(_Open(node, in_braces=in_braces))
        return True

    def _scalar(self, event: Any, mark: Mark) -> None:  # noqa: ANN401
        top = self.stack[-1] if self.stack else None
        if top is not None and isinstance(top.node, Mapping) and top.key is None:
            self._key(top, event, mark)
            return
        value = core_value(event.value) if event.implicit[0] else event.value
        if value is None and event.tag is None and event.anchor is None and top is not None:
            self._no_value(top, mark)
        if isinstance(value, str) and not _encodable(value):
            self._report(mark, "the text contains half of a surrogate pair", "characters that UTF-8 can express")
            value = None
        if value == "" and event.style in (">", "|"):
            self._report(mark, f"{event.style} begins a block of text, but the block is empty", "", _BLOCK_HINT)
            value = None
        self._place(Scalar(mark, value), mark)

    def _no_value(self, top: _Open, mark: Mark) -> None:
        if top.key is None:
            self._report(mark, "the item has no value", "a value", "or remove the item")
            return
        hint = 'text that begins with { needs quotes: "{comm}"' if top.in_braces else "or remove the line"
        self._report(top.key_mark, f'"{top.key}" has no value', "a value", hint)

    def _key(self, top: _Open, event: Any, mark: Mark) -> None:  # noqa: ANN401
        assert isinstance(top.node, Mapping)
        top.key, top.key_mark, top.dropping = event.value, mark, False
        if event.value == "<<" and event.implicit[0]:
            self._report(
                mark,
                "merge keys (<<) are not supported",
                "the keys themselves",
                'use lists: and "$name" to share values',
            )
            top.dropping = True
        elif event.value in top.node.entries:
            first = top.node.entries[event.value][0]
            self._report(mark, f'duplicate key "{event.value}"', "", f"the first is on line {first.line}")
            top.dropping = True
        elif not _encodable(event.value):
            self._report(mark, "the key contains half of a surrogate pair", "characters that UTF-8 can express")
            top.dropping = True

    def _place(self, node: Node, mark: Mark) -> None:
        if not self.stack:
            self.root = node
            return
        top = self.stack[-1]
        if isinstance(top.node, Sequence):
            top.node.items.append(node)
        elif top.key is None:
            self._report(
                mark,
                "a key cannot be a list or a mapping",
                "text",
                'text that begins with { or [ needs quotes: "{comm}"',
            )
            top.key, top.key_mark, top.dropping = "", mark, True
        else:
            if not top.dropping:
                top.node.entries[top.key] = (top.key_mark, node)
            top.key = None


def _encodable(text: str) -> bool:
    # Only an escape ("\ud800") can produce a lone surrogate; PyYAML's own scanner accepts it.
    return not any("\ud800" <= character <= "\udfff" for character in text)


# Text that is not YAML.

# Includes the line separators of YAML 1.1 that editors do not count as line ends: they would shift every position.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
_CONTROL_HINT = 'write it as an escape in double quotes, like "\\x1b"'
_BLOCK_HINT = 'text that begins with > or | needs quotes: "> 3"'
_LINE_END = re.compile(r"\r\n|\r|\n")
_TAB_INDENT = re.compile(r"^ *\t", re.MULTILINE)


def _mark_of_offset(text: str, offset: int) -> Mark:
    start = max(text.rfind("\n", 0, offset), text.rfind("\r", 0, offset)) + 1
    return Mark(len(_LINE_END.findall(text[:offset])) + 1, offset - start + 1)


def _too_deep_for_scanner(error: yaml.MarkedYAMLError) -> bool:
    """Return whether libyaml stopped at its own nesting limit.

    Since 0.2.6 (PyYAML 6.0.4) its scanner stops at 1000 open brackets. The scanner reads up to 1024 characters ahead of
    the first event, because each bracket may begin a key. PyYAML's own parser has no limit and finds level DEEPEST + 1;
    it needs 3 s for the largest file.
    """
    return "nesting depth" in str(error.problem)


def _syntax_problem(error: yaml.MarkedYAMLError, text: str) -> MarkedProblem:
    at = error.problem_mark or error.context_mark
    mark = Mark(at.line + 1, at.column + 1) if at else Mark(1, 1)
    lines = _LINE_END.split(text)
    if mark.line > len(lines):  # libyaml counts one line too many at the end of a file without a final newline
        mark = Mark(len(lines), len(lines[-1]) + 1)
    line = lines[mark.line - 1]
    tab = _TAB_INDENT.match(line)
    if tab:
        return MarkedProblem(
            Mark(mark.line, tab.end()),
            ValueProblem("this line is indented with a tab", "spaces", "YAML does not allow tabs in indentation"),
        )
    cause = f"{error.context}: {error.problem}" if error.context else str(error.problem)
    return MarkedProblem(mark, ValueProblem(f"invalid YAML: {cause}", hint=_syntax_hint(cause, line)))


def _syntax_hint(cause: str, line: str) -> str:
    for kind, sign in (("tag", "!"), ("alias", "*"), ("anchor", "&")):
        if kind in cause:
            return f"text that begins with {sign} needs quotes"
    if re.search(r":\s+[>|]\s*[^\s#]", line):
        return _BLOCK_HINT
    if re.search(r":\s+[{\[%@`]", line):
        return 'text that begins with { [ % @ or ` needs quotes: "{comm}"'
    return 'check the indentation and the quotes; text that contains ": " or " #" needs quotes'

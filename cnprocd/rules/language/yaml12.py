"""A YAML 1.2 reader that keeps the position of everything and refuses what surprises.

Strategy: PyYAML only parses, into events with marks; the tree is built here, with an explicit stack. So the meanings
are those of the YAML 1.2 core schema (PyYAML's own resolver is 1.1: `on` a boolean, 010 octal, 1:30 sexagesimal), no
nesting can exhaust the C or Python stack, and anchors, tags, merge keys, duplicate keys and empty values are reported
where they stand, all of them, instead of being resolved. libyaml's parser and PyYAML's own give the same positions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from cnprocd.rules.language.mistakes import Mistake
from cnprocd.rules.values import Octal

DEEPEST = 50
# The C parser is some twenty times faster; Debian's python3-yaml and the wheels have it, a build without libyaml not.
FAST_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True, order=True)
class Mark:
    """A place in a text; both count from 1, columns in characters. Line 0 stands for the file as a whole."""

    line: int = 0
    column: int = 0


@dataclass(frozen=True, slots=True)
class Scalar:
    """A leaf: its meaning in the core schema, or None for one that was refused (and reported)."""

    mark: Mark
    value: str | int | float | bool | None


@dataclass(slots=True)
class Sequence:
    """A list."""

    mark: Mark
    items: list[Node] = field(default_factory=list)


@dataclass(slots=True)
class Mapping:
    """A mapping: keys are texts, in file order."""

    mark: Mark
    entries: dict[str, tuple[Mark, Node]] = field(default_factory=dict)


Node = Scalar | Sequence | Mapping


@dataclass(frozen=True, slots=True)
class Flaw:
    """A mistake of the text itself, and where it is."""

    mark: Mark
    mistake: Mistake


@dataclass(frozen=True, slots=True)
class Document:
    """What was read: no root when there is no document. If `broken`, reading stopped and the tree is a part."""

    root: Node | None
    flaws: tuple[Flaw, ...] = ()
    broken: bool = False


def read(text: str, loader: Any = FAST_LOADER) -> Document:  # noqa: ANN401 (PyYAML's two loaders share no type)
    """Read one YAML document; never raises. With flaws the root is what could be made of the rest."""
    control = _CONTROL.search(text)
    if control:
        said = Mistake(f"the character U+{ord(control[0]):04X} is not allowed", hint=_CONTROL_HINT)
        return Document(None, (Flaw(_mark_of_offset(text, control.start()), said),), broken=True)
    builder = _Builder()
    try:
        for event in yaml.parse(text, Loader=loader):
            if not builder.take(event):
                break
    except yaml.MarkedYAMLError as error:
        if _too_deep_for_scanner(error) and loader is not yaml.SafeLoader:
            return read(text, yaml.SafeLoader)
        flaw = _syntax_flaw(error, text)
        return Document(builder.root, (*builder.flaws, flaw), broken=True)
    return Document(builder.root, tuple(builder.flaws), broken=bool(builder.stack))


def plain_data(node: Node) -> Any:  # noqa: ANN401 (what pydantic validates)
    """The tree without its marks: dict, list, str, int, float, bool, and None for what was refused."""
    if isinstance(node, Mapping):
        return {key: plain_data(value) for key, (_, value) in node.entries.items()}
    if isinstance(node, Sequence):
        return [plain_data(item) for item in node.items]
    return node.value


def locate(root: Node, path: tuple[str | int, ...], on_key: bool) -> Mark:
    """Where a path of keys and indexes leads: the value there, or with `on_key` the key that holds it.

    A step that the tree does not have is passed over: a model may see a list where the file has a single item.
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


# --- what a plain scalar means (YAML 1.2, section 10.3.2)

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


def meaning(text: str) -> str | int | float | bool | None:
    """The core schema's value of a plain scalar. Numbers beyond any use stay text, which no number field accepts."""
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


# --- events to tree


@dataclass(slots=True)
class _Open:
    """A container being filled; for a mapping, `key` is the one whose value comes next."""

    node: Sequence | Mapping
    key: str | None = None
    key_mark: Mark = Mark()
    dropping: bool = False
    in_braces: bool = False


@dataclass(slots=True)
class _Builder:
    """Builds the tree from parser events; `take` says whether to go on."""

    root: Node | None = None
    flaws: list[Flaw] = field(default_factory=list)
    stack: list[_Open] = field(default_factory=list)

    def take(self, event: Any) -> bool:  # noqa: ANN401
        mark = Mark(event.start_mark.line + 1, event.start_mark.column + 1)
        match event:
            case yaml.DocumentStartEvent():
                return self._document(mark)
            case yaml.AliasEvent():
                hint = f'text that begins with * needs quotes: "*{event.anchor}"'
                self._flaw(mark, "aliases are not used here", "the value itself", hint)
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

    def _flaw(self, mark: Mark, message: str, accepted: str = "", hint: str = "") -> None:
        self.flaws.append(Flaw(mark, Mistake(message, accepted, hint)))

    def _document(self, mark: Mark) -> bool:
        if self.root is not None:
            self._flaw(mark, "a second document begins here", "one document a file", "put it in a file of its own")
        return self.root is None

    def _refuse_anchor_and_tag(self, event: Any, mark: Mark) -> None:  # noqa: ANN401
        if event.anchor is not None:
            hint = f'use lists: and "$name" to share values; text that begins with & needs quotes: "&{event.anchor}"'
            self._flaw(mark, "anchors are not used here", "the value itself", hint)
        if event.tag is not None:
            self._flaw(
                mark, "tags are not used here", "the value itself", 'text that begins with ! needs quotes: "!= 0"'
            )

    def _open(self, node: Sequence | Mapping, in_braces: bool) -> bool:
        if len(self.stack) >= DEEPEST:
            self._flaw(node.mark, f"nested deeper than {DEEPEST} levels", "a flatter structure")
            return False
        self._place(node, node.mark)
        self.stack.append(_Open(node, in_braces=in_braces))
        return True

    def _scalar(self, event: Any, mark: Mark) -> None:  # noqa: ANN401
        top = self.stack[-1] if self.stack else None
        if top is not None and isinstance(top.node, Mapping) and top.key is None:
            self._key(top, event, mark)
            return
        value = meaning(event.value) if event.implicit[0] else event.value
        if value is None and event.tag is None and event.anchor is None and top is not None:
            self._no_value(top, mark)
        if isinstance(value, str) and not _encodable(value):
            self._flaw(mark, "the text holds half of a surrogate pair", "characters that UTF-8 can express")
            value = None
        if value == "" and event.style in (">", "|"):
            self._flaw(mark, f"{event.style} begins a block of text, and there is none", "", _BLOCK_HINT)
            value = None
        self._place(Scalar(mark, value), mark)

    def _no_value(self, top: _Open, mark: Mark) -> None:
        if top.key is None:
            self._flaw(mark, "the item has no value", "a value", "or take the item out")
            return
        hint = 'text that begins with { needs quotes: "{comm}"' if top.in_braces else "or take the line out"
        self._flaw(top.key_mark, f'"{top.key}" has no value', "a value", hint)

    def _key(self, top: _Open, event: Any, mark: Mark) -> None:  # noqa: ANN401
        assert isinstance(top.node, Mapping)
        top.key, top.key_mark, top.dropping = event.value, mark, False
        if event.value == "<<" and event.implicit[0]:
            self._flaw(
                mark,
                "merge keys (<<) are not used here",
                "the keys themselves",
                'use lists: and "$name" to share values',
            )
            top.dropping = True
        elif event.value in top.node.entries:
            first = top.node.entries[event.value][0]
            self._flaw(mark, f'the key "{event.value}" is there twice', "", f"the first is in line {first.line}")
            top.dropping = True
        elif not _encodable(event.value):
            self._flaw(mark, "the key holds half of a surrogate pair", "characters that UTF-8 can express")
            top.dropping = True

    def _place(self, node: Node, mark: Mark) -> None:
        if not self.stack:
            self.root = node
            return
        top = self.stack[-1]
        if isinstance(top.node, Sequence):
            top.node.items.append(node)
        elif top.key is None:
            self._flaw(
                mark, "a key is a list or a mapping", "text", 'text that begins with { or [ needs quotes: "{comm}"'
            )
            top.key, top.key_mark, top.dropping = "", mark, True
        else:
            if not top.dropping:
                top.node.entries[top.key] = (top.key_mark, node)
            top.key = None


def _encodable(text: str) -> bool:
    # The only way for a lone surrogate to get in is an escape ("\ud800"), which PyYAML's own scanner lets through.
    return not any("\ud800" <= character <= "\udfff" for character in text)


# --- text that is not YAML at all

# Also the line separators that YAML 1.1 counts as line ends and editors do not: they would shift every position.
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


def _syntax_flaw(error: yaml.MarkedYAMLError, text: str) -> Flaw:
    at = error.problem_mark or error.context_mark
    mark = Mark(at.line + 1, at.column + 1) if at else Mark(1, 1)
    lines = _LINE_END.split(text)
    if mark.line > len(lines):  # libyaml counts one line too many at the end of a file without a final newline
        mark = Mark(len(lines), len(lines[-1]) + 1)
    line = lines[mark.line - 1]
    tab = _TAB_INDENT.match(line)
    if tab:
        return Flaw(
            Mark(mark.line, tab.end()), Mistake("a tab indents this line", "spaces", "YAML has no tabs in indents")
        )
    said = f"{error.context}: {error.problem}" if error.context else str(error.problem)
    return Flaw(mark, Mistake(f"not YAML: {said}", hint=_syntax_hint(said, line)))


def _syntax_hint(said: str, line: str) -> str:
    for sort, sign in (("tag", "!"), ("alias", "*"), ("anchor", "&")):
        if sort in said:
            return f"text that begins with {sign} needs quotes"
    if re.search(r":\s+[>|]\s*[^\s#]", line):
        return _BLOCK_HINT
    if re.search(r":\s+[{\[%@`]", line):
        return 'text that begins with { [ % @ or ` needs quotes: "{comm}"'
    return 'check the indent and the quotes around here; text with ": " or " #" in it needs quotes'

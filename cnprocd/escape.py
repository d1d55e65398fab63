"""Make text from processes safe to show, and safe as an argument of a hook. PURE.

A comm is 16 arbitrary bytes that the process chose itself; exe, cmdline and unit are as arbitrary. Here they are `str`,
decoded as UTF-8 with surrogateescape (so the raw byte 0xff is U+DCFF). Two functions:

printable   for terminals and logs. Every character that could move a cursor, start a line, reverse the reading
            direction, be invisible or forge another record is escaped: \\xNN for a byte (control character, DEL, or a
            byte that is not UTF-8), \\uNNNN or \\UNNNNNNNN for a character (C1 controls, U+2028, bidi controls, zero
            width...). The backslash itself is escaped, so different texts never look the same.
argument    for one argv element of a hook. In addition "/" and a leading "-" or "." are escaped, so the text is never
            a path and never an option. exe and cgroup are paths and keep their "/".

str.isprintable() decides what is escaped: all of Unicode's Other (Cc Cf Cs Co Cn) and Separator (Zl Zp Zs) except the
ASCII space. A newer Python knows more characters. That changes how a character is shown, never whether it is safe.
"""

from __future__ import annotations

import re

_RAW_BYTE = range(0xDC80, 0xDD00)  # surrogateescape's code points for bytes that are not UTF-8


def printable(text: str) -> str:
    """Return `text` with all but visible characters and the ASCII space escaped; injective, and always valid UTF-8."""
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(ch if ch.isprintable() and ch != "\\" else _escaped(ch) for ch in text)


def argument(text: str, *, keep_slash: bool = False, is_unit: bool = False) -> str:
    """Return `text` as part of one argv element: printable, not an option, and not a path (unless `keep_slash`)."""
    shown = unit_name(text) if is_unit else printable(text)
    if not keep_slash:
        shown = shown.replace("/", "\\x2f")
    return _escaped(shown[0]) + shown[1:] if shown.startswith(("-", ".")) else shown


_UNIT_NAME = re.compile(r"[A-Za-z0-9:_.\\@-]+", re.ASCII)


def unit_name(text: str) -> str:
    """A systemd unit's name as systemctl(1) takes it; anything else as `printable`.

    The characters that a valid name may have (systemd src/basic/unit-name.c VALID_CHARS) are all visible. The backslash
    stays, so this is injective only because a text with other characters is never taken for a unit's name.
    """
    return text if _UNIT_NAME.fullmatch(text) else printable(text)


def _escaped(ch: str) -> str:
    point = ord(ch)
    if point in _RAW_BYTE:
        return f"\\x{point - 0xDC00:02x}"
    if point < 0x80:
        return f"\\x{point:02x}"
    return f"\\u{point:04x}" if point <= 0xFFFF else f"\\U{point:08x}"

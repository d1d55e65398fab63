"""Convert a terminal screen to SVG: `tmux capture-pane -ep | python tests/demo/picture.py > screenshot.svg`.

packaging/screenshot.svg was made in a tmux window of 134 columns. The daemon ran with the examples
oracle-shared-memory, core-dump-notice and crash-loop. The commands were `cnprocctl watch --count 9` while processes
died, then `cnprocctl status`. Only the colours of cnprocctl are supported.
"""

from __future__ import annotations

import re
import sys
from html import escape
from itertools import pairwise

WIDE, HIGH, MARGIN = 8.4, 18, 14  # of a character, in a font of 14 pixels
COLOURS = {31: "#ff7b72", 32: "#7ee787", 33: "#e3b341", 36: "#79c0ff"}
SEQUENCE = re.compile(r"\x1b\[([\d;]*)m")


def spans(line: str, codes: set[int]) -> str:
    """Return the text of one line. `codes` are the current attributes, which carry over to the next line."""
    marks = [(0, 0, ""), *[(one.start(), one.end(), one[1]) for one in SEQUENCE.finditer(line)]]
    drawn, column = [], 0
    for (_, begin, code), (end, _, _) in pairwise([*marks, (len(line), 0, "")]):
        for number in map(int, filter(None, code.split(";"))) if begin else ():
            codes.difference_update(
                COLOURS if number == 39 else {1, 2} if number == 22 else codes if number == 0 else ()
            )
            codes |= {number} - {0, 22, 39}
        if begin and not code:
            codes.clear()
        piece = line[begin:end]
        if piece.strip():
            drawn.append(f'<tspan x="{MARGIN + column * WIDE:.1f}"{style(codes)}>{escape(piece)}</tspan>')
        column += len(piece)
    return "".join(drawn)


def style(codes: set[int]) -> str:
    colour = next((COLOURS[code] for code in codes if code in COLOURS), "#8b949e" if 2 in codes else None)
    return (f' fill="{colour}"' if colour else "") + (' font-weight="bold"' if 1 in codes else "")


def main() -> None:
    lines = sys.stdin.read().rstrip().split("\n")
    width = 2 * MARGIN + WIDE * max(len(SEQUENCE.sub("", line)) for line in lines)
    height = 2 * MARGIN + HIGH * len(lines)
    print(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}" font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="14" fill="#e6edf3">\n'
        '<rect width="100%" height="100%" rx="8" fill="#0d1117"/>'
    )
    codes: set[int] = set()
    for number, line in enumerate(lines):
        drawn = spans(line, codes)
        if drawn:
            print(f'<text y="{MARGIN + HIGH * number + 13}" xml:space="preserve">{drawn}</text>')
    print("</svg>")


if __name__ == "__main__":
    main()

"""A program with several hard links, of which rules name some: one file, as exit records name it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kernel.harness import child, running

RULES = """
rules:
  - {name: one, events: [nonzero_exit], match: {exe: $TMP/one}}
  - {name: not-one, events: [nonzero_exit], match: {exe_claimed: "$TMP/*", not: {exe: $TMP/one}}}
  - {name: exec-one, events: [exec], match: {exe: $TMP/one}}
  - {name: exec-two, events: [exec], match: {exe: $TMP/two}}
$MARKER
"""


def ended(program: Path) -> int:
    pid = child(lambda: os.execv(program, [program]))
    os.waitpid(pid, 0)
    return pid


def test_hard_links_are_one_program_when_they_end(tmp_path):
    """An exit record has the number of the file. At an exec, /proc has the path that was executed."""
    shutil.copy(os.path.realpath("/bin/false"), tmp_path / "one")
    for name in ("two", "other"):
        (tmp_path / name).hardlink_to(tmp_path / "one")
    with running(tmp_path, RULES.replace("$TMP", str(tmp_path))) as daemon:
        pids = {name: [ended(tmp_path / name) for _ in range(5)] for name in ("one", "two", "other")}
        daemon.mark()
        for name, pid in ((name, pid) for name, some in pids.items() for pid in some):
            found = {str(one["rule"]): one for one in daemon.matches(pid=pid)}
            assert "one" in found and "not-one" not in found
            assert Path(str(found["one"]["exe"])).parent == tmp_path
            assert not {"exec-one", "exec-two"} & found.keys() - {f"exec-{name}"}

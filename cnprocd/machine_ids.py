"""Read the ids of this machine, once at the start of the daemon."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cnprocd.escape import printable
from cnprocd.output.match_id import Machine
from cnprocd.process.procfs import boot_id

_MACHINE_ID = Path("/etc/machine-id")
_ID = re.compile(r"[0-9a-f]{32}")


def this_machine() -> Machine:
    """Return the host name as the kernel has it, the machine id of machine-id(5), and this boot's id."""
    return Machine(printable(os.uname().nodename), _machine_id(), boot_id().replace("-", ""))


def _machine_id() -> str | None:
    """Return the machine id, or None if the file is missing, empty or `uninitialized` (machine-id(5))."""
    try:
        text = _MACHINE_ID.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
    return text if _ID.fullmatch(text) else None

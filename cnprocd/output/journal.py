"""The journal's native protocol: one record is one datagram to /run/systemd/journal/socket.

`encode` turns a record (the same mapping that becomes a JSON line) into bytes, and `JournalSink` sends them. Processes
choose some field values themselves (a comm is 16 arbitrary bytes), so no value may end its field. A value with a
newline or a NUL is sent in the length-prefixed form. The control characters in MESSAGE, which is shown on terminals,
are escaped.

Facts relied on (systemd.io/JOURNAL_NATIVE_PROTOCOL, systemd.journal-fields(7), journald-native.c):
- `NAME=value\\n`, or `NAME\\n` + 64-bit little-endian length + value + `\\n` for any bytes at all.
- Names are A-Z 0-9 _, at most 64, not starting with _ (journald drops those) or a digit.
- A datagram that is too large (EMSGSIZE, ENOBUFS) is sent as a memfd sealed against write, grow, shrink and seal,
  passed by SCM_RIGHTS with an empty payload. journald refuses an unsealed one from sandboxed senders.
- Several values of one name are allowed. Each name is sent once here, so a record and its JSON line are equal.
- journald looks up OBJECT_PID only for senders with uid 0. From the daemon's user it is stored as given, so a reused
  PID adds no wrong fields.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from cnprocd.json_value import JsonObject, JsonValue

JOURNAL_SOCKET = Path("/run/systemd/journal/socket")
IDENTIFIER = "cnprocd"
FACILITY_DAEMON = "3"

PRIORITIES = {"debug": 7, "info": 6, "notice": 5, "warning": 4, "error": 3, "critical": 2}

MESSAGE_IDS = {
    "started": "1d04f98ef6494fd7b4e5583773ec639a",
    "rules_loaded": "8e0b500c32f149849b3f23e596ab65c6",
    "rules_rejected": "a179997244714d76934c35e1b6f88922",
    "rule_matched": "2b761c5a2a174400bfd70bbfcdc48658",
    "hook_started": "ada217c4e0c6442ca3462053cf9b2dc3",
    "hook_finished": "46600ae9ba174c7192ca6a1364773b9d",
    "hook_failed": "35b1770d482b447ab765f10e8e4aefa6",
    "hook_output": "561b34390a0a4486ad529a3a8a9bf921",
    "job_dead": "0b67c67cc1d34e9a9053fd508da4c233",
    "overrun": "082be2ccd97d48afa78520e10d029207",
    "recovered": "68d0532869d4492ab62ed7ee3776ed3b",
    "spoofed": "b5f0ce3e4be34f09a6685d4985c817fa",
    "stopping": "ea564821f11b4575b97d85ddabef781e",
    "throttled": "c560db1221a24b97b36a01a352130418",
    "throttle_keys_discarded": "39f28cabd3874ef9a63b7e035f9dacaf",
    "queue_full": "99f1245e39684acaa3ab7e5ed785aa89",
    "spool_damaged": "e2792e8238bc4375887f879970e018b0",
    "spool_not_durable": "b95da1b4570543c0bb3785fda75bd230",
    "spool_durable": "88725cf1bbfd45d9acae8ab4251df1ab",
    "log_lost": "f6b2439f2d914eee9d9f70fb0fa772d5",
    "proc_unreadable": "b243e4f4ea334cdaa1ee4d0296964d3a",
    "proc_unavailable": "283e53b59f7c4c83ba8a9759ed1b210a",
    "names_unavailable": "6a0c533015674f2b8f82ceaa87724d54",
}
"""The id of each record class for `journalctl MESSAGE_ID=` and the message catalog. Never change or reuse one."""

# The field with the PID of the process that a record is about. A class not listed is about cnprocd itself.
OBJECT_PID_FIELD = {
    "rule_matched": "pid",
    "recovered": "pid",
    "hook_started": "hook_pid",
    "hook_finished": "hook_pid",
    "hook_failed": "hook_pid",
    "hook_output": "hook_pid",
}

# The message of an invalid rule file has several lines: position, the line, a caret.
MULTILINE = frozenset({"rules_rejected"})

_NOT_IN_NAMES = re.compile(r"[^A-Z0-9_]")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_CONTROL_BUT_NEWLINE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_NEEDS_LENGTH = re.compile(rb"[\x00-\x08\x0a-\x1f]")


@lru_cache(maxsize=1024)  # the keys are constants of the daemon
def field_name(key: str) -> str:
    """Return the journal field of a record's key: CNPROCD_EXIT_CODE for `exit_code`."""
    return ("CNPROCD_" + _NOT_IN_NAMES.sub("_", key.upper()))[:64]


def field_value(value: JsonValue) -> bytes:
    """Return the bytes of a value. Structures are JSON, as in a JSON line."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value.isascii():
        return value.encode("ascii")
    if type(value) is int:  # not a bool
        return b"%d" % value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "surrogateescape" if _round_trips(text) else "replace")


def _round_trips(text: str) -> bool:
    """Return whether every surrogate in `text` stands for a byte (os.fsdecode), as in text from /proc."""
    return not any("\ud800" <= char < "\udc80" or "\udcff" < char <= "\udfff" for char in text)


def escaped(text: str, *, keep_newlines: bool = False) -> str:
    """Return `text` with everything escaped that could move a cursor, change colours, reorder or forge a line."""
    pattern = _CONTROL_BUT_NEWLINE if keep_newlines else _CONTROL
    return pattern.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def message(record: JsonObject) -> str:
    """Return the line that journalctl shows: the record's message, or its class and fields."""
    event = str(record.get("event", ""))
    own = record.get("message")
    if isinstance(own, str) and own:
        return escaped(own, keep_newlines=event in MULTILINE)
    facts = " ".join(
        f"{key}={field_value(value).decode('utf-8', 'backslashreplace')}"
        for key, value in record.items()
        if value is not None and key not in ("timestamp", "level", "event", "message")
    )
    title = event.replace("_", " ")
    return escaped(f"{title}: {facts}" if facts else title)


def fields(record: JsonObject) -> Iterator[tuple[str, bytes]]:
    """Yield every journal field of a record, in order. A null value is an absent field."""
    event = str(record.get("event", ""))
    yield "MESSAGE", message(record).encode("utf-8", "replace")
    yield "PRIORITY", str(PRIORITIES.get(str(record.get("level")), PRIORITIES["info"])).encode()
    yield "SYSLOG_IDENTIFIER", IDENTIFIER.encode()
    yield "SYSLOG_FACILITY", FACILITY_DAEMON.encode()
    if event in MESSAGE_IDS:
        yield "MESSAGE_ID", MESSAGE_IDS[event].encode()
    about = record.get(OBJECT_PID_FIELD.get(event, ""))
    if isinstance(about, int):
        yield "OBJECT_PID", str(about).encode()
    for key, value in record.items():
        if value is not None and key not in ("message", "level"):
            yield field_name(key), field_value(value)


def encode(record: JsonObject) -> bytes:
    """Return the datagram of a record."""
    parts: list[bytes] = []
    for name, value in fields(record):
        if _NEEDS_LENGTH.search(value):
            parts += (name.encode(), b"\n", len(value).to_bytes(8, "little"), value, b"\n")
        else:
            parts += (name.encode(), b"=", value, b"\n")
    return b"".join(parts)


def is_journal_stream(environ: Mapping[str, str], descriptor: int) -> bool:
    """Return whether `descriptor` is the stream that systemd connected to the journal.

    JOURNAL_STREAM is its device:inode. The variable alone is not enough, because a child whose output goes elsewhere
    inherits it (systemd.exec(5)).
    """
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return stat.S_ISSOCK(status.st_mode) and environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"

"""Render a hook's arguments, environment and standard input. PURE.

Invariant: text that a process chose (comm, exe, unit...) is data. In an argument it is escaped, so that it is never an
option and never a path. In the environment and on standard input it is exact. It can never become the program, the name
of a variable, or a second argument.

Facts:
- execve(2): one string of argv or environ may have 128 KiB (MAX_ARG_STRLEN), all together a quarter of the stack limit.
  Long values are truncated; otherwise a process with a huge command line could prevent its own cleanup.
- A record's texts are escaped for the log; `<field>_hex` beside one holds its exact bytes.
- systemd.exec(5) describes $MONITOR_SERVICE_RESULT, $MONITOR_EXIT_CODE, $MONITOR_EXIT_STATUS and $MONITOR_UNIT for
  units of OnFailure=. Hooks get the same variables with the same meaning, so one program serves both.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Iterator, Mapping, Sequence

from cnprocd.escape import argument, printable
from cnprocd.json_value import JsonObject, JsonValue
from cnprocd.launch.request import LaunchRequest
from cnprocd.rules.ruleset import Hook
from cnprocd.rules.values import Field, Template

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MOST_VALUE_BYTES = 32 * 1024
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")  # of a record's field; a damaged spool may hold others, with NUL or "="
_KEEPS_SLASH = frozenset({"exe", "exe_claimed", "cgroup"})  # paths by nature
_UNITS = frozenset({"unit", "user_unit"})


def argv(hook: Hook, record: JsonObject) -> list[bytes]:
    """Return the argument list. An unknown field is empty text."""
    return [_encoded(_rendered(template, record, as_argument=True)) for template in hook.command]


def environment(request: LaunchRequest) -> dict[bytes, bytes]:
    """Return the whole environment: nothing is inherited. `env:` overrides PATH and the like, but not CNPROCD_*."""
    record, user = request.first_record, request.user
    variables: dict[str, str] = {
        "PATH": PATH,
        "LANG": "C.UTF-8",
        "HOME": user.home,
        "USER": user.name,
        "LOGNAME": user.name,
        "SHELL": user.shell,
    }
    variables.update(
        (name, _rendered(template, record, as_argument=False)) for name, template in request.hook.env.items()
    )
    variables.update(_of_event(record))
    variables.update(_of_monitor(record))
    variables.update(
        CNPROCD_JOB_ID=str(request.job_id),
        CNPROCD_RULE=request.rule,
        CNPROCD_ATTEMPT=str(request.attempt),
        CNPROCD_ATTEMPT_ID=request.attempt_id,
        CNPROCD_EVENTS=str(len(request.events)),
        CNPROCD_EVENTS_LEFT_OUT=str(request.events_left_out),
    )
    return {name.encode(): _encoded(value) for name, value in variables.items()}


def standard_input(request: LaunchRequest) -> bytes:
    """Return the events as JSON lines, as they are logged. There is one line unless the rule has `coalesce`."""
    return b"".join(json.dumps({**record, "job_id": request.job_id}).encode() + b"\n" for record in request.events)


def message(template: Template, record: JsonObject) -> str:
    """Return a message for people."""
    return "".join(
        part if isinstance(part, str) else printable(_text(exact(record, part.name))) for part in template.parts
    )


def exact(record: JsonObject, name: str) -> JsonValue:
    """Return a field's value as it was before escaping. Undecodable bytes of text become surrogates."""
    raw = record.get(f"{name}_hex")
    if isinstance(raw, str):
        with contextlib.suppress(ValueError):  # not hexadecimal: from a damaged disk, or from a compromised daemon
            return bytes.fromhex(raw).decode("utf-8", "surrogateescape")
    return record.get(name)


def _rendered(template: Template, record: JsonObject, *, as_argument: bool) -> str:
    return "".join(
        part if isinstance(part, str) else _field(part, record, as_argument=as_argument) for part in template.parts
    )


def _field(part: Field, record: JsonObject, *, as_argument: bool) -> str:
    value = exact(record, part.name)
    if as_argument and isinstance(value, str):
        return argument(value, keep_slash=part.name in _KEEPS_SLASH, is_unit=part.name in _UNITS)
    return _text(value)


def _text(value: JsonValue) -> str:
    """Return a JSON value as text: null is empty, true and false are words, lists and objects stay JSON."""
    if value is None:
        return ""
    if type(value) is int:  # what json writes, sooner
        return str(value)
    return value if isinstance(value, str) else json.dumps(value)


def _of_event(record: JsonObject) -> Iterator[tuple[str, str]]:
    for name, value in record.items():
        if value is None or not _NAME.fullmatch(name):
            continue
        if not (name.endswith("_hex") and name[:-4] in record):
            yield f"CNPROCD_{name.upper()}", _text(exact(record, name))


def _of_monitor(record: JsonObject) -> Mapping[str, str]:
    code, number, unit = record.get("exit_code"), record.get("signal"), exact(record, "unit")
    found: dict[str, str] = {} if not isinstance(unit, str) else {"MONITOR_UNIT": unit}
    if number is not None:
        dumped = record.get("core_dumped") is True
        found["MONITOR_SERVICE_RESULT"] = "core-dump" if dumped else "signal"
        found["MONITOR_EXIT_CODE"] = "dumped" if dumped else "killed"
        found["MONITOR_EXIT_STATUS"] = signal_name(number)
    elif isinstance(code, int):
        found["MONITOR_SERVICE_RESULT"] = "exit-code" if code else "success"
        found["MONITOR_EXIT_CODE"] = "exited"
        found["MONITOR_EXIT_STATUS"] = str(code)
    return found


def signal_name(number: JsonValue) -> str:
    """Return a signal as systemd writes it: KILL, SEGV, RTMIN+3. A name loses its SIG."""
    if not isinstance(number, int):
        return str(number).removeprefix("SIG")
    if signal.SIGRTMIN <= number <= signal.SIGRTMAX:
        return f"RTMIN+{number - signal.SIGRTMIN}"
    known: Sequence[signal.Signals] = list(signal.Signals)
    return next((one.name.removeprefix("SIG") for one in known if one == number), str(number))


def _encoded(text: str) -> bytes:
    """Return bytes for execve: no NUL, truncated, undecodable bytes as they were. A lone surrogate becomes "?"."""
    if text.isascii():
        return text.replace("\0", "")[:MOST_VALUE_BYTES].encode()
    raw = text.encode("utf-8", "surrogateescape") if _plain(text) else text.encode("utf-8", "replace")
    return raw.replace(b"\0", b"")[:MOST_VALUE_BYTES]


def _plain(text: str) -> bool:
    return not any("\ud800" <= ch <= "\udfff" and not "\udc80" <= ch <= "\udcff" for ch in text)

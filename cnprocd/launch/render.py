"""What a hook is told: its arguments, its environment and its standard input. PURE.

The invariant: what a process says about itself (comm, exe, unit...) is data. In an argument it is escaped so that it is
never an option and never a path; in the environment and on standard input it is exact, for programs that parse
neither. No text that a process chose can become the program, a variable's name, or a second argument.

Facts:
- execve(2): one string of argv or environ may have 128 KiB (MAX_ARG_STRLEN), all together a quarter of the stack limit.
  A process that dies with a huge command line must not thereby prevent its own cleanup: long values are cut.
- A record's texts are escaped for the log; `<field>_hex` beside one holds its exact bytes.
- systemd.exec(5) describes $MONITOR_SERVICE_RESULT, $MONITOR_EXIT_CODE, $MONITOR_EXIT_STATUS and $MONITOR_UNIT for
  units of OnFailure=. The same names are given where they mean the same, so that one program serves both.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Iterator, Mapping, Sequence

from cnprocd.escape import argument, printable
from cnprocd.rules.values import Field, Template
from cnprocd.spool.job import HookSpec, Identity, Job, Record

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MOST_VALUE_BYTES = 32 * 1024
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")  # of a record's field; a damaged spool may hold others, with NUL or "="
_KEEPS_SLASH = frozenset({"exe", "cgroup"})  # paths by nature


def argv(spec: HookSpec, job: Job) -> list[bytes]:
    """The argument list. A field that is not known is empty text."""
    record = _first(job)
    return [_encoded(_rendered(template, record, as_argument=True)) for template in spec.command]


def environment(spec: HookSpec, job: Job, who: Identity, attempt_id: str) -> dict[bytes, bytes]:
    """The whole environment: nothing is inherited. The rule's own variables win over the plain ones."""
    record = _first(job)
    variables: dict[str, str] = {
        "PATH": PATH,
        "LANG": "C.UTF-8",
        "HOME": who.home,
        "USER": who.name,
        "LOGNAME": who.name,
        "SHELL": who.shell,
    }
    variables.update((name, _rendered(template, record, as_argument=False)) for name, template in spec.env.items())
    variables.update(_of_event(record))
    variables.update(_of_monitor(record))
    variables.update(
        CNPROCD_JOB_ID=str(job.job_id),
        CNPROCD_RULE=job.rule,
        CNPROCD_ATTEMPT=str(job.attempts),
        CNPROCD_ATTEMPT_ID=attempt_id,
        CNPROCD_EVENTS=str(job.event_count),
    )
    return {name.encode(): _encoded(value) for name, value in variables.items()}


def standard_input(job: Job) -> bytes:
    """The events as JSON lines, as they are logged; one line unless the rule gathers."""
    return b"".join(json.dumps({**record, "job_id": job.job_id}).encode() + b"\n" for record in job.events)


def message(template: Template, job: Job) -> str:
    """A message for people, of the first event."""
    record = _first(job)
    return "".join(
        part if isinstance(part, str) else printable(_text(exact(record, part.name))) for part in template.parts
    )


def exact(record: Record, name: str) -> object:
    """The value of a field before it was escaped for the log; text keeps undecodable bytes as surrogates."""
    raw = record.get(f"{name}_hex")
    if isinstance(raw, str):
        with contextlib.suppress(ValueError):  # no hexadecimal: from a damaged disk, or a reader that makes things up
            return bytes.fromhex(raw).decode("utf-8", "surrogateescape")
    return record.get(name)


def _first(job: Job) -> Record:
    return {**job.events[0], "job_id": job.job_id}


def _rendered(template: Template, record: Record, *, as_argument: bool) -> str:
    return "".join(
        part if isinstance(part, str) else _field(part, record, as_argument=as_argument) for part in template.parts
    )


def _field(part: Field, record: Record, *, as_argument: bool) -> str:
    value = exact(record, part.name)
    if as_argument and isinstance(value, str):
        return argument(value, keep_slash=part.name in _KEEPS_SLASH)
    return _text(value)


def _text(value: object) -> str:
    """A JSON value as text: null is empty, true and false are words, lists and objects stay JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _of_event(record: Record) -> Iterator[tuple[str, str]]:
    for name, value in record.items():
        if value is None or not _NAME.fullmatch(name):
            continue
        if not (name.endswith("_hex") and name[:-4] in record):
            yield f"CNPROCD_{name.upper()}", _text(exact(record, name))


def _of_monitor(record: Record) -> Mapping[str, str]:
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


def signal_name(number: object) -> str:
    """A signal as systemd writes it: KILL, SEGV, RTMIN+3. A name is taken without its SIG."""
    if not isinstance(number, int):
        return str(number).removeprefix("SIG")
    if signal.SIGRTMIN <= number <= signal.SIGRTMAX:
        return f"RTMIN+{number - signal.SIGRTMIN}"
    known: Sequence[signal.Signals] = list(signal.Signals)
    return next((one.name.removeprefix("SIG") for one in known if one == number), str(number))


def _encoded(text: str) -> bytes:
    """Bytes for execve: no NUL, not too long, undecodable bytes as they were (and no lone surrogate can fail)."""
    raw = text.encode("utf-8", "surrogateescape") if _plain(text) else text.encode("utf-8", "replace")
    return raw.replace(b"\0", b"")[:MOST_VALUE_BYTES]


def _plain(text: str) -> bool:
    return not any("\ud800" <= ch <= "\udfff" and not "\udc80" <= ch <= "\udcff" for ch in text)

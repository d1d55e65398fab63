"""`cnprocctl record` and `replay`: record events; evaluate rules on them offline."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from cnprocd import __version__
from cnprocd.cli.drafts import draft_of
from cnprocd.cli.grammar import Options
from cnprocd.cli.lines import match_line
from cnprocd.cli.listening import BUFFER_BYTES
from cnprocd.cli.recording import Drain, Recording, RecordingError, Writer, facts_of, read
from cnprocd.cli.replaying import Replayed
from cnprocd.cli.replaying import replay as replayed
from cnprocd.cli.rule_names import require_rule, wanted
from cnprocd.cli.ruleset import loaded_rules
from cnprocd.cli.standard_files import STDIN
from cnprocd.cli.terminal import Style, counted, print_json, size
from cnprocd.cli.verbs.trial import ACCOUNTS
from cnprocd.connector.decode import SLOT_SIZE, Rejects, decode
from cnprocd.connector.event import Exec
from cnprocd.connector.listener import Listener
from cnprocd.connector.taskstats import Taskstats, TaskstatsAbsent
from cnprocd.connector.uapi import DATAGRAM_SIZE
from cnprocd.errors import EX_OK, CnprocdError
from cnprocd.json_value import JsonDict
from cnprocd.process import procfs
from cnprocd.process.kernel_log import KernelLog
from cnprocd.process.model import EVERYTHING
from cnprocd.rules.compile import Matcher

_FLUSH_EVERY_S = 1.0
_CHECK_EVERY_MS = 200  # for a signal, the size and the time
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_HELD_IN = "/var/tmp"  # noqa: S108  # not in memory as /tmp often is
_PIECE = 4096
_BY_SIGNAL, _BY_LINE, _BY_END_OF_INPUT = "a signal", "a line on standard input", "the end of standard input"


def record(options: Options) -> int:
    """Record until the time or the size is reached, or until a signal. The file is then complete."""
    if options.hold == (options.file is not None):
        raise _unclear("where to record is not clear", "give the FILE to create, or --hold")
    if options.hold:
        return _hold(options)
    with _new_file(options.file) as file:
        recorder = _Recorder(file, options.max_size)
        recorder.run(options.duration)
    _report(recorder, str(options.file), options)
    return EX_OK


def _hold(options: Options) -> int:
    """Record to a file without a name, and keep it until standard input ends. The kernel deletes it with this process.

    So nothing stays behind, however this process and its client end.
    """
    with tempfile.TemporaryFile(dir=_HELD_IN) as file:
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        recorder = _Recorder(file, options.max_size, hold=True)
        if options.json:
            print_json({"recording": path}, line=True)
        recorder.run(options.duration)
        _report(recorder, path, options)
        if recorder.why in (_BY_SIGNAL, _BY_END_OF_INPUT):
            return EX_OK
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        while os.read(STDIN, _PIECE):
            """Until the end of standard input."""
    return EX_OK


def _report(recorder: _Recorder, file: str, options: Options) -> None:
    figures: JsonDict = {
        "file": file,
        "bytes": recorder.writer.written,
        "events": recorder.events,
        "exit_records": recorder.exit_records,
        "lost": recorder.lost,
        "ended": recorder.why,
    }
    if options.json:
        print_json(figures, line=options.hold)
        return
    print(
        f"{file}: {counted(recorder.events, 'event')}, {counted(recorder.exit_records, 'exit record')}, "
        f"{recorder.lost} lost, "
        f"{size(recorder.writer.written)}; ended by {recorder.why}",
        flush=True,
    )


def _unclear(what: str, hint: str) -> CnprocdError:
    error = CnprocdError(what, hint)
    error.exit_status = 2
    return error


def _new_file(path: Path) -> BinaryIO:
    """Create a file that only this user may read, because it has the arguments of other users' processes."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        hint = "use another name, or remove the file" if error.errno == errno.EEXIST else "use another directory"
        raise CnprocdError(f"cannot create {path}: {error.strerror}", hint) from error
    os.fchmod(fd, 0o600)
    return os.fdopen(fd, "wb")


class _RawTaskstats(Taskstats):
    """Exit records as undecoded messages."""

    @property
    def family(self) -> int:
        """The generic netlink family id of taskstats on this machine."""
        return self._family

    def drain_raw(self) -> list[bytes]:
        """Return all queued messages."""
        messages: list[bytes] = []
        while True:
            received = self._receive(self._slots.count)
            messages += [bytes(datagram) for datagram in self._slots.datagrams(received)]
            if received < self._slots.count:
                return messages


class _Recorder:
    """Write the messages of both sockets to a file."""

    def __init__(self, file: BinaryIO, most_bytes: int, *, hold: bool = False) -> None:
        self.events = self.exit_records = self.lost = 0
        self.why = ""
        self._most_bytes = most_bytes
        self._hold = hold
        self._listener = Listener.open(BUFFER_BYTES)
        self._taskstats: _RawTaskstats | None = None
        self._kernel_log = KernelLog.open()
        self._rejects = Rejects()
        self._uids: set[int] = set()
        try:
            self._taskstats = _RawTaskstats(BUFFER_BYTES)
        except TaskstatsAbsent:
            self._taskstats = None
        self.writer = Writer(file)

    def run(self, duration_s: float) -> None:
        """Record. `why` is then what ended it: the time, the size, a signal; if it is held, standard input."""
        # The handler sets a flag; an exception could leave a partial chunk.
        for number in _SIGNALS:
            signal.signal(number, self._stop)
        self._listener.subscribe()
        try:
            self._begin()
            print(f"recording, {'Enter' if self._hold else 'Ctrl-C'} ends", file=sys.stderr, flush=True)
            self._follow(time.monotonic() + duration_s)
        finally:
            self._end()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.why = _BY_SIGNAL

    def _begin(self) -> None:
        start = list(procfs.scan(EVERYTHING))
        self.writer.values(
            b"H",
            {
                "version": __version__,
                "kernel": os.uname().release,
                "machine": os.uname().machine,
                "byte_order": sys.byteorder,
                "recorded_ns": time.time_ns(),
                "taskstats": self._taskstats is not None,
                "family": self._taskstats.family if self._taskstats is not None else None,
                "kernel_log": not self._kernel_log.why_unreadable,
            },
        )
        self.writer.values(b"S", [facts_of(process) for process in start])
        self._uids.update(one.uid for one in start if one.uid is not None)

    def _follow(self, until_s: float) -> None:
        poller = select.poll()
        for source in (self._listener, self._taskstats):
            if source is not None:
                poller.register(source.fileno(), select.POLLIN)
        if self._hold:
            poller.register(STDIN, select.POLLIN)
        flush_at = time.monotonic() + _FLUSH_EVERY_S
        while not self.why:
            ready = poller.poll(_CHECK_EVERY_MS)
            self._drain()
            if any(fd == STDIN for fd, _ in ready):
                self.why = _BY_LINE if os.read(STDIN, _PIECE) else _BY_END_OF_INPUT
            now = time.monotonic()
            if now >= flush_at:
                self.writer.flush()
                flush_at = now + _FLUSH_EVERY_S
            if self.writer.written >= self._most_bytes:
                self.why = "its size"
            elif now >= until_s:
                self.why = "its time"

    def _drain(self) -> None:
        slots = self._listener.receive()
        messages = self._taskstats.drain_raw() if self._taskstats is not None else []
        if slots is not None or messages:
            self._write(bytes(slots) if slots is not None else b"", messages)

    def _write(self, slots: bytes, messages: list[bytes]) -> None:
        events = decode(slots, self._rejects)
        execs = {event.process_tgid for event in events if isinstance(event, Exec)}
        facts = [one for tgid in sorted(execs) if (one := procfs.read_process(tgid)) is not None]
        starts = range(0, len(slots), SLOT_SIZE)
        datagrams = b"".join(slots[at : at + DATAGRAM_SIZE] for at in starts)
        self.writer.drain(Drain(datagrams, messages, facts, self._kernel_log.read()))
        self._uids.update(one.uid for one in facts if one.uid is not None)
        self.events += len(events)
        self.exit_records += len(messages)

    def _end(self) -> None:
        """Unsubscribe, then finish the recording."""
        self.lost = self._listener.drops() + (self._taskstats.drops() if self._taskstats is not None else 0)
        self._listener.unsubscribe()
        if self._taskstats is not None:
            self._taskstats.close()
        self._kernel_log.close()
        self.writer.values(b"N", {str(uid): procfs.user_name(uid) for uid in sorted(self._uids)})
        self.writer.end({"ended": self.why, "lost": self.lost, "events": self.events})


def replay(options: Options) -> int:
    """Show the matches of the rules on a recording, then figures; or with --history, on past matches."""
    if options.history == (options.file is not None):
        raise _unclear("what to replay is not clear", "give the FILE of a recording, or --history")
    if options.history:
        from cnprocd.cli.verbs.past import replay_history

        return replay_history(options)
    try:
        with open(options.file, "rb") as file:
            recording = read(file)
    except OSError as error:
        hint = "`cnprocctl record FILE` writes a recording"
        raise CnprocdError(f"cannot read {options.file}: {error.strerror}", hint) from error
    if recording.header.get("byte_order") != sys.byteorder:
        raise RecordingError("the recording is of a machine with another byte order", "replay it on such a machine")
    ids = {name: uid for uid, name in recording.names.items()}
    loaded = loaded_rules(options.rules, user=_user(ids), draft=draft_of(options))
    require_rule(options.rule, lambda: [rule.name for rule in loaded.rules])
    found = replayed(recording, Matcher(loaded.rules))
    matches = [match for match in found.matches if wanted(str(match["rule"]), options.rule)]
    matches = matches if options.limit is None else matches[-options.limit :]
    if options.json:
        print_json({"matches": matches, "summary": _summary(found, recording), "timing": _timing(found)})
        return EX_OK
    style = Style()
    for match in matches:
        at_ns = match["kernel_time_ns"]
        at = f"{at_ns / 1e9:.6f}" if isinstance(at_ns, int) else "-"
        print(match_line(match, style, at))
    for line in _figures(found, recording):
        print(style("dim", line))
    return EX_OK


def _user(ids: dict[str, int]) -> Callable[[str], int | None]:
    """Look up users by the names of the recorded machine, then by those of this one."""
    return lambda name: ids[name] if name in ids else ACCOUNTS.user(name)


def _summary(found: Replayed, recording: Recording) -> JsonDict:
    return {
        "events": found.events,
        "exit_records": found.exit_records,
        "occurrences": found.occurrences,
        "unreadable": found.unreadable,
        "matches": len(found.matches),
        "held_back": found.held_back,
        "rules": dict(sorted(found.rules.items())),
        "lost_while_recording": recording.end.get("lost"),
        "cut_short": recording.cut_short,
        "recorded_s": round(found.span_s, 6),
    }


def _timing(found: Replayed) -> JsonDict:
    events = max(1, found.events)
    return {
        "seconds": round(found.took_s, 6),
        "events_per_second": round(found.events / max(found.took_s, 1e-9)),
        "microseconds_per_event": round(found.took_s / events * 1e6, 3),
    }


def _figures(found: Replayed, recording: Recording) -> list[str]:
    timing = _timing(found)
    lost = recording.end.get("lost")
    lines = [
        f"{counted(found.events, 'event')} and {counted(found.exit_records, 'exit record')} of {found.span_s:.1f} s, "
        f"{counted(len(found.matches), 'match', 'es')}"
        + "".join(f", {rule} {count}" for rule, count in sorted(found.rules.items()))
        + (f"; {found.held_back} of them held back" if found.held_back else ""),
        f"replayed in {found.took_s:.3f} s: {timing['events_per_second']} events a second, "
        f"{timing['microseconds_per_event']} microseconds an event",
    ]
    if lost:
        lines.append(f"{lost} events were lost while recording")
    if recording.cut_short:
        lines.append("the recording is truncated: its end is missing")
    return lines

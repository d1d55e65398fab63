"""What one daemon hands on to the next, as JSON: the processes that it knew, and those that its hooks left. PURE.

The next daemon scans /proc, which shows the processes that live then. It does not show what a process was that died in
between, and whose exit waits in the socket that the service manager keeps. So the table is handed on, and with it the
exit records of leaders that ended before their processes.

The processes of hooks are handed on by PID and start time. They are not recognized by their environment: any user can
set that, and would hide its processes from every rule.

The files that rules name are handed on as well (former_files.py): a path may lead to another file by then.

All of it is for one boot. A text that is not as this module writes it is refused as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from itertools import islice
from typing import Any, NamedTuple, TypeVar, get_args

from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.json_value import (
    JsonDict,
    JsonError,
    JsonObject,
    JsonValue,
    as_bool,
    as_dict,
    as_int,
    as_list,
    as_str,
    get_int,
    get_list,
    get_str,
    list_of,
    parse_json,
)
from cnprocd.process.files import FileId, NamedFile, Removal
from cnprocd.process.model import Image, MoreIds, Process, Provenance

FORMAT = 1
MOST_BYTES = 16 << 20
MOST_HOOKS = 4096
MOST_FILES = 4096
MOST_LEADERS = 1024

T = TypeVar("T")


class Started(NamedTuple):
    """A process by what no other process of a boot has: its PID, and its start (CLOCK_MONOTONIC, as /proc shows it)."""

    tgid: int
    start_ns: int


class HandedOn(NamedTuple):
    """What a daemon knew of processes when it stopped."""

    processes: tuple[Process, ...] = ()
    leaders: tuple[TaskRecord, ...] = ()  # that ended before their processes
    at_ns: int = 1 << 62  # every event after this time (CLOCK_MONOTONIC) is queued for the next daemon


class FormerHooks(NamedTuple):
    """The processes of the hooks of a daemon, and the runners that it used."""

    hooks: frozenset[Started] = frozenset()
    runners: frozenset[Started] = frozenset()


def encode_processes(known: HandedOn, boot_id: str, most_bytes: int = MOST_BYTES) -> tuple[bytes, int]:
    """Return the text, and how many processes have no room in it."""
    leaders = json.dumps(known.leaders[:MOST_LEADERS])
    head = f'{{"format": {FORMAT}, "boot_id": {json.dumps(boot_id)}, "at_ns": {known.at_ns}, '
    head += f'"leaders": {leaders}, "processes": [\n'
    room, texts = most_bytes - len(head) - len("]}"), []
    for process in known.processes:
        text = json.dumps(_of_process(process))
        room -= len(text) + len(",\n")
        if room < 0:
            break
        texts.append(text)
    return (head + ",\n".join(texts) + "]}").encode(), len(known.processes) - len(texts)


def decode_processes(raw: bytes, boot_id: str) -> HandedOn:
    """Return what the text of this boot has. Raises JsonError if it is of another boot or format, or damaged."""
    found = _current(raw, boot_id)
    processes, leaders = get_list(found, "processes", _process), get_list(found, "leaders", _leader)
    return HandedOn(tuple(processes), tuple(leaders), get_int(found, "at_ns"))


def encode_hooks(former: FormerHooks, boot_id: str) -> bytes:
    """Return the text. Beyond MOST_HOOKS the oldest are kept."""
    by_age = sorted(former.hooks, key=lambda hook: hook.start_ns)
    found: JsonDict = {"format": FORMAT, "boot_id": boot_id, "hooks": by_age[:MOST_HOOKS]}
    return json.dumps(found | {"runners": sorted(former.runners)}).encode()


def decode_hooks(raw: bytes, boot_id: str) -> FormerHooks:
    """Return what the text of this boot has. Raises JsonError if it is of another boot or format, or damaged."""
    found = _current(raw, boot_id)
    return FormerHooks(frozenset(get_list(found, "hooks", _started)), frozenset(get_list(found, "runners", _started)))


def encode_files(known: Iterable[tuple[NamedFile, int]], boot_id: str) -> bytes:
    """Return the text of at most MOST_FILES files of named paths, each with when its path last led to it."""
    return json.dumps({"format": FORMAT, "boot_id": boot_id, "files": list(islice(known, MOST_FILES))}).encode()


def decode_files(raw: bytes, boot_id: str) -> tuple[tuple[NamedFile, int], ...]:
    """Return what the text of this boot has. Raises JsonError if it is of another boot or format, or damaged."""
    return tuple(get_list(_current(raw, boot_id), "files", _named_file))


def _named_file(value: JsonValue) -> tuple[NamedFile, int]:
    named, looked_ns = _items(value, as_list, as_int)
    path, file, is_current, removal = _items(named, as_str, _file, as_bool, _or_none(_removal))
    return NamedFile(path, file, is_current, removal), looked_ns


def _removal(value: JsonValue) -> Removal:
    return Removal(*_items(value, as_int, as_int))


def _current(raw: bytes, boot_id: str) -> JsonObject:
    found = as_dict(parse_json(raw))
    if get_int(found, "format") != FORMAT or get_str(found, "boot_id") != boot_id:
        raise JsonError("it is of another boot or of another version")
    return found


def _started(value: JsonValue) -> Started:
    return Started(*_items(value, as_int, as_int))


# A process: the attributes that differ from the defaults, by name.


def _of_process(process: Process) -> JsonDict:
    return {name: value for name, default in _DEFAULTS.items() if (value := getattr(process, name)) != default}


def _process(value: JsonValue) -> Process:
    found = as_dict(value)
    return Process(**{name: _READERS[name](found[name]) for name in _READERS.keys() & found.keys()} | _tgid(found))


def _tgid(found: JsonObject) -> dict[str, int]:
    return {"tgid": get_int(found, "tgid", minimum=1)}


def _leader(value: JsonValue) -> TaskRecord:
    return TaskRecord(*_items(value, *_LEADER_READERS))


def _image(value: JsonValue) -> Image:
    claimed, is_deleted, file, links, is_cut, exe_source = _items(
        value, _or_none(as_str), _or_none(as_bool), _or_none(_file), list_of(as_str), as_bool, _or_none(_provenance)
    )
    return Image(claimed, is_deleted, file, tuple(links), is_cut, exe_source)


def _more_ids(value: JsonValue) -> MoreIds:
    return MoreIds(*_items(value, _or_none(as_int), _or_none(as_int)))


def _file(value: JsonValue) -> FileId:
    return FileId(*_items(value, as_int, as_int))


def _provenance(value: JsonValue) -> Provenance:
    for provenance in _PROVENANCES:
        if value == provenance:
            return provenance
    raise JsonError("expected a provenance")


def _or_none(read: Callable[[JsonValue], T]) -> Callable[[JsonValue], T | None]:
    return lambda value: None if value is None else read(value)


def _items(value: JsonValue, *readers: Callable[[JsonValue], Any]) -> list[Any]:
    items = as_list(value)
    if len(items) != len(readers):
        raise JsonError(f"expected {len(readers)} items, found {len(items)}")
    return [read(item) for read, item in zip(readers, items, strict=True)]


_PROVENANCES: tuple[Provenance, ...] = get_args(Provenance)
_BY_ANNOTATION: dict[str, Callable[[JsonValue], Any]] = {
    "int": as_int,
    "int | None": _or_none(as_int),
    "str": as_str,
    "str | None": _or_none(as_str),
    "bool": as_bool,
    "Provenance": _provenance,
    "Image | None": _or_none(_image),
    "MoreIds | None": _or_none(_more_ids),
}
NOT_HANDED_ON = ("is_shared",)  # it holds within one table
_FIELDS = [one for one in fields(Process) if one.name not in NOT_HANDED_ON]
_DEFAULTS = {one.name: None if one.default is MISSING else one.default for one in _FIELDS}
_READERS = {one.name: _BY_ANNOTATION[str(one.type)] for one in _FIELDS}
_LEADER_READERS = [_BY_ANNOTATION[kind.__forward_arg__] for kind in TaskRecord.__annotations__.values()]

"""In a flood, decide by a look at an exit record that the matches of a process would only be counted. PURE.

A user can make tens of thousands of processes a second fail that are alike in all that the rules ask for: name, user,
group, program and status. To identify and match one of them costs five times what its event and its record cost. So the
rules are evaluated for the first one, and for a few more while their matches are reported. The others are counted by
what was found, as long as that is certain:

- A throttle holds back the match.
- Or the match has no room in the budgets of the flood (flood.py), among the deferred ones, or in the backlog.

A process of a new name is like another one if the same rules ask for both names. A rule that asks for anything else
(its unit, parent, arguments, lifetime, a pattern of its path) ends all this: then each process is matched, as are all
processes of hooks. If a named path leads to another file, all is forgotten, and all is found anew after MEMO_S.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from cnprocd.alike import (
    SHOWN,
    Alike,
    Key,
    Later,
    Part,
    counts_names,
    is_by_index,
    is_known,
    name_of,
    named_fields,
    nameless,
    part_of,
    throttles_of,
    without_name,
)
from cnprocd.connector.event import Exit, Row, named
from cnprocd.connector.taskrecord import ReadRecords, Shed, Sheds, TaskRecord, Who, is_repeated
from cnprocd.connector.uapi import PROC_EVENT_EXIT, PROC_EVENT_FORK
from cnprocd.counts import Counts
from cnprocd.deferred import Deferred
from cnprocd.delivery import Delivery, Fate
from cnprocd.failures import Failures
from cnprocd.flood import Flood
from cnprocd.output.record import early_fields
from cnprocd.process.family import HookFamily
from cnprocd.process.files import FileId
from cnprocd.process.model import FileLookup, Occurrence
from cnprocd.rules.compile import CompiledRule, Match, Matcher

MEMO_S = 0.05
MOST_ALIKE = 4096
MOST_LAG_S = 0.4  # of a batch whose matches are made and deferred: that costs as much as to look at five records
READ_S = 0.1  # in which the events of a batch are read
MOST_AWAITED, AWAITED_S = 10_000, 10.0  # processes whose event is to come, and for how long they are kept
MOST_QUEUED = 500  # log records that wait for the output: with more of them, only the shares are reported


class Crowd:
    """Decides what becomes of the matches of a flood: reported at once, deferred, held back or counted."""

    def __init__(
        self,
        matcher: Matcher,
        flood: Flood,
        deferred: Deferred[Later | tuple[Match, str]],
        delivery: Delivery,
        family: HookFamily,
        log_queued: Callable[[], int],
        failures: Failures,
        files: FileLookup | None = None,
    ) -> None:
        self._failures = failures
        self._flood = flood
        self._deferred = deferred
        self._delivery = delivery
        self._family = family
        self._log_queued = log_queued
        self._files = files
        self._alike: dict[Key, Alike] = {}
        self._named_otherwise: dict[tuple[tuple[int, ...], Key], Alike] = {}  # by rules, without the name
        self._is_stale, self._now_s = False, 0.0
        self._awaited: dict[int, tuple[list[Part], TaskRecord, float]] = {}  # until their event comes, or this time
        self.is_looking, self._keeps = False, False
        self._batch, self._latest_ns = 0, 0
        self._room: dict[tuple[str, bool], int] = {}  # in this batch, by rule, and whether it is of root's processes
        self._full: set[str] = set()  # rules for whose jobs the backlog has no more room in this batch
        self._below: Counter[tuple[str, bytes]] = Counter()  # in this batch, by rule and name: shed, and to be counted
        self.use(matcher)

    def use(self, matcher: Matcher) -> None:
        """Use other rules."""
        self._matcher = matcher
        self._shows = {rule.order: rule.match_needs <= SHOWN and is_known(rule.rule) for rule in matcher.rules}
        self._files_of = {rule.order for rule in matcher.rules if "exe_file" in rule.match_needs}
        throttles = [one for rule in matcher.rules for one in throttles_of(rule.rule)]
        self._by_ppid = any(one.by == "ppid" for one in throttles)
        self._any_name = {rule.order: self._shows[rule.order] and is_by_index(rule) for rule in matcher.rules}
        self._is_stale, self.is_looking = True, False

    def forget(self) -> None:
        """Forget what was found: a named path leads to another file now."""
        self._is_stale = True

    # Processes of which an exit record is looked at.

    @property
    def awaits(self) -> bool:
        """Whether events of processes are still to come whose matches are to be deferred."""
        return bool(self._awaited)

    @property
    def waiting(self) -> int:
        """How many matches wait to be reported, with those of processes whose event is still to come."""
        return len(self._deferred) + len(self._awaited)

    def begin(self, now_s: float, keeps: bool) -> Sheds | None:
        """Begin a batch. Return what is to look at its records: nothing if there is no flood.

        `keeps`: no process is in a table, so a death can be matched later.
        """
        self._batch += 1
        self._flood.note_silence(now_s)
        self._now_s, self._keeps, self.is_looking = now_s, keeps, self._flood.active
        self.expire(now_s)
        if not self.is_looking:
            return None
        if self._is_stale or len(self._alike) + len(self._named_otherwise) > MOST_ALIKE:
            self._alike.clear()
            self._named_otherwise.clear()
            self._is_stale = False
        self._room.clear()
        self._below.clear()
        self._full.clear()
        self._latest_ns = int((now_s + READ_S) * 1e9)
        return self._sheds_safely

    def _key(self, status: int, who: Who) -> Key:
        return status, who.comm, who.ids, who.file, who.ppid if self._by_ppid else 0

    def expire(self, now_s: float) -> None:
        """Count the matches of processes whose event was lost: it has not come for so long."""
        while self._awaited and next(iter(self._awaited.values()))[2] < now_s:
            self._count(self._awaited.pop(next(iter(self._awaited)))[0], 1)

    def _sheds_safely(self, pid: int, status: int, who: Who) -> Alike | None:
        """Without a look, the process is matched."""
        try:
            return self.sheds(pid, status, who)
        except Exception:
            self._failures.note("evaluate", who)
            return None

    def sheds(self, pid: int, status: int, who: Who) -> Alike | None:
        """Return what the end of a process is counted as, or None if it is to be matched. Nothing is counted yet."""
        key = self._key(status, who)
        alike = self._alike.get(key) or self._find_by_rules(key)
        family = self._family
        if alike is None or pid in family.hooks or who.ppid in family.hooks or who.ppid in family.roots:
            return None
        if self._now_s >= alike.until_s:  # this one is matched, and what is found for it replaces this
            if not alike.is_old and self._now_s < alike.until_s + MEMO_S:
                alike.until_s = self._now_s + MEMO_S
            alike.is_old = True
            return None
        if alike.naming and not self._are_below(alike.naming, who.comm):
            return None
        if alike.batch != self._batch:
            alike.batch, alike.is_shed = self._batch, False
            alike.left = [part for part in alike.parts if not self._is_held(part)]
        if not alike.is_shed:
            if any(part.compiled.rule.after is not None for part in alike.left):
                return None  # it has to count this one
            rooms = [(part.name, alike.uid == 0) for part in alike.left]
            for part, room in zip(alike.left, rooms, strict=True):
                if room not in self._room:
                    self._room[room] = self._room_for(part, alike.uid)
            if any(self._room[room] > 0 for room in rooms):
                for room in rooms:
                    self._room[room] -= 1
                return None
            alike.is_shed = True
        self._below.update([(part.name, who.comm) for part in alike.naming])
        return alike

    def learn(self, occurrence: Occurrence, found: list[Match]) -> None:
        """Remember what was found for a process that has ended."""
        record, status = occurrence.usage, occurrence.status
        if not self.is_looking or record is None or record.threaded or not record.last or status is None:
            return
        process, key = occurrence.process, self._key(status, Who.of(record))
        known = self._alike.get(key)
        if known is not None and not known.is_old:
            return
        candidates = self._matcher.candidates(occurrence)
        is_certain = not (occurrence.from_hook or occurrence.recovered or self._matcher.undecided)
        if not is_certain or not all(self._shows[rule.order] for rule in candidates):
            return
        if (process.comm, process.uid, process.gid) != (record.comm, record.uid, record.gid):
            return  # a name or user of another moment
        if any(match.log_only for match in found) or not self._is_one_program(candidates, record):
            return
        fields = early_fields(process)
        alike = Alike(tuple(part_of(match, fields) for match in found), (), record.uid, self._now_s + MEMO_S)
        self._alike[key] = alike
        if all(self._any_name[rule.order] for rule in candidates):
            others = tuple(nameless(part) for part in alike.parts if not counts_names(part))
            naming = tuple(nameless(part) for part in alike.parts if counts_names(part))
            rules = tuple(rule.order for rule in candidates)
            self._named_otherwise[rules, without_name(key)] = Alike(others, naming, record.uid, alike.until_s)

    def settle(
        self, records: ReadRecords, rows: list[Row], decode: Callable[[bytes], TaskRecord], counts: Counts, now_ns: int
    ) -> list[int]:
        """Count the matches of the processes that were shed in this batch, and defer those for which there is room.

        Return their PIDs, which are taken out of those that were passed over. Some are matched after all. `rows`: the
        events of the batch. `decode` reads an exit record.
        """
        if is_repeated(records):  # in two reads: then the order of its records counts
            records.keep_shed(decode)
        if hooks := self._hooks_among(records.shed, rows):
            records.keep_shed(decode, hooks)
        shed = {one.pid for one in records.shed}
        records.passed = [pid for pid in records.passed if pid not in shed]
        try:
            self._settle(records.shed, rows, decode, counts, now_ns)
        except Exception:
            self._failures.note("evaluate", records.shed[0] if records.shed else None)
        return list(shed)

    def _hooks_among(self, shed: list[Shed], rows: list[Row]) -> set[int]:
        """Return the PIDs of those that were shed and that a hook has started in this batch."""
        parents, born = self._family.hooks | self._family.roots.keys(), set[int]()
        for row in rows:
            if row[0] == PROC_EVENT_FORK and row[5] == row[6] and (row[4] in parents or row[4] in born):
                born.add(row[6])
        if not born:
            return born
        return {one.pid for one in shed if one.pid in born or Who.in_message(one.message).ppid in born}

    def _settle(
        self, shed: list[Shed], rows: list[Row], decode: Callable[[bytes], TaskRecord], counts: Counts, now_ns: int
    ) -> None:
        groups: dict[int, list[Shed]] = {}
        for one in shed:
            groups.setdefault(id(one.counted_as), []).append(one)
        at_ns = int(self._flood.seen_s * 1e9)
        exits = {row[3]: row for row in rows if row[0] == PROC_EVENT_EXIT} if self._keeps or self._awaited else {}
        for pid in exits.keys() & self._awaited.keys():
            parts, record, _ = self._awaited.pop(pid)
            self._defer_all(parts, exits[pid], record)
        for group in groups.values():
            alike = group[0].counted_as
            self._note(alike, len(group), counts, now_ns, at_ns)
            for part in alike.naming:
                for one in group:
                    fields = {**(part.fields or {}), **named_fields(Who.in_message(one.message).comm)}
                    self._delivery.hold(part.name, fields, at_ns, 1)
            waiting = [part for part in alike.left if self._keeps and part.can_wait]
            self._count([part for part in alike.left if part not in waiting], len(group))
            left = [one for one in group if not self._keep(waiting, one, exits, decode)] if waiting else []
            self._count(waiting, len(left))

    def _are_below(self, parts: Iterable[Part], comm: bytes) -> bool:
        """Return whether one more match of this name passes `after` of none of these rules."""
        named = named_fields(comm)
        return all(
            self._delivery.is_below(part.name, {**(part.fields or {}), **named}, self._below[part.name, comm])
            for part in parts
        )

    def _note(self, alike: Alike, count: int, counts: Counts, now_ns: int, at_ns: int) -> None:
        """Count processes and their matches, and those that throttles hold back."""
        counts.occurrences += count
        counts.kinds["exit"] += count
        for part in (*alike.parts, *alike.naming):
            counts.matches += count
            counts.rules[part.name] += count
            counts.rule_last_ns[part.name] = now_ns
            self._flood.note_held()
        left = set(map(id, alike.left))
        for part in alike.parts:
            if id(part) not in left and part.fields is not None:
                self._delivery.hold(part.name, part.fields, at_ns, count)

    def _keep(self, parts: list[Part], one: Shed, exits: dict[int, Row], decode: Callable[[bytes], TaskRecord]) -> bool:
        """Defer the matches of a process, now or when its event comes. Return False if there is no room for any."""
        if not any(self._deferred.room(part.name) for part in parts):
            return False
        record = decode(one.message)
        if one.pid in exits and exits[one.pid][5] == record.status:
            self._defer_all(parts, exits[one.pid], record)
            return True
        if one.pid in self._awaited:
            self._count(self._awaited.pop(one.pid)[0], 1)  # the event of the PID's owner before was lost
        if len(self._awaited) >= MOST_AWAITED:
            return False
        self._awaited[one.pid] = parts, record, self._now_s + AWAITED_S
        return True

    def _defer_all(self, parts: Iterable[Part], row: Row, record: TaskRecord) -> None:
        """Defer the matches of a process whose event has come, or count them if it is that of another process."""
        event = named(row)
        assert isinstance(event, Exit)
        for part in parts:
            loser = self._deferred.make_room(part.name) if event.exit_code == record.status else part.name
            if loser is not None:
                self._flood.count(loser)
            if loser != part.name:
                self._deferred.add(part.name, Later(part.compiled, part.event, event, record))
                self._flood.note_held()

    def _count(self, parts: Iterable[Part], count: int) -> None:
        for part in parts if count else ():
            self._flood.count(part.name, count)
            if part.name in self._full:
                self._delivery.note_dropped(part.name, count)

    def _is_one_program(self, candidates: Iterable[CompiledRule], record: TaskRecord) -> bool:
        """Return whether the file of a record says all that these rules need to know of the program."""
        if self._files_of.isdisjoint(rule.order for rule in candidates):
            return True
        file = FileId(record.exe_device, record.exe_inode)
        return self._files is not None and bool(file.inode) and self._files.is_one_program(file)

    def _find_by_rules(self, key: Key) -> Alike | None:
        if not self._named_otherwise:
            return None
        rules = tuple(rule.order for rule in self._matcher.asking("exit", name_of(key[1])))
        return self._named_otherwise.get((rules, without_name(key)))

    def _is_held(self, part: Part) -> bool:
        return part.fields is not None and self._delivery.holds(part.name, part.fields, self._latest_ns)

    def _room_for(self, part: Part, uid: int) -> int:
        """Return how many more matches of a rule would be reported, deferred, or put into the backlog."""
        rule = part.compiled.rule
        if rule.coalesce is not None:
            return self._flood.room_for_hooks(part.name)
        if rule.run is not None:
            backlog, requests = self._delivery.room(part.name), self._flood.room_for_requests(part.name)
            if requests is not None and requests < backlog:
                return requests
            self._full.add(part.name)  # if more come than that
            return backlog
        if self._keeps:  # to defer a match costs little: beyond its share it is reported when no events wait
            return self._flood.room(part.name, uid, has_room=False)
        deferred = self._deferred.room(part.name) if self._flood.lag_s < MOST_LAG_S else 0
        return self._flood.room(part.name, uid, self._log_queued() < MOST_QUEUED) + deferred

    # Matches.

    def is_reported(self, match: Match, unique: str) -> bool:
        """Return whether to report a match of a flood now. If not, it is deferred or counted, without a record."""
        name, at_ns = match.rule.name, match.occurrence.kernel_time_ns
        at_s = None if at_ns is None else at_ns / 1e9
        fate = self._delivery.decide(match)
        if fate is Fate.HELD:
            return False
        if fate is Fate.DROPPED:
            self._flood.count(name)
            return False
        if not match.runs_hook:
            uid, has_room = match.occurrence.process.uid, self._log_queued() < MOST_QUEUED
            return self._flood.admits(name, uid, at_s, has_room) or self._defer(match, fate, unique)
        if fate is Fate.OPEN or match.rule.rule.coalesce is not None:
            return self._flood.admits_hook(name, at_s)
        if not self._flood.admits_request(name, at_s):
            self._flood.count(name)
            return False
        return True

    def _defer(self, match: Match, fate: Fate, unique: str) -> bool:
        """Report a match of a flood later. Count what has no room, and what its throttle has not let pass yet."""
        name = match.rule.name
        has_time = fate is Fate.PASSES and (self._keeps or self._flood.lag_s < MOST_LAG_S)
        loser = self._deferred.make_room(name) if has_time else name
        if loser is not None:
            self._flood.count(loser)
        if loser != name:
            occurrence = match.occurrence
            if not self._keeps or occurrence.kind != "exit":  # its process is the table's own, and goes on
                occurrence = replace(occurrence, process=replace(occurrence.process, is_shared=False))
            self._deferred.add(name, (match._replace(occurrence=occurrence), unique))
        return False

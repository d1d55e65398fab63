"""The spool's file and its WAL: spool/store.py, database.py, salvage.py, spool.py.

Invariant: for any contents of the file, the spool opens, accepts jobs, returns and finishes them without an exception.
A finished job is not returned again, and after as many rounds as there are jobs nothing is due. All jobs that were
accepted since it was opened run, whatever happens to the others. The hook input from a damaged record can be passed to
execve.

An input is the length of the database file (4 bytes, big-endian), the file, and its WAL.
"""

from __future__ import annotations

import random
import shutil
import struct
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fuzz.target import Target

from cnprocd.json_value import JsonDict
from cnprocd.launch import render
from cnprocd.launch.request import AttemptResult, HookUser, LaunchRequest
from cnprocd.rules.language.actions import HookModel
from cnprocd.rules.language.plain import plain
from cnprocd.rules.values import Field, Template
from cnprocd.spool.job import NS, Gather, Job, JobRequest
from cnprocd.spool.rows import MatchFilter, PastMatch, RuleHits
from cnprocd.spool.spool import FILE_NAME, Spool

_LENGTH = struct.Struct(">I")
_FINE, _FAILED = AttemptResult(None, 0), AttemptResult("exit code 1", 1)
_SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None
_PAGE = 1024
_USER = HookUser(0, 0, (), "root", "/root", "/bin/sh", False)
_COMMAND = (Template(("/bin/true",)), *(Template((Field(name),)) for name in ("comm", "pid", "unit")))
_HOOK = replace(plain(HookModel.model_validate({"command": ["/bin/true"]})), command=_COMMAND)


class Clock:
    now_ns = 1_700_000_000 * NS
    offset_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def _quiet(level: str, event: str, **fields: object) -> None:
    pass


def _request(number: int, key: str, **more) -> JobRequest:
    cmdline = "x" * (number % 7 * 40)
    event: JsonDict = {"rule": "a", "pid": number, "comm": "ora\\xff", "comm_hex": "6f7261ff", "cmdline": cmdline}
    return JobRequest(key, "ab"[number % 2], event, kernel_time_ns=number, **more)


class SpoolFiles(Target):
    name = "spool"
    executions = 40_000
    most_cpu_s = 10.0
    tokens = (
        b"waiting", b"running", b"done", b"dead", b'{"pid":', b"\\u0000", b"=", b'"_hex"', b"CREATE", b"\x0d", b"\x0a",
        b"\x05", b"\x02", b"\0\0\0\0",
    )  # fmt: skip

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="cnprocd-fuzz-", dir=_SHM))
        self._clock = Clock()
        super().__init__()

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def _open(self) -> Spool:
        return Spool.open(self._directory, log=_quiet, clock=self._clock)

    def _emptied(self) -> None:
        for file in self._directory.iterdir():
            file.unlink()

    def made(self) -> list[bytes]:
        """Return a file at rest, and one as kill -9 leaves it, with most data in the WAL."""
        found = []
        for at_rest in (True, False):
            self._emptied()
            spool = self._open()
            spool.enqueue([_request(n, f"key {n}") for n in range(12)])
            spool.enqueue([_request(n, f"gather {n}", gather=Gather("g", 5.0), serialize_key="a/") for n in range(3)])
            for job_id in (1, 2, 3, 4):
                spool.start(job_id, "t")
            spool.finish(1, _FINE)
            spool.retry(2, _FAILED, self._clock())
            spool.bury(3, _FAILED, "exit code 1 (1 attempt)")
            spool.record_matches([PastMatch(n, "a", "c", n, {"pid": n, "job_id": n}) for n in range(5)])
            spool.put_output(1, "some output\n")
            spool.put_hits({"a": RuleHits(5, 7)})
            if at_rest:
                spool.close()
            else:
                spool.sync()
            found.append(self._taken())
            if not at_rest:
                spool.close()
        return found

    def _taken(self) -> bytes:
        wal = self._directory / f"{FILE_NAME}-wal"
        database = (self._directory / FILE_NAME).read_bytes()
        return _LENGTH.pack(len(database)) + database + (wal.read_bytes() if wal.exists() else b"")

    def mutated(self, rng: random.Random) -> bytes:
        seed = self.seeds[int(rng.random() * len(self.seeds))]
        raw, chance = bytearray(seed[4:]), rng.random()
        size = _LENGTH.unpack_from(seed)[0]
        for _ in range(1 + rng.getrandbits(1)):
            at = rng.randrange(len(raw))
            if chance < 0.35:
                length = rng.choice((1, 1, 2, 4, 8))
                raw[at : at + length] = rng.randbytes(length)[: len(raw) - at]
            elif chance < 0.55:  # the header of a page
                at = min(at // _PAGE * _PAGE + rng.getrandbits(5), len(raw) - 1)
                raw[at] = rng.getrandbits(8)
            elif chance < 0.65:
                length = rng.randrange(3000)
                raw[at : at + length] = rng.randbytes(length)[: len(raw) - at]
            elif chance < 0.75:  # a page replaced by another or by zeros
                page, other = at // _PAGE * _PAGE, rng.randrange(len(raw)) // _PAGE * _PAGE
                raw[page : page + _PAGE] = raw[other : other + _PAGE] if rng.getrandbits(1) else bytes(_PAGE)
            elif chance < 0.97:
                token = self.tokens[int(rng.random() * len(self.tokens))]
                raw[at : at + len(token)] = token[: len(raw) - at]
            else:
                del raw[at:]
                size = min(size, len(raw))
                break
        return _LENGTH.pack(size) + bytes(raw)

    def check(self, data: bytes) -> None:
        (size,) = _LENGTH.unpack_from(data)
        self._emptied()
        (self._directory / FILE_NAME).write_bytes(data[4 : 4 + size])
        if data[4 + size :]:
            (self._directory / f"{FILE_NAME}-wal").write_bytes(data[4 + size :])
        spool = self._open()
        try:
            self._used(spool)
        finally:
            spool.close()

    def _used(self, spool: Spool) -> None:
        spool.recover()
        self._clock.now_ns += 10 * NS
        new = spool.enqueue([_request(n, f"new {n}") for n in range(3)])
        assert None not in new.job_ids
        spool.counts(), spool.next_due_in_s(spool.clock())
        for search in (spool.find_jobs(), spool.find_matches(MatchFilter(rule="a*")), spool.find_output(1)):
            with suppress(StopIteration):
                search.send(None)  # it never waits
        assert all(isinstance(one.count, int) for one in spool.hits().values())
        ran: list[int] = []
        for _ in range(4):  # damage that is found only now can bring back jobs
            due = spool.due(99)
            if not due:
                break
            for job in due:
                spool.start(job.job_id, "t")
                spool.events(job.job_id)
                found = spool.job(job.job_id)
                assert found is None or isinstance(found.events, tuple)
                if found is not None and found.events:
                    self._render(found)
                spool.put_output(job.job_id, "new\n")
                spool.finish(job.job_id, _FINE)
                ran.append(job.job_id)
        assert not spool.due(99), "jobs are returned again and again"
        assert len(set(ran)) == len(ran), f"a finished job was returned again: {sorted(ran)}"
        assert set(new.job_ids) <= set(ran), "a new job was not returned"
        spool.sync()
        spool.prune()

    @staticmethod
    def _render(job: Job) -> None:
        request = LaunchRequest(
            rule=job.rule, hook=_HOOK, user=_USER, job_id=job.job_id, attempt=job.attempts, attempt_id="0" * 32,
            events=job.events, limit_s=1.0,
        )  # fmt: skip
        env = render.environment(request)
        assert not any(b"\0" in text for text in (*render.argv(_HOOK, request.first_record), *env, *env.values()))
        assert not any(b"=" in name for name in env), list(env)
        assert render.standard_input(request).endswith(b"\n")
        render.message(_HOOK.command[1], request.first_record)

"""Rule files: rules/language/load.py, yaml12.py, schema.py, then compile.py and plan.py with accepted files.

Invariant: RulesError or rules, nothing else, in time that grows with the size of the file. Every problem is in a line
of the file, and its printed text cannot control a terminal. Accepted rules compile, have a plan, and can be evaluated
for any occurrence without an exception. Every match of a rule is of an event that the rule names.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from fuzz.target import Target, outcome

from cnprocd.connector.request import Features
from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.process.model import Kind, Occurrence, Process
from cnprocd.rules.compile import Matcher
from cnprocd.rules.language import load as load_module
from cnprocd.rules.language.load import LARGEST, RulesError, load
from cnprocd.rules.plan import make_plan

CONFIG = Path(__file__).parents[3] / "config"
_FILE = Path("/etc/cnprocd/rules.yaml")
_IDS = {"oracle": 54321, "root": 0, "postgres": 26}
_USAGE = TaskRecord(7, 7, 1, 9, True, False, "ora_pmon_X", 54321, 54321, 1, 5_000_000, 10, 2048, *[0] * 6)
_PARENT = Process(1, 0, 1, "systemd", "procfs", 0, 0, "procfs", "/sbin/init", "/sbin/init", "/init.scope")
_ORACLE = Process(7, 1, 5, "ora_pmon_X", "event", 54321, 54321, "exec", "/opt/o", "o -x \udcff", "/a.service")
_KINDS: tuple[Kind, ...] = ("fork", "uid", "gid", "sid", "ptrace", "comm")
_OCCURRENCES = (
    Occurrence("exit", _ORACLE, 7, 9, 10**10, 0, usage=_USAGE, ancestors=(_PARENT,)),
    Occurrence("exit", Process(8), 8, None, recovered=True),
    Occurrence("exit", Process(9, 1, 5, "a" * 15, cmdline="a" * 4096), 9, 3 << 8, 10**9, 0),
    Occurrence("coredump", Process(7, 1, 5, "sh\n\x1b"), 7, None, 6, 1, ancestors=()),
    Occurrence("exec", Process(7, 1, 5, ""), 8, None, 6, 1, of_thread=True),
    *(Occurrence(kind, Process(5, 1, 2, "x"), 5, None, 9, 0) for kind in _KINDS),
)  # fmt: skip
_WORDS = """
rules: settings: lists: name: description: enabled: events: match: threads: include_hooks: on_unknown_exit:
rate_limit: cooldown: coalesce: after: resets: log: run: count: per: by: window: max: within: level: message: command:
user: group: timeout: deadline: retries: backoff: env: working_directory: umask: nice: limits: slots: serialize:
output_limit: comm: exe: cmdline: cgroup: unit: exit_code: signal: core_dumped: exit_status: lifetime: max_rss:
cpu_time: parent: ancestor: not: any: all: hook_slots: receive_buffer: queue_limit: gather: log_level: metrics_file:
fork exec uid gid sid ptrace comm nonzero_exit coredump exit all true false null ~ 0o17 0x7f 1e3 .inf 010 1:30 on
2024-01-01 SIGKILL SIGRTMIN+3 "1-127" "!=0" ">5s" 3h 32M root oracle $names "{comm}" "{" "}}" /a.*/ /(a+)+$/ /(/
/[[:a]/i "a*" "[a-" "*?[!x]" & * ! | > % @ ` - ? : , [ ] { } # " ' &a *a !!str !x <<: --- ... \\t \\u0000 "\\ud800"
"\\x1b" 99999999999999999999 -1
""".split()
_TOKENS = (
    *(word.encode() for word in _WORDS),
    b"\n", b"\n  ", b"\n    ", b"\t", b"\r", b"\r\n", b"\xff", b"\xe2\x80\xa8", b"\xc2\x85", b"\xef\xbb\xbf", b"\0",
    b": ", b" #", b"[" * 60, b"{a: " * 60, b"- " * 60, b"? ", b"a" * 1030, b"(a|a)*" * 30,
)  # fmt: skip
_BIT = b"""settings: {hook_slots: 3, gather: 2ms, receive_buffer: 8M, history_age: 7d, log_level: info}
lists:
  names: ["ora_*", "/^asm_[a-z]+$/i", tnslsnr]
rules:
  - name: died
    events: [nonzero_exit, coredump]
    match:
      comm: $names
      exit_code: "1-127, != 3"
      signal: [SIGKILL, 11]
      user: oracle
      parent: {comm: systemd, not: {user: [root, 5]}}
      any: [{lifetime: "< 5s"}, {max_rss: "> 1M"}]
    rate_limit: {count: 10, per: 1m, by: comm}
    log: {level: error, message: "{comm}[{pid}] of {status}"}
    run: {command: [/bin/true, "{pid}"], user: root, timeout: 30s, retries: 3, env: {A: "{comm}"}, umask: 0o77}
  - {name: b, events: all, threads: true, match: {cmdline: "/-x$/", unit: "a.*", exit_status: unknown}}
"""


class RuleFiles(Target):
    name = "rules"
    executions = 60_000
    most_cpu_s = 20.0  # a file of a megabyte with an error in every line
    tokens = _TOKENS

    def made(self) -> list[bytes]:
        files = [CONFIG / "rules.yaml", *sorted((CONFIG / "examples").glob("*.yaml"))]
        commented = (CONFIG / "rules.yaml").read_bytes()
        return [_BIT, _BIT, *(file.read_bytes() for file in files), re.sub(rb"(?m)^# ?", b"", commented)]

    def mutated(self, rng: random.Random) -> bytes:
        data = self.seeds[int(rng.random() * len(self.seeds))]
        if rng.random() < 0.6:
            data = self._edited(rng, data)
        if rng.random() < 0.6:
            data = self.mutator(rng).damaged(data, self.seeds, most=2)
        if rng.random() < 0.002:  # up to the size limit
            piece = data[rng.randrange(len(data) + 1) :][: 1 + int(rng.random() * 200)] or b"a"
            data += (b"\n" if rng.getrandbits(1) else b"") + piece * (LARGEST // len(piece))
        return data[:LARGEST]

    @staticmethod
    def _edited(rng: random.Random, data: bytes) -> bytes:
        """Swap words for words and lines for lines: input that is still YAML gets further."""
        words = re.split(rb"([\w$./*-]+:?)", data)
        for _ in range(1 + rng.getrandbits(2)):
            at = rng.randrange(len(words))
            words[at] = rng.choice(words) if rng.getrandbits(1) else rng.choice(_TOKENS)
        data = b"".join(words)
        if rng.random() < 0.3:
            lines = data.split(b"\n")
            at = rng.randrange(len(lines))
            lines[at : at + rng.getrandbits(2)] = [
                rng.choice(lines),
                *([b"  " + lines[at]] if rng.getrandbits(1) else []),
            ]
            data = b"\n".join(lines)
        return data

    def check(self, data: bytes) -> None:
        load_module._content, real = lambda source, read: data, load_module._content  # without the disk
        try:
            loaded, error = outcome(lambda: load(_FILE, user=_IDS.get, group=_IDS.get), RulesError)
        finally:
            load_module._content = real
        if error is not None:
            lines = len(re.split(rb"\r\n|\r|\n", data))
            assert all(0 <= problem.line <= lines for problem in error.problems)
            self._printable(error.render() + str(error))
            return
        for warning in loaded.warnings:
            self._printable(warning.render())
        matcher = Matcher(loaded.rules)
        for features in (Features(), Features(taskstats=False)):
            make_plan(matcher, features)
        for occurrence in _OCCURRENCES:
            for match in matcher.match(occurrence):
                named = match.rule.rule.events
                assert occurrence.kind in named or (occurrence.kind == "exit" and "nonzero_exit" in named)
                assert match.rule.rule.threads is occurrence.of_thread

    @staticmethod
    def _printable(text: str) -> None:
        assert all(character.isprintable() or character in "\n\t" for character in text), ascii(text)[:200]
        text.encode()

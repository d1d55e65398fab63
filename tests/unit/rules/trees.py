"""Random `match:` trees as users write them, occurrences, and the meaning of a tree, defined a second time.

The meaning is Kleene's with numbers: true 1, unknown 1/2, false 0; and is min, or is max, not is 1 - x. It reads the
plain data of the tree with the standard library (fnmatch, re, os.W*), and shares nothing with the compiler.
"""

import fnmatch
import operator
import os
import re
from dataclasses import replace

from hypothesis import strategies as st

from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.process.model import NO_LOGIN, MoreIds, Occurrence, Process
from cnprocd.rules.language.condition import ConditionModel
from cnprocd.rules.language.plain import plain
from cnprocd.rules.ruleset import Condition

COMMS = ["sh", "ora_pmon_A", "ora_smon_B", "java", "a b) c", "x\ny", ""]
COMM_PATTERNS = ["sh", "java", "ora_*", "ora_?mon_[AB]", "*", "[!o]*", "/^ora_/", "/A$/", "/JAVA/i", "*_B", "a b) c"]
PATHS = ["/bin/sh", "/opt/db/ora_pmon_A", "/opt/db/ora_smon_B", "/usr/bin/java"]
PATH_PATTERNS = ["/bin/sh", "/opt/*", "/usr/bin/[!s]*", "/mon_/", "*"]
CMDLINES = ["sh -c x", "java -jar a.jar", "nginx: worker"]
CONTAINER = "0123456789abcdef" * 4
CGROUPS = [
    "/", "/init.scope", "/system.slice/oracle.service", "/user.slice/u.scope", "/user.slice",
    f"/kubepods/burstable/pod-7/{CONTAINER}", f"/system.slice/docker-{CONTAINER}.scope",
    "/user.slice/user-7.slice/user@7.service/app.slice/oracle.service",
]  # fmt: skip
UNITS = ["oracle.service", "*.scope", "/\\.service$/", "ora*"]
SIGNALS = [6, 9, 11, 15]
STATUSES = [0, 256, 3 << 8, 5 << 8, 255 << 8, 6, 0x86, 9, 11, 0x8B, 15]
NUMBERS = {
    "lifetime": ["< 1.505s", ">= 1.505s", "> 10s"],
    "max_rss": ["> 100K", "<= 100K"],
    "cpu_time": ["> 1.5s", "< 50ms"],
}
OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def one_or_more(values):
    return st.sampled_from(values) | st.lists(st.sampled_from(values), min_size=1, max_size=3, unique=True)


IDENTITY_KEYS = {
    "comm": one_or_more(COMM_PATTERNS),
    "exe": one_or_more(PATH_PATTERNS),
    "cmdline": one_or_more([*CMDLINES, "*java*", "/bin/*"]),
    "cgroup": one_or_more(["/*.slice/*", "/", "/user*"]),
    "unit": one_or_more(UNITS),
    "user_unit": one_or_more(UNITS),
    "container": one_or_more([CONTAINER, CONTAINER[:12], "0123*", "web"]),
    "pod_uid": one_or_more(["-7", "*7", "/8/"]),
    "user": one_or_more([0, 54, 1000]),
    "group": one_or_more([0, 55, 100]),
    "euid": one_or_more([0, 54]),
    "loginuid": one_or_more([0, 54, "unset"]),
}
_spans = st.sampled_from(["0", "1", "3", "5", "1-4", "4-255", "0-255", "255"])
ENDING_KEYS = {
    "exit_code": st.lists(_spans, min_size=1, max_size=3, unique=True),
    "signal": st.lists(st.sampled_from(SIGNALS), min_size=1, max_size=3, unique=True),
    "core_dumped": st.booleans(),
    "oom_killed": st.booleans(),
    "exit_status": st.sampled_from(["known", "unknown"]),
    **{name: st.sampled_from(values) for name, values in NUMBERS.items()},
}


@st.composite
def trees(draw, keys, relatives=True, depth=2):
    """Return mappings of one to three keys, and branches."""
    chosen = draw(st.lists(st.sampled_from(sorted(keys)), max_size=3, unique=True))
    data = {key: draw(keys[key]) for key in chosen}
    if data.get("exit_status") == "unknown":
        for key in ("exit_code", "signal", "core_dumped"):
            data.pop(key, None)  # refused: it can never hold
    if depth and draw(st.booleans()):
        branch = draw(st.sampled_from(["not", "any", "all"]))
        data[branch] = draw(st.lists(trees(keys, relatives, depth - 1), min_size=1, max_size=2))
    if relatives and depth and draw(st.integers(0, 3)) == 0:
        data[draw(st.sampled_from(["parent", "ancestor"]))] = draw(trees(IDENTITY_KEYS, relatives, depth - 1))
    return data or {"comm": draw(keys["comm"])} if "comm" in keys else data or {chosen[0]: draw(keys[chosen[0]])}


match_data = trees(IDENTITY_KEYS | ENDING_KEYS)


def model(data) -> Condition:
    return plain(ConditionModel.model_validate(data))


# --- occurrences

_known = st.booleans().map(lambda hidden: not hidden)


def maybe(values):
    return st.none() | st.sampled_from(values)


processes = st.builds(
    Process, tgid=st.just(100), ppid=st.sampled_from([0, 1, 60]), start_ns=maybe([10**9, 2 * 10**9]), comm=maybe(COMMS),
    uid=maybe([0, 54, 1000]), gid=maybe([0, 55, 100]), exe=maybe(PATHS), cmdline=maybe(CMDLINES), cgroup=maybe(CGROUPS),
    more_ids=st.none() | st.builds(MoreIds, maybe([0, 54]), maybe([0, 54, NO_LOGIN])),
)  # fmt: skip
usages = st.builds(
    lambda lifetime, rss, cpu: TaskRecord(1, 1, 1, 0, True, False, "", 0, 0, 0, lifetime, cpu, rss, 0, 0, 0, 0, 0, 0),
    st.sampled_from([0, 1_000_000, 20_000_000]), st.sampled_from([10, 100, 1000]), st.sampled_from([0, 2_000_000]),
)  # fmt: skip
occurrences = st.builds(
    Occurrence, kind=st.sampled_from(["exit", "exit", "exit", "exec", "comm"]), process=processes, tid=st.just(100),
    status=maybe(STATUSES), kernel_time_ns=maybe([3 * 10**9]), usage=st.none() | usages,
    ancestors=st.none() | st.lists(processes, max_size=3).map(tuple), oom=st.sampled_from([True, False, "lost", None]),
)  # fmt: skip

PROCESS_FIELDS = ("comm", "uid", "gid", "exe", "cmdline", "cgroup", "more_ids")
hidings = st.tuples(
    st.frozensets(st.sampled_from([*PROCESS_FIELDS, "status", "usage", "ancestors", "start", "oom_killed"])),
    st.booleans(),
)


def hide(occurrence: Occurrence, hiding) -> Occurrence:
    """Return the occurrence with fewer attributes known."""
    what, in_parents = hiding
    gone = {name: None for name in PROCESS_FIELDS if name in what}
    if "start" in what or "usage" in what:  # a generated start need not agree with a generated lifetime
        gone["start_ns"] = None
    above = occurrence.ancestors
    if above and in_parents:
        above = tuple(replace(process, **gone) for process in above)
    return replace(
        occurrence, process=replace(occurrence.process, **gone), ancestors=None if "ancestors" in what else above,
        status=None if "status" in what else occurrence.status, usage=None if "usage" in what else occurrence.usage,
        oom=None if "oom_killed" in what else occurrence.oom,
    )  # fmt: skip


# --- the meaning

TRUE, UNKNOWN, FALSE = 1, 0.5, 0


def verdict(data, occurrence: Occurrence):
    """Return the meaning of a tree, in the values of compile_condition()."""
    return {TRUE: True, FALSE: False, UNKNOWN: None}[meaning(data, occurrence)]


def meaning(data, occurrence: Occurrence) -> float:
    found = [_identity(data, occurrence.process, occurrence.ancestors), *_ending(data, occurrence)]
    found += [1 - meaning(part, occurrence) for part in listed(data.get("not", []))]
    found += [meaning(part, occurrence) for part in data.get("all", [])]
    if "any" in data:
        found.append(max(meaning(part, occurrence) for part in data["any"]))
    return min(found)


def of_process(data, process: Process, above) -> float:
    found = [_identity(data, process, above)]
    found += [1 - of_process(part, process, above) for part in listed(data.get("not", []))]
    found += [of_process(part, process, above) for part in data.get("all", [])]
    if "any" in data:
        found.append(max(of_process(part, process, above) for part in data["any"]))
    return min(found)


def _identity(data, process: Process, above) -> float:
    found = [TRUE]
    for key in ("comm", "exe", "cmdline", "cgroup"):
        if key in data:
            value = getattr(process, key)
            found.append(UNKNOWN if value is None else any(like(p, value) for p in listed(data[key])))
    if "unit" in data:
        found.append(UNKNOWN if process.cgroup is None else _unit(data["unit"], process.cgroup))
    if "user_unit" in data:
        below = (process.cgroup or "").partition("user@7.service")[2]
        found.append(UNKNOWN if process.cgroup is None else _unit(data["user_unit"], below))
    if "container" in data:
        names = [CONTAINER, CONTAINER[:12]] if CONTAINER in (process.cgroup or "") else []
        found.append(UNKNOWN if process.cgroup is None else _any(data["container"], names))
    if "pod_uid" in data:
        names = ["-7"] if "pod-7" in (process.cgroup or "") else []
        found.append(UNKNOWN if process.cgroup is None else _any(data["pod_uid"], names))
    for key, attribute in (("user", "uid"), ("group", "gid")):
        if key in data:
            value = getattr(process, attribute)
            found.append(UNKNOWN if value is None else value in listed(data[key]))
    for key in ("euid", "loginuid"):
        if key in data:
            value = getattr(process.more_ids, key, None)
            wanted = [NO_LOGIN if one == "unset" else one for one in listed(data[key])]
            found.append(UNKNOWN if value is None else value in wanted)
    if "parent" in data:
        found.append(of_process(data["parent"], above[0], above[1:]) if above else UNKNOWN)
    if "ancestor" in data:
        found.append(_ancestor(data["ancestor"], above))
    return min(found)


def _ancestor(data, above) -> float:
    if not above:
        return UNKNOWN
    known = [of_process(data, process, above[n + 1 :]) for n, process in enumerate(above)]
    return max(known if above[-1].ppid == 0 else [*known, UNKNOWN])


def _any(patterns, names: list[str]) -> float:
    return any(like(pattern, name) for pattern in listed(patterns) for name in names)


def _unit(patterns, cgroup: str) -> float:
    units = [part for part in cgroup.split("/") if part.endswith((".service", ".scope"))]
    return bool(units) and any(like(pattern, units[0]) for pattern in listed(patterns))


def _ending(data, occurrence: Occurrence):
    ending = [key for key in ENDING_KEYS if key in data]
    if not ending:
        return
    if occurrence.kind != "exit":
        yield FALSE
        return
    status = occurrence.status
    if "exit_code" in data or "signal" in data:
        yield UNKNOWN if status is None else _ended_so(data, status)
    if "core_dumped" in data:
        yield UNKNOWN if status is None else (os.WIFSIGNALED(status) and os.WCOREDUMP(status)) == data["core_dumped"]
    if "oom_killed" in data:
        yield UNKNOWN if occurrence.oom_killed is None else occurrence.oom_killed == data["oom_killed"]
    if "exit_status" in data:
        yield (status is None) == (data["exit_status"] == "unknown")
    usage, process = occurrence.usage, occurrence.process
    for key, factor, value in (
        ("lifetime", 1, _lifetime(occurrence, process)),
        ("max_rss", 1024, usage and usage.max_rss_kib),
        ("cpu_time", 1e-6, usage and usage.cpu_time_us),
    ):
        if key in data:
            yield UNKNOWN if value is None else compared(data[key], value * factor)


def _lifetime(occurrence: Occurrence, process: Process):
    if occurrence.usage:
        return occurrence.usage.lifetime_us / 1e6
    if process.start_ns is None or occurrence.kernel_time_ns is None:
        return None
    return (occurrence.kernel_time_ns - process.start_ns) / 1e9


def _ended_so(data, status: int) -> bool:
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) in data.get("signal", [])
    spans = [span.partition("-") for span in data.get("exit_code", [])]
    return any(int(low) <= os.WEXITSTATUS(status) <= int(high or low) for low, _, high in spans)


def compared(text: str, value: float) -> bool:
    sign, number = text.split()
    amount, unit = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", number).groups()
    return OPERATORS[sign](value, float(amount) * {"s": 1, "ms": 0.001, "K": 1024}[unit])


def like(pattern: str, value: str) -> bool:
    """Return whether a text matches a written pattern. fnmatchcase() is the documented meaning of globs."""
    if pattern.startswith("/") and pattern.endswith("/i") and len(pattern) > 3:
        return re.search(pattern[1:-2], value, re.IGNORECASE) is not None
    if pattern.startswith("/") and pattern.endswith("/") and len(pattern) > 2:
        return re.search(pattern[1:-1], value) is not None
    return fnmatch.fnmatchcase(value, pattern)


def listed(value) -> list:
    return value if isinstance(value, list) else [value]

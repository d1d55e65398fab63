"""The loaded rules: plain frozen values, without pydantic or YAML. PURE.

The daemon reads rules in a child process (loader_process.py), which sends these values and exits. So the daemon does
not hold pydantic and YAML (10 MB), and reading a rule file takes no time from the events. Each class has the fields of
the model of its name in rules/language, where each field is described and checked. A key that the file does not have is
None or ().
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from cnprocd.log import Level
from cnprocd.rules.values import Comparison, IntSet, Pattern, Template

EventName = Literal["fork", "exec", "uid", "gid", "sid", "ptrace", "comm", "nonzero_exit", "coredump", "exit"]
EVENT_NAMES: tuple[EventName, ...] = get_args(EventName)
ID_KEYS: Mapping[str, Literal["user", "group"]] = {"user": "user", "group": "group", "euid": "user", "loginuid": "user"}
"""Match keys whose values are ids, or names of users or groups."""
LOGIN_UNSET = "unset"  # how the rule language writes the loginuid of a process outside any login session
# The events that have an exit status.
EXIT_EVENTS: frozenset[EventName] = frozenset({"exit", "nonzero_exit"})
Serialize = Literal["rule", "comm", "none"]
# What `by:` takes: "rule" for the whole rule, or a field of the record that identifies processes.
ByField = Literal[
    "rule", "comm", "exe", "user", "uid", "gid", "ppid", "parent_comm", "unit", "user_unit", "cgroup", "container",
    "pod_uid",
]  # fmt: skip
BY_FIELDS: tuple[ByField, ...] = get_args(ByField)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Identity:
    comm: tuple[Pattern, ...] | None = None
    exe: tuple[Pattern, ...] | None = None
    exe_claimed: tuple[Pattern, ...] | None = None
    cmdline: tuple[Pattern, ...] | None = None
    cgroup: tuple[Pattern, ...] | None = None
    unit: tuple[Pattern, ...] | None = None
    user_unit: tuple[Pattern, ...] | None = None
    container: tuple[Pattern, ...] | None = None
    pod_uid: tuple[Pattern, ...] | None = None
    user: tuple[int | str, ...] | None = None  # a name: it could not be resolved (unresolved.py)
    group: tuple[int | str, ...] | None = None
    euid: tuple[int | str, ...] | None = None
    loginuid: tuple[int | str, ...] | None = None
    parent: ProcessCondition | None = None
    ancestor: ProcessCondition | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessCondition(_Identity):
    """A condition on a related process. Every given key must hold."""

    not_: tuple[ProcessCondition, ...] = ()
    any: tuple[ProcessCondition, ...] = ()
    all: tuple[ProcessCondition, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition(_Identity):
    """A condition on an event and its process. If both `exit_code` and `signal` are given, either must hold."""

    exit_code: IntSet | None = None
    signal: frozenset[int] | None = None
    core_dumped: bool | None = None
    exit_status: Literal["unknown", "known"] | None = None
    lifetime: Comparison | None = None
    max_rss: Comparison | None = None
    cpu_time: Comparison | None = None
    oom_killed: bool | None = None
    not_: tuple[Condition, ...] = ()
    any: tuple[Condition, ...] = ()
    all: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleLog:
    """A record to write. The default message depends on the record."""

    level: Level
    message: Template | None


@dataclass(frozen=True, slots=True)
class Backoff:
    """The pauses between attempts: doubled from `initial_s` up to `max_s`."""

    initial_s: float
    max_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceLimits:
    """Resource limits of a hook (setrlimit(2)). None keeps the daemon's own limit."""

    open_files: int | None = None
    processes: int | None = None
    address_space_bytes: int | None = None
    cpu_time_s: float | None = None
    core_bytes: int | None = None
    file_size_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """The settings of a rule's `run:`: which program to run for a match, as which user, and how often."""

    command: tuple[Template, ...]
    user: str | int | None
    group: str | int | None
    timeout_s: float
    deadline_s: float | None
    retries: int
    backoff: Backoff
    env: Mapping[str, Template]
    working_directory: str
    umask: int
    nice: int
    limits: ResourceLimits | None
    slots: int | None
    serialize: Serialize
    output_limit_bytes: int
    on_failure: RuleLog | None
    given: frozenset[str] = field(default=frozenset(), compare=False)  # the keys that the file has


@dataclass(frozen=True, slots=True)
class RateLimit:
    """Pass at most `count` matches in any `per_s`, for each value of `by` ("rule": all together)."""

    count: int
    per_s: float
    by: ByField = "rule"


@dataclass(frozen=True, slots=True)
class Cooldown:
    """Pass no match for `for_s` after one that passed, for each value of `by`."""

    for_s: float
    by: ByField = "rule"


@dataclass(frozen=True, slots=True, kw_only=True)
class Coalesce:
    """Run the hook once for the matches of a window, for each value of `by`."""

    window_s: float
    max: int
    by: ByField = "rule"


@dataclass(frozen=True, slots=True)
class After:
    """Fire at match number `count` within `within_s`, for each value of `by`."""

    count: int
    within_s: float
    by: ByField = "rule"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    name: str
    description: str
    enabled: bool
    events: tuple[EventName, ...]
    match: Condition | None
    threads: bool
    include_hooks: bool
    on_unknown_exit: Literal["match", "log", "ignore"]
    rate_limit: RateLimit | None
    cooldown: Cooldown | None
    coalesce: Coalesce | None
    after: After | None
    resets_s: float | None
    record: tuple[str, ...]  # fields of the record to gather
    log: RuleLog | None
    run: Hook | None
    record_by_settings: tuple[str, ...] = field(default=(), compare=False)  # as `record`, of the settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    hook_slots: int
    receive_buffer_bytes: int
    queue_limit: int
    history_count: int
    history_age_s: float
    gather_s: float
    record: tuple[str, ...]
    log_level: Level
    metrics_file: str | None


def hooks_of(rules: Iterable[Rule]) -> Mapping[str, Hook]:
    """Return the hooks by rule name, those of disabled rules included: their jobs may still be waiting."""
    return {rule.name: rule.run for rule in rules if rule.run is not None}


def given_keys(condition: Condition | ProcessCondition) -> tuple[str, ...]:
    """Return the keys that a condition has, as attribute names."""
    return tuple(one.name for one in fields(condition) if getattr(condition, one.name) not in (None, ()))

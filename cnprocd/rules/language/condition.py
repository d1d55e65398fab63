"""The `match:` of a rule: a tree of conditions on an event and its process, as frozen models. PURE.

Every key of a mapping must hold (and); a list in a key means any of its items (or). A key about the end of a process
holds only for an exit. `never_matches` rejects the trees that no event of a rule can satisfy: the worst problem of a
rule file is a rule that silently never matches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cnprocd.rules.language.fields import (
    CommPatterns,
    ExitCodes,
    Flag,
    Groups,
    LoginUsers,
    Model,
    OneAsList,
    OneOrListOf,
    PathPatterns,
    SignalSet,
    SizeComparison,
    TextPatterns,
    TimeComparison,
    Users,
    words,
)
from cnprocd.rules.language.value_problem import ValueProblem, invalid
from cnprocd.rules.ruleset import EXIT_EVENTS, EventName

ExitStatus = Annotated[Literal["unknown", "known"], *words("unknown", "known")]

# The keys about the end of a process, by their YAML names (which are also their attribute names).
EXIT_KEYS = ("exit_code", "signal", "core_dumped", "exit_status", "lifetime", "max_rss", "cpu_time", "oom_killed")


class _Identity(Model):
    """The keys about the identity of a process. Every given key must hold."""

    comm: CommPatterns | None = Field(
        default=None,
        description="The command name (comm), which the kernel cuts at 15 bytes. Any of the patterns.",
    )
    exe: PathPatterns | None = Field(
        default=None,
        description="The path of the executable, without symbolic links: a verified file of the host. Its hard "
        "links are the same program. Any of the patterns.",
    )
    exe_claimed: PathPatterns | None = Field(
        default=None,
        description="The path of the executable as the process sees it, as in its container. A user can choose it. Any "
        "of the patterns.",
    )
    cmdline: TextPatterns | None = Field(
        default=None, description="The arguments, joined by single spaces. Any of the patterns."
    )
    cgroup: PathPatterns | None = Field(
        default=None, description='The control group path (v2), from its root "/". Any of the patterns.'
    )
    unit: TextPatterns | None = Field(
        default=None, description='The systemd unit, like "nginx.service". Any of the patterns.'
    )
    user_unit: TextPatterns | None = Field(
        default=None,
        description='The unit of a user\'s service manager, like "app.service". Any of the patterns.',
    )
    container: TextPatterns | None = Field(
        default=None,
        description="The innermost container, by its name, or by its id in full or as its engine lists it (12 digits). "
        "Any of the patterns.",
    )
    pod_uid: TextPatterns | None = Field(
        default=None, description="The UID of the Kubernetes pod. Any of the patterns."
    )
    user: Users | None = Field(default=None, description="The user, by name or number. Any of them.")
    group: Groups | None = Field(default=None, description="The primary group, by name or number. Any of them.")
    euid: Users | None = Field(
        default=None, description="The effective user, by name or number. Of a uid event the new one. Any of them."
    )
    loginuid: LoginUsers | None = Field(
        default=None,
        description="The user of the login session, whatever user the process runs as since, by name or number; unset: "
        "a process outside any login session. Any of them.",
    )
    parent: ProcessConditionModel | None = Field(default=None, description="A condition on the parent process.")
    ancestor: ProcessConditionModel | None = Field(
        default=None,
        description="A condition on the parent, or its parent, and so on: at least one of them must satisfy it.",
    )

    @model_validator(mode="after")
    def _not_empty(self) -> _Identity:
        if not self.model_fields_set:
            raise invalid(
                "the match is empty",
                "at least one key: " + ", ".join(keys_of(type(self))),
                "remove it to match every process",
            )
        return self


class ProcessConditionModel(_Identity):
    """A condition on the identity of a related process."""

    not_: Annotated[tuple[ProcessConditionModel, ...], OneAsList, OneOrListOf()] = Field(
        default=(), alias="not", min_length=1, description="None of these may hold: one condition or a list."
    )
    any: tuple[ProcessConditionModel, ...] = Field(
        default=(), min_length=1, description="At least one of these must hold."
    )
    all: tuple[ProcessConditionModel, ...] = Field(
        default=(), min_length=1, description="Every one of these must hold."
    )


class ConditionModel(_Identity):
    """A condition on an event and its process.

    If one mapping has both `exit_code` and `signal`, either must hold. An unknown attribute never matches, not even
    under `not`.
    """

    exit_code: ExitCodes | None = Field(
        default=None, description='The exit code: 3, "!= 0", "> 3", "1-127", or a list. With signal: either.'
    )
    signal: SignalSet | None = Field(
        default=None,
        description='The signal that killed the process: SIGKILL, 9, "any", or a list. With exit_code: either.',
    )
    core_dumped: Flag | None = Field(default=None, description="Whether the process dumped core.")
    exit_status: ExitStatus | None = Field(
        default=None,
        description="unknown: the process ended while events were lost; known: the kernel reported its exit status.",
    )
    lifetime: TimeComparison | None = Field(
        default=None, description='The time from start to end of the process: "< 5s".'
    )
    max_rss: SizeComparison | None = Field(default=None, description='Peak resident memory: "> 500M".')
    cpu_time: TimeComparison | None = Field(default=None, description='User and system CPU time together: "> 10s".')
    oom_killed: Flag | None = Field(
        default=None, description="Whether the kernel's OOM killer ended the process, according to the kernel's log."
    )
    not_: Annotated[tuple[ConditionModel, ...], OneAsList, OneOrListOf()] = Field(
        default=(), alias="not", min_length=1, description="None of these may hold: one condition or a list."
    )
    any: tuple[ConditionModel, ...] = Field(default=(), min_length=1, description="At least one of these must hold.")
    all: tuple[ConditionModel, ...] = Field(default=(), min_length=1, description="Every one of these must hold.")

    @model_validator(mode="after")
    def _no_contradiction(self) -> ConditionModel:
        given = [key for key in ("exit_code", "signal", "core_dumped") if key in self.model_fields_set]
        if self.exit_status == "unknown" and given:
            raise invalid(
                f"{given[0]} never holds together with exit_status: unknown",
                hint="an unknown status has no code, signal or core flag; use an any: list to match either",
                key=given[0],
            )
        return self


def keys_of(model: type[Model]) -> list[str]:
    """Return the keys of a model as in a rule file."""
    return [info.alias or name for name, info in model.model_fields.items()]


def never_matches(condition: ConditionModel, events: tuple[EventName, ...]) -> Iterator[ValueProblem]:
    """Return the problems of a condition that no event in `events` can satisfy, each at its key."""
    if EXIT_EVENTS.isdisjoint(events):
        for path in _exit_keys(condition):
            yield ValueProblem(
                f"{path[-1]} is known only when a process ends, and the rule has no exit event",
                hint="add nonzero_exit or exit to events",
                at=path,
                on_key=True,
            )
    elif "exit" not in events:
        for path, part in _required(condition):
            if part.exit_code is not None and part.exit_code.ranges == ((0, 0),) and part.signal is None:
                yield ValueProblem(
                    "a nonzero_exit event never has exit code 0",
                    hint="use events: [exit] for successful exits",
                    at=(*path, "exit_code"),
                )


def _exit_keys(condition: ConditionModel) -> Iterator[tuple[str | int, ...]]:
    """Return the paths of all keys in the tree that need an exit event."""
    yield from ((key,) for key in EXIT_KEYS if key in condition.model_fields_set)
    for name, branch in (("not", condition.not_), ("any", condition.any), ("all", condition.all)):
        for index, child in enumerate(branch):
            yield from ((name, index, *path) for path in _exit_keys(child))


def _required(condition: ConditionModel) -> Iterator[tuple[tuple[str | int, ...], ConditionModel]]:
    """Return the parts of the tree that every matching event must satisfy: the root and the parts under `all`."""
    yield (), condition
    for index, child in enumerate(condition.all):
        yield from ((("all", index, *path), part) for path, part in _required(child))


ProcessConditionModel.model_rebuild()
ConditionModel.model_rebuild()

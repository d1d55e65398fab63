"""What a rule does about a match: `log:` writes a record, `run:` starts a hook.

Strategy: the same as schema.py's. The one rule that matters here: event data is never a command. The program is a
literal absolute path, there is no shell, and where the program is a shell itself, text that a process chose for
itself cannot become part of the script.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, PlainValidator, model_validator

from cnprocd.rules.language import syntax
from cnprocd.rules.language.fields import (
    Duration,
    Group,
    Model,
    Nice,
    OutputSize,
    ResourceCount,
    Retries,
    Size,
    Slots,
    TemplateText,
    Umask,
    User,
    YamlForm,
    words,
)
from cnprocd.rules.language.mistakes import Mistake, MistakeError, mistake, shown
from cnprocd.rules.ruleset import LogLevel
from cnprocd.rules.values import FREE_TEXT_FIELDS, Template

_LEVELS = ("debug", "info", "notice", "warning", "error", "critical")


Level = Annotated[LogLevel, *words(*_LEVELS)]


class LogModel(Model):
    """The record written for a match."""

    level: Level = Field(default="notice", description="The severity of the record.")
    message: TemplateText | None = Field(
        default=None, description='The text of the record with event fields: "{comm}[{pid}] died of {status}".'
    )


class BackoffModel(Model):
    """The pauses between retries: doubled from `initial` up to `max`."""

    initial_s: Duration = Field(
        default="1s", validate_default=True, alias="initial", description="The pause before the first retry."
    )
    max_s: Duration = Field(default="5m", validate_default=True, alias="max", description="The longest pause.")

    @model_validator(mode="after")
    def _grows(self) -> BackoffModel:
        if self.initial_s > self.max_s:
            raise mistake("the first pause is longer than the longest one", "initial at most max", key="initial")
        return self


class ResourceLimitsModel(Model):
    """Resource limits of the hook (setrlimit); a hook that passes one fails."""

    open_files: ResourceCount | None = Field(default=None, description="Open file descriptors (RLIMIT_NOFILE).")
    processes: ResourceCount | None = Field(
        default=None, description="Processes of the hook's user, all together (RLIMIT_NPROC)."
    )
    address_space_bytes: Size | None = Field(
        default=None, alias="address_space", description="Virtual memory of each process (RLIMIT_AS)."
    )
    cpu_time_s: Duration | None = Field(
        default=None, alias="cpu_time", description="CPU time of each process, rounded up to a second (RLIMIT_CPU)."
    )
    core_bytes: Size | None = Field(default=None, alias="core", description="Size of a core dump (RLIMIT_CORE).")
    file_size_bytes: Size | None = Field(
        default=None, alias="file_size", description="Size of a file it writes (RLIMIT_FSIZE)."
    )


_SHELLS = frozenset({"sh", "bash", "dash", "ash", "ksh", "mksh", "zsh", "fish", "busybox", "su", "runuser"})
_RESERVED_ENVIRONMENT = re.compile(r"CNPROCD_.*|LISTEN_.*|WATCHDOG_.*|NOTIFY_SOCKET|LD_.*")
_ACCEPT_COMMAND = 'a list of arguments, the program first: [/usr/lib/oracle/cleanup, --pid, "{pid}"]'


def _parse_command(value: object) -> tuple[Template, ...]:
    """An argument list. Event data may be an argument but never a program, an unbounded one, or shell text."""
    if isinstance(value, str):
        raise mistake("a command is a list of arguments, there is no shell", _ACCEPT_COMMAND)
    if not isinstance(value, list):
        raise mistake(f"expected a list of arguments, found {shown(value)}", _ACCEPT_COMMAND)
    command = tuple(syntax.each(value, syntax.template, _ACCEPT_COMMAND))
    found = [*_bad_program(command[0]), *_bad_arguments(command)]
    if found:
        raise MistakeError(*found)
    return command


def _bad_program(program: Template) -> list[Mistake]:
    path = "".join(part for part in program.parts if isinstance(part, str))
    if program.fields:
        return [Mistake("the program cannot come from the event: data is never a command", "a fixed path", at=(0,))]
    if not path.startswith("/") or path.endswith("/"):
        hint = "there is no search path and no shell"
        return [Mistake(f"{shown(path)} is not an absolute path", "the full path of a program", hint, at=(0,))]
    return []


def _bad_arguments(command: tuple[Template, ...]) -> list[Mistake]:
    program = command[0].render(dict.fromkeys(command[0].fields, ""))
    shell = program.rsplit("/", 1)[-1] in _SHELLS
    found = []
    for index, argument in enumerate(command[1:], start=1):
        if "cmdline" in argument.fields:
            hint = "the hook finds it as CNPROCD_CMDLINE in its environment, and in the event on its standard input"
            found.append(Mistake("{cmdline} cannot be an argument: it has no bound", hint=hint, at=(index,)))
        elif shell and argument.fields & FREE_TEXT_FIELDS and _is_script(command[index - 1]):
            hint = 'use "$CNPROCD_COMM" and the like in the script: the shell does not parse what a variable holds'
            found.append(Mistake("a process chose this text, and the shell would run it", hint=hint, at=(index,)))
    return found


def _is_script(before: Template) -> bool:
    """Whether an argument says that the next one is shell text: -c, -ec, --command."""
    option = before.render(dict.fromkeys(before.fields, ""))
    return option == "--command" or re.fullmatch(r"-[A-Za-z]*c", option) is not None


Command = Annotated[
    tuple[Template, ...],
    PlainValidator(_parse_command),
    YamlForm(
        {
            "type": "array",
            "minItems": 1,
            "prefixItems": [{"type": "string", "pattern": "^/.*[^/]$"}],
            "items": {"type": "string"},
        }
    ),
]


def _parse_environment_name(value: object) -> str:
    accepted = "a letter or _, then letters, digits or _"
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,254}", value, re.ASCII):
        raise mistake(f"{shown(value)} is not a name for a variable", accepted)
    if _RESERVED_ENVIRONMENT.fullmatch(value):
        hint = "cnprocd sets CNPROCD_* itself; the others would change how programs load, listen or notify"
        raise mistake(f"{value} is reserved", "any other name", hint)
    return value


EnvironmentName = Annotated[
    str,
    PlainValidator(_parse_environment_name),
    YamlForm({"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$"}),
]


def _parse_directory(value: object) -> str:
    path = syntax.text(value, "an absolute path")
    if not path.startswith("/"):
        raise mistake(f"{shown(path)} is not an absolute path", 'an absolute path, like "/var/tmp"')
    return path


Directory = Annotated[str, PlainValidator(_parse_directory), YamlForm({"type": "string", "pattern": "^/"})]


class HookModel(Model):
    """The hook: a program started for a match, with the event in its environment and on its standard input."""

    command: Command = Field(
        description="The argument list, no shell. The first is an absolute path; the others may hold {fields}."
    )
    user: User | None = Field(default=None, description="The user to run as; by default the one cnprocd runs as.")
    group: Group | None = Field(default=None, description="The group to run as; by default the user's primary group.")
    timeout_s: Duration = Field(
        default="30s",
        validate_default=True,
        alias="timeout",
        description="How long one try may take: then TERM, then KILL.",
    )
    deadline_s: Duration | None = Field(
        default=None, alias="deadline", description="How long the job may take, all retries and pauses included."
    )
    retries: Retries = Field(default=0, description="How often a failed try is repeated.")
    backoff: BackoffModel = Field(default=BackoffModel(), description="The pauses between tries.")
    env: dict[EnvironmentName, TemplateText] = Field(
        default_factory=dict, description="Variables added to the environment; values may hold {fields}."
    )
    working_directory: Directory = Field(default="/", description="The directory it starts in.")
    umask: Umask = Field(default="0077", validate_default=True, description="The umask of the hook, octal.")
    nice: Nice = Field(default=0, description="The scheduling priority, -20 (first) to 19 (last).")
    limits: ResourceLimitsModel | None = Field(default=None, description="Resource limits.")
    slots: Slots | None = Field(default=None, description="How many hooks of this rule may run at once.")
    serialize: Annotated[Literal["rule", "comm", "none"], *words("rule", "comm", "none")] = Field(
        default="none", description="Which hooks run one after another: those of the rule, or of one comm."
    )
    output_limit_bytes: OutputSize = Field(
        default="64K",
        validate_default=True,
        alias="output_limit",
        description="How much of its output is kept and logged.",
    )
    on_failure: LogModel | None = Field(
        default=None, description="The record written when the job has failed for good."
    )


def parse_log(value: object) -> object:
    """`false` is no record, `true` the default one."""
    if isinstance(value, bool):
        return LogModel() if value else None
    return value

"""Completions for bash, zsh and fish, all from the table of verbs in cnprocd/cli/grammar.py.

Options and words come from the table. Rule names and job numbers come from cnprocctl itself when the key is pressed,
users and groups from the system.
"""

from __future__ import annotations

from collections.abc import Iterator

from cnprocd.cli.arguments import Argument
from cnprocd.cli.grammar import COMMON, GROUPS, VERBS, Verb
from cnprocd.connector.status import SIGNAL_NAMES

_KINDS = {
    "--rules": "file", "file": "file", "files": "file", "--runtime-dir": "directory", "--state-dir": "directory",
    "--rule": "rule", "rule": "rule", "names": "rule", "--job": "job", "job": "job", "jobs": "job", "--user": "user",
    "--group": "group", "words": "verb",
}  # fmt: skip
_STATE_OF_VERB = {"jobs retry": "dead", "jobs drop": "waiting", "jobs kill": "running"}  # the jobs that make sense
_LISTED = 'cnprocctl rules list 2>/dev/null | awk "NR > 1 { print \\$1 }"'
_JOBS = 'cnprocctl jobs list -n 200 {state} 2>/dev/null | awk "NR > 1 && \\$1 + 0 {{ print \\$1 }}"'


def kind_of(one: Argument) -> str:
    """Return what the value of an argument is: a key of the shells' tables, or an empty string."""
    return _KINDS.get(one.names[-1], "")


def words_of(one: Argument) -> list[str]:
    """Return the words that an argument accepts, as far as they are known beforehand."""
    choices = one.options.get("choices")
    if isinstance(choices, tuple):
        return list(map(str, choices))
    if one.names[-1] == "--signal":
        return [name for _, name in sorted(SIGNAL_NAMES.items())]
    return list(first_words()) if kind_of(one) == "verb" else []


def takes_value(one: Argument) -> bool:
    """Whether a value follows the option."""
    return one.options.get("action") not in ("store_true", "store_const")


def is_option(one: Argument) -> bool:
    """Whether an argument is an option, and not positional."""
    return one.names[0].startswith("-")


def arguments(verb: Verb) -> list[Argument]:
    """Return the arguments of a verb, its own first."""
    return [*verb.arguments, *COMMON]


def first_words() -> dict[str, str]:
    """Return the words that may stand first, with their help."""
    words: dict[str, str] = {}
    for verb in VERBS:
        group, _, name = verb.name.rpartition(" ")
        words[group or name] = GROUPS[group] if group else verb.help
    return words


def second_words(group: str) -> dict[str, str]:
    """Return the words that may follow the first word of a group, with their help."""
    return {verb.name.split()[1]: verb.help for verb in VERBS if verb.name.startswith(f"{group} ")}


# -- bash --------------------------------------------------------------------------------------------------------


def bash() -> str:
    """Return the completion for bash."""
    lines = [
        "# bash completion for cnprocctl; made by packaging/manual.py.",
        f"_cnprocctl_rules() {{ {_LISTED}; }}",
        f"_cnprocctl_jobs() {{ {_JOBS.format(state='${1:+--state $1}')}; }}",
        "_cnprocctl() {",
        "    local cur prev verb help word i",
        '    cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} verb="" help=""',
        "    for ((i = 1; i < COMP_CWORD; i++)); do",
        "        word=${COMP_WORDS[i]}",
        '        case "$word" in',
        f"            {'|'.join(sorted(_valued()))}) ((i++)) ;;",
        "            -*) ;;",
        "            *) if [[ -z $verb && $word == help ]]; then help=yes; elif [[ -z $verb ]]; then verb=$word;"
        f' elif [[ " {" ".join(GROUPS)} " == *" $verb "* ]]; then verb="$verb $word"; fi ;;',
        "        esac",
        "    done",
        '    case "$prev" in',
        *_bash_values(),
        "    esac",
        f'    if [[ -n $help && -n $verb && " {" ".join(GROUPS)} " != *" $verb "* ]]; then COMPREPLY=(); return; fi',
        '    case "$verb" in',
        f'        "") COMPREPLY=($(compgen -W "{" ".join((*first_words(), *_names(COMMON)))}" -- "$cur")) ;;',
    ]
    lines += [
        f'        {group}) COMPREPLY=($(compgen -W "{" ".join(second_words(group))}" -- "$cur")) ;;' for group in GROUPS
    ]
    for verb in VERBS:
        if verb.name == "help":  # the words after it are completed as if it were not there
            continue
        lines.append(f'        "{verb.name}")')
        lines.append(f'            COMPREPLY=($(compgen -W "{" ".join(_names(arguments(verb)))}" -- "$cur"))')
        for one in verb.arguments:
            reply = _bash_reply(one, verb)
            if not is_option(one) and reply:
                lines.append(f"            [[ $cur != -* ]] && COMPREPLY=({reply})")
        lines.append("            ;;")
    return "\n".join([*lines, "    esac", "}", "complete -F _cnprocctl cnprocctl"]) + "\n"


def _valued() -> set[str]:
    every = [one for verb in VERBS for one in arguments(verb) if is_option(one) and takes_value(one)]
    return {name for one in every for name in one.names}


def _names(some: list[Argument] | tuple[Argument, ...]) -> list[str]:
    return list(dict.fromkeys(name for one in some if is_option(one) for name in one.names))


def _bash_values() -> Iterator[str]:
    every = {one.names: one for verb in VERBS for one in arguments(verb) if is_option(one) and takes_value(one)}
    # Two verbs may use one option for different things (-n): the last name decides what its value is.
    replies: dict[str, str] = {}
    for names, one in every.items():
        for name in names:
            replies[name] = replies.get(name) or _bash_reply(one, None)
    for name, reply in sorted(replies.items()):
        yield f"        {name}) COMPREPLY=({reply}); return ;;"


def _bash_reply(one: Argument, verb: Verb | None) -> str:
    if words_of(one):
        return f'$(compgen -W "{" ".join(words_of(one))}" -- "$cur")'
    state = _STATE_OF_VERB.get(verb.name, "") if verb is not None else ""
    jobs = f"_cnprocctl_jobs {state}".rstrip()
    return {
        "file": '$(compgen -f -- "$cur")',
        "directory": '$(compgen -d -- "$cur")',
        "rule": '$(compgen -W "$(_cnprocctl_rules)" -- "$cur")',
        "job": f'$(compgen -W "$({jobs})" -- "$cur")',
        "user": '$(compgen -u -- "$cur")',
        "group": '$(compgen -g -- "$cur")',
    }.get(kind_of(one), "")


# -- zsh ---------------------------------------------------------------------------------------------------------


def zsh() -> str:
    """Return the completion for zsh's _arguments."""
    lines = [
        "#compdef cnprocctl",
        "# made by packaging/manual.py",
        "_cnprocctl_rules() {",
        "    local -a names",
        f'    names=(${{(f)"$({_LISTED})"}})',
        "    _describe rule names",
        "}",
        "_cnprocctl_jobs() {",
        "    local -a numbers",
        f'    numbers=(${{(f)"$({_JOBS.format(state="${1:+--state} $1")})"}})',
        "    _describe job numbers",
        "}",
        "_cnprocctl() {",
        "    local curcontext=$curcontext state line",
        "    local -a common verbs",
        "    common=(",
        *(f"        {spec}" for one in COMMON for spec in _zsh(one, None)),
        "    )",
        "    verbs=(",
        *(f"        {_quoted(f'{word}:{text}')}" for word, text in first_words().items()),
        "    )",
        '    _arguments -C $common "1:verb:->verb" "*::argument:->argument"',
        '    case "$state" in',
        "        verb) _describe verb verbs ;;",
        '        argument) case "$line[1]" in',
    ]
    for group in GROUPS:
        lines.append(f"            {group})")
        described = " ".join(_quoted(f"{word}:{text}") for word, text in second_words(group).items())
        lines.append(f"                verbs=({described})")
        lines.append('                _arguments -C $common "1:verb:->second" "*::argument:->third"')
        lines.append('                case "$state" in')
        lines.append("                    second) _describe verb verbs ;;")
        lines.append('                    third) case "$line[1]" in')
        lines += [
            f"                        {verb.name.split()[1]}) {_zsh_arguments(verb)} ;;"
            for verb in VERBS
            if verb.name.startswith(f"{group} ")
        ]
        lines += ["                    esac ;;", "                esac ;;"]
    lines += [f"            {verb.name}) {_zsh_arguments(verb)} ;;" for verb in VERBS if " " not in verb.name]
    lines += ["        esac ;;", "    esac", "}", '_cnprocctl "$@"']
    return "\n".join(lines) + "\n"


def _zsh_arguments(verb: Verb) -> str:
    return " ".join(["_arguments", "$common", *(spec for one in verb.arguments for spec in _zsh(one, verb))])


def _zsh(one: Argument, verb: Verb | None) -> Iterator[str]:
    """Yield the specs of an argument, one for each of its names."""
    text = str(one.options["help"]).replace("[", "(").replace("]", ")").replace(":", " -")
    state = _STATE_OF_VERB.get(verb.name, "") if verb is not None else ""
    action = {
        "file": "_files",
        "directory": "_files -/",
        "rule": "_cnprocctl_rules",
        "job": f"_cnprocctl_jobs {state}".rstrip(),
        "user": "_users",
        "group": "_groups",
    }.get(kind_of(one), "")
    if words_of(one):
        action = f"({' '.join(words_of(one))})"
    if kind_of(one) == "verb":
        below = " ".join(dict.fromkeys(word for group in GROUPS for word in second_words(group)))
        yield from (_quoted(f"1:verb:{action}"), _quoted(f"2:verb:({below})"))
        return
    if not is_option(one):
        yield _quoted(f"{'*' if one.options.get('nargs') in ('+', '*') else ''}:{one.names[0]}:{action}")
        return
    value = f":{one.options.get('metavar', 'value')}:{action}" if takes_value(one) else ""
    before = "*" if one.options.get("action") == "append" else f"({' '.join(one.names)})" if one.names[1:] else ""
    for name in one.names:
        yield _quoted(f"{before}{name}[{text}]{value}")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# -- fish --------------------------------------------------------------------------------------------------------


def fish() -> str:
    """Return the completion for fish."""
    lines = ["# fish completion for cnprocctl; made by packaging/manual.py.", "complete -c cnprocctl -f"]
    lines.append(f"function __cnprocctl_rules; {_LISTED}; end")
    lines.append(f"function __cnprocctl_jobs; {_JOBS.format(state='$argv')}; end")
    lines += [_fish("__fish_use_subcommand", word, text) for word, text in first_words().items()]
    for group in GROUPS:
        second = second_words(group)
        first_only = f"__fish_seen_subcommand_from {group}; and not __fish_seen_subcommand_from {' '.join(second)}"
        lines += [_fish(first_only, word, text) for word, text in second.items()]
    lines += [_fish_option("", one, None) for one in COMMON]
    for verb in VERBS:
        when = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in verb.name.split())
        if verb.name == "help":  # after one of these words, its own completions follow
            when += (
                f"; and not __fish_seen_subcommand_from {' '.join(word for word in first_words() if word != 'help')}"
            )
        lines += [_fish_option(when, one, verb) for one in verb.arguments]
    return "\n".join(lines) + "\n"


def _fish(when: str, word: str, text: str) -> str:
    return f"complete -c cnprocctl -n {_quoted(when)} -a {word} -d {_quoted(text)}"


def _fish_option(when: str, one: Argument, verb: Verb | None) -> str:
    parts = ["complete -c cnprocctl", *([f"-n {_quoted(when)}"] if when else [])]
    if is_option(one):
        parts += [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in one.names]
        parts += ["-r" if kind_of(one) in ("file", "directory") else "-x"] if takes_value(one) else []
    state = _STATE_OF_VERB.get(verb.name, "") if verb is not None else ""
    words = {
        "rule": "(__cnprocctl_rules)",
        "job": f"(__cnprocctl_jobs {f'--state {state}' if state else ''})".replace(" )", ")"),
        "user": "(__fish_complete_users)",
        "group": "(__fish_complete_groups)",
    }.get(kind_of(one), " ".join(words_of(one)))
    if words:
        parts.append(f"-a {_quoted(words)}")
    elif kind_of(one) in ("file", "directory"):
        parts.append("-F")
    return " ".join([*parts, f"-d {_quoted(str(one.options['help']))}"])

"""Completions of bash, zsh and fish, all from the table of verbs in cnprocd/cli/grammar.py."""

from __future__ import annotations

from collections.abc import Iterator

from cnprocd.cli.grammar import COMMON, GROUPS, VERBS, Argument, Verb

_FILES = {"--rules": "file", "file": "file", "--runtime-dir": "directory", "--state-dir": "directory"}
_RULES = {"--rule", "rule", "names"}  # completed with the names that `cnprocctl rules list` gives


def arguments(verb: Verb) -> dict[str, Argument]:
    return {one.names[0]: one for one in (*verb.arguments, *COMMON)}


def first_words() -> dict[str, str]:
    """What may stand first, with its help."""
    words: dict[str, str] = {}
    for verb in VERBS:
        group, _, name = verb.name.rpartition(" ")
        words[group or name] = GROUPS[group] if group else verb.help
    return words


def second_words(group: str) -> dict[str, str]:
    return {verb.name.split()[1]: verb.help for verb in VERBS if verb.name.startswith(f"{group} ")}


def takes_value(one: Argument) -> bool:
    return one.options.get("action") != "store_true"


def words_of(one: Argument) -> list[str]:
    choices = one.options.get("choices")
    return list(map(str, choices)) if isinstance(choices, tuple) else []


def bash() -> str:
    """For bash-completion."""
    lines = [
        "# bash completion for cnprocctl; made by packaging/manual.py.",
        "_cnprocctl() {",
        "    local cur prev verb word i",
        '    cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} verb=""',
        "    for ((i = 1; i < COMP_CWORD; i++)); do",
        "        word=${COMP_WORDS[i]}",
        '        case "$word" in',
        f"            {'|'.join(sorted(_valued()))}) ((i++)) ;;",
        "            -*) ;;",
        '            *) if [[ -z $verb ]]; then verb=$word; elif [[ " '
        + " ".join(GROUPS)
        + ' " == *" $verb "* ]]; then'
        ' verb="$verb $word"; fi ;;',
        "        esac",
        "    done",
        '    case "$prev" in',
        *_bash_values(),
        "    esac",
        '    case "$verb" in',
        f'        "") COMPREPLY=($(compgen -W "{" ".join((*first_words(), *_names(COMMON)))}" -- "$cur")) ;;',
    ]
    lines += [
        f'        {group}) COMPREPLY=($(compgen -W "{" ".join(second_words(group))}" -- "$cur")) ;;' for group in GROUPS
    ]
    for verb in VERBS:
        known = arguments(verb)
        options = " ".join(name for name in known if name.startswith("-"))
        lines.append(f'        "{verb.name}")')
        lines.append(f'            COMPREPLY=($(compgen -W "{options}" -- "$cur"))')
        if any(name in _RULES and not name.startswith("-") for name in known):
            lines.append('            [[ $cur != -* ]] && COMPREPLY=($(compgen -W "$(_cnprocctl_rules)" -- "$cur"))')
        elif "file" in known:
            lines.append('            [[ $cur != -* ]] && COMPREPLY=($(compgen -f -- "$cur"))')
        lines.append("            ;;")
    lines += [
        "    esac",
        "}",
        "_cnprocctl_rules() { cnprocctl rules list 2>/dev/null | awk 'NR > 1 { print $1 }'; }",
        "complete -F _cnprocctl cnprocctl",
    ]
    return "\n".join(lines) + "\n"


def _valued() -> set[str]:
    every = [one for verb in VERBS for one in arguments(verb).values()]
    return {one.names[0] for one in every if one.names[0].startswith("-") and takes_value(one)}


def _names(some: tuple[Argument, ...]) -> list[str]:
    return [one.names[0] for one in some]


def _bash_values() -> Iterator[str]:
    every = {one.names[0]: one for verb in VERBS for one in arguments(verb).values() if one.names[0] in _valued()}
    for name, one in sorted(every.items()):
        if words_of(one):
            reply = f'$(compgen -W "{" ".join(words_of(one))}" -- "$cur")'
        elif name in _RULES:
            reply = '$(compgen -W "$(_cnprocctl_rules)" -- "$cur")'
        elif name in _FILES:
            reply = f'$(compgen -{"d" if _FILES[name] == "directory" else "f"} -- "$cur")'
        else:
            reply = ""
        yield f"        {name}) COMPREPLY=({reply}); return ;;"


def zsh() -> str:
    """For zsh's _arguments."""
    lines = [
        "#compdef cnprocctl",
        "# made by packaging/manual.py",
        "_cnprocctl_rules() {",
        "    local -a names",
        "    names=(${(f)\"$(cnprocctl rules list 2>/dev/null | awk 'NR > 1 { print $1 }')\"})",
        "    _describe rule names",
        "}",
        "_cnprocctl() {",
        "    local curcontext=$curcontext state line",
        "    local -a common verbs",
        "    common=(",
        *(f"        {_zsh(one)}" for one in COMMON),
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
    return " ".join(["_arguments", "$common", *map(_zsh, verb.arguments)])


def _zsh(one: Argument) -> str:
    name = one.names[0]
    text = str(one.options["help"]).replace("[", "(").replace("]", ")").replace(":", " -")
    if words_of(one):
        action = f"({' '.join(words_of(one))})"
    elif name in _RULES:
        action = "_cnprocctl_rules"
    else:
        action = {"file": "_files", "directory": "_files -/"}.get(_FILES.get(name, ""), "")
    if not name.startswith("-"):
        return _quoted(f"{'*' if one.options.get('nargs') == '+' else ''}:{name}:{action}")
    repeated = "*" if one.options.get("action") == "append" else ""
    value = f":{one.options.get('metavar', 'value')}:{action}" if takes_value(one) else ""
    return _quoted(f"{repeated}{name}[{text}]{value}")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def fish() -> str:
    """For fish."""
    lines = ["# fish completion for cnprocctl; made by packaging/manual.py.", "complete -c cnprocctl -f"]
    lines.append("function __cnprocctl_rules; cnprocctl rules list 2>/dev/null | awk 'NR > 1 { print $1 }'; end")
    lines += [_fish("__fish_use_subcommand", word, text) for word, text in first_words().items()]
    for group in GROUPS:
        second = second_words(group)
        unsaid = f"__fish_seen_subcommand_from {group}; and not __fish_seen_subcommand_from {' '.join(second)}"
        lines += [_fish(unsaid, word, text) for word, text in second.items()]
    lines += [_fish_option("", one) for one in COMMON]
    for verb in VERBS:
        when = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in verb.name.split())
        lines += [_fish_option(when, one) for one in verb.arguments]
    return "\n".join(lines) + "\n"


def _fish(when: str, word: str, text: str) -> str:
    return f"complete -c cnprocctl -n {_quoted(when)} -a {word} -d {_quoted(text)}"


def _fish_option(when: str, one: Argument) -> str:
    name = one.names[0]
    parts = ["complete -c cnprocctl", *([f"-n {_quoted(when)}"] if when else [])]
    if name.startswith("--"):
        parts.append(f"-l {name[2:]}" + (" -r" if takes_value(one) else ""))
    if words_of(one):
        parts.append(f"-a {_quoted(' '.join(words_of(one)))}")
    elif name in _RULES:
        parts.append("-a '(__cnprocctl_rules)'")
    elif name in _FILES:
        parts.append("-F")
    return " ".join([*parts, f"-d {_quoted(str(one.options['help']))}"])

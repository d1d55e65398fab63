"""Write what is derived from the code: manual pages, completions, the editor's schema, and the
Varlink interface.

    python packaging/manual.py            write them to their places
    python packaging/manual.py DIRECTORY  write them to a directory

The prose of a page is packaging/man/NAME.in, in roff. A line @NAME@ in it is replaced by text that is made from the
code: options and verbs from the parsers' tables, the keys of the rule language from the JSON schema, log fields from
output/fields.py. So a page lists exactly the options and fields that exist. No date is written: the same source gives
the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from completion import bash, fish, zsh  # noqa: E402  # beside this file

from cnprocd import __version__  # noqa: E402  # the checkout's, whatever is installed
from cnprocd.cli import cnprocd as daemon  # noqa: E402
from cnprocd.cli.arguments import Argument  # noqa: E402
from cnprocd.cli.grammar import COMMON, VERBS  # noqa: E402
from cnprocd.control.interface import DESCRIPTION  # noqa: E402
from cnprocd.output import fields  # noqa: E402
from cnprocd.output.journal import MESSAGE_IDS  # noqa: E402
from cnprocd.rules.language.schema import json_schema  # noqa: E402
from cnprocd.rules.values import FIELD_NAMES  # noqa: E402

HERE = ROOT / "packaging"
Schema = dict[str, Any]
STATUSES = {
    "0": "Done; for the daemon, a clean stop.",
    "1": "cnprocctl: no rule matches, a check of the doctor failed, or there is no such rule, job or process.",
    "2": "Wrong usage.",
    "69": "The kernel has no proc connector; cnprocctl: the daemon does not run or does not answer.",
    "70": "A bug in cnprocd.",
    "71": "A system call failed.",
    "75": "Another cnprocd uses the state directory.",
    "77": "Not permitted: CAP_NET_ADMIN is missing; cnprocctl: only root may do that.",
    "78": "A rule file is invalid.",
    "255": "cnprocctl -H: ssh failed.",
}


TABLES = {
    "ALWAYS": fields.ALWAYS,
    "MATCH": fields.MATCH,
    "CLASSES": fields.CLASSES,
    "OTHER": fields.OTHER,
    "HOOK": fields.HOOK_VARIABLES,
}


def roff(text: str) -> str:
    """Return plain text as roff, without requests and escapes."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\(ga")
    return "\n".join("\\&" + line if line.startswith((".", "'")) else line for line in text.split("\n"))


def sentence(text: str) -> str:
    """Return a help text as a sentence."""
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")


def option(names: tuple[str, ...], metavar: str | None, help_text: str) -> str:
    shown = ", ".join(f"\\fB{roff(name)}\\fR" for name in names)
    value = f" \\fI{roff(metavar)}\\fR" if metavar else ""
    return f".TP\n{shown}{value}\n{roff(sentence(help_text))}\n"


def argument(one: Argument) -> str:
    """Return a row of the table in grammar.py."""
    metavar = one.options.get("metavar")
    named = one.names[0].startswith("-")
    shown = str(metavar) if metavar else None
    if named:
        return option(one.names, shown, str(one.options["help"]))
    return f".TP\n\\fI{roff(shown or one.names[0])}\\fR\n{roff(sentence(str(one.options['help'])))}\n"


def daemon_options() -> str:
    made = daemon.parser()
    actions = [one for one in made._actions if one.option_strings and one.dest not in ("help", "version")]
    lines = []
    for one in actions:
        metavar = one.metavar or ("|".join(map(str, one.choices)) if one.choices else None)
        lines.append(option(tuple(one.option_strings), str(metavar) if metavar else None, one.help or ""))
    return "".join(lines)


def verbs() -> str:
    lines = []
    for verb in VERBS:
        lines.append(f".SS {roff(verb.name)}\n{roff(verb.description or sentence(verb.help))}\n")
        lines += [argument(one) for one in verb.arguments]
        if verb.examples:
            lines.append(
                ".PP\nFor example:\n.PP\n.RS\n.nf\n" + "".join(f"{roff(one)}\n" for one in verb.examples) + ".fi\n.RE\n"
            )
    return "".join(lines)


def statuses() -> str:
    return "".join(f".TP\n.B {number}\n{roff(text)}\n" for number, text in STATUSES.items())


def terms(table: Mapping[str, str]) -> str:
    """Return a table of names and their meanings."""
    return "".join(f".TP\n.B {roff(name)}\n{roff(text)}\n" for name, text in table.items())


def keys(schema: Schema, name: str) -> str:
    """Return every key of a mapping of the rule language."""
    here = schema if name == "" else schema["$defs"][name]
    lines = []
    for key, value in here["properties"].items():
        required = ", required" if key in here.get("required", ()) else ""
        default = value.get("default")
        given = f" Default: {json.dumps(default)}." if default is not None else ""
        described = roff(value.get("description", "")) + roff(given)
        lines.append(f".TP\n\\fB{roff(key)}\\fR (\\fI{roff(form(value))}\\fR{required})\n{described}\n")
    return "".join(lines)


def form(value: Schema) -> str:
    """Return the form of a value in a few words."""
    if "$ref" in value:
        return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", value["$ref"].rsplit("/", 1)[-1]).lower()
    for choices in ("anyOf", "allOf"):
        if choices in value:
            forms = list(dict.fromkeys(form(choice) for choice in value[choices]))
            return " or ".join(forms)
    if "enum" in value:
        return "|".join(map(str, value["enum"])) if len(value["enum"]) < 12 else "name"
    sort = value.get("type")
    if sort == "array":
        return f"list of {form(value.get('items', {}))}"
    if isinstance(sort, list):
        return " or ".join({"string": "name", "integer": "number"}.get(one, str(one)) for one in sort)
    if sort == "string" and value.get("examples"):
        return f"like {value['examples'][0]}"
    return {"string": "text", "integer": "number", "boolean": "true|false", "object": "mapping"}.get(str(sort), "value")


def sections(schema: Schema) -> Iterator[tuple[str, str]]:
    """Yield the placeholder and the keys of each mapping."""
    yield "TOP", keys(schema, "")
    for name in schema["$defs"]:
        yield name.upper(), keys(schema, name)


def page(source: Path) -> str:
    """Return a page: its prose with the placeholders replaced."""
    schema = json_schema()
    parts: dict[str, Callable[[], str] | str] = {
        "OPTIONS": daemon_options,
        "COMMON": lambda: "".join(map(argument, COMMON)),
        "VERBS": verbs,
        "STATUSES": statuses,
        **{f"FIELDS {name}": partial(terms, table) for name, table in TABLES.items()},
        "MESSAGE IDS": lambda: terms(MESSAGE_IDS),
        "FIELDS": lambda: roff(", ".join(FIELD_NAMES)) + "\n",
        **{f"KEYS {name}": text for name, text in sections(schema)},
    }
    lines = [f'.\\" Made by packaging/manual.py from {source.name}; edit that.\n']
    for line in source.read_text().splitlines(keepends=True):
        if line.startswith("@"):
            part = parts[line.strip().strip("@")]
            lines.append(part if isinstance(part, str) else part())
        else:
            lines.append(line.replace("@VERSION@", __version__))
    return "".join(lines)


def made() -> Iterator[tuple[str, str]]:
    """Yield every derived file as (path below the project, text)."""
    for source in sorted((HERE / "man").glob("*.in")):
        yield f"packaging/man/{source.stem}", page(source)
    # The shorter name leads to the same page.
    yield "packaging/man/cnprocd-rules.5", ".so man5/cnprocd-rules.yaml.5\n"
    yield "packaging/completions/cnprocctl.bash", bash()
    yield "packaging/completions/_cnprocctl", zsh()
    yield "packaging/completions/cnprocctl.fish", fish()
    yield "config/rules.schema.json", json.dumps(json_schema(), indent=2) + "\n"
    yield "config/io.cnprocd.varlink", DESCRIPTION


def main() -> None:
    """Write everything."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    options.add_argument("directory", nargs="?", type=Path, default=ROOT)
    directory = options.parse_args().directory
    for path, text in made():
        file = directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


if __name__ == "__main__":
    main()

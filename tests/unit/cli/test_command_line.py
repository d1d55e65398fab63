"""The command line: help, wrong usage and the nearest name, short options, and what stands before or after the verb."""

import pytest

from cnprocd.cli.cnprocctl import run
from cnprocd.cli.command_line import parse
from cnprocd.cli.grammar import GROUPS, VERBS


def usage_error(capsys, *words):
    """The lines on standard error of a command that must end with status 2."""
    with pytest.raises(SystemExit) as ended:
        run(list(words))
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


UNKNOWN = {
    "a verb": (["statsu"], "usage: cnprocctl [-h]", 'unknown verb "statsu": did you mean "status"?'),
    "a second word": (["jobs", "lst"], "usage: cnprocctl jobs", 'unknown verb "lst": did you mean "list"?'),
    "an option": (["history", "--sicne", "2h"], "usage: cnprocctl history", 'did you mean "--since"?'),
    "an option of two words": (["jobs", "list", "--sate=dead"], "usage: cnprocctl jobs list", '"--state"?'),
    "an option and no argument": (["jobs", "show", "--jsno"], "usage: cnprocctl jobs show", '"--json"?'),
    "an option before the verb": (["--jsn", "status"], "usage: cnprocctl [-h]", '"--json"?'),
    "an option without a verb": (["--jsn"], "usage: cnprocctl [-h]", 'unknown option --jsn: did you mean "--json"?'),
    "a short option": (["status", "-x"], "usage: cnprocctl status", "unknown option -x"),
    "a value": (["jobs", "list", "--state", "daed"], "usage: cnprocctl jobs list", 'did you mean "dead"?'),
    "an argument": (["status", "now"], "usage: cnprocctl status", 'unexpected argument "now"'),
    "help of a verb": (["help", "statsu"], "usage: cnprocctl [-h]", 'did you mean "status"?'),
    "help of a second word": (["help", "rules", "lits"], "usage: cnprocctl rules", 'did you mean "list"?'),
    "help of a third word": (["help", "status", "x"], "usage: cnprocctl status", 'unexpected argument "x"'),
    "no verb": ([], "usage: cnprocctl [-h]", "missing verb"),
    "no second word": (["jobs"], "usage: cnprocctl jobs", "missing verb"),
    "a time": (["history", "--since", "soon"], "usage: cnprocctl history", '--since: invalid time "soon"'),
    "a limit": (["history", "-n", "0"], "usage: cnprocctl history", "expected 1 to 1000"),
    "no line": (["watch", "-n", "0"], "usage: cnprocctl watch", 'invalid number "0": expected at least 1'),
    "no interval": (["top", "--interval", "0"], "usage: cnprocctl top", "expected at least 100ms"),
    "no time": (["rules", "disable", "a", "--for", "0"], "usage: cnprocctl rules disable", "expected at least 100ms"),
    "a time without an end": (["rules", "disable", "a", "--for", "99999999d"], "usage: cnprocctl", "at most 100y"),
    "a time beyond all calendars": (["history", "--since", "9999-12-31"], "usage: cnprocctl history", "before 2261"),
}


@pytest.mark.parametrize(("words", "usage", "mistake"), UNKNOWN.values(), ids=UNKNOWN)
def test_wrong_usage_shows_usage_and_nearest_name(capsys, words, usage, mistake):
    found = usage_error(capsys, *words)
    assert found.startswith(usage)
    assert mistake in found


def test_an_unknown_verb_lists_those_that_exist(capsys):
    (line,) = [one for one in usage_error(capsys, "xyz").splitlines() if one.startswith("verbs: ")]
    assert set(line.removeprefix("verbs: ").split(", ")) == {verb.name.split()[0] for verb in VERBS}


@pytest.mark.parametrize("name", [*(verb.name for verb in VERBS), *GROUPS])
def test_help_of_a_verb_is_its_help_option(capsys, name):
    assert run(["help", *name.split()]) == 0
    by_verb = capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        run([*name.split(), "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == by_verb
    assert by_verb.startswith(f"usage: cnprocctl {name} ")


def test_help_alone_lists_every_verb(capsys):
    assert run(["help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"    {verb.name.split()[0]} " in shown for verb in VERBS)


def test_output_formats_before_and_after_the_verb():
    for words in (["-o", "json", "status"], ["status", "-ojson"], ["--json", "status"], ["status", "--output=json"]):
        assert parse(words).json is True
    for words in (["status"], ["status", "-o", "table"], ["--json", "status", "-o", "table"]):
        assert parse(words).json is False


def test_short_options_are_the_long_ones():
    assert parse(["history", "-n", "7"]).limit == parse(["history", "--limit", "7"]).limit == 7
    assert parse(["jobs", "list", "-n7"]).limit == 7
    assert parse(["watch", "-n", "3"]).count == 3
    assert parse(["top", "-n", "4"]).lines == 4


def test_a_time_that_begins_with_minus_is_a_value():
    assert parse(["history", "--since", "-2h"]).since.at_s < parse(["history", "--since", "now"]).since.at_s


def test_the_help_of_the_grammar_is_imperative():
    """A capital first, no full stop at the end, and no personification."""
    for verb in VERBS:
        for text in (verb.help, *(str(one.options["help"]) for one in verb.arguments)):
            assert text[0].isupper() or text.startswith("systemd"), text
            assert not text.endswith("."), text


def test_kinds_are_for_events_only(capsys):
    assert run(["watch", "--kinds", "exit"]) == 2
    assert "--kinds needs --events" in capsys.readouterr().err

"""Rule files on disk: the exact place of every error, precedence of drop-ins, files that other users can write."""

import errno
import os
import re
import stat
from pathlib import Path

import pytest

from cnprocd.errors import EX_CONFIG
from cnprocd.rules.language import load as load_module
from cnprocd.rules.language.load import LARGEST, RulesError, load
from cnprocd.safe_open import UnsafeFileError, safe_open

SHIPPED = Path(__file__).parents[4] / "config" / "rules.yaml"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
USERS = {"oracle": 54}


def written(directory, text, name="rules.yaml"):
    directory.mkdir(parents=True, exist_ok=True, mode=0o755)
    file = directory / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    file.chmod(0o644)
    return file


def problems(file, **options):
    with pytest.raises(RulesError) as caught:
        load(file, user=USERS.get, group={}.get, **options)
    assert caught.value.exit_status == EX_CONFIG
    return caught.value.problems


RULE = "rules:\n  - name: a\n    events: [nonzero_exit]\n"


# Each bad file with every problem it must give: line, column, and a phrase of its text (message, accepted, hint).
BAD = {
    "empty": ("", [(0, 0, r"empty.*rules: \[\]")]),
    "only a comment": ("# nothing\n", [(0, 0, "empty")]),
    "null": ("~\n", [(0, 0, "empty")]),
    "an empty mapping": ("{}\n", [(0, 0, "empty")]),
    "a bare list": ("- name: a\n", [(1, 1, "not a mapping.*under a key: rules")]),
    "a text": ("hello\n", [(1, 1, "not a mapping")]),
    "not UTF-8": (b"rules:\n  # caf\xe9\n", [(2, 8, "0xe9 is not UTF-8.*iconv")]),
    "UTF-16": ("rules: []\n".encode("utf-16"), [(1, 1, "0xff is not UTF-8")]),
    "a NUL": ("rules: []\n# \0\n", [(2, 3, r"U\+0000")]),
    "a tab": ("rules:\n\t- name: a\n", [(2, 1, "tab.*spaces")]),
    "too large": (b"#" * (LARGEST + 1), [(0, 0, "too large.*1 MiB")]),
    "too deep": ("rules: " + "[" * 60, [(1, 57, "nested deeper")]),
    "two documents": ("rules: []\n---\nrules: []\n", [(2, 1, "second document")]),
    "a duplicate key": ("rules: []\nrules: []\n", [(2, 1, 'duplicate key "rules".*line 1')]),
    "an alias": ("rules: []\nlists: {a: [*x]}\n", [(2, 13, r'aliases.*"\*x"')]),
    "an anchor": ("rules: &r []\n", [(1, 8, "anchors")]),
    "a merge key": (RULE + "    log: {<<: {level: info}}\n", [(4, 11, "merge keys")]),
    "a tag": (RULE + "    match: {exit_code: !=0 }\n", [(4, 24, "needs quotes")]),
    "an unclosed list": ("rules: [\n", [(2, 1, "invalid YAML")]),
    "no value": ("rules:\n", [(1, 1, '"rules" has no value')]),
    "a key without a value": (RULE + "    match: {comm: a, exe: }\n", [(4, 22, '"exe" has no value')]),
    "an unknown key": ("rulez: []\n", [(1, 1, 'unknown key "rulez".*settings, lists, rules.*"rules"')]),
    "an unknown key below": (RULE + "    matches: {}\n", [(4, 5, 'unknown key "matches".*"match"')]),
    "a wrong shape": ("rules: {name: a}\n", [(1, 8, "expected a list, found a mapping")]),
    "a rule that is text": ("rules: [abc]\n", [(1, 9, 'expected a mapping, found "abc".*name, description')]),
    "missing keys": (
        "rules:\n  - description: x\n",
        [(2, 5, '"name" is missing'), (2, 5, '"events" is missing.*name, a list')],
    ),
    "a missing key of cooldown": (RULE + "    cooldown: {by: unit}\n", [(4, 5, '"for" is missing')]),
    "a missing key below": (RULE + "    rate_limit: {count: 3}\n", [(4, 5, '"per" is missing')]),
    "a wrong type": (RULE + "    threads: yes\n", [(4, 14, "expected true or false, found.*YAML 1.2")]),
    "log of the wrong shape": (RULE + "    log: 5\n", [(4, 10, "true or false, or a mapping with level, message")]),
    "a list where a mapping belongs": (RULE + "    match: [comm]\n", [(4, 12, "expected a mapping, found a list")]),
    "an unknown event": ("rules: [{name: a, events: [exec, exi]}]\n", [(1, 34, 'unknown event: "exi".*"exit"')]),
    "an impossible range": (RULE + '    match: {exit_code: [3, "9-3"]}\n', [(4, 28, "9-3 is empty.*a number 0-255")]),
    "an impossible code": (RULE + "    match: {exit_code: 300}\n", [(4, 24, 'invalid exit code: 300.*"!= 0"')]),
    "a bad expression": (RULE + '    match: {comm: "/(/"}\n', [(4, 19, "invalid regular expression.*unterminated")]),
    "a comm too long": (
        RULE + "    match: {comm: gnome-terminal-server}\n",
        [(4, 19, 'never match.*"gnome-terminal-"')],
    ),
    "a glob too long": (RULE + '    match: {comm: ["a*", "0123456789abcdef*"]}\n', [(4, 26, "never match.*15")]),
    "a number as comm": (RULE + "    match: {comm: 010}\n", [(4, 19, "expected text, found 10.*quotes")]),
    "an unknown list": (
        "lists: {db: [a]}\n" + RULE + "    match: {comm: $dbs}\n",
        [(5, 19, r'no list named "dbs".*\$db')],
    ),
    "a bad list": (
        "lists: {db: [a, '/(/']}\n" + RULE + "    match: {comm: $db}\n",
        [(1, 17, "invalid regular expression")],
    ),
    "a bad list name": ("lists: {1 b: [a]}\nrules: []\n", [(1, 9, "invalid list name")]),
    "an empty match": (RULE + "    match: {}\n", [(4, 12, "empty.*at least one key")]),
    "an empty branch": (RULE + "    match: {any: []}\n", [(4, 18, "list is empty")]),
    "an empty not": (RULE + "    match: {not: [], comm: a}\n", [(4, 18, "list is empty")]),
    "a bad single not": (RULE + "    match: {not: {comm: 5}}\n", [(4, 25, "expected text")]),
    "a bad not in a list": (RULE + "    match: {not: [{comm: a}, {com: b}]}\n", [(4, 31, 'unknown key "com".*"comm"')]),
    "a key without its event": (
        "rules:\n  - name: a\n    events: fork\n    match:\n      not:\n        lifetime: '< 5s'\n",
        [(6, 9, "known only when a process ends")],
    ),
    "an unknown field": (RULE + "    log: {message: 'x {com}'}\n", [(4, 20, 'unknown field "com".*"comm"')]),
    "a shell": (RULE + "    run: {command: /bin/sh -c x}\n", [(4, 20, "no shell")]),
    "a bad variable": (RULE + "    run: {command: [/x], env: {LD_PRELOAD: x}}\n", [(4, 32, "reserved")]),
    "a plain umask": (RULE + "    run: {command: [/x], umask: 0077}\n", [(4, 33, "decimal number in YAML 1.2")]),
    "a name taken": (RULE + "  - {name: a, events: exit}\n", [(4, 12, r'duplicate rule name "a": also at \S+:2:11')]),
    "several": (
        "settings: {hook_slots: 0}\nrules:\n  - {name: a b, events: exit, cooldown: 5}\n  - {nam: b, events: []}\n",
        [
            (1, 24, "out of range.*1 to 256"),
            (3, 12, "invalid rule name"),
            (3, 41, 'invalid duration: 5.*"5s"'),
            (4, 5, '"name" is missing'),
            (4, 6, 'unknown key "nam"'),
            (4, 22, "list is empty"),
        ],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_reported_with_every_position(tmp_path, case):
    text, expected = BAD[case]
    found = problems(written(tmp_path, text))
    assert [(p.line, p.column) for p in found] == [(line, column) for line, column, _ in expected]
    for problem, (_, _, phrase) in zip(found, expected, strict=True):
        assert re.search(phrase, f"{problem.message} {problem.accepted} {problem.hint}"), problem


def test_a_problem_is_shown_with_its_line_and_a_caret(tmp_path):
    file = written(tmp_path, RULE + "    match: {exit_code: 9-3}\n")
    (problem,) = problems(file)
    assert problem.render() == (
        f"{file}:4:24: the range 9-3 is empty\n"
        "        match: {exit_code: 9-3}\n"
        "                           ^\n"
        '    accepted: a number 0-255, "!= 0", "> 3", a range "1-127", or a list of these\n'
        '    hint: write "3-9"'
    )


def test_the_error_itself_is_one_line_with_the_count(tmp_path):
    with pytest.raises(RulesError) as caught:
        load(written(tmp_path, "a: 1\nb: 2\n"))
    assert str(caught.value).startswith(f'{tmp_path}/rules.yaml:1:1: unknown key "a" (and 1 more)')
    assert "\n" not in str(caught.value)
    assert caught.value.render().count(":1: unknown key") == 2


def test_a_hostile_file_cannot_control_or_flood_a_terminal(tmp_path):
    (problem,) = problems(written(tmp_path, b"# " + b"x" * 5000 + b"\x1b[31m" + b"y" * 5000 + b"\n"))
    assert "\x1b" not in problem.render()
    assert max(map(len, problem.render().splitlines())) < 200
    shown, caret = problem.render().splitlines()[1:3]
    assert shown[caret.index("^")] == "\N{REPLACEMENT CHARACTER}"
    (problem,) = problems(written(tmp_path, "rules: []\n# ab\fcd\n"))
    assert problem.source_line == "# ab\fcd"
    (problem,) = problems(written(tmp_path, 'rules: []\n"a\\e[1m": 1\n'))
    assert "\x1b" not in problem.render()


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_a_good_file(tmp_path, start):
    file = written(tmp_path, start + b"settings: {hook_slots: 3}\nlists: {db: [a]}\n" + RULE.encode())
    loaded = load(file)
    assert [rule.name for rule in loaded.rules] == ["a"]
    assert loaded.settings.hook_slots == 3
    assert loaded.files == (file,)
    assert [w.message for w in loaded.warnings] == ['the list "db" is not used']
    assert load(written(tmp_path, "rules: []\n")).rules == ()
    assert load(written(tmp_path, RULE.replace("\n", "\r\n"))).rules == loaded.rules


def test_the_shipped_file_is_good_and_so_is_its_example(tmp_path):
    text = SHIPPED.read_text()
    shipped = load(written(tmp_path, text))
    assert [rule.name for rule in shipped.rules] == ["process-failed"]
    assert shipped.warnings == ()
    example = [line[2:] for line in text.splitlines() if re.match(r"# (lists:|  )", line)]
    loaded = load(written(tmp_path, "\n".join([example[0], example[1], "rules:", *example[2:]])), user=USERS.get)
    assert [rule.name for rule in loaded.rules] == ["oracle-process-died"]
    assert [w.message for w in loaded.warnings] == []


def test_names_of_this_machine_are_looked_up(tmp_path):
    file = written(tmp_path, RULE + "    match: {user: root, group: root}\n")
    assert (load(file).rules[0].match.user, load(file).rules[0].match.group) == ((0,), (0,))


def test_warnings(tmp_path):
    rules = (
        "rules:\n"
        "  - {name: a, events: exit, log: false}\n"
        "  - name: b\n"
        "    events: exit\n"
        "    run: {command: [/x, '{comm}', --, '{exe}']}\n"
    )
    found = load(written(tmp_path, rules)).warnings
    assert [(w.line, w.column) for w in found] == [(2, 34)], "a leading dash is escaped: see escape.argument"
    assert "does nothing" in found[0].message


# --- drop-ins


@pytest.fixture
def etc(tmp_path):
    """A system of three drop-in directories and a main file with no rules."""
    written(tmp_path / "etc", "settings: {hook_slots: 2}\nlists: {db: [x]}\nrules: []\n")
    return tmp_path


def load_system(root):
    directories = [root / "etc" / "rules.d", root / "run", root / "lib"]
    return load(None, main_file=root / "etc" / "rules.yaml", dropin_dirs=directories)


def system_problems(root):
    with pytest.raises(RulesError) as caught:
        load_system(root)
    return [(p.file.relative_to(root).as_posix(), p.line, p.column, p.message) for p in caught.value.problems]


def named(name):
    return f"rules: [{{name: {name}, events: exit, match: {{comm: $db}}}}]\n"


def test_the_administrators_file_wins_and_names_give_the_order(etc):
    written(etc / "lib", named("lib-10"), "10.yaml")
    written(etc / "lib", named("lib-20"), "20.yaml")
    written(etc / "lib", named("lib-30"), "30.yaml")
    written(etc / "run", named("run-20"), "20.yaml")
    written(etc / "run", named("run-30"), "30.yaml")
    written(etc / "etc" / "rules.d", named("etc-30"), "30.yaml")
    written(etc / "etc" / "rules.d", named("etc-05"), "05.yaml")
    loaded = load_system(etc)
    assert [rule.name for rule in loaded.rules] == ["etc-05", "lib-10", "run-20", "etc-30"]
    assert [f.relative_to(etc).as_posix() for f in loaded.files] == [
        "etc/rules.yaml", "etc/rules.d/05.yaml", "lib/10.yaml", "run/20.yaml", "etc/rules.d/30.yaml",
    ]  # fmt: skip
    assert loaded.settings.hook_slots == 2


def test_an_empty_file_or_a_link_to_dev_null_masks(etc):
    for number in (1, 2, 3):
        written(etc / "lib", named(f"lib-{number}"), f"{number}.yaml")
    written(etc / "run", "", "1.yaml")
    (etc / "run" / "2.yaml").symlink_to("/dev/null")
    written(etc / "run", "# nothing any more\n", "3.yaml")
    assert load_system(etc).rules == ()


def test_other_names_are_ignored_and_a_near_miss_is_warned_of(etc):
    for name in ("a.yml", "b.yaml~", ".c.yaml.swp", "README"):
        written(etc / "lib", "rubbish: [", name)
    loaded = load_system(etc)
    assert loaded.rules == ()
    assert [(w.file.name, w.line) for w in loaded.warnings if w.line == 0] == [("a.yml", 0)]


def test_lists_are_shared_and_problems_come_in_file_order(etc):
    written(etc / "lib", "lists: {other: [y]}\n" + named("a"), "10.yaml")
    written(etc / "lib", "rules: [{name: b, events: exit, match: {comm: [$other, $nope]}}]\n", "20.yaml")
    written(etc / "etc" / "rules.d", "settings: {}\nlists: {db: [z]}\n" + named("a"), "30.yaml")
    written(etc / "run", "lists: [\n", "05.yaml")
    first, *others = system_problems(etc)
    assert first[:3] == ("run/05.yaml", 2, 1)
    assert others == [
        ("lib/20.yaml", 1, 56, 'there is no list named "nope"'),
        ("etc/rules.d/30.yaml", 1, 1, "settings are allowed only in the main file"),
        ("etc/rules.d/30.yaml", 2, 9, f'duplicate list name "db": also at {etc}/etc/rules.yaml:2:9'),
        ("etc/rules.d/30.yaml", 3, 16, f'duplicate rule name "a": also at {etc}/lib/10.yaml:2:16'),
    ]


def test_an_explicit_file_has_no_dropins(etc):
    written(etc / "lib", named("a"), "10.yaml")
    assert load(etc / "etc" / "rules.yaml", dropin_dirs=[etc / "lib"]).rules == ()


def test_without_a_main_file(tmp_path):
    found = problems(None, main_file=tmp_path / "none.yaml", dropin_dirs=[tmp_path / "d"])
    assert found[0].file == tmp_path / "none.yaml"
    assert "--rules" in found[0].hint


def test_the_default_places_are_those_of_the_documentation():
    assert Path("/etc/cnprocd/rules.yaml") == load_module.MAIN_FILE
    assert [str(d) for d in load_module.DROPIN_DIRS] == [f"/{d}/cnprocd/rules.d" for d in ("etc", "run", "usr/lib")]


# --- unreadable files, and files that other users can write


def test_a_path_that_is_not_a_regular_file_is_rejected(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    for file, phrase in [
        (tmp_path, "is a directory"),
        (tmp_path / "pipe", "is a named pipe"),
        (Path("/dev/null"), "is a device"),
        (tmp_path / "none" / "rules.yaml", "does not exist"),
        (written(tmp_path, "x") / "below", "Not a directory"),
    ]:
        (problem,) = problems(file)
        assert phrase in problem.message
        assert (problem.line, problem.hint != "") == (0, True)


def test_links_are_followed_but_not_for_ever(tmp_path):
    file = written(tmp_path / "real", RULE)
    (tmp_path / "here").symlink_to("real/../real/rules.yaml")
    (tmp_path / "there").symlink_to(file)
    (tmp_path / "loop").symlink_to("loop")
    assert load(tmp_path / "here").rules == load(tmp_path / "there").rules == load(file).rules
    (problem,) = problems(tmp_path / "loop")
    assert "symbolic links" in problem.message and "symbolic links" in problem.hint


@pytest.mark.parametrize(("code", "word"), [(errno.EACCES, "permissions"), (errno.EIO, "disk"), (errno.ENXIO, "path")])
def test_the_hint_about_an_unreadable_file_fits_the_error(tmp_path, code, word):
    def fail(file):
        raise OSError(code, os.strerror(code), str(file))

    (problem,) = problems(tmp_path / "rules.yaml", read=fail)
    assert word in problem.hint


def test_a_relative_path(tmp_path, monkeypatch):
    written(tmp_path, RULE)
    monkeypatch.chdir(tmp_path)
    assert load(Path("rules.yaml")).rules


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_can_write_is_refused(tmp_path, mode):
    file = written(tmp_path, RULE)
    file.chmod(mode)
    (problem,) = problems(file)
    assert "can be written by" in problem.message
    assert f"chmod go-w {file}" in problem.hint


def test_a_directory_writable_by_others_is_refused_unless_sticky(tmp_path):
    file = written(tmp_path / "open" / "below", RULE)
    (tmp_path / "open").chmod(0o777)
    (problem,) = problems(file)
    assert f"{tmp_path}/open can be written by everyone" in problem.message
    (tmp_path / "open").chmod(0o1777)
    assert load(file).rules
    # The way through a link counts as much as the way to what it names.
    (tmp_path / "open").chmod(0o770)
    target = written(tmp_path / "closed", RULE)
    (tmp_path / "open" / "link").symlink_to(target)
    assert "open can be written by" in problems(tmp_path / "open" / "link")[0].message
    (tmp_path / "link").symlink_to(file)
    assert "open can be written by" in problems(tmp_path / "link")[0].message


@as_root
@pytest.mark.parametrize("what", ["file", "directory", "link"])
def test_a_file_of_another_user_is_rejected(tmp_path, what):
    file = written(tmp_path / "d", RULE)
    (tmp_path / "link").symlink_to(file)
    given = {"file": file, "directory": tmp_path / "d", "link": tmp_path / "link"}[what]
    assert load(tmp_path / "link").rules
    os.chown(given, 1234, 0, follow_symlinks=False)
    (problem,) = problems(tmp_path / "link")
    assert f"{given} belongs to user 1234" in problem.message
    moved = "move it to a directory that only root can write"
    assert problem.hint == (moved if what == "directory" else f"chown -h root:root {given}")


@as_root
def test_without_root_own_files_and_those_of_root_are_safe(tmp_path, monkeypatch):
    own, foreign = written(tmp_path, RULE), written(tmp_path, RULE, "foreign.yaml")
    os.chown(own, 1234, 0)
    os.chown(foreign, 4321, 0)
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert load(own).rules
    with pytest.raises(UnsafeFileError):
        safe_open(foreign)


def test_the_descriptor_is_the_checked_file_and_none_leaks(tmp_path):
    file = written(tmp_path, RULE)
    before = os.listdir("/proc/self/fd")
    fd = safe_open(file)
    assert os.fstat(fd).st_ino == file.stat().st_ino
    assert stat.S_ISREG(os.fstat(fd).st_mode)
    assert not os.get_inheritable(fd)
    os.close(fd)
    file.chmod(0o666)
    with pytest.raises(UnsafeFileError):
        safe_open(file)
    assert os.listdir("/proc/self/fd") == before


def test_without_proc_a_file_is_not_said_to_be_absent(tmp_path, monkeypatch):
    """As in a bare chroot: who can write the file cannot be found out."""
    monkeypatch.setattr("cnprocd.safe_open._DESCRIPTORS", "/none/self/fd")
    (problem,) = problems(written(tmp_path, RULE))
    assert "/proc is not mounted" in problem.message and "mount -t proc" in problem.hint


def test_found_by_fuzzing_lists_of_lists_of_names_are_no_bomb(tmp_path):
    """A megabyte of this would be billions of patterns."""
    entries = ", ".join(f"n{number}" for number in range(5000))
    rules = "".join(f"  - {{name: r{number}, events: exit, match: {{comm: $many}}}}\n" for number in range(50))
    found = problems(written(tmp_path, f"lists: {{many: [{entries}]}}\nrules:\n{rules}"))
    assert len(found) == 10  # 40 times 5,000 is what is allowed
    assert "more than 200000 entries" in found[0].message
    assert found[0].line == 43


def test_found_by_fuzzing_many_problems_in_one_line_are_fast(tmp_path):
    file = written(tmp_path, b"rules: [" + b"a, " * 3000 + b"]")
    with pytest.raises(RulesError) as caught:
        load(file)
    shown = caught.value.render()
    assert len(caught.value.problems) == 3000
    assert max(map(len, shown.splitlines())) < 500

"""The floor plan, enforced: what a pure module may import, which room may import which, and how large a module may be.

Everything is read from the source with `ast`, imports inside functions and under TYPE_CHECKING included: what a module
names counts as imported. `FLOORS` lists the rooms. A new room gets its floor here, with its purpose.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "cnprocd"
LONGEST_MODULE = 420
LONGEST_FUNCTION = 60

# Room (or module of the top level), from the ground up. Each may import what stands below it, never above.
FLOORS = {
    "__init__": "the version, and nothing else",
    "errors": "one exception family, which every room raises",
    "json_value": "JSON values with types; needs only the exception family",
    "log": "the protocol by which every part writes log records",
    "escape": "text that is safe to print",
    "failures": "unexpected exceptions, counted and logged",
    "safe_open": "opens only what root alone can write: rule files, and the programs of hooks",
    "worker": "a thread or child process that does work for an edge",
    "patience": "how long the event loop waits for an edge",
    "edge": "work that another program can make slow, done beside the event loop",
    "owner_lock": "one daemon for one state directory and one runtime directory",
    "stall_meter": "how long the event loop did not wait for events",
    "stalls": "measures the event loop, and reports its stalls",
    "service": "the service manager's sockets and watchdog; imports nothing of cnprocd",
    "connector": "the kernel's two sockets: events, exit records, filters, losses",
    "process": "processes and their attributes, from events, exit records and /proc",
    "surroundings": "what a machine or container withholds, in words",
    "rules": "match occurrences, and decide what to ask the kernel for",
    "rules/language": "rule files to rules, for the loader process and the commands; the daemon never imports it",
    "load_state": "the outcome of the last load, and whether the rule files changed since",
    "launch": "one attempt of a hook",
    "names": "names of users and groups, resolved beside the event loop",
    "runner": "the root service that starts hooks, and its client in the daemon",
    "spool": "the jobs, and which of them runs next",
    "output": "log records and metrics",
    "machine_ids": "the names and ids of this machine, for match records",
    "acceptance": "how loaded rules become the accepted ones, whose snapshot root alone can write",
    "subscription": "what is asked of the kernel for the rules in force and for hooks",
    "handover": "the files by which one daemon hands on what it knows of processes",
    "recovery": "what the pipeline does after an overrun",
    "flood": "which matches are reported while the daemon is behind",
    "delivery": "what the pipeline hands over, and the protocol of where it goes",
    "deferred": "matches of a flood that are reported when no events wait",
    "unknown_attributes": "counts and logs what rules needed to know and could not",
    "counts": "what the pipeline counts",
    "alike": "processes that look alike, and the rules that cannot tell them apart",
    "crowd": "what becomes of the matches of a flood",
    "rescan": "the processes as other rules need them, before those come into force",
    "pipeline": "the only room that joins connector, process, rules and output",
    "postponing": "jobs of a flood that are made later",
    "dispatch": "the jobs and the log records of matches",
    "hits": "the hits of each rule, from the pipeline's counts to the spool",
    "reload": "the rules in force, and all that a reload replaces",
    "name_resolution": "the names of the rules in force that had no id when they were loaded",
    "control": "shows and steers the rules in force, the pipeline and the jobs",
    "event_loop": "turns the pipeline, and does the housekeeping of all parts",
    "wiring": "builds and connects the parts, once",
    "daemon": "start, signals, stop",
    "cli": "what a person types; nothing imports it",
}

PURE = """
alike counts crowd deferred delivery errors escape failures flood json_value log patience stall_meter
cli/plans cli/reasons cli/rule_text
connector/ahead connector/decode connector/event connector/filter connector/gathering connector/needed
connector/request connector/sequence connector/status connector/taskrecord connector/uapi
control/interface control/introspection control/protocol control/verb
launch/render launch/request
output/console output/fields output/match_id output/metrics output/record
process/cgroup_path process/completion process/counted_lookup process/death process/deaths process/doubt
process/evidence process/executed_file process/executions process/family process/files process/handed_on
process/inheritance process/model
process/oom process/second_look process/stat process/table process/thread_count process/tracker process/tracking
process/unasked
rules/compile rules/needs rules/plan rules/predicate rules/ruleset rules/unresolved rules/values rules/written
rules/language/actions rules/language/advice rules/language/condition rules/language/evidence rules/language/fields
rules/language/impossible rules/language/lint
rules/language/names rules/language/overlap rules/language/plain rules/language/regex_cost rules/language/schema
rules/language/syntax rules/language/value_problem
runner/wire runner/wire_validate
spool/changes spool/disk_messages spool/job spool/latency spool/pauses spool/promises spool/reopening spool/rows
spool/running
spool/throttle
spool/turns
""".split()

# Modules with effects: the system, files, time, the network, other processes, threads, or the log.
IMPURE = {
    "asyncio": "waiting", "ctypes": "the C library", "datetime": "has now()", "fcntl": "file descriptors",
    "glob": "files", "grp": "the group database", "io": "files", "logging": "output", "mmap": "files",
    "multiprocessing": "processes", "os": "the system", "pathlib": "files", "pwd": "the user database",
    "random": "is not the same twice", "resource": "limits of this process", "secrets": "is not the same twice",
    "select": "waiting", "selectors": "waiting", "shutil": "files", "socket": "the network", "sqlite3": "files",
    "structlog": "output", "subprocess": "processes", "tempfile": "files", "threading": "threads", "time": "the clock",
    "uuid": "is not the same twice", "yaml": "files of the world outside",
}  # fmt: skip
# Names that may not be used from modules that may be imported.
IMPURE_NAMES = {
    "sys": "argv stdin stdout stderr exit path modules".split(),
    "signal": "signal sigaction alarm setitimer raise_signal pthread_kill pthread_sigmask sigwait pause".split(),
    "builtins": "open print input exec eval __import__".split(),
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """The full names of the modules that a module imports; `from a.b import c` is a.b, and a.b.c if that is one."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno}: imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """The modules of this package that a module imports, by their keys in MODULES."""
    return {
        key
        for name in imports(path)
        if name.split(".")[0] == "cnprocd"
        for key in [name.removeprefix("cnprocd").lstrip(".").replace(".", "/") or "__init__"]
        if key in MODULES
    }


def room(module: str) -> str:
    return "rules/language" if module.startswith("rules/language/") else module.partition("/")[0]


# --- pure modules


def test_pure_modules_are_those_that_claim_it():
    """A module is listed if and only if the first paragraph of its docstring has the word PURE."""
    docstrings = {module: ast.get_docstring(tree(path)) or "" for module, path in MODULES.items()}
    claimed = {module for module, docstring in docstrings.items() if "PURE" in docstring.split("\n\n")[0]}
    assert claimed == set(PURE)
    assert claimed == {module for module, docstring in docstrings.items() if "PURE" in docstring}, "say it at the top"


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_nothing_that_touches_the_world(module):
    found = {name.split(".")[0] for name in imports(MODULES[module])} & set(IMPURE)
    assert not found, "; ".join(f"{name}: {IMPURE[name]}" for name in sorted(found))


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_use_nothing_that_touches_the_world(module):
    used = set()
    for node in ast.walk(tree(MODULES[module])):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.add((node.value.id, node.attr))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            used.add(("builtins", node.func.id))
    forbidden = {(owner, name) for owner, names in IMPURE_NAMES.items() for name in names}
    assert not used & forbidden


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_only_pure_ones_of_ours(module):
    assert ours(MODULES[module]) <= {*PURE, *(f"{room(pure)}/__init__" for pure in PURE)}


# --- floors


def test_every_room_has_its_floor_and_its_reason():
    assert {room(module) for module in MODULES} == set(FLOORS)
    assert all(FLOORS.values())


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_only(module):
    order = list(FLOORS)
    above = [name for name in ours(MODULES[module]) if order.index(room(name)) > order.index(room(module))]
    assert not above, f"{module} is on the floor of {room(module)}, below {above}"


LANGUAGE_IMPORTERS = ("rules/language", "cli")  # the loader child's entry is in cli/cnprocd.py


@pytest.mark.parametrize("module", MODULES)
def test_only_commands_and_the_loader_know_the_language(module):
    """rules/language holds all that imports pydantic or YAML; the daemon's modules take plain rules (ruleset.py)."""
    if room(module) in LANGUAGE_IMPORTERS:
        return
    assert not [name for name in ours(MODULES[module]) if room(name) == "rules/language"]
    assert not imports(MODULES[module]) & {"pydantic", "pydantic_core", "yaml"}


def test_the_import_closure_of_the_daemon_has_no_pydantic():
    """Import the daemon as its command does, in a new interpreter, and list what is loaded."""
    code = "import sys, cnprocd.daemon, cnprocd.cli.cnprocd; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"cnprocd.daemon", "cnprocd.rules.ruleset"} <= loaded
    assert not {name for name in loaded if name.split(".")[0] in ("pydantic", "pydantic_core", "yaml", "_yaml")}
    assert not {name for name in loaded if name.startswith("cnprocd.rules.language")}


def test_the_daemon_does_not_load_openssl():
    """It takes 4.7 MB (cli/without_openssl.py). A Python without digests of its own needs it."""
    code = (
        "import cnprocd.cli.cnprocd, cnprocd.daemon, hashlib; print(open('/proc/self/maps').read(), hashlib.sha256())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "libpython" in done.stdout or "python3" in done.stdout
    assert "libcrypto" not in done.stdout
    assert "libssl" not in done.stdout


def test_no_module_imports_itself_through_others():
    graph = {module: ours(path) for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


# --- sizes


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_too_long_to_be_read_in_one_go(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_longer_than_a_screen(module):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(tree(MODULES[module])) if isinstance(n, functions)}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}

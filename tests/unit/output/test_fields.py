"""The fields that cnprocd-fields(7) lists are those that the code writes and hands to hooks: no fewer and no more."""

import ast
from pathlib import Path

import cnprocd
from cnprocd.log import LEVELS
from cnprocd.output.fields import ALWAYS, CLASSES, HOOK_VARIABLES, MATCH, OTHER
from cnprocd.output.journal import MESSAGE_IDS
from cnprocd.output.record import MATCH_FIELDS

HINT = "describe it in cnprocd/output/fields.py, then run `python packaging/manual.py`"
PACKAGE = Path(cnprocd.__file__).parent
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def log_calls():
    """Every call that writes a record: of a Log, of a wrapper of one, or of ThrottledLog.add()."""
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                texts = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
                if name in ("log", "_log", "_record") or (name == "add" and texts and texts[0] in LEVELS):
                    yield node, [text for text in texts if text not in LEVELS]


def keys_of(module, function):
    """The keys of the mapping that a function returns."""
    (found,) = [
        node
        for node in ast.walk(TREES[PACKAGE / module])
        if isinstance(node, ast.FunctionDef) and node.name == function
    ]
    return {key for node in ast.walk(found) if isinstance(node, ast.Dict) for key in constants(node)}


def constants(mapping):
    """The constant keys of a mapping; a part that is unpacked has none."""
    return {key.value for key in mapping.keys if isinstance(key, ast.Constant)}


def written_fields():
    found = keys_of("reload.py", "summary")  # of started and rules_loaded, as **summary()
    found |= keys_of("spool/running.py", "record_of_attempt") | keys_of("spool/running.py", "record_of_death")
    for node, _ in log_calls():
        found |= {one.arg for one in node.keywords if one.arg is not None}
        for counts in node.args:
            if isinstance(counts, ast.Dict):
                found |= constants(counts)
    return found - set(ALWAYS)


def test_every_class_of_records_is_described():
    classes = {event for _, texts in log_calls() for event in texts[:1]}
    assert classes == set(CLASSES), HINT
    assert set(MESSAGE_IDS) <= set(CLASSES)


def test_every_field_of_other_records_is_described():
    assert written_fields() - set(MATCH) == set(OTHER), HINT
    assert not set(MATCH) & set(OTHER)


def match_fields():
    """Every constant key that record.py and the tracker's details put into a match, and what the throttles add."""
    found = keys_of("output/record.py", "match_record") | keys_of("output/record.py", "_usage")
    of_record = ("match_record", "_placement", "_image", "_more_ids", "_ancestors")
    writers = (*(("output/record.py", name) for name in of_record), ("dispatch.py", "_admits"))
    for path, function in writers:
        for node in ast.walk(TREES[PACKAGE / path]):
            if isinstance(node, ast.FunctionDef) and node.name == function:
                found |= {
                    one.slice.value
                    for one in ast.walk(node)
                    if isinstance(one, ast.Subscript)
                    and isinstance(one.ctx, ast.Store)
                    and isinstance(one.slice, ast.Constant)
                }
    for node in ast.walk(TREES[PACKAGE / "process/tracker.py"]):
        if isinstance(node, ast.Assign) and [getattr(one, "id", "") for one in node.targets] == ["details"]:
            found |= constants(node.value)
    return {name for name in found if not name.endswith("_hex")}


def test_every_field_of_a_match_is_described():
    assert match_fields() == set(MATCH), HINT
    assert set(MATCH_FIELDS) <= set(MATCH)


def test_every_variable_of_a_hook_is_described():
    """The names that render.py writes in capitals, in literals and as keywords of update()."""
    tree = TREES[PACKAGE / "launch/render.py"]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            found |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
        elif isinstance(node, ast.Call):
            found |= {one.arg for one in node.keywords if one.arg is not None}
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            found.add(node.slice.value)
    assert {name for name in found if isinstance(name, str) and name.isupper()} == set(HOOK_VARIABLES)


def test_descriptions_are_sentences():
    for table in (ALWAYS, MATCH, CLASSES, OTHER):
        assert [text for text in table.values() if not text.endswith(".")] == []

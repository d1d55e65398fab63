"""A snapshot: the bytes of all files that rules in force were parsed from, under one digest.

Jobs name the snapshot that promised their hook, and the runner acts on snapshots only. A snapshot holds the text of the
files and not the parsed rules, so its digest is the same in every version of cnprocd: an old runner and a new daemon
agree on it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cnprocd.json_value import JsonValue, as_dict, as_list, as_str, get_list, get_with, parse_json

DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RuleFile:
    """A rule file as it was parsed."""

    path: Path
    data: bytes


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All rule files, the main file first, and the file `disabled` if there was one. `text` is the form on the disk."""

    files: tuple[RuleFile, ...]
    disabled: bytes | None
    text: str

    @classmethod
    def of(cls, files: Sequence[tuple[Path, bytes]], disabled: bytes | None) -> Snapshot:
        """Return the snapshot of these files and contents. Their paths are absolute."""
        document = {
            "files": [[str(path), _text(data)] for path, data in files],
            "disabled": None if disabled is None else _text(disabled),
        }
        return cls(tuple(RuleFile(*file) for file in files), disabled, json.dumps(document))

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """Return the snapshot of its form on the disk. Raises JsonError."""
        document = as_dict(parse_json(text))
        files = [(Path(path), _data(content)) for path, content in get_list(document, "files", _pair)]
        disabled = get_with(document, "disabled", lambda value: None if value is None else _data(as_str(value)))
        return cls.of(files, disabled)

    @property
    def digest(self) -> str:
        """Return 64 hexadecimal digits that two snapshots share if their files and contents are the same."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def main_file(self) -> Path:
        return self.files[0].path


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _data(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _pair(value: JsonValue) -> tuple[str, str]:
    path, content = as_list(value)
    return as_str(path), as_str(content)

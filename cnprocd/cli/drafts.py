"""A draft: what would hold if a rule file had the content of standard input. For editors, before anything is saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cnprocd.cli.grammar import Options
from cnprocd.cli.standard_files import read_input
from cnprocd.errors import CnprocdError
from cnprocd.rules.language.load import read_rule_file
from cnprocd.rules.rule_files import DROPIN_DIRS, LARGEST, MAIN_FILE, find_dropins


class DraftError(CnprocdError):
    """The daemon would not read the file of the draft."""

    exit_status = 2


@dataclass(frozen=True, slots=True)
class Draft:
    """A rule file, and the content that it is to have."""

    file: Path
    content: bytes

    def read(self, path: Path) -> bytes:
        """Return the content of a rule file: the draft's for its own. Raises as read_rule_file does."""
        return self.content if path == self.file else read_rule_file(path)


def draft_of(options: Options) -> Draft | None:
    """Return the draft of --draft, whose content is read from standard input, or None."""
    if options.draft is None:
        return None
    if getattr(options, "event", None) == "-" or getattr(options, "files", None):
        raise DraftError("--draft reads standard input", "give the event as @FILE, and no files to check")
    return Draft(options.draft.absolute(), read_input(LARGEST + 1))


def dropins_with(rules: Path | None, draft: Draft) -> list[Path]:
    """Return the main file and the drop-ins as they would be read with the draft, in order. Raises DraftError."""
    main = (rules or MAIN_FILE).absolute()
    if draft.file == main:
        return [main, *(() if rules is not None else find_dropins().files)]
    if rules is not None:
        raise DraftError(f"{draft.file} is not the file of --rules", f"give --draft {main}")
    if draft.file.parent not in DROPIN_DIRS or draft.file.suffix != ".yaml":
        places = ", ".join(f"{directory}/*.yaml" for directory in DROPIN_DIRS)
        raise DraftError(f"the daemon does not read {draft.file}", f"it reads {MAIN_FILE} and {places}")
    chosen = {file.name: file for file in find_dropins().files}
    before = chosen.get(draft.file.name)
    if before is not None and DROPIN_DIRS.index(before.parent) < DROPIN_DIRS.index(draft.file.parent):
        raise DraftError(f"{before} takes precedence over {draft.file}", "edit that file")
    chosen[draft.file.name] = draft.file
    return [main, *(chosen[name] for name in sorted(chosen))]

"""The targets by name, one for each parser of foreign data."""

from fuzz.target import Target
from fuzz.targets.control import Control
from fuzz.targets.datagrams import Datagrams
from fuzz.targets.procfiles import ProcFiles
from fuzz.targets.recordings import Recordings
from fuzz.targets.records import Records
from fuzz.targets.rulefiles import RuleFiles
from fuzz.targets.runner import Runner
from fuzz.targets.spoolfiles import SpoolFiles

TARGETS: dict[str, type[Target]] = {
    one.name: one for one in (Datagrams, Records, ProcFiles, Control, Runner, RuleFiles, Recordings, SpoolFiles)
}

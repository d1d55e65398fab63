"""Write the digests of the rule files to standard output: a script, started by loader_process.DigestsProcess.

Arguments: the directory of the package, and the main file if the daemon has --rules.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    from cnprocd.rules.rule_files import file_digests, rule_files

    main_file = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    pickle.dump((file_digests(rule_files(main_file)), ()), sys.stdout.buffer, pickle.HIGHEST_PROTOCOL)


if __name__ == "__main__":
    main()

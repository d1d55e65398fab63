"""The same checks with inputs chosen by coverage: atheris (libFuzzer for Python), one process for each target.

Useful inputs are kept in .fuzz/guided/<target>/, where the next run starts. The targets datagrams, records and
procfiles gain nothing: their own mutations already reach every line at a hundred times the rate.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

INSTALL = "atheris is not installed: .venv/bin/pip install atheris"


def guided(names: Sequence[str], seconds: int, found: Path) -> int:
    """Run each target for `seconds`. Return 1 if there was a finding. Without atheris, print that and return 0."""
    if importlib.util.find_spec("atheris") is None:
        print(f"skipped: {INSTALL}")
        return 0
    failed = []
    for name in names:
        corpus = found / "guided" / name
        corpus.mkdir(parents=True, exist_ok=True)
        options = [f"-max_total_time={seconds}", "-max_len=65536", "-rss_limit_mb=4096", "-timeout=30"]
        options += [f"-artifact_prefix={found}/{name}-", "-print_final_stats=1", str(corpus)]
        done = subprocess.run([sys.executable, __file__, name, *options])
        failed += [name] if done.returncode else []
    print("findings in: " + ", ".join(failed) if failed else "no findings")
    return 1 if failed else 0


def main() -> None:
    """Run one target in a process of its own: libFuzzer does not return."""
    import atheris

    tests = Path(__file__).resolve().parents[1]
    sys.path[0] = str(tests)
    sys.path.insert(1, str(tests.parent))
    with atheris.instrument_imports(include=["cnprocd"]):
        from fuzz.targets import TARGETS
    target = TARGETS[sys.argv[1]]()
    corpus = Path(sys.argv[-1])
    for seed in target.seeds:
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target.check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

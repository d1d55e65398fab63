"""Whether hooks are refused: `--observe-only`, or CNPROCD_OBSERVE_ONLY in the environment, as in the container image.

The daemon and every command that reads rules decide it alike, so `check` inside the container answers as the daemon
does. The environment only restricts: it cannot let a hook run.
"""

from __future__ import annotations

from collections.abc import Mapping

VARIABLE = "CNPROCD_OBSERVE_ONLY"


def observes_only(option: bool, environment: Mapping[str, str]) -> bool:
    """Return whether hooks are refused. Any value but the empty one and 0 refuses them: a typing error is safe."""
    return option or environment.get(VARIABLE, "") not in ("", "0")

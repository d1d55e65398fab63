"""The bill of materials of a release: what the packages bundle, with versions, sums and licences (CycloneDX 1.5, JSON).

PURE but for reading the unpacked wheels. Facts relied on: a wheel names its licence in METADATA (PEP 639, or an older
classifier), and what is compiled into it in *.dist-info/sboms (PEP 770), for example the crates of pydantic-core.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from flavours import Package, Pin, normalized

_CLASSIFIERS = {"MIT License": "MIT", "Apache Software License": "Apache-2.0"}
Component = dict[str, Any]  # an object of the CycloneDX schema


def licences(wheels: Path) -> dict[str, str]:
    """Return the SPDX expression of each distribution that is unpacked in `wheels`, by its normalized name."""
    found = {}
    for path in wheels.glob("*.dist-info/METADATA"):
        fields = HeaderParser().parsestr(path.read_text(encoding="utf-8"))
        named = [line.rpartition(" :: ")[2] for line in fields.get_all("Classifier", []) if line.startswith("License")]
        old = " OR ".join(_CLASSIFIERS[name] for name in named if name in _CLASSIFIERS)
        found[normalized(fields["Name"])] = fields["License-Expression"] or old or fields["License"]
    return found


def library(pin: Pin, digest: str, licence: str, packages: Iterable[str]) -> Component:
    """Return the component of one wheel or source of PyPI."""
    purl = f"pkg:pypi/{normalized(pin.name)}@{pin.version}"
    return {
        "type": "library",
        "bom-ref": f"{purl}#{digest[:16]}",
        "name": pin.name,
        "version": pin.version,
        "purl": purl,
        "hashes": [{"alg": "SHA-256", "content": digest}],
        "licenses": [{"expression": licence}],
        "properties": [{"name": "cnprocd:package", "value": name} for name in packages],
    }


def compiled_in(wheels: Path) -> Iterable[Component]:
    """Yield the components that the wheels say are compiled into them."""
    kept = ("type", "name", "version", "purl", "licenses", "hashes")
    for path in sorted(wheels.glob("*.dist-info/sboms/*.json")):
        for component in json.loads(path.read_text(encoding="utf-8")).get("components", []):
            if "purl" in component:
                facts = {key: component[key] for key in kept if key in component}
                yield {"bom-ref": component["purl"], **facts}


def bill(
    version: str, licence: str, stamp: str, bundles: Mapping[Package, tuple[list[Pin], Path]], files: Mapping[str, str]
) -> dict[str, Any]:
    """Return the document. `bundles` gives the pins and unpacked wheels of each package, `files` the sums of files."""
    users: dict[tuple[str, str, str], list[str]] = {}
    components: dict[str, Component] = {}
    named: dict[str, str] = {}
    for package, (pins, wheels) in bundles.items():
        named |= licences(wheels)
        for pin in pins:
            users.setdefault((pin.name, pin.version, pin.sha256[0]), []).append(package.name)
        components |= {component["bom-ref"]: component for component in compiled_in(wheels)}
    for (name, number, digest), packages in users.items():
        component = library(Pin(name, number, (digest,)), digest, named[normalized(name)], packages)
        components[component["bom-ref"]] = component
    purl = f"pkg:pypi/cnprocd@{version}"
    main = {
        "type": "application",
        "bom-ref": purl,
        "name": "cnprocd",
        "version": version,
        "purl": purl,
        "licenses": [{"license": {"id": licence}}],
        "externalReferences": [
            {"type": "distribution", "url": name, "hashes": [{"alg": "SHA-256", "content": digest}]}
            for name, digest in sorted(files.items())
        ],
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{purl}?{stamp}')}",
        "version": 1,
        "metadata": {"timestamp": stamp, "component": main},
        "components": [components[ref] for ref in sorted(components)],
        "dependencies": [{"ref": purl, "dependsOn": sorted(ref for ref in components if ref.startswith("pkg:pypi"))}],
    }

"""The files of packaging/container: the manifest is valid Kubernetes, and asks for what docs/containers.md lists."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from cnprocd.process.host_view import HOST_CGROUP
from cnprocd.rules.language.load import load

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / "packaging/container"
SCHEMA = json.loads((ROOT / "tests/container/kubernetes.schema.json").read_text())


def documents():
    return list(yaml.safe_load_all((DIRECTORY / "daemonset.yaml").read_text()))


def validate(document):
    """Raise jsonschema.ValidationError unless a document is what Kubernetes 1.37 accepts, without unknown fields."""
    reference = {"$ref": f"#/$defs/{SCHEMA['kinds'][document['kind']]}", "$defs": SCHEMA["$defs"]}
    jsonschema.Draft202012Validator(reference).validate(document)


def test_every_document_of_the_manifest_is_valid_kubernetes():
    assert [document["kind"] for document in documents()] == ["Namespace", "ConfigMap", "DaemonSet"]
    for document in documents():
        validate(document)


@pytest.mark.parametrize("key", ["hostPid", "hostIPCs"])
def test_the_schema_refuses_a_misspelt_key(key):
    """Else the test above would pass whatever the manifest says."""
    daemonset = documents()[2]
    daemonset["spec"]["template"]["spec"][key] = True
    with pytest.raises(jsonschema.ValidationError, match=key):
        validate(daemonset)


def test_the_daemonset_observes_the_host_and_no_more():
    pod = documents()[2]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    security = container["securityContext"]
    assert (pod["hostPID"], pod["hostNetwork"], "hostIPC" in pod) == (True, True, False)
    assert {"name": "CNPROCD_OBSERVE_ONLY", "value": "1"} in container["env"]
    assert (security["privileged"], security["allowPrivilegeEscalation"]) == (False, False)
    assert security["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN", "SYS_PTRACE"]}
    mounts = {one["mountPath"]: one.get("readOnly", False) for one in container["volumeMounts"]}
    writable = {path for path, read_only in mounts.items() if not read_only}
    assert writable == {"/var/lib/cnprocd", "/run/cnprocd", "/tmp"}
    assert mounts["/sys"] and mounts[HOST_CGROUP]
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}


def test_the_rules_of_the_manifest_are_valid_without_hooks(tmp_path):
    (tmp_path / "rules.yaml").write_text(documents()[1]["data"]["rules.yaml"])
    loaded = load(tmp_path / "rules.yaml", observe_only=True)
    assert [rule.name for rule in loaded.rules] == ["process-failed"]


def test_the_image_observes_only():
    text = (DIRECTORY / "Containerfile").read_text()
    assert "ENV CNPROCD_OBSERVE_ONLY=1" in text

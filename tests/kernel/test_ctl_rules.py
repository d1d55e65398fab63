"""rules list, show and disable --for against the real daemon."""

from __future__ import annotations

from kernel.harness import running
from kernel.test_ctl_daemon import ctl, ctl_json, fail, rules

NEW = "  - {name: new, events: [exec], match: {comm: cnpctl-new}}\n"


def states(daemon):
    return {one["name"]: (one["in_force"], one["files"]) for one in ctl_json(daemon, "rules", "list")}


def test_list_shows_what_is_in_force_and_how_files_differ(tmp_path):
    with running(tmp_path, rules()) as daemon:
        assert set(states(daemon).values()) == {(True, "same")}
        assert ctl(daemon, "rules", "list")[2] == ""
        changed = rules("/bin/true", NEW).replace('exit_code: "1-9"', "exit_code: 3")
        daemon.write_rules(changed.replace("  - name: hooked\n", "  - name: renamed\n"))
        found = states(daemon)
        assert found["failed"] == (True, "changed")
        assert found["hooked"] == (True, "removed")
        assert found["renamed"] == found["new"] == (False, "new")
        assert "`cnprocctl reload` loads them" in ctl(daemon, "rules", "list")[2]
        assert ctl(daemon, "reload")[0] == 0
        assert set(states(daemon).values()) == {(True, "same")}


def test_list_shows_hits_and_survives_invalid_files(tmp_path):
    with running(tmp_path, rules()) as daemon:
        fail("cnpctl-a")
        daemon.mark()
        daemon.write_rules("rules: [{name: x, events: [died]}]\n")
        status, out, err = ctl(daemon, "rules", "list")
        assert status == 0
        (failed,) = [line.split() for line in out.splitlines() if line.startswith("failed ")]
        assert failed[:4] == ["failed", "enabled", "1", "-"]
        assert "cannot compare with the rule files" in err


def test_show_compares_the_file_with_what_is_in_force(tmp_path):
    with running(tmp_path, rules()) as daemon:
        assert ctl_json(daemon, "rules", "show", "failed")["in_force"] == "same"
        daemon.write_rules(rules(more=NEW).replace('exit_code: "1-9"', "exit_code: 3"))
        found = ctl_json(daemon, "rules", "show", "failed")
        assert found["in_force"] == "differs"
        assert found["rule"]["match"]["exit_code"] == 3
        assert found["rule_in_force"]["match"]["exit_code"] == "1-9"
        shown = ctl(daemon, "rules", "show", "failed")[1]
        assert '# -    exit_code: "1-9"\n# +    exit_code: 3\n' in shown
        assert ctl_json(daemon, "rules", "show", "new")["in_force"] == "absent"
        daemon.write_rules("rules: []\n")
        assert ctl_json(daemon, "rules", "show", "failed")["in_force"] == "removed"
        assert ctl(daemon, "rules", "show", "nothing")[0] == 1


def test_a_rule_disabled_for_a_time_comes_back_by_itself(tmp_path):
    with running(tmp_path, rules()) as daemon:
        assert ctl(daemon, "rules", "disable", "failed", "--for", "1s")[0] == 0
        daemon.write_rules("rules: [{name: x, events: [died]}]\n")  # which must not keep the rule disabled
        daemon.wait_for("rules_enabled", rules=["failed"])
        pid = fail("cnpctl-a")
        daemon.mark()
        assert [match["pid"] for match in daemon.matches("failed")] == [pid]


def test_a_rule_disabled_for_a_time_is_so_after_a_restart(tmp_path):
    with running(tmp_path, rules()) as daemon:
        assert ctl(daemon, "rules", "disable", "failed", "--for", "2h")[0] == 0
        daemon.kill()
    with running(tmp_path, rules()) as daemon:
        (failed,) = [one for one in ctl_json(daemon, "rules", "list") if one["name"] == "failed"]
        assert (failed["enabled"], failed["files"]) == (False, "same")
        assert failed["disabled_until_ns"] > 0
        fail("cnpctl-a")
        daemon.mark()
        assert daemon.matches("failed") == []
        assert ctl(daemon, "rules", "enable", "failed")[0] == 0
        pid = fail("cnpctl-a")
        daemon.mark()
        assert [match["pid"] for match in daemon.matches("failed")] == [pid]

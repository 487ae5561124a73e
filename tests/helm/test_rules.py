"""Alert and recording rules, their runbooks and the dashboards: checked by promtool, and every metric they use is one that is really there."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from chart import BORA, CHART, PRESETS, ROOT, Loader, objects, parse, preset, render_text, run, schema, values
from living import GPU_METRICS, etcd_metrics, router_metrics, worker_metrics

RULES = CHART / "files" / "rules"
DASHBOARDS = sorted((CHART / "files" / "dashboards").glob("*.json"))


def rules():
    for file in ("recording", "alerts"):
        for group in yaml.load((RULES / f"{file}.yaml").read_text(), Loader)["groups"]:
            yield from group["rules"]


ALERTS = [rule for rule in rules() if "alert" in rule]


def test_promtool_accepts_the_rules_and_their_unit_tests_pass(tmp_path):
    for file in RULES.glob("*.yaml"):
        shutil.copy(file, tmp_path)
    shutil.copy(ROOT / "tests" / "helm" / "rules.test.yaml", tmp_path)
    checked = run("promtool", "check", "rules", "recording.yaml", "alerts.yaml", cwd=tmp_path)
    assert checked.returncode == 0 and "FAILED" not in checked.stdout + checked.stderr, checked.stdout + checked.stderr
    tested = run("promtool", "test", "rules", "rules.test.yaml", cwd=tmp_path)
    assert tested.returncode == 0 and "SUCCESS" in tested.stdout + tested.stderr, tested.stdout + tested.stderr


def test_every_alert_has_a_unit_test_that_sees_it_fire():
    tests = yaml.load((ROOT / "tests" / "helm" / "rules.test.yaml").read_text(), Loader)["tests"]
    fired = {case["alertname"] for test in tests for case in test.get("alert_rule_test", []) if case["exp_alerts"]}
    assert fired == {alert["alert"] for alert in ALERTS}


SELECTED = 'namespace="llm",release="bora"'


def test_the_chart_carries_the_same_rules_for_its_release_alone():
    for path in PRESETS:
        for rule in objects(preset(path), "PrometheusRule"):
            # without those that are of one workload (tests/helm/test_admission.py computes them)
            carried = [one for group in rule["spec"]["groups"] for one in group["rules"] if not one.get("record", "").endswith(":workload")]
            expected = json.loads(json.dumps(list(rules())).replace("RUNBOOKS/", "docs/runbooks/"))
            for one, own in zip(carried, expected, strict=True):
                plain = one["expr"].replace(f"{{{SELECTED}}}", "").replace(f"{SELECTED},", "")
                assert {**one, "expr": plain.strip()} == {**own, "expr": own["expr"].strip()}
                # every metric is selected by the release
                assert len(METRIC.findall(one["expr"])) == one["expr"].count(SELECTED) > 0, one["expr"]


def test_what_is_summed_or_matched_keeps_the_release_apart():
    for rule in rules():
        for labels in re.findall(r"\b(?:by|on|without|ignoring) \(([^)]*)\)", rule["expr"]):
            assert labels.startswith("namespace, release"), f"{rule.get('alert') or rule['record']}: by ({labels})"


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_has_a_runbook(alert):
    assert alert["labels"]["severity"] in ("critical", "warning")
    page = ROOT / "docs" / "runbooks" / f"{alert['alert']}.md"
    assert alert["annotations"]["runbook_url"] == f"RUNBOOKS/{page.name}"
    text = page.read_text()
    assert text.startswith(f"# {alert['alert']}\n") and "\n## Look\n" in text and "\n## Do\n" in text and "**What clients see.**" in text
    for link in re.findall(r"\]\(([\w/.]+\.md)\)", text):
        assert (page.parent / link).is_file(), link
    assert f"[{alert['alert']}]({page.name})" in (page.parent / "README.md").read_text()


def test_no_runbook_is_without_its_alert():
    pages = {page.stem for page in (ROOT / "docs" / "runbooks").glob("*.md")} - {"README"}
    assert pages == {alert["alert"] for alert in ALERTS}


GUIDES = [*sorted((ROOT / "docs" / "runbooks").glob("*.md")), *sorted((ROOT / "docs" / "kubernetes").glob("*.md")), *(ROOT / "docs" / name for name in ("upgrade.md", "quickstart-kubernetes.md")), CHART / "README.md"]


def test_commands_objects_and_values_that_the_pages_name_are_there():
    """Subcommands and flags of the binary, names of the release's objects, and values of the chart."""
    multinode = parse(render_text([next(path for path in PRESETS if "multinode" in path.stem)]))
    names = {document["metadata"]["name"] for document in multinode}
    known = {".".join(path) for path in leaves_of(values())}
    options = schema()["properties"]["router"]["properties"]["options"]["properties"]
    wrong, seen = [], {"commands": 0, "objects": 0, "values": 0}
    for page in GUIDES:
        text = page.read_text()
        for subcommand, flags in re.findall(r"\bbora (check|top|doctor|router|worker|serve|bench)\b((?: --[\w-]+)*)", text):
            usage = run(BORA, subcommand, "--help")
            wrong += [f"{page.name}: bora {subcommand} {flag}" for flag in flags.split() if usage.returncode or flag not in usage.stdout]
            seen["commands"] += 1
        for name in re.findall(r"\$R-([\w-]+)", text):
            name = re.sub(r"-(INDEX|\d+)$", "", name.replace("KEY", "batch"))
            wrong += [f"{page.name}: object {name}"] * (f"bora-{name}" not in names)
            seen["objects"] += 1
        for name in re.findall(r"`((?:router|workers|etcd|monitoring|networkPolicy|storage|download|grpc|telemetry|leaderWorkerSet|podSecurityContext|rollback|image)\.[\w.]+)", text):
            option = re.match(r"router\.options\.(\w+)", name)
            there = option[1] in options if option else any(one == prefix + name or one.startswith(f"{prefix}{name}.") for prefix in ("", "workers.") for one in known)
            wrong += [f"{page.name}: value {name}"] * (not there and name != "grpc.health.v1")
            seen["values"] += 1
    assert not wrong, wrong
    assert seen["commands"] >= 3 and seen["objects"] > 15 and seen["values"] > 40, seen


def leaves_of(node, path=()):
    for key, value in node.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves_of(value, (*path, key))


METRIC = re.compile(r"\b((?:bora_(?!model_)|etcd_|process_)[a-z0-9_]+|bora:[a-z0-9_:]+)")


def used():
    """(where, metric) of everything that rules, dashboards and autoscalers ask for."""
    for rule in rules():
        yield from ((rule.get("alert") or rule["record"], name) for name in METRIC.findall(rule["expr"]))
    for path in DASHBOARDS:
        yield from ((path.name, name) for name in METRIC.findall(path.read_text()))
    for path in PRESETS:
        for scaled in objects(preset(path), "ScaledObject"):
            for trigger in scaled["spec"]["triggers"]:
                yield from ((path.name, name) for name in METRIC.findall(trigger["metadata"]["query"]))
    for name in METRIC.findall((ROOT / "deploy" / "prometheus-adapter.yaml").read_text()):
        yield "prometheus-adapter.yaml", name


def test_every_metric_that_is_used_is_exported():
    exported = router_metrics() | worker_metrics() | etcd_metrics() | {rule["record"] for rule in rules() if "record" in rule}
    for rule in objects(preset(next(path for path in PRESETS if "h200x4" in path.stem)), "PrometheusRule"):
        exported |= {one["record"] for group in rule["spec"]["groups"] for one in group["rules"] if "record" in one}
    missing = sorted({f"{where}: {name}" for where, name in used() if name not in exported})
    assert not missing, missing


def test_what_routers_and_workers_export_is_shown_on_a_dashboard():
    shown = "".join(path.read_text() for path in DASHBOARDS) + json.dumps(list(rules()))
    hidden = {name for name in router_metrics() | worker_metrics() if name.startswith(("bora_router_", "bora_worker_")) and name not in shown
              and not (name.endswith(("_sum", "_count")) and re.sub("_[a-z]+$", "", name) in shown)}
    assert not hidden, hidden


def test_what_only_a_gpu_tells_is_in_the_source():
    source = "".join(path.read_text() for path in (ROOT / "worker" / "src" / "telemetry").glob("*.rs"))
    for name in GPU_METRICS:
        assert f'"{name.removeprefix("bora_worker_").removesuffix("_total")}"' in source, name


def test_hpa_metrics_are_those_of_the_adapter():
    adapter = yaml.load((ROOT / "deploy" / "prometheus-adapter.yaml").read_text(), Loader)
    offered = {rule["name"]["as"] for rule in adapter["rules"]["external"]}
    (autoscaler,) = [one for one in objects(preset(next(path for path in PRESETS if "h200x4" in path.stem)), "HorizontalPodAutoscaler")
                     if one["metadata"]["name"] == "bora-devstral-2"]
    asked = {metric["external"]["metric"]["name"] for metric in autoscaler["spec"]["metrics"]}
    assert asked == offered


def test_dashboards_are_what_their_script_writes(tmp_path):
    committed = {path.name: path.read_text() for path in DASHBOARDS}
    assert sorted(committed) == ["batch.json", "engine.json", "fleet.json", "service.json"]
    script = (ROOT / "scripts" / "make-dashboards").read_text()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "make-dashboards").write_text(script)
    subprocess.run([sys.executable, tmp_path / "scripts" / "make-dashboards"], check=True, capture_output=True)
    for name, text in committed.items():
        assert (tmp_path / "helm" / "bora" / "files" / "dashboards" / name).read_text() == text, f"run scripts/make-dashboards ({name})"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboards_queries_are_promql(path, tmp_path):
    dashboard = json.loads(path.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(queries) > 8
    groups = [{"name": "queries", "rules": [
        {"record": f"query:{number}", "expr": query.replace("$__rate_interval", "1m").replace("$__range", "1h").replace("$namespace", ".*").replace("$release", ".*").replace("$model", ".*")}
        for number, query in enumerate(queries)]}]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))
    checked = run("promtool", "check", "rules", tmp_path / "rules.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids)) and all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in dashboard["panels"])

"""Odd but lawful combinations of values give what a real API server and its controllers would take; what they would refuse, the chart refuses by name."""

import concurrent.futures
import copy
import json

import kubernetes_validate
import pytest
import yaml

import admission
import definitions
from chart import CHART, PRESETS, helm, named, objects, parse, preset, run

EXISTING = {"builtin": {"tls": {"source": "existing", "existingSecret": "given"}}}
LONG_RELEASE = "a-very-long-release-name-that-fills-all-53-characters"
TWO = {"models": {"one": {"name": "org/one"}, "two": {"workers": {"kind": "LeaderWorkerSet", "tensorParallelSize": 4}}}}
HUB = {"kind": "huggingFace", "huggingFace": {"repository": "org/model", "tokenSecret": {"name": "given"}}}
MONITORED = {"podMonitor": {"enabled": True}, "prometheusRule": {"enabled": True}}

# name: (values, release)
COMBINATIONS = {
    "no model": ({"etcd": EXISTING}, "bora"),
    "everything at once": ({
        **TWO, "etcd": {"builtin": {**EXISTING["builtin"], "backup": {"enabled": True}}}, "download": HUB,
        "router": {"tls": {"secret": "given"}, "keys": {"secret": "given"}, "autoscaling": {"enabled": True}, "drain": {"preStopSeconds": 0}},
        "grpc": {"tls": {"source": "existing", "existing": {"router": "given", "worker": "given"}}}, "workers": {"rdma": {"enabled": True, "ipcLock": True}, "autoscaling": {"kind": "keda", "minReplicas": 0}},
        "telemetry": {"otlpEndpoint": "http://collector:4317"}, "ingress": {"enabled": True, "tlsSecret": "given"}, "image": {"pullSecrets": ["given"], "registry": "mirror/"},
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "g"}]}, "monitoring": {**MONITORED, "serviceMonitor": {"enabled": True}, "dashboards": {"enabled": True}},
        "commonLabels": {"team": "inference"},
    }, "bora"),
    "HorizontalPodAutoscalers": ({**TWO, "etcd": EXISTING, "workers": {"autoscaling": {"kind": "hpa"}}, "monitoring": MONITORED}, "bora"),
    "the longest names": ({
        "models": {"a23456789012345678b1": {}, "b23456789012345678b1": {"workers": {"kind": "LeaderWorkerSet", "tensorParallelSize": 2}}},
        "etcd": {"builtin": {**EXISTING["builtin"], "backup": {"enabled": True}}}, "workers": {"autoscaling": {"kind": "keda"}}, "monitoring": MONITORED,
    }, LONG_RELEASE),
    "a release with dots": ({**TWO, "etcd": EXISTING}, "my.llm-1.0"),
    "a name of one's own": ({**TWO, "etcd": EXISTING, "fullnameOverride": "a23456789012345678901234567b", "nameOverride": "x"}, "2nd"),
    "etcd of one's own with TLS and a password": ({**TWO, "etcd": {"kind": "external", "external": {
        "endpoints": ["etcd.db:2379", "[fd00::1]:12379"], "username": "u", "passwordSecret": {"name": "given"}, "tls": {"enabled": True, "secret": "given"}}}}, "bora"),
    "etcd without TLS and volumes": ({**TWO, "etcd": {"builtin": {"replicas": 1, "tls": {"enabled": False}, "storage": {"kind": "emptyDir"}}}, "monitoring": MONITORED}, "bora"),
    "cert-manager": ({**TWO, "etcd": {"builtin": {"tls": {"source": "certManager", "certManager": {"issuer": "i"}}}}}, "bora"),
    "a claim for backups": ({"etcd": {"builtin": {**EXISTING["builtin"], "backup": {"enabled": True, "existingClaim": "given"}}}}, "bora"),
    "every kind of storage": ({"etcd": EXISTING, "models": {
        "claim": {"download": HUB}, "ours": {"storage": {"kind": "existingClaim", "existingClaim": "given"}}, "node": {"storage": {"kind": "hostPath"}},
        "empty": {"storage": {"kind": "emptyDir"}, "download": {"kind": "objectStore", "objectStore": {"source": ":s3:b", "secret": "given"}}},
        "within": {"storage": {"kind": "image"}, "path": "/model"}}}, "bora"),
    "IPv6 and the nodes' network": ({**TWO, "etcd": EXISTING, "bindAddress": "::", "workers": {"hostNetwork": True}}, "bora"),
    "accounts of one's own": ({**TWO, "etcd": EXISTING, "serviceAccount": {"create": False, "name": "given"}}, "bora"),
    "environment of one's own": ({**TWO, "etcd": EXISTING, "workers": {"env": {"CUDA_CACHE_PATH": "/cache", "A": "b"}}}, "bora"),
}


def rendered(settings, directory, release="bora", *more):
    file = directory / "values.json"
    file.write_text(json.dumps(settings))
    outcome = helm("template", release, CHART, "--namespace", "llm", "--values", file, *more)
    assert outcome.returncode == 0, outcome.stderr
    return parse(outcome.stdout)


def faults(documents):
    found = []
    for document in documents:
        where = f"{document['kind']} {document['metadata']['name']}"
        try:
            if definitions.is_custom(document):
                definitions.validate(document)
            else:
                kubernetes_validate.validate(document, "1.36", strict=True)
        except (definitions.jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
            found.append(f"{where}: {str(error).splitlines()[0]}")
    return found + faults_beyond_schemas(documents)


def faults_beyond_schemas(documents):
    own = [f"{one['kind']} {one['metadata']['name']}: {complaint}" for one in documents for complaint in admission.complaints(one)]
    return own + [*admission.dangling(documents, given=("given",)), *admission.collisions(documents), *admission.unbound(documents)]


def test_every_combination_would_be_taken(tmp_path):
    def judge(name):
        settings, release = COMBINATIONS[name]
        (tmp_path / name).mkdir()
        return [f"{name}: {fault}" for fault in faults(rendered(settings, tmp_path / name, release))]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = [fault for some in pool.map(judge, COMBINATIONS) for fault in some]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_would_be_taken(path):
    found = faults(preset(path))
    assert not found, "\n".join(found)


def test_the_judge_sees_what_is_wrong():
    documents = preset(next(path for path in PRESETS if path.stem == "values-multinode"))

    def with_change(kind, name, edit):
        changed = copy.deepcopy(documents)
        edit(named(changed, kind, name))
        return "\n".join(faults_beyond_schemas(changed))

    pod = lambda one: one["spec"]["template"]["spec"]["containers"][0]
    assert "no volume" in with_change("Deployment", "bora-router", lambda one: pod(one)["volumeMounts"].append({"name": "x", "mountPath": "/x"}))
    assert "two entries of (8000, 'TCP')" in with_change("Deployment", "bora-router", lambda one: pod(one)["ports"].append({"name": "x", "containerPort": 8000}))
    assert "does not select its pods" in with_change("Deployment", "bora-router", lambda one: one["spec"]["selector"]["matchLabels"].update(a="b"))
    assert "asks port nowhere" in with_change("Deployment", "bora-router", lambda one: pod(one)["livenessProbe"]["httpGet"].update(port="nowhere"))
    assert "no label's value" in with_change("LeaderWorkerSet", "bora-batch", lambda one: one["metadata"]["labels"].update(model="mistralai/x"))
    assert "55 characters" in with_change("LeaderWorkerSet", "bora-batch", lambda one: one["metadata"].update(name="b" * 55))
    assert "also a group of bora-batch" in with_change("StatefulSet", "bora-etcd", lambda one: one["metadata"].update(name="bora-batch-3"))
    assert "no port metricz" in with_change("PodMonitor", "bora-worker", lambda one: one["spec"]["podMetricsEndpoints"][0].update(port="metricz"))
    assert "ConfigMap bora-nothing" in with_change("Deployment", "bora-router", lambda one: one["spec"]["template"]["spec"]["volumes"][0]["configMap"].update(name="bora-nothing"))
    only_jobs = [one for one in documents if one["kind"] != "Job"]
    assert any("bora-etcd-backup" in fault for fault in admission.unbound(only_jobs))
    etcd = named(documents, "StatefulSet", "bora-etcd")
    other = copy.deepcopy(etcd)
    other["spec"].update(serviceName="x", replicas=5)
    assert list(admission.change(etcd, other)) == ["spec.serviceName"]


@pytest.mark.parametrize("wrong, why", [
    ({"models": {"etcd": {}}}, "models.etcd: objects of the chart bear this name"),
    ({"models": {"dashboard-batch": {}}}, "models.dashboard-batch: objects of the chart"),
    ({"models": {"devstral": {}, "devstral-2": {}}, "workers": {"kind": "LeaderWorkerSet"}}, "models.devstral-2: a group of models.devstral"),
    ({"models": {"m": {"workers": {"ports": {"admin": 9001}}}}}, "models.m.workers.ports: each port has one use"),
    ({"models": {"m": {}}, "grpc": {"tls": {"healthPort": 9002}}}, "models.m.workers.ports: each port has one use"),
    ({"models": {"m": {"workers": {"kind": "LeaderWorkerSet", "leaderWorkerSet": {"maxUnavailable": 0}}}}}, "can't both be 0"),
    ({"router": {"ports": {"admin": 8000}}}, "router.ports: http and admin must differ"),
    ({"router": {"autoscaling": {"enabled": True, "minReplicas": 9}}}, "router.autoscaling: minReplicas is above maxReplicas"),
    ({"workers": {"env": {"POD_IP": "1.2.3.4"}}}, "schema"),
    ({"workers": {"env": {"A": {"secretKeyRef": {}}}}}, "schema"),
    ({"workers": {"gpuResource": ""}}, "schema"),
    ({"workers": {"extraContainers": [{"name": "worker", "image": "i"}]}}, "schema"),
    ({"models": {"m": {"workers": {"gpuResource": None}}}}, "models.m.workers.gpuResource: null is for GPUs that workers.resourceClaims"),
    ({"models": {"m": {"storage": {"readOnly": True}}}}, "models.m.storage.readOnly: only for storage of kind existingClaim"),
    ({"models": {"m": {"storage": {"kind": "existingClaim", "existingClaim": "c", "readOnly": True}, "download": HUB}}}, "models.m: nothing can be downloaded to a read-only claim"),
    ({"router": {"service": {"nodePort": 30080}}}, "router.service.nodePort: only for type NodePort or LoadBalancer"),
    ({"router": {"service": {"externalTrafficPolicy": "Local"}}}, "router.service.externalTrafficPolicy: only for type NodePort or LoadBalancer"),
    ({"router": {"service": {"type": "NodePort", "loadBalancerSourceRanges": ["10.0.0.0/8"]}}}, "router.service.loadBalancerSourceRanges: only for type LoadBalancer"),
    ({"workers": {"autoscaling": {"scaleUp": {"periodSeconds": 0}}}}, "schema"),
    ({"commonLabels": {"a": "not a label"}}, "schema"),
    ({"fullnameOverride": "with.dots"}, "schema"),
    # these select, or are distinguished by
    ({"router": {"podLabels": {"app.kubernetes.io/component": "x"}}}, "schema"),
    ({"workers": {"podLabels": {"bora/model": "x"}}}, "schema"),
    ({"commonLabels": {"app.kubernetes.io/name": "x"}}, "schema"),
])
def test_what_could_not_be_installed_is_refused_by_name(wrong, why, tmp_path):
    (tmp_path / "v.json").write_text(json.dumps(wrong))
    outcome = helm("template", "bora", CHART, "--values", tmp_path / "v.json")
    assert outcome.returncode != 0 and why in outcome.stderr, outcome.stderr


def test_a_release_that_begins_with_a_digit_needs_another_name(tmp_path):
    outcome = helm("template", "2nd", CHART)
    assert outcome.returncode != 0 and "fullnameOverride: the names of Services begin with a letter" in outcome.stderr


def test_long_releases_do_not_share_names(tmp_path):
    names = {objects(rendered({"etcd": EXISTING}, tmp_path, release), "Deployment")[0]["metadata"]["name"] for release in (LONG_RELEASE, LONG_RELEASE[:-1] + "x")}
    assert len(names) == 2 and all(len(name) == 28 + len("-router") for name in names)


def test_every_pod_runs_where_its_part_does(tmp_path):
    """A cluster whose nodes are all tainted: a job without the toleration would wait for ever, and its claim with it."""
    place = lambda name: {"nodeSelector": {"pool": name}, "tolerations": [{"key": name, "operator": "Exists"}], "priorityClassName": name}
    documents = rendered({
        **TWO, "router": place("router"), "workers": place("worker"),
        "etcd": {"builtin": {**EXISTING["builtin"], **place("etcd"), "backup": {"enabled": True}}},
    }, tmp_path)
    parts = {"router": "router", "test": "router", "worker": "worker", "etcd": "etcd", "etcd-maintenance": "etcd"}
    seen = set()
    for document in documents:
        for metadata, spec in admission.templates(document):
            part = parts[metadata["labels"]["app.kubernetes.io/component"]]
            assert {key: spec.get(key) for key in place("x")} == place(part), document["metadata"]["name"]
            seen.add(document["kind"])
    assert seen == {"Deployment", "StatefulSet", "LeaderWorkerSet", "CronJob", "Job", "Pod"}


def test_a_hung_worker_is_not_waited_for_as_long_as_a_drain(tmp_path):
    documents = rendered({"etcd": EXISTING, "workers": {"drainSeconds": 900}, **TWO}, tmp_path)
    leaders = 0
    for document in documents:
        for metadata, spec in admission.templates(document):
            if metadata["labels"]["app.kubernetes.io/component"] != "worker":
                continue
            # a drain has its time, and the pod a little more; a process that takes no connections has none to give
            assert spec["terminationGracePeriodSeconds"] == 930
            for container in spec["containers"]:
                if "livenessProbe" in container:
                    leaders += 1
                    assert container["livenessProbe"]["terminationGracePeriodSeconds"] <= 30
    assert leaders == 2


# ---- who reaches what


def egress(documents, policy):
    """(ports, to or nothing) of a policy's rules."""
    return [({entry["port"] for entry in rule["ports"]}, rule.get("to")) for rule in named(documents, "NetworkPolicy", policy)["spec"]["egress"] if "ports" in rule]


def test_network_policies_let_through_what_the_values_ask_for(tmp_path):
    documents = rendered({
        "models": {"m": {}, "host": {"workers": {"hostNetwork": True, "ports": {"grpc": 9100}}}},
        "etcd": EXISTING, "telemetry": {"otlpEndpoint": "http://collector.observe:14317"},
        "download": {"kind": "huggingFace", "huggingFace": {"repository": "o/m", "endpoint": "https://mirror:8443"}},
        "router": {"options": {"access": {"jwt": {"issuer": "https://idp.example.com/realm", "audience": ["bora"]}}}},
        "networkPolicy": {"extraEgress": [{"ports": [{"port": 7777, "protocol": "TCP"}]}]},
    }, tmp_path)
    router, worker = egress(documents, "bora-router"), egress(documents, "bora-m")
    for rules in (router, worker):
        # DNS anywhere: a cache on the node is no pod
        assert ({53}, None) in rules and ({14317}, None) in rules and ({7777}, None) in rules
        assert [to for ports, to in rules if ports == {443, 80, 8443}] == [[{"ipBlock": {"cidr": "0.0.0.0/0"}}, {"ipBlock": {"cidr": "::/0"}}]]
    # the issuer of tokens is asked by routers only
    assert ({443}, None) in router and ({443}, None) not in worker
    # pods on the nodes' network are found by no selector: neither as a target nor as a source
    assert ({9100}, None) in router and ({9000}, None) not in router
    (client,) = [rule for rule in named(documents, "NetworkPolicy", "bora-etcd")["spec"]["ingress"] if rule["ports"][0]["port"] == "client"]
    assert "from" not in client
    closed = rendered({"models": {"m": {}}, "etcd": EXISTING}, tmp_path)
    (client,) = [rule for rule in named(closed, "NetworkPolicy", "bora-etcd")["spec"]["ingress"] if rule["ports"][0]["port"] == "client"]
    assert client["from"] and [ports for ports, to in egress(closed, "bora-router") if to is None] == [{53}]


# ---- what scales


def test_an_autoscaler_selects_by_a_label_that_the_rules_record(tmp_path):
    """A selector refuses the slash of a model's name, so the chart's rules record the numbers under the workload's name: promtool computes them."""
    documents = rendered({"models": {"big": {"name": "mistralai/Devstral-2"}}, "etcd": EXISTING, "workers": {"autoscaling": {"kind": "hpa"}}, "monitoring": MONITORED}, tmp_path)
    (rule,) = objects(documents, "PrometheusRule")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rule["spec"]))
    series = lambda labels: f'bora_router_group_queued_prefill_seconds{{namespace="llm",release="bora",group="g",{labels}}}'
    test = {"rule_files": ["rules.yaml"], "evaluation_interval": "15s", "tests": [{"interval": "15s", "input_series": [
        {"series": series('model="mistralai/Devstral-2"'), "values": "12x8"}, {"series": series('model="other"'), "values": "99x8"}],
        "promql_expr_test": [{"expr": "bora:model_queued_prefill_seconds:workload", "eval_time": "1m30s", "exp_samples": [
            {"labels": 'bora:model_queued_prefill_seconds:workload{namespace="llm", workload="bora-big"}', "value": 12}]}]}]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    outcome = run("promtool", "test", "rules", tmp_path / "test.yaml", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    autoscaler = named(documents, "HorizontalPodAutoscaler", "bora-big")
    recorded = {one["record"] for group in rule["spec"]["groups"] for one in group["rules"] if "record" in one}
    for metric in autoscaler["spec"]["metrics"]:
        assert metric["external"]["metric"]["selector"] == {"matchLabels": {"workload": "bora-big"}}
        name = metric["external"]["metric"]["name"].removeprefix("bora_model_")
        assert f"bora:model_{name}:workload" in recorded


# a model that keeps a group and one that may go to zero, and the shipped thresholds
DAY_AND_BATCH = {"models": {"day": {}, "batch": {"name": "org/batch", "workers": {"autoscaling": {"minReplicas": 0}}}}, "etcd": EXISTING, "workers": {"autoscaling": {"kind": "keda"}}}
SIGNALS = {"bora:model_queued_prefill_seconds:sum": 4, "bora:model_batch_backlog_seconds:sum": 600, "bora:model_kv_occupancy_percent:sum": 80,
           "bora:model_sequences:sum": 192, "bora:model_unserved_requests:increase2m": 1000}


def test_metrics_that_are_away_take_no_group_away(tmp_path):
    """Beside other groups a failing trigger is enough: the autoscaler holds. From zero nothing but KEDA's fallback wakes. One trigger each, since
    KEDA's operator may end itself if several of one object fail at once."""
    documents = rendered(DAY_AND_BATCH, tmp_path)
    day, batch = (named(documents, "ScaledObject", name)["spec"] for name in ("bora-day", "bora-batch"))
    definitions.validate(named(documents, "ScaledObject", "bora-day"))
    (trigger,) = day["triggers"]
    # without series of the queue it fails, and the autoscaler holds; there is no fallback
    assert trigger["metadata"]["ignoreNullValues"] == "false" and "fallback" not in day
    assert batch["fallback"] == {"failureThreshold": 4, "replicas": 1, "behavior": "currentReplicasIfHigher"}
    (trigger,) = batch["triggers"]
    assert trigger["metadata"]["ignoreNullValues"] == "true" and trigger["metadata"]["threshold"] == "1" and trigger["metricType"] == "AverageValue"


def wanted_groups():
    """(name, series, groups): every signal in turn the largest, alone and absent; what is no number counts as absent."""
    for record, per_group in SIGNALS.items():
        rest = {other: one / 4 for other, one in SIGNALS.items() if other != record}
        yield "largest", {record: 3 * per_group, **rest}, 3
        yield "alone", {record: 1.5 * per_group}, 1.5
        yield "absent", rest, 0.25
        yield "infinite", {record: "Inf", **rest}, 0.25
        yield "no number", {record: "NaN", **rest}, 0.25
    yield "none", {}, None
    yield "all at rest", dict.fromkeys(SIGNALS, 0), 0
    yield "one sequence", {**dict.fromkeys(SIGNALS, 0), "bora:model_sequences:sum": 1}, 1 / 192


QUEUE = "bora:model_queued_prefill_seconds:sum"


def test_the_signal_that_asks_for_most_groups_decides(tmp_path):
    """promtool computes the one query of each one trigger: threshold 1, so that its value is the groups that are wanted, and above zero is asked for. Neither another
    model's series nor those of another release of the same model count."""
    documents = rendered(DAY_AND_BATCH, tmp_path)
    queries = {name: named(documents, "ScaledObject", f"bora-{name}")["spec"]["triggers"][0]["metadata"]["query"] for name in ("day", "batch")}

    def series(record, value, model, release="bora"):
        return {"series": f'{record}{{namespace="llm",release="{release}",model="{model}"}}', "values": " ".join([str(value)] * 3)}

    tests = []
    for of, values, groups in wanted_groups():
        for name, model, other in (("batch", "org/batch", "day"), ("day", "day", "org/batch")):
            if name == "day" and "bora:model_unserved_requests:increase2m" in values and of != "all at rest":
                continue
            # a model that keeps a group: without its queue's series nothing is known
            expected = None if name == "day" and values.get(QUEUE, "NaN") in ("Inf", "NaN") else groups
            others = [series(record, 99 * per_group, other) for record, per_group in SIGNALS.items()]
            others += [series(record, 99 * per_group, model, "other") for record, per_group in SIGNALS.items()]
            tests.append({"name": f"{name}: {of}", "interval": "15s", "input_series": [*others, *(series(record, value, model) for record, value in values.items())],
                          "promql_expr_test": [{"expr": queries[name], "eval_time": "30s", "exp_samples": [] if expected is None else [{"labels": "{}", "value": expected}]}]})
    assert len(tests) > 30
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"evaluation_interval": "15s", "tests": tests}))
    outcome = run("promtool", "test", "rules", tmp_path / "test.yaml", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_two_releases_of_a_model_neither_scale_nor_alert_for_each_other(tmp_path):
    """promtool evaluates the rules of both, as Prometheus does, with series of both."""
    settings = {"models": {"m": {"name": "org/model"}}, "etcd": EXISTING, "workers": {"autoscaling": {"kind": "hpa"}}, "monitoring": {**MONITORED, "serviceMonitor": {"enabled": True}}}
    for release in ("bora", "bora-next"):
        documents = rendered(settings, tmp_path, release)
        (rule,) = objects(documents, "PrometheusRule")
        (tmp_path / f"{release}.yaml").write_text(yaml.safe_dump(rule["spec"]))
        for monitor in [*objects(documents, "PodMonitor"), *objects(documents, "ServiceMonitor")]:
            for endpoint in monitor["spec"].get("podMetricsEndpoints") or monitor["spec"]["endpoints"]:
                assert endpoint["relabelings"] == [{"targetLabel": "release", "replacement": release}], monitor["metadata"]["name"]
    labels = lambda release: f'{{namespace="llm",release="{release}",model="org/model",group="{release}-m-0"}}'
    series = [{"series": f'bora_router_group_queued_prefill_seconds{labels(release)}', "values": f"{value}x40"}
              for release, value in (("bora", 12), ("bora-next", 99))]
    series += [{"series": f'bora_router_group_ready{labels(release)}', "values": f"{value}x40"}
               for release, value in (("bora", 1), ("bora-next", 0))]
    series += [{"series": f'bora_router_groups{{namespace="llm",release="{release}"}}', "values": "1x40"} for release in ("bora", "bora-next")]
    fired = {"exp_labels": {"severity": "critical", "namespace": "llm", "release": "bora-next", "model": "org/model"}, "exp_annotations": {
        "summary": "org/model has groups, but none is ready", "description": "All groups of org/model in llm have been loading, draining or gone for 5 minutes.",
        "runbook_url": "docs/runbooks/BoraModelUnavailable.md"}}
    test = {"rule_files": ["bora.yaml", "bora-next.yaml"], "evaluation_interval": "15s", "tests": [{
        "interval": "15s", "input_series": series, "alert_rule_test": [{"alertname": "BoraModelUnavailable", "eval_time": "9m", "exp_alerts": [fired]}],
        "promql_expr_test": [{"expr": "bora:model_queued_prefill_seconds:workload", "eval_time": "2m", "exp_samples": [
            {"labels": f'bora:model_queued_prefill_seconds:workload{{namespace="llm", workload="{workload}"}}', "value": value}
            for workload, value in (("bora-m", 12), ("bora-next-m", 99))]}]}]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    outcome = run("promtool", "test", "rules", tmp_path / "test.yaml", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.parametrize("least", [0, 1])
def test_keda_shows_prometheus_who_it_is(tmp_path, least):
    auth = {"modes": ["bearer", "tls"], "secret": "monitoring", "keys": {"bearerToken": "jwt"}}
    documents = rendered({"models": {"m": {}}, "etcd": EXISTING, "workers": {"autoscaling": {"kind": "keda", "minReplicas": least, "prometheusAuth": auth}}}, tmp_path)
    authentication = named(documents, "TriggerAuthentication", "bora-m-prometheus")
    definitions.validate(authentication)
    targets = {one["parameter"]: (one["name"], one["key"]) for one in authentication["spec"]["secretTargetRef"]}
    assert targets == {"bearerToken": ("monitoring", "jwt"), "ca": ("monitoring", "ca.crt"), "cert": ("monitoring", "tls.crt"), "key": ("monitoring", "tls.key")}
    scaled = named(documents, "ScaledObject", "bora-m")
    definitions.validate(scaled)
    triggers = scaled["spec"]["triggers"]
    assert {trigger["metadata"]["authModes"] for trigger in triggers} == {"bearer,tls"}
    assert {trigger["authenticationRef"]["name"] for trigger in triggers} == {"bora-m-prometheus"} and len(triggers) == 1


# ---- what clusters differ in


def pods_of(documents):
    return [(document["kind"], metadata["labels"]["app.kubernetes.io/component"], spec) for document in documents for metadata, spec in admission.templates(document)]


@pytest.mark.parametrize("given", [
    {"podSecurityContext": None, "containerSecurityContext": None},
    {"podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}},
    {"podSecurityContext": {"runAsUser": 1000650000, "runAsGroup": 0, "fsGroup": 1000650000}},
])
def test_users_are_those_of_the_values_or_of_the_cluster(given, tmp_path):
    """OpenShift's SCC restricted-v2 refuses any user but those that it assigns to the namespace."""
    documents = rendered({**TWO, "etcd": {"builtin": {"backup": {"enabled": True}}}, "download": HUB, "workers": {"rdma": {"enabled": True, "ipcLock": True}, "autoscaling": {"kind": "keda"}},
                          "grpc": {"tls": {"source": "existing", "existing": {"router": "given", "worker": "given"}}}, **given}, tmp_path)
    assert not faults(documents)
    assert "10001" not in json.dumps(documents)
    for kind, part, spec in pods_of(documents):
        containers = spec["containers"] + spec.get("initContainers", [])
        user = (given["podSecurityContext"] or {}).get("runAsUser")
        assert spec.get("securityContext", {}).get("runAsUser") == user
        for container in containers:
            security = container.get("securityContext", {})
            # of the capability alone the values say that it is needed
            assert "containerSecurityContext" not in given or security == ({"capabilities": {"add": ["IPC_LOCK"]}} if container["name"] == "worker" else {}), (kind, part)
        modes = {volume["secret"]["defaultMode"] for volume in spec.get("volumes", []) if "secret" in volume}
        assert modes <= ({0o440} if user else {0o444}), "without a group only root could read the Secret"


def test_no_image_needs_its_user():
    """Everything in the images is root's and readable: nothing is owned by user 10001, and none has a home."""
    text = (CHART.parents[1] / "deploy" / "docker" / "Dockerfile").read_text()
    assert "--chown" not in text and "chown" not in text and "useradd" not in text and "USER 10001:10001" in text


POD = {"hostAliases": [{"ip": "10.0.0.9", "hostnames": ["hub.example.com"]}], "dnsConfig": {"options": [{"name": "ndots", "value": "2"}]},
       "schedulerName": "volcano", "runtimeClassName": "gvisor"}


def test_pods_take_what_clusters_ask_for(tmp_path):
    sidecar = {"name": "sidecar", "image": "proxy:1"}
    claims = [{"name": "gpus", "resourceClaimTemplateName": "four-gpus"}]
    documents = rendered({
        **TWO, "etcd": {"builtin": {**EXISTING["builtin"], **POD, "backup": {"enabled": True}}}, "router": {**POD, "extraContainers": [sidecar]},
        "workers": {**POD, "extraContainers": [sidecar], "resourceClaims": claims, "gpuResource": None,
                    "env": {"TOKEN": {"valueFrom": {"secretKeyRef": {"name": "given", "key": "t"}}}, "NCCL_DEBUG": None}},
        "test": {"tolerations": [{"key": "only-tests", "operator": "Exists"}], "nodeSelector": {"pool": "tests"}},
    }, tmp_path)
    assert not faults(documents)
    for kind, part, spec in pods_of(documents):
        assert {key: spec.get(key) for key in POD} == POD, (kind, part)
        if part in ("router", "worker"):
            assert sidecar in spec["containers"]
        if part == "test":
            assert spec["tolerations"] == [{"key": "only-tests", "operator": "Exists"}] and spec["nodeSelector"] == {"pool": "tests"}
        if part == "worker":
            (worker,) = [one for one in spec["containers"] if one["name"] == "worker"]
            assert spec["resourceClaims"] == claims and worker["resources"]["claims"] == [{"name": "gpus"}]
            assert "nvidia.com/gpu" not in worker["resources"]["limits"] and None not in worker["resources"]["limits"]
            environment = {one["name"]: one for one in worker["env"]}
            assert environment["TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "given", "key": "t"} and "NCCL_DEBUG" not in environment


def test_the_service_takes_what_load_balancers_ask_for(tmp_path):
    service = {"type": "LoadBalancer", "loadBalancerSourceRanges": ["10.0.0.0/8", "fd00::/8"], "externalTrafficPolicy": "Local", "nodePort": 30080,
               "sessionAffinity": "ClientIP", "sessionAffinitySeconds": 60, "loadBalancerClass": "internal"}
    documents = rendered({**TWO, "etcd": EXISTING, "router": {"service": service}}, tmp_path)
    assert not faults(documents)
    spec = named(documents, "Service", "bora")["spec"]
    assert spec["loadBalancerSourceRanges"] == ["10.0.0.0/8", "fd00::/8"] and spec["externalTrafficPolicy"] == "Local" and spec["loadBalancerClass"] == "internal"
    assert spec["ports"][0]["nodePort"] == 30080 and spec["sessionAffinityConfig"] == {"clientIP": {"timeoutSeconds": 60}}
    plain = named(rendered({**TWO, "etcd": EXISTING}, tmp_path), "Service", "bora")["spec"]
    assert plain.keys() == {"type", "ipFamilyPolicy", "selector", "ports"} and "nodePort" not in plain["ports"][0]


def test_downloads_go_through_a_proxy_and_trust_a_private_authority(tmp_path):
    """Both models download, and share the volume of the authority: a router's pod has it once. The proxy's port is let through."""
    authority = {"name": "authority", "configMap": {"name": "given"}}
    mount = {"name": "authority", "mountPath": "/etc/authority", "readOnly": True}
    environment = [{"name": "HTTPS_PROXY", "value": "http://proxy.example.com:3128"}, {"name": "SSL_CERT_FILE", "value": "/etc/authority/ca.crt"}]
    documents = rendered({"models": {"one": {}, "two": {}}, "etcd": EXISTING,
                          "download": {**HUB, "timeoutSeconds": 600, "env": environment, "extraVolumes": [authority], "extraVolumeMounts": [mount]}}, tmp_path)
    assert not faults(documents)
    downloads = 0
    for _, part, spec in pods_of(documents):
        for container in spec.get("initContainers", []):
            downloads += 1
            assert all(one in container["env"] for one in environment) and mount in container["volumeMounts"] and "--timeout=600" in container["command"]
            assert spec["volumes"].count(authority) == 1, part
    assert downloads == 4
    for policy in ("bora-router", "bora-one"):
        assert any(3128 in ports for ports, _ in egress(documents, policy)), policy


def test_a_read_only_claim_is_mounted_so(tmp_path):
    documents = rendered({"models": {"m": {"storage": {"kind": "existingClaim", "existingClaim": "given", "readOnly": True}}}, "etcd": EXISTING}, tmp_path)
    assert not faults(documents)
    for _, part, spec in pods_of(documents):
        if part in ("router", "worker"):
            assert {"name": "model-m", "persistentVolumeClaim": {"claimName": "given", "readOnly": True}} in spec["volumes"], part


def test_a_model_of_a_preset_is_removed_by_null(tmp_path):
    multinode = next(path for path in PRESETS if path.stem == "values-multinode")
    outcome = helm("template", "bora", CHART, "--values", multinode, "--set", "models.batch=null")
    assert outcome.returncode == 0, outcome.stderr
    documents = parse(outcome.stdout)
    assert not faults(documents)
    assert [one["metadata"]["name"] for one in objects(documents, "LeaderWorkerSet")] == ["bora-devstral-2"] and "devstral-small-2-batch" not in outcome.stdout.split("kind: PrometheusRule")[0]
    # the last one, and one's defaults, too
    none = helm("template", "bora", CHART, "--values", PRESETS[0], "--set", "models.demo=null")
    assert none.returncode == 0 and not [one for one in parse(none.stdout) if one["metadata"]["name"] in ("bora-demo", "bora-test")], none.stderr
    whole = parse(helm("template", "bora", CHART, "--set", "workers.maxModelLen=5000,models.m.workers.maxModelLen=null").stdout)
    assert "max_model_len" not in named(whole, "ConfigMap", "bora-m")["data"]["bora.yaml"]
    notes = helm("install", "bora", CHART, "--dry-run=client", "--values", PRESETS[0], "--set", "models.demo=null").stdout.split("NOTES:")[1]
    assert "It has no model yet" in notes


@pytest.mark.parametrize("component", ["worker", "router", "etcd"])
def test_a_drain_is_not_held_up_by_what_does_not_serve(component, tmp_path):
    """A budget counts ready pods that are not being deleted. What is not ready may always go, so that a group that can't become whole blocks no node."""
    documents = rendered({**TWO, "etcd": EXISTING}, tmp_path)
    budgets = [one["spec"] for one in objects(documents, "PodDisruptionBudget") if one["metadata"]["labels"]["app.kubernetes.io/component"] == component]
    assert budgets and all(spec["unhealthyPodEvictionPolicy"] == "AlwaysAllow" and spec["maxUnavailable"] >= 1 for spec in budgets)
    if component == "worker":
        # one for each model: groups of one model do not wait for those of another
        assert [spec["selector"]["matchLabels"]["bora/model"] for spec in budgets] == ["one", "two"]

"""Every value in values.yaml is documented, is in the schema, and changes what is rendered; what the schema does not know is refused."""

import concurrent.futures
import json
import re

import jsonschema
import pytest

import admission
from chart import CHART, PRESETS, helm, named, objects, parse, render_text, run, schema, values

# what must be on for a value to matter; the first that shows a difference is enough
MODEL = {"storage": {}, "download": {}, "workers": {}}
# generating certificates takes longer than all the rest of a rendering
NO_CERTIFICATES = {"builtin": {"tls": {"source": "existing", "existingSecret": "etcd"}}}
EVERYTHING = {
    "models": {"m": MODEL},
    "download": {"kind": "huggingFace", "huggingFace": {"repository": "org/model", "tokenSecret": {"name": "hub"}}},
    "router": {"autoscaling": {"enabled": True}, "service": {"type": "LoadBalancer"}, "tls": {"secret": "h"}, "keys": {"secret": "k"}},
    "grpc": {"tls": {"source": "existing", "existing": {"router": "r", "worker": "w", "follower": "f"}}},
    "workers": {
        "kind": "LeaderWorkerSet", "tensorParallelSize": 4, "ranksPerPod": 2, "rdma": {"enabled": True},
        "autoscaling": {"kind": "keda", "prometheusAuth": {"modes": ["bearer", "basic", "tls"], "secret": "p"}},
    },
    "etcd": {"builtin": {**NO_CERTIFICATES["builtin"], "backup": {"enabled": True}}},
    "telemetry": {"otlpEndpoint": "http://collector:4317"},
    "test": {"apiKey": {"secret": "question"}},
    "ingress": {"enabled": True, "tlsSecret": "t"},
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}]},
    "monitoring": {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}, "prometheusRule": {"enabled": True}, "dashboards": {"enabled": True}},
}
PLAIN = {"models": {"m": MODEL}, "etcd": NO_CERTIFICATES}
CHART_CERTIFICATES = {"models": {"m": MODEL}}
TO_ZERO = {"models": {"m": MODEL}, "etcd": NO_CERTIFICATES, "workers": {"autoscaling": {"kind": "keda", "minReplicas": 0}}}
OTHERS = {
    "download.kind": PLAIN,
    "router.service.sessionAffinitySeconds": {**PLAIN, "router": {"service": {"sessionAffinity": "ClientIP"}}},
    "storage.readOnly": {"models": {"m": MODEL}, "etcd": NO_CERTIFICATES, "storage": {"kind": "existingClaim", "existingClaim": "c"}},
    "telemetry.otlpEndpoint": PLAIN,
    "download.objectStore": {"models": {"m": MODEL}, "etcd": NO_CERTIFICATES, "download": {"kind": "objectStore", "objectStore": {"source": ":s3:b/m", "secret": "s"}}},
    "storage.existingClaim": {"models": {"m": MODEL}, "etcd": NO_CERTIFICATES, "storage": {"kind": "existingClaim", "existingClaim": "c"}},
    "storage.hostPath": {"models": {"m": MODEL}, "etcd": NO_CERTIFICATES, "storage": {"kind": "hostPath"}},
    "storage.emptyDirSize": {"models": {"m": MODEL}, "etcd": NO_CERTIFICATES, "storage": {"kind": "emptyDir"}},
    "router.replicas": PLAIN,
    "workers.replicas": PLAIN,
    "workers.kind": PLAIN,
    "workers.autoscaling.pollingSeconds": TO_ZERO,
    "workers.autoscaling.cooldownSeconds": TO_ZERO,
    "workers.tensorParallelSize": {"models": {"m": MODEL}, "etcd": NO_CERTIFICATES, "workers": {"kind": "LeaderWorkerSet"}},
    "workers.ranksPerPod": {"models": {"m": MODEL}, "etcd": NO_CERTIFICATES, "workers": {"kind": "LeaderWorkerSet", "tensorParallelSize": 4}},
    "etcd.kind": PLAIN,
    "etcd.external": {"models": {"m": MODEL}, "etcd": {"kind": "external", "external": {"endpoints": ["e:2379"], "username": "u", "passwordSecret": {"name": "s"}, "tls": {"enabled": True, "secret": "t"}}}},
    "etcd.builtin.tls.certManager": {"etcd": {"builtin": {"tls": {"source": "certManager", "certManager": {"issuer": "i"}}}}},
    "etcd.builtin.tls.existingSecret": {"etcd": {"builtin": {"tls": {"source": "existing", "existingSecret": "s"}}}},
    "etcd.builtin.tls.source": CHART_CERTIFICATES,
    "etcd.builtin.storage.kind": {"etcd": {"builtin": {**NO_CERTIFICATES["builtin"], "replicas": 1}}},
    "serviceAccount.create": PLAIN,
    "test.apiKey.secret": PLAIN,
    "serviceAccount.name": {"etcd": NO_CERTIFICATES, "serviceAccount": {"create": False}},
    "monitoring.podMonitor": {"etcd": NO_CERTIFICATES, "monitoring": {"podMonitor": {"enabled": True}}},
}
EXISTING_GRPC = {"tls": {"source": "existing", "existing": {"router": "r", "worker": "w", "follower": "f"}}}
OTHERS["grpc.tls.certManager"] = {"models": {"m": MODEL}, "etcd": NO_CERTIFICATES, "grpc": {"tls": {"source": "certManager", "certManager": {"issuer": "i"}}}}
# certificates that are made anew would be a difference of their own
for setting in OTHERS.values():
    setting.setdefault("grpc", EXISTING_GRPC)
# another value where the schema alone does not say one that fits
FITTING = {
    "telemetry.otlpEndpoint": {"otlpEndpoint": "http://collector:4317"},
    "telemetry.sampleRatio": {"sampleRatio": 0.5},
    "etcd.kind": {"kind": "external", "external": {"endpoints": ["e:2379"]}},
    "etcd.builtin.tls.source": {"source": "existing", "existingSecret": "s"},
    "storage.kind": {"kind": "emptyDir"},
    "download.kind": {"kind": "objectStore", "objectStore": {"source": ":s3:b/m"}},
    "workers.device": {"device": "cpu"},
    "router.ports.http": {"http": 8080},
    "router.ports.admin": {"admin": 8081},
    "workers.ports.grpc": {"grpc": 9010},
    "workers.ports.peers": {"peers": 9011},
    "workers.ports.admin": {"admin": 9012},
    "grpc.tls.healthPort": {"healthPort": 9013},
    "grpc.tls.source": {"source": "none"},
    "workers.autoscaling.kind": {"kind": "none"},
    "workers.autoscaling.prometheusAuth.modes": {"modes": ["tls"]},
    "workers.tensorParallelSize": {"tensorParallelSize": 2},
    "workers.ranksPerPod": {"ranksPerPod": 4},
    "workers.autoscaling.minReplicas": {"minReplicas": 3},
    "workers.autoscaling.maxReplicas": {"maxReplicas": 9},
    "etcd.builtin.replicas": {"replicas": 5},
    "etcd.builtin.storage.kind": {"kind": "emptyDir"},
    "grpc.tls.days": None,
    "etcd.builtin.tls.days": None,  # see test_certificates_live_as_long_as_days_says
    "nameOverride": {"nameOverride": "other"},
    "bindAddress": {"bindAddress": "::"},
    "podSecurityContext": {"podSecurityContext": None},
    "containerSecurityContext": {"containerSecurityContext": None},
    "router.service.type": {"type": "NodePort"},
    "router.service.loadBalancerSourceRanges": {"loadBalancerSourceRanges": ["10.0.0.0/8"]},
    "workers.resourceClaims": {"resourceClaims": [{"name": "gpus", "resourceClaimTemplateName": "four-gpus"}]},
    "workers.gpuResource": {"gpuResource": "amd.com/gpu"},
    "storage.readOnly": {"readOnly": True},
    "download.extraVolumeMounts": {"extraVolumeMounts": [{"name": "n", "mountPath": "/n"}]},
    "router.extraEnv": {"extraEnv": [{"name": "A", "value": "b"}]},
    "router.options": {"options": {"debug": True}},
    "router.http": {"http": {"max_connections": 100}},
    "workers.schedule": {"schedule": {"max_num_seqs": 7}},
    "workers.kvCache.memory": {"memory": "3GiB"},
    "etcd.builtin.compactionRetention": {"compactionRetention": "3h"},
    "etcd.builtin.defragmentation.schedule": {"schedule": "1 1 * * *"},
    "etcd.builtin.backup.schedule": {"schedule": "1 1 * * *"},
    "networkPolicy.downloadTo": {"downloadTo": ["10.0.0.0/8"]},
    "networkPolicy.downloadPorts": {"downloadPorts": [8443]},
    "httpRoute.timeout": {"timeout": "60s"},
    "monitoring.serviceMonitor.interval": {"interval": "30s"},
    "monitoring.podMonitor.interval": {"interval": "30s"},
    "etcd.external.endpoints": {"endpoints": ["f:2379"]},
    "storage.pvc.accessModes": {"accessModes": ["ReadOnlyMany"]},
    "httpRoute.parentRefs": {"parentRefs": [{"name": "other"}]},
}


def leaves(node, path=()):
    """Paths of values; an empty or free-form map is one value."""
    for key, value in node.items():
        here = (*path, key)
        free = ".".join(here) in ("models", "workers.env") or here[-1] in ("resources", "labels", "podSecurityContext", "containerSecurityContext") or not value
        if isinstance(value, dict) and not free:
            yield from leaves(value, here)
        else:
            yield here


PATHS = [path for path in leaves(values()) if path != ("models",)]


def schema_at(path):
    node = schema()
    for key in path:
        if "$ref" in node:
            node = schema()["$defs"][node["$ref"].rsplit("/", 1)[1]]
        node = node["properties"][key]
    return node


def another(path, now):
    """A valid value that is not the present one, as the map that holds it."""
    dotted = ".".join(path)
    if dotted in FITTING:
        return FITTING[dotted]
    node = schema_at(path)
    kinds = node["type"] if isinstance(node.get("type"), list) else [node.get("type")]
    if "enum" in node:
        value = next(choice for choice in node["enum"] if choice != now)
    elif "boolean" in kinds:
        value = not now
    elif "integer" in kinds or "number" in kinds:
        value = (now or 0) + max(1, node.get("minimum", 0))
        if value > node.get("maximum", value):
            value = now - 1
    elif "array" in kinds:
        value = [{"key": "k"}] if node["items"].get("type") == "object" else ["other"]
        if path[-1] in ("extraVolumes", "extraVolumeMounts", "env"):
            value = [{"name": "n"}]
        if path[-1] == "extraContainers":
            value = [{"name": "n", "image": "i"}]
        if path[-1] == "hostAliases":
            value = [{"ip": "10.0.0.1", "hostnames": ["hub"]}]
        if path[-1] in ("apiFrom", "metricsFrom"):
            value = [{"podSelector": {"matchLabels": {"a": "b"}}}]
    elif "object" in kinds:
        if path[-1] == "resources":
            value = {"requests": {"cpu": "77m"}}
        elif path[-1] == "affinity":
            value = {"nodeAffinity": {}}
        else:
            value = {"OTHER" if path[-1] == "env" else "other": "value"}
    else:
        value = next(text for text in ("other", "7Gi", "/other", "https://other:1", "sha256:" + "a" * 64, "org/other")
                     if re.search(node.get("pattern", ""), text) and text != now)
    return {path[-1]: value}


def overlay(path, holder):
    for key in reversed(path[:-1]):
        holder = {key: holder}
    return holder


def merged(base, over):
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    return {**base, **{key: merged(base.get(key), value) for key, value in over.items()}}


def rendered(settings, directory, name):
    file = directory / f"{name}.json"
    file.write_text(json.dumps(settings))
    text = render_text([file])
    return re.sub(r'(ca\.crt|tls\.crt|tls\.key): \S+|secret: "[A-Za-z0-9+/=]{60}"', "generated", text)


def setting_of(path):
    dotted = ".".join(path)
    for prefix, setting in OTHERS.items():
        if dotted == prefix or dotted.startswith(prefix + "."):
            return setting
    return EVERYTHING


# values whose change an API server refuses, because it would change a field that can't be changed; docs/upgrade.md says what to do
IMMUTABLE = {
    "etcd.builtin.storage.kind", "etcd.builtin.storage.size", "etcd.builtin.storage.storageClassName", "etcd.builtin.backup.storageClassName",
    "storage.pvc.accessModes", "storage.pvc.storageClassName",
}


def refused_on_upgrade(old_text, new_text):
    """Immutable fields that differ between two renderings. Only what differs is parsed."""
    old, new = ({one for one in re.split(r"(?m)^---\n", text)} for text in (old_text, new_text))
    # hooks are deleted before they are made anew
    before = {(one["kind"], one["metadata"]["name"]): one for one in parse("---\n".join(old - new)) if "helm.sh/hook" not in one["metadata"].get("annotations", {})}
    return [f"{one['kind']} {field}" for one in parse("---\n".join(new - old))
            if (one["kind"], one["metadata"]["name"]) in before for field in admission.change(before[one["kind"], one["metadata"]["name"]], one)]


def test_every_value_changes_what_is_rendered_and_can_be_changed_by_an_upgrade(tmp_path):
    now = values()
    bases, immutable = {}, {}

    def check(number):
        path = PATHS[number]
        base = setting_of(path)
        current = now
        for key in path:
            current = current[key]
        base_now = base
        for key in path:
            base_now = base_now.get(key) if isinstance(base_now, dict) else None
        holder = another(path, current if base_now is None else base_now)
        if holder is None:
            return None
        changed = rendered(merged(base, overlay(path, holder)), tmp_path, number)
        immutable[".".join(path)] = refused_on_upgrade(bases[id(base)], changed)
        return None if changed != bases[id(base)] else ".".join(path)

    for setting in [EVERYTHING, *OTHERS.values()]:
        bases.setdefault(id(setting), rendered(setting, tmp_path, f"base-{id(setting)}"))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        unused = [name for name in pool.map(check, range(len(PATHS))) if name]
    assert not unused, f"values that change nothing: {unused}"
    # every other change of a value is an upgrade that the API server takes
    assert {name for name, fields in immutable.items() if fields} == IMMUTABLE, {name: fields for name, fields in immutable.items() if fields}
    upgrades = (CHART.parents[1] / "docs" / "upgrade.md").read_text()
    assert not [name for name in IMMUTABLE if f"`{name}`" not in upgrades]


def test_every_value_is_documented():
    text = (CHART / "values.yaml").read_text().splitlines()
    undocumented, stack = [], []
    documented = False
    for line in text:
        if not line.strip():
            documented = False
            continue
        if line.strip().startswith("#"):
            documented = documented or "# -- " in line
            continue
        match = re.match(r"^( *)(\w+):", line)
        if not match:  # an item of a list
            continue
        indent, key = len(match[1]), match[2]
        stack = [(depth, name) for depth, name in stack if depth < indent]
        stack.append((indent, key))
        path = tuple(name for _, name in stack)
        if path in PATHS or path == ("models",):
            if not documented:
                undocumented.append(".".join(path))
        documented = False
    assert not undocumented, undocumented
    assert len(PATHS) > 180


def test_schema_and_values_name_the_same():
    def names(node, path=()):
        if "$ref" in node:
            node = schema()["$defs"][node["$ref"].rsplit("/", 1)[1]]
        if "properties" in node and not (path and ".".join(path) in ("router.options", "router.http", "workers.schedule", "models") or path and path[-1] == "resources"):
            assert node["additionalProperties"] is False, path
            for key, child in node["properties"].items():
                yield from names(child, (*path, key))
        else:
            yield path

    in_schema = {path for path in names(schema()) if path not in (("global",), ("models",))}
    assert in_schema == set(PATHS)
    jsonschema.Draft7Validator(schema()).validate(values())


@pytest.mark.parametrize("wrong", [
    "routers={}", "router.replica=3", "workers.autoscaling.kind=\"yes\"", "models.m.worker={}", "models.UPPER={}", "models.m.workers.gpu=1",
    "router.options.max_body=1", "workers.schedule.max_seqs=1", "router.ports.http=\"8000\"", "etcd.builtin.replicas=2", "storage.kind=\"nfs\"",
    "image.router.digest=\"latest\"", "etcd.external.endpoints=[\"http://e:2379\"]", "monitoring.grafana={}", "workers.env.A=1",
])
def test_what_the_schema_does_not_know_is_refused(wrong):
    outcome = helm("template", "x", CHART, f"--set-json={wrong}")
    assert outcome.returncode != 0 and "schema" in outcome.stderr, wrong


@pytest.mark.parametrize("wrong, why", [
    ({"workers": {"tensorParallelSize": 3, "ranksPerPod": 2}}, "must be a multiple of ranksPerPod"),
    ({"workers": {"tensorParallelSize": 2}}, "needs kind LeaderWorkerSet"),
    ({"workers": {"autoscaling": {"kind": "hpa", "minReplicas": 0}}}, "minReplicas 0 needs kind keda"),
    ({"workers": {"autoscaling": {"kind": "keda", "minReplicas": 9}}}, "above maxReplicas"),
    ({"workers": {"autoscaling": {"kind": "keda", "prometheusAuth": {"modes": ["basic"]}}}}, "modes need the name of a secret"),
    ({"download": {"kind": "huggingFace"}}, "repository: expected one"),
    ({"storage": {"kind": "existingClaim"}}, "expected the name of a claim"),
    ({"storage": {"kind": "image"}, "download": {"kind": "objectStore", "objectStore": {"source": "s"}}}, "nothing can be downloaded"),
])
def test_values_that_do_not_go_together_are_named(wrong, why, tmp_path):
    (tmp_path / "v.json").write_text(json.dumps({"models": {"m": wrong}}))
    outcome = helm("template", "x", CHART, "--values", tmp_path / "v.json")
    assert outcome.returncode != 0 and why in outcome.stderr and "models.m" in outcome.stderr, outcome.stderr


def test_several_members_of_etcd_need_volumes():
    outcome = helm("template", "x", CHART, '--set-json=etcd.builtin.storage.kind="emptyDir"')
    assert outcome.returncode != 0 and "emptyDir is for a single member" in outcome.stderr


def test_a_models_own_section_beats_the_default(tmp_path):
    (tmp_path / "v.json").write_text(json.dumps({
        "workers": {"drainSeconds": 77, "tolerations": [{"key": "a"}]},
        "models": {"one": {}, "two": {"workers": {"drainSeconds": 5, "tolerations": [], "disruptionBudget": {"enabled": False}}}},
    }))
    documents = parse(render_text([tmp_path / "v.json"]))
    one, two = (named(documents, "StatefulSet", f"bora-{key}")["spec"]["template"]["spec"] for key in ("one", "two"))
    assert one["terminationGracePeriodSeconds"] == 107 and two["terminationGracePeriodSeconds"] == 35
    assert one["tolerations"] == [{"key": "a"}] and "tolerations" not in two
    assert {budget["metadata"]["name"] for budget in objects(documents, "PodDisruptionBudget")} >= {"bora-one"}
    assert "bora-two" not in {budget["metadata"]["name"] for budget in objects(documents, "PodDisruptionBudget")}


def test_a_changed_configuration_is_a_new_pod_and_a_changed_number_of_groups_is_not(tmp_path):
    def annotations(settings):
        (tmp_path / "v.json").write_text(json.dumps(merged(PLAIN, settings)))
        documents = parse(render_text([tmp_path / "v.json"]))
        return [named(documents, kind, name)["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
                for kind, name in (("Deployment", "bora-router"), ("StatefulSet", "bora-m"))]

    router, worker = annotations({})
    assert annotations({"workers": {"replicas": 5}}) == [router, worker]
    assert annotations({"workers": {"maxModelLen": 4096}})[1] != worker
    assert annotations({"router": {"options": {"debug": True}}})[0] != router
    # what only one of them reads restarts only that one
    assert annotations({"workers": {"maxModelLen": 4096}})[0] == router and annotations({"router": {"options": {"debug": True}}})[1] == worker
    for shared in ({"log": {"level": "debug"}}, {"telemetry": {"otlpEndpoint": "http://collector:4317"}}, {"etcd": {"leaseSeconds": 20}}):
        both = annotations(shared)
        assert both[0] != router and both[1] != worker, shared


def test_certificates_live_as_long_as_days_says(tmp_path):
    import base64
    import datetime

    (tmp_path / "v.json").write_text(json.dumps({"etcd": {"builtin": {"tls": {"days": 7}}}}))
    secret = named(parse(render_text([tmp_path / "v.json"])), "Secret", "bora-etcd-server")
    (tmp_path / "crt").write_bytes(base64.b64decode(secret["data"]["tls.crt"]))
    text = run("openssl", "x509", "-in", tmp_path / "crt", "-noout", "-enddate", "-ext", "subjectAltName").stdout
    end = datetime.datetime.strptime(re.search(r"notAfter=(.*) GMT", text)[1], "%b %d %H:%M:%S %Y")
    assert datetime.timedelta(days=6) < end - datetime.datetime.now(datetime.UTC).replace(tzinfo=None) < datetime.timedelta(days=8)
    assert "*.bora-etcd.llm.svc.cluster.local" in text and "127.0.0.1" in text


def test_each_role_has_a_certificate_that_bears_it(tmp_path):
    import base64

    (tmp_path / "v.json").write_text(json.dumps({"etcd": NO_CERTIFICATES, "grpc": {"tls": {"days": 7}}}))
    documents = parse(render_text([tmp_path / "v.json"]))
    authorities = set()
    for role in ("router", "worker", "follower", "operator"):
        data = {key: base64.b64decode(value) for key, value in named(documents, "Secret", f"bora-grpc-{role}")["data"].items()}
        for key, value in data.items():
            (tmp_path / key).write_bytes(value)
        text = run("openssl", "x509", "-in", tmp_path / "tls.crt", "-noout", "-text").stdout
        assert re.findall(r"DNS:([^,\s]+)", text) == [f"{role}.bora.bora.internal"], text
        assert "TLS Web Server Authentication" in text and "TLS Web Client Authentication" in text
        assert run("openssl", "verify", "-CAfile", tmp_path / "ca.crt", tmp_path / "tls.crt").returncode == 0
        assert run("openssl", "x509", "-in", tmp_path / "tls.crt", "-noout", "-checkend", str(8 * 86400)).returncode == 1
        authorities.add(data["ca.crt"])
    assert len(authorities) == 1
    # a name that no certificate can bear is refused
    (tmp_path / "v.json").write_text(json.dumps({"etcd": NO_CERTIFICATES, "cluster": "a_b"}))
    assert "cluster: with grpc.tls" in helm("template", "bora", CHART, "--values", tmp_path / "v.json").stderr


def test_notes_name_the_next_command():
    outcome = helm("install", "bora", CHART, "--namespace", "llm", "--dry-run=client", "--values", PRESETS[0])
    assert outcome.returncode == 0, outcome.stderr
    text = outcome.stdout.split("NOTES:")[1]
    assert "helm test bora -n llm --logs" in text and "port-forward svc/bora 8000:80" in text and "bora-demo" in text
    assert "curl -N http://127.0.0.1" in text and "Bearer" not in text
    secure = helm("install", "bora", CHART, "--namespace", "llm", "--dry-run=client", "--values", PRESETS[0], "--set", "router.tls.secret=t,router.keys.secret=k")
    assert "curl -N -k https://127.0.0.1" in secure.stdout and "authorization: Bearer" in secure.stdout, secure.stderr
    empty = helm("install", "bora", CHART, "--namespace", "llm", "--dry-run=client").stdout.split("NOTES:")[1]
    assert "It has no model yet" in empty


def test_the_question_of_helm_test_has_a_key_where_one_is_needed(tmp_path):
    sets = ['router.keys.secret="tenants"', 'test.apiKey.secret="question"', 'test.apiKey.key="token"']
    (container,) = named(parse(render_text([PRESETS[0]], sets)), "Pod", "bora-test")["spec"]["containers"]
    assert container["env"] == [{"name": "BORA_API_KEY", "valueFrom": {"secretKeyRef": {"name": "question", "key": "token"}}}]
    (container,) = named(parse(render_text([PRESETS[0]])), "Pod", "bora-test")["spec"]["containers"]
    assert "env" not in container

    def notes(**values):
        (tmp_path / "v.json").write_text(json.dumps(values))
        install = helm("install", "bora", CHART, "--namespace", "llm", "--dry-run=client", "--values", PRESETS[0], "--values", tmp_path / "v.json")
        assert install.returncode == 0, install.stderr
        return install.stdout.split("NOTES:")[1]

    keys, jwt = {"keys": {"secret": "tenants"}}, {"options": {"access": {"jwt": {"issuer": "https://idp.example.com", "audience": ["bora"]}}}}
    for router in (keys, jwt):
        assert "Set test.apiKey.secret" in notes(router=router)
        assert "test.apiKey" not in notes(router=router, test={"apiKey": {"secret": "question"}})
        assert "requires no key" not in notes(router={**router, "service": {"type": "LoadBalancer"}})
    assert "test.apiKey" not in notes()
    assert "requires no key" in notes(router={"service": {"type": "LoadBalancer"}})


def test_keda_is_told_nothing_that_its_webhook_warns_of():
    """Its own looks and its cooldown are those of the last group."""
    spec = lambda least: objects(parse(render_text(sets=[
        'models={"m": {}}', f'workers.autoscaling={{"kind": "keda", "minReplicas": {least}}}'])), "ScaledObject")[0]["spec"]
    assert spec(0)["pollingInterval"] == 15 and spec(0)["cooldownPeriod"] == 900
    assert not {"pollingInterval", "cooldownPeriod"} & spec(1).keys()

"""Every preset: linted, rendered, validated strictly, compared with its snapshot, and safe by checkov's judgement."""

import copy
import json
import os
import re

import jsonschema
import kubernetes_validate
import pytest

import definitions
from chart import CHART, PRESETS, SNAPSHOTS, helm, named, objects, parse, pod_specs, preset, render_text, run

KUBERNETES = "1.36"

with_presets = pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)


def test_there_are_the_presets_that_the_documentation_names():
    assert [path.stem for path in PRESETS] == [
        "values-cpu-demo", "values-devstral-2-h200x4", "values-devstral-small-h100", "values-multinode"]


@with_presets
def test_lint(path):
    outcome = helm("lint", "--strict", CHART, "--values", path)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def validate(document):
    if definitions.is_custom(document):
        definitions.validate(document)
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@with_presets
def test_every_object_is_valid_with_unknown_fields_refused(path):
    documents = preset(path)
    assert len(documents) > 15
    for document in documents:
        validate(document)
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(names) == len(set(names)), "two objects of one name"
    # the templates within a LeaderWorkerSet are pods
    for where, spec in pod_specs(documents):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": copy.deepcopy(spec)}
        try:
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            raise AssertionError(f"{where}: {error}") from error


# what no preset turns on, because not every cluster has its definitions
OPTIONAL = ["monitoring.serviceMonitor.enabled=true", "httpRoute.enabled=true", 'httpRoute.parentRefs=[{"name": "public", "namespace": "gateways"}]',
            'httpRoute.hostnames=["bora.example.com"]', 'etcd.builtin.tls.source="certManager"', 'etcd.builtin.tls.certManager.issuer="internal"',
            "ingress.enabled=true"]


def test_what_no_preset_turns_on_is_valid():
    documents = parse(render_text([next(path for path in PRESETS if path.stem == "values-multinode")], OPTIONAL))
    for document in documents:
        validate(document)
    assert {"ServiceMonitor", "HTTPRoute", "Certificate", "Ingress"} <= {document["kind"] for document in documents}


def test_presets_need_nothing_but_keda_leaderworkerset_and_the_prometheus_operator():
    for path in PRESETS:
        groups = {document["apiVersion"].split("/")[0] for document in preset(path) if "." in document["apiVersion"].split("/")[0]}
        assert groups <= {"keda.sh", "leaderworkerset.x-k8s.io", "monitoring.coreos.com", "networking.k8s.io", "rbac.authorization.k8s.io"}, (path.stem, groups)
        assert {document["kind"] for document in preset(path) if document["apiVersion"].startswith("monitoring")} <= {"PodMonitor", "PrometheusRule"}
    demo = preset(next(path for path in PRESETS if path.stem == "values-cpu-demo"))
    assert not objects(demo, "PersistentVolumeClaim") and not any("volumeClaimTemplates" in document.get("spec", {}) for document in demo)


def test_the_validators_refuse_what_is_wrong():
    documents = parse(render_text([next(path for path in PRESETS if path.stem == "values-multinode")], OPTIONAL))
    deployment = copy.deepcopy(objects(documents, "Deployment")[0])
    deployment["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(deployment)
    for kind, change in [
        ("LeaderWorkerSet", lambda spec: spec.update(startupPolicy="LeaderFirst")),
        ("LeaderWorkerSet", lambda spec: spec["leaderWorkerTemplate"]["workerTemplate"]["spec"].update(containerz=[])),
        ("ScaledObject", lambda spec: spec.update(minReplicas=1)),
        ("PodMonitor", lambda spec: spec["podMetricsEndpoints"][0].update(intervall="1s")),
        ("PrometheusRule", lambda spec: spec["groups"][0]["rules"][0].update(alerts="x")),
        ("ServiceMonitor", lambda spec: spec.update(endpoint=[])),
        ("Certificate", lambda spec: spec.update(issuer="x")),
    ]:
        document = copy.deepcopy(objects(documents, kind)[0])
        validate(document)
        change(document["spec"])
        with pytest.raises(jsonschema.ValidationError):
            validate(document)


def normalized(documents):
    """Without what differs from run to run: generated certificates."""
    documents = copy.deepcopy(documents)
    for document in objects(documents, "Secret"):
        document["data"] = {key: "generated" for key in document["data"]}
    return documents


@with_presets
def test_two_renderings_are_equal(path):
    """But for generated Secrets, which are kept only by a lookup in the cluster."""
    assert normalized(parse(render_text([path]))) == normalized(preset(path))


@with_presets
def test_snapshot(path):
    """`UPDATE_SNAPSHOTS=1 scripts/test-helm` writes them anew; the difference is for a reviewer to read."""
    # dashboards and rules are files of their own, and tested as such
    documents = [document for document in normalized(preset(path))
                 if "-dashboard-" not in document["metadata"]["name"] and document["kind"] != "PrometheusRule"]
    lines = []
    for document in documents:
        lines.append(f"{document['kind']} {document['metadata']['name']}\n{json.dumps(document, indent=1, sort_keys=True)}\n")
    text = "\n".join(lines)
    snapshot = SNAPSHOTS / f"{path.stem}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        snapshot.write_text(text)
    assert snapshot.read_text() == text, f"{snapshot} differs: UPDATE_SNAPSHOTS=1 scripts/test-helm, then read the difference"


# what checkov asks for and Bora has a reason not to do
SKIPPED = {
    "CKV_K8S_8": "only for the pod of `helm test`, which ends by itself (the groups' followers, too, have no port to probe)",
    "CKV_K8S_9": "as CKV_K8S_8",
    "CKV_K8S_11": "a CPU limit throttles streams; memory is limited",
    "CKV_K8S_15": "IfNotPresent: the tags of releases do not move",
    "CKV_K8S_35": "the tools that download read a token or keys from their environment",
    "CKV_K8S_38": "only for the job that keeps replicas through a rollback, which asks the API server",
    "CKV2_K8S_6": "as CKV_K8S_38: the address of the API server is the cluster's to know",
    "CKV_K8S_43": "digests are the installer's to set (image.*.digest)",
}


def test_checkov_finds_nothing(tmp_path):
    for path in PRESETS:
        text = render_text([path])
        (tmp_path / f"{path.stem}.yaml").write_text(text)
        # a LeaderWorkerSet is unknown to checkov: its pods are judged as pods
        for number, (where, spec) in enumerate(pod_specs(parse(text))):
            if where.startswith("LeaderWorkerSet"):
                pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{number}", "namespace": "llm"}, "spec": spec}
                (tmp_path / f"{path.stem}-{number}.yaml").write_text(json.dumps(pod))
    outcome = run("checkov", "--directory", tmp_path, "--framework", "kubernetes", "--skip-download", "--quiet", "--compact",
                  "--skip-check", ",".join(SKIPPED), "--output", "json", env={**os.environ, "LOG_LEVEL": "ERROR"})
    report = json.loads(outcome.stdout)
    failed = [f"{check['check_id']} {check['check_name']}: {check['file_path']} {check['resource']}" for check in report["results"]["failed_checks"]]
    assert not failed, "\n".join(failed)
    assert report["summary"]["passed"] > 1500, report["summary"]


@with_presets
def test_pods_keep_to_the_restricted_profile(path):
    for where, spec in pod_specs(preset(path)):
        # only what keeps numbers through a rollback speaks to the API server
        assert spec["automountServiceAccountToken"] is (where == "Job bora-rollback"), where
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", where
        assert not spec.get("hostPID") and not spec.get("hostIPC"), where
        for container in spec.get("initContainers", []) + spec["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"], where
            assert security["capabilities"]["drop"] == ["ALL"], where
            assert "add" not in security["capabilities"], where
            assert "privileged" not in security, where
            assert "memory" in container["resources"]["limits"], where
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts <= {volume["name"] for volume in spec["volumes"]} | {"data"}, where


def test_grace_periods_let_streams_finish():
    for path in PRESETS:
        documents = preset(path)
        router = named(documents, "Deployment", "bora-router")["spec"]["template"]["spec"]
        config = next(document for document in objects(documents, "ConfigMap") if document["metadata"]["name"] == "bora-router")
        grace = int(re.search(r"shutdown_grace_seconds: (\d+)", config["data"]["bora.yaml"])[1])
        pause = router["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert router["terminationGracePeriodSeconds"] > grace + pause
        for where, spec in pod_specs(documents):
            if spec["containers"][0]["name"] == "worker":
                name = spec["volumes"][0]["configMap"]["name"]
                drain = int(re.search(r"drain_seconds: (\d+)", named(documents, "ConfigMap", name)["data"]["bora.yaml"])[1])
                assert spec["terminationGracePeriodSeconds"] > drain, where


def test_a_group_of_several_pods():
    multinode = next(path for path in PRESETS if path.stem == "values-multinode")
    rdma = "models.devstral-2.workers.rdma."
    documents = parse(render_text([multinode], [f"{rdma}enabled=true", f"{rdma}ipcLock=true"]))
    group = named(documents, "LeaderWorkerSet", "bora-devstral-2")["spec"]
    template = group["leaderWorkerTemplate"]
    assert template["size"] == 4 and template["restartPolicy"] == "RecreateGroupAfterStart"
    # the leader is ready only when its group is complete: waiting for it would wait for ever
    assert group["startupPolicy"] == "LeaderCreated"
    leader, worker = (template[kind]["spec"]["containers"][0] for kind in ("leaderTemplate", "workerTemplate"))
    for container in (leader, worker):
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 2 and container["resources"]["limits"]["rdma/ib"] == 1
        assert "--ranks-per-process=2" in container["args"] and "--process-index=$(PROCESS_INDEX)" in container["args"]
        assert {"name": "NCCL_NVLS_ENABLE", "value": "0"} in container["env"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    # the preset itself comes up where nodes offer nothing but GPUs
    template_of_preset = named(preset(multinode), "LeaderWorkerSet", "bora-devstral-2")["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
    assert "rdma" not in json.dumps(template_of_preset["spec"]["containers"]) and "IPC_LOCK" not in json.dumps(template_of_preset)
    # a follower serves no request, but is ready only in a group that is whole
    assert "grpc" in leader["readinessProbe"] and worker["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "admin"}
    volumes = {kind: {one["name"]: one for one in template[kind]["spec"]["volumes"]} for kind in ("leaderTemplate", "workerTemplate")}
    # a follower's certificate does not let it serve a group
    secrets = [volumes[kind].pop("grpc-tls")["secret"]["secretName"] for kind in ("leaderTemplate", "workerTemplate")]
    assert secrets == ["bora-grpc-worker", "bora-grpc-follower"] and volumes["leaderTemplate"] == volumes["workerTemplate"]


def allowed(policy, direction, port):
    """The label sets of pods that a policy lets through on a port, those of an expression with its values as `component`."""
    found = []
    for rule in policy["spec"].get(direction, []):
        ports = [entry["port"] for entry in rule.get("ports", [{"port": port}])]
        if port in ports:
            for peer in rule.get("from" if direction == "ingress" else "to", [{}]):
                selector = peer.get("podSelector", {})
                values = [value for one in selector.get("matchExpressions", []) for value in one["values"]]
                components = [{"app.kubernetes.io/component": value} for value in values] or [{}]
                found += [{**selector.get("matchLabels", {}), **component} for component in components]
    return found


def test_nothing_reaches_workers_but_routers_and_their_group_and_nothing_reaches_etcd_but_bora():
    documents = preset(next(path for path in PRESETS if path.stem == "values-multinode"))
    worker = named(documents, "NetworkPolicy", "bora-devstral-2")
    assert worker["spec"]["policyTypes"] == ["Ingress", "Egress"]
    peers = [labels.get("app.kubernetes.io/component") for labels in allowed(worker, "ingress", 9000)]
    assert sorted(peers) == ["operator", "router", "worker"]
    assert [labels.get("bora/model") for labels in allowed(worker, "ingress", 45678)] == ["devstral-2"]
    assert allowed(named(documents, "NetworkPolicy", "bora-batch"), "ingress", 45678) == []
    etcd = named(documents, "NetworkPolicy", "bora-etcd")
    assert all(allowed(etcd, "ingress", "client"))
    # every pod is selected by a policy
    selectors = [policy["spec"]["podSelector"]["matchLabels"] for policy in objects(documents, "NetworkPolicy")]
    for document in documents:
        if "helm.sh/hook" in document["metadata"].get("annotations", {}):
            continue
        template = document.get("spec", {}).get("template") or document.get("spec", {}).get("jobTemplate", {}).get("spec", {}).get("template")
        if template:
            labels = template["metadata"]["labels"]
            assert any(selector.items() <= labels.items() for selector in selectors), document["metadata"]["name"]

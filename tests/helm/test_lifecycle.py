"""The life of a release with the real helm against a stand-in of an API server: install, test, upgrade, rollback, uninstall."""

import copy
import json
import re

import pytest

from apiserver import Server
from chart import CHART, NAMESPACE, PRESETS, helm, named, parse, preset

PRESET = {path.stem: path for path in PRESETS}


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def succeeds(outcome):
    assert outcome.returncode == 0, outcome.stdout[-1500:] + outcome.stderr[-3000:]
    return outcome.stdout


# the other two have no kind of object that these have not
@pytest.mark.parametrize("name", ["values-cpu-demo", "values-multinode"])
def test_install_test_upgrade_rollback_uninstall(name, server, tmp_path):
    at = ["--kubeconfig", server.kubeconfig(tmp_path / "kubeconfig"), "--namespace", NAMESPACE]
    path = PRESET[name]
    succeeds(helm("install", "bora", CHART, *at, "--values", path))
    # every object of the release, and the test's pod is not among them
    expected = sorted(f"{one['kind']}/{one['metadata']['name']}" for one in preset(path) if "helm.sh/hook" not in one["metadata"].get("annotations", {}))
    assert server.names() == expected
    assert all("apply" in content for method, kind, _, content, _ in server.log if method == "PATCH" and kind != "Secret"), "not applied on the server's side"
    installed = copy.deepcopy(server.objects)

    # the question is asked, and its pod is gone afterwards
    assert "Phase:" in succeeds(helm("test", "bora", *at, "--logs"))
    assert server.names() == expected

    succeeds(helm("upgrade", "bora", CHART, *at, "--values", path, "--set-json", "router.replicas=7", "--set-json", 'log.level="debug"'))
    assert server.names() == expected
    if "autoscaling" not in path.read_text().split("router:")[-1]:
        assert server.get("Deployment", "bora-router")["spec"]["replicas"] == 7
    assert 'level: "debug"' in server.get("ConfigMap", "bora-router")["data"]["bora.yaml"]
    # certificates and the cluster secret outlive upgrades: new ones would lock everybody out
    secrets = {key: one["data"] for key, one in installed.items()
               if one["kind"] == "Secret" and re.search("etcd|cluster-secret", one["metadata"]["name"])}
    assert len(secrets) == 3
    for key, data in secrets.items():
        assert server.objects[key]["data"] == data, "an upgrade made new secrets"

    succeeds(helm("rollback", "bora", "1", *at))
    assert server.names() == expected
    for key, one in installed.items():
        if not one.get("type", "").startswith("helm.sh/"):
            now = server.objects[key]
            assert {k: v for k, v in now.items() if k not in ("metadata", "status")} == {k: v for k, v in one.items() if k not in ("metadata", "status")}, key

    succeeds(helm("uninstall", "bora", *at))
    assert server.objects == {}, server.names()


SCALED = [("LeaderWorkerSet", "bora-sets"), ("StatefulSet", "bora-single"), ("Deployment", "bora-router")]


def scaling(directory, kind, **more):
    """Values of two models and the routers, scaled by `kind`."""
    file = directory / f"{kind}.json"
    models = {"sets": {"workers": {"kind": "LeaderWorkerSet", "tensorParallelSize": 4}}, "single": {}}
    # certificates of the chart's own take longer than all the rest of a rendering
    etcd = {"builtin": {"tls": {"source": "existing", "existingSecret": "given"}}}
    file.write_text(json.dumps({
        "models": models, "etcd": etcd, "workers": {"replicas": 3, "autoscaling": {"kind": kind, "minReplicas": 2}},
        "router": {"replicas": 3, "autoscaling": {"enabled": kind != "none"}}, **more,
    }))
    return file


def test_an_autoscaler_takes_over_without_a_group_lost(server, tmp_path):
    """What Helm set and gives up becomes 1 again: three groups would end in the upgrade that is to bring more."""
    at = ["--kubeconfig", server.kubeconfig(tmp_path / "kubeconfig"), "--namespace", NAMESPACE]
    count = lambda: [server.get(kind, name)["spec"].get("replicas") for kind, name in SCALED]
    succeeds(helm("install", "bora", CHART, *at, "--values", scaling(tmp_path, "none")))
    assert count() == [3, 3, 3]
    # also where nothing is scaled for a while, and Helm's number stays for another upgrade
    for level in ("info", "debug"):
        succeeds(helm("upgrade", "bora", CHART, *at, "--values", scaling(tmp_path, "keda", log={"level": level})))
        assert count() == [3, 3, 3]
    for kind, name in SCALED:
        server.scale(kind, name, 5, manager="keda")
    # from then on it is the autoscaler's: not in the manifest, so that neither this upgrade nor a rollback to it sets it back
    succeeds(helm("upgrade", "bora", CHART, *at, "--values", scaling(tmp_path, "keda", log={"level": "warn"})))
    assert count() == [5, 5, 5]
    manifest = parse(succeeds(helm("get", "manifest", "bora", *at)))
    assert not any("replicas" in named(manifest, kind, name)["spec"] for kind, name in SCALED)
    # back to a number of one's own: another one's field is asked for, as docs/upgrade.md says
    outcome = helm("upgrade", "bora", CHART, *at, "--values", scaling(tmp_path, "none"))
    assert outcome.returncode != 0 and 'conflict with "keda"' in outcome.stderr, outcome.stderr
    succeeds(helm("upgrade", "bora", CHART, *at, "--values", scaling(tmp_path, "none"), "--force-conflicts"))
    assert count() == [3, 3, 3]


@pytest.mark.parametrize("kind", ["keda", "hpa"])
def test_a_release_begins_with_as_many_as_its_autoscalers_keep_at_least(kind, server, tmp_path):
    """`helm install --wait` waits for what the manifest says. One is the default anyhow, and a model that may go to zero begins with one."""
    at = ["--kubeconfig", server.kubeconfig(tmp_path / "kubeconfig"), "--namespace", NAMESPACE]
    succeeds(helm("install", "bora", CHART, *at, "--values", scaling(tmp_path, kind), "--set", "models.one.workers.autoscaling.minReplicas=1"))
    assert [server.get(kind, name)["spec"].get("replicas") for kind, name in SCALED] == [2, 2, 2]
    assert "replicas" not in server.get("StatefulSet", "bora-one")["spec"]
    # who renders without the cluster does not know what there is: no number of the autoscaler's is overwritten
    documents = parse(succeeds(helm("template", "bora", CHART, "--namespace", NAMESPACE, "--values", scaling(tmp_path, kind))))
    assert not any("replicas" in named(documents, kind, name)["spec"] for kind, name in SCALED)


def test_a_rollback_to_an_autoscaler_takes_nothing_away(server, tmp_path):
    """A manifest without a number makes Helm give up the one that it set, which becomes 1: three groups and three routers would end at once."""
    at = ["--kubeconfig", server.kubeconfig(tmp_path / "kubeconfig"), "--namespace", NAMESPACE]
    count = lambda: [server.get(kind, name)["spec"].get("replicas") for kind, name in SCALED]
    upgrade = lambda kind, *more, **values: succeeds(helm("upgrade", "--install", "bora", CHART, *at, *more, "--values", scaling(tmp_path, kind, **values)))
    upgrade("keda")
    for kind, name in SCALED:
        server.scale(kind, name, 5, manager="keda")
    upgrade("keda", log={"level": "debug"})
    # between two revisions with autoscalers nothing is claimed and nothing changes
    upgrade("keda", log={"level": "warn"})
    succeeds(helm("rollback", "bora", "2", *at))
    assert count() == [5, 5, 5] and server.output.pop("bora-rollback") == ""
    upgrade("none", "--force-conflicts")
    assert count() == [3, 3, 3]
    there = server.names()
    succeeds(helm("rollback", "bora", "2", *at))
    assert count() == [3, 3, 3], server.output
    assert server.names() == sorted({*there, "ScaledObject/bora-sets", "ScaledObject/bora-single", "HorizontalPodAutoscaler/bora-router"}), "the hooks are gone again"
    # the numbers are the autoscalers' to change, and stay theirs in the next upgrade
    for kind, name in SCALED:
        server.scale(kind, name, 4, manager="keda")
    upgrade("keda")
    assert count() == [4, 4, 4]


def test_a_rollback_to_a_smaller_number_is_a_conflict_and_the_release_goes_on(server, tmp_path):
    """The first revision has minReplicas in its manifest."""
    at = ["--kubeconfig", server.kubeconfig(tmp_path / "kubeconfig"), "--namespace", NAMESPACE]
    count = lambda: [server.get(kind, name)["spec"].get("replicas") for kind, name in SCALED]
    succeeds(helm("install", "bora", CHART, *at, "--values", scaling(tmp_path, "keda")))
    succeeds(helm("upgrade", "bora", CHART, *at, "--values", scaling(tmp_path, "none")))
    outcome = helm("rollback", "bora", "1", *at)
    assert outcome.returncode != 0 and 'conflict with "bora-rollback"' in outcome.stderr and count() == [3, 3, 3], outcome.stderr
    # the safe way of docs/upgrade.md: the values of that revision, and the numbers that there are
    values = tmp_path / "old.yaml"
    values.write_text(succeeds(helm("get", "values", "bora", "--revision", "1", *at, "--output", "yaml")))
    succeeds(helm("upgrade", "bora", CHART, *at, "--values", values))
    assert count() == [3, 3, 3] and "ScaledObject/bora-sets" in server.names()


def test_a_rollback_that_the_client_merges_is_refused(server, tmp_path):
    """As Helm 3 does it: what the manifest gives up is deleted, whoever owns it."""
    at = ["--kubeconfig", server.kubeconfig(tmp_path / "kubeconfig"), "--namespace", NAMESPACE]
    count = lambda: [server.get(kind, name)["spec"].get("replicas") for kind, name in SCALED]
    upgrade = lambda kind, **values: succeeds(helm("upgrade", "bora", CHART, *at, "--server-side=false", "--values", scaling(tmp_path, kind, **values)))
    few = {"workers": {"replicas": 3, "autoscaling": {"kind": "keda", "minReplicas": 1}}, "router": {"replicas": 3, "autoscaling": {"enabled": True, "minReplicas": 1}}}
    succeeds(helm("install", "bora", CHART, *at, "--server-side=false", "--values", scaling(tmp_path, "keda", **few)))
    for kind, name in SCALED:
        server.scale(kind, name, 4)
    upgrade("keda", **few, log={"level": "debug"})
    # no manifest has a number yet
    succeeds(helm("rollback", "bora", "1", *at))
    assert count() == [4, 4, 4]
    upgrade("none")
    assert count() == [3, 3, 3]
    outcome = helm("rollback", "bora", "1", *at)
    assert outcome.returncode != 0 and count() == [3, 3, 3], outcome.stderr
    assert "statefulsets/bora-single has 3 replicas, and the rollback would set 1" in server.output["bora-rollback"]
    # docs/upgrade.md: Helm leaves the release pending, until the record of the rollback is deleted
    (pending,) = [key for key, one in server.objects.items() if one["metadata"].get("labels", {}).get("status") == "pending-rollback"]
    del server.objects[pending]
    # an upgrade keeps the numbers, and so does each one after it
    for level in ("info", "debug"):
        upgrade("keda", **few, log={"level": level})
        assert count() == [3, 3, 3]
        for kind, name in SCALED:
            server.scale(kind, name, 3)


def test_two_upgrades_with_the_same_values_are_one_manifest(server, tmp_path):
    at = ["--kubeconfig", server.kubeconfig(tmp_path / "kubeconfig"), "--namespace", NAMESPACE]
    path = PRESET["values-multinode"]
    succeeds(helm("install", "bora", CHART, *at, "--values", path))
    manifests = []
    for _ in range(2):
        succeeds(helm("upgrade", "bora", CHART, *at, "--values", path))
        manifests.append(succeeds(helm("get", "manifest", "bora", *at)))
    assert manifests[0] == manifests[1]


def test_from_one_autoscaler_to_the_other(server, tmp_path):
    """Each leaves the other's objects alone: KEDA refuses a target that has an autoscaler unless that says it may, and Helm takes over no object that
    another one made, as KEDA's autoscaler is."""
    at = ["--kubeconfig", server.kubeconfig(tmp_path / "kubeconfig"), "--namespace", NAMESPACE]
    scaled = lambda kind: {name for name in server.names() if name.startswith((f"{kind}/bora-sets", f"{kind}/bora-single"))}
    both = lambda kind: {f"{kind}/bora-sets", f"{kind}/bora-single"}
    succeeds(helm("install", "bora", CHART, *at, "--values", scaling(tmp_path, "hpa")))
    assert scaled("HorizontalPodAutoscaler") == both("HorizontalPodAutoscaler")
    for name in ("bora-sets", "bora-single"):
        assert server.get("HorizontalPodAutoscaler", name)["metadata"]["annotations"]["validations.keda.sh/hpa-ownership"] == "false"
    succeeds(helm("upgrade", "bora", CHART, *at, "--values", scaling(tmp_path, "keda")))
    assert scaled("ScaledObject") == both("ScaledObject") and not scaled("HorizontalPodAutoscaler")
    # as KEDA would: the name is its own
    for name in ("bora-sets", "bora-single"):
        assert "name" not in server.get("ScaledObject", name)["spec"]["advanced"]["horizontalPodAutoscalerConfig"]
    succeeds(helm("rollback", "bora", "1", *at))
    assert scaled("HorizontalPodAutoscaler") == both("HorizontalPodAutoscaler") and not scaled("ScaledObject")


def test_a_model_at_zero_comes_back_with_an_autoscaler_that_knows_no_zero(server, tmp_path):
    """A HorizontalPodAutoscaler leaves alone what has no replicas: the model would never come back."""
    at = ["--kubeconfig", server.kubeconfig(tmp_path / "kubeconfig"), "--namespace", NAMESPACE]
    count = lambda: [server.get(kind, name)["spec"].get("replicas") for kind, name in SCALED[:2]]
    upgrade = lambda kind, **more: succeeds(helm("upgrade", "--install", "bora", CHART, *at, "--values", scaling(tmp_path, kind, **more)))
    upgrade("keda")
    for kind, name in SCALED[:2]:
        server.scale(kind, name, 0, manager="keda")
    # asleep it stays through upgrades, and wakes where nothing can wake it any more
    upgrade("keda", log={"level": "debug"})
    assert count() == [0, 0]
    upgrade("hpa")
    assert count() == [2, 2]
    for kind, name in SCALED[:2]:
        server.scale(kind, name, 5)
    upgrade("hpa", log={"level": "debug"})
    assert count() == [5, 5]
    # without an autoscaler it is the number of the values, and nobody's field before
    upgrade("keda")
    for kind, name in SCALED[:2]:
        server.scale(kind, name, 0, manager="keda")
    upgrade("none")
    assert count() == [3, 3]


def test_a_leader_worker_set_does_not_become_a_stateful_set(server, tmp_path):
    """It has made a StatefulSet of its own name, which Helm would find in its way in the middle of the upgrade."""
    at = ["--kubeconfig", server.kubeconfig(tmp_path / "kubeconfig"), "--namespace", NAMESPACE]
    succeeds(helm("install", "bora", CHART, *at, "--set-json", 'models={"m": {"workers": {"kind": "LeaderWorkerSet"}}}'))
    outcome = helm("upgrade", "bora", CHART, *at, "--set-json", 'models={"m": {}}')
    assert outcome.returncode != 0 and "models.m.workers.kind: its groups are a LeaderWorkerSet" in outcome.stderr, outcome.stderr
    # under another key the new groups come beside the old ones
    succeeds(helm("upgrade", "bora", CHART, *at, "--set-json", 'models={"m2": {}}'))
    assert "StatefulSet/bora-m2" in server.names() and "LeaderWorkerSet/bora-m" not in server.names()


def test_a_claim_that_is_to_be_kept_outlives_the_release(server, tmp_path):
    at = ["--kubeconfig", server.kubeconfig(tmp_path / "kubeconfig"), "--namespace", NAMESPACE]
    succeeds(helm("install", "bora", CHART, *at, "--set-json", 'models={"m": {}}', "--set-json", "storage.pvc.keep=true"))
    succeeds(helm("uninstall", "bora", *at))
    assert server.names() == ["PersistentVolumeClaim/bora-m-model"]


def test_a_model_that_leaves_the_values_leaves_the_cluster(server, tmp_path):
    at = ["--kubeconfig", server.kubeconfig(tmp_path / "kubeconfig"), "--namespace", NAMESPACE]
    succeeds(helm("install", "bora", CHART, *at, "--set-json", 'models={"one": {}, "two": {}}'))
    assert any(name.startswith("StatefulSet/bora-two") for name in server.names())
    succeeds(helm("upgrade", "bora", CHART, *at, "--set-json", 'models={"one": {}}'))
    assert not any("bora-two" in name for name in server.names()) and "StatefulSet/bora-one" in server.names()
    # as on a server, what can't be changed is refused
    outcome = helm("upgrade", "bora", CHART, *at, "--set-json", 'models={"one": {}}', "--set-json", 'etcd.builtin.storage.size="9Gi"')
    assert outcome.returncode != 0 and "spec.volumeClaimTemplates: field is immutable" in outcome.stderr, outcome.stderr


def test_the_stand_in_refuses_what_a_server_would(server, tmp_path):
    chart = tmp_path / "chart"
    (chart / "templates").mkdir(parents=True)
    (chart / "Chart.yaml").write_text("apiVersion: v2\nname: wrong\nversion: 0.1.0\n")
    (chart / "templates" / "a.yaml").write_text("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{port: 1}], selektor: {a: b}}\n")
    outcome = helm("install", "x", chart, "--kubeconfig", server.kubeconfig(tmp_path / "kubeconfig"), "--namespace", NAMESPACE)
    assert outcome.returncode != 0 and "selektor" in outcome.stderr, outcome.stderr

"""The life of a release with the real helm against a stand-in of an API server: install, test, upgrade, rollback, uninstall."""

import copy

import pytest

from apiserver import Server
from chart import CHART, NAMESPACE, PRESETS, helm, preset

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
    expected = sorted(f"{one['kind']}/{one['metadata']['name']}" for one in preset(path) if one["kind"] != "Pod")
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
    # certificates outlive upgrades: a new authority would lock everybody out
    secrets = {key: one["data"] for key, one in installed.items() if one["kind"] == "Secret" and "etcd" in one["metadata"]["name"]}
    assert len(secrets) == 2
    for key, data in secrets.items():
        assert server.objects[key]["data"] == data, "an upgrade made new certificates"

    succeeds(helm("rollback", "bora", "1", *at))
    assert server.names() == expected
    for key, one in installed.items():
        if not one.get("type", "").startswith("helm.sh/"):
            now = server.objects[key]
            assert {k: v for k, v in now.items() if k not in ("metadata", "status")} == {k: v for k, v in one.items() if k not in ("metadata", "status")}, key

    succeeds(helm("uninstall", "bora", *at))
    assert server.objects == {}, server.names()


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

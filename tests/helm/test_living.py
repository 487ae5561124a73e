"""What the chart renders runs: etcd with its flags and certificates, router and workers with their commands and configuration,
the question of `helm test`, and the downloads. Only addresses, ports and directories are replaced."""

import base64
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from chart import BORA, CHART, FIXTURES, PRESETS, named, parse, preset, render_text, run
from cluster import free_port, http as ask_http, wait_until
from living import ChartEtcd

DEMO = next(path for path in PRESETS if path.stem == "values-cpu-demo")
SCRIPTS = CHART / "files" / "scripts"


@pytest.fixture
def demo_model(tmp_path):
    """The directory that the demo image has."""
    return shutil.copytree(FIXTURES / "bora-demo" / "fp8", tmp_path / "demo-model")


class Pods:
    """Starts containers of the chart as processes of this machine."""

    def __init__(self, documents, etcd, directory, model):
        self.documents, self.etcd, self.directory, self.model = documents, etcd, directory, model
        self.ports = {port: free_port() for port in (8000, 8001, 9000, 9001, 9002)}
        self.running = []
        for key, value in named(documents, "Secret", "bora-cluster-secret")["data"].items():
            (directory / "cluster-secret").mkdir(exist_ok=True)
            (directory / "cluster-secret" / key).touch(mode=0o600)
            (directory / "cluster-secret" / key).write_bytes(base64.b64decode(value))

    def local(self, text):
        text = text.replace("bora-etcd-0.bora-etcd.llm.svc.cluster.local:2379", f"127.0.0.1:{self.etcd.client}")
        text = text.replace("/etc/bora/cluster-secret", str(self.directory / "cluster-secret"))
        text = text.replace("/etc/bora/keys", str(self.directory / "keys"))
        text = text.replace("/etc/bora/etcd-tls", str(self.etcd.directory / "client")).replace("/usr/share/bora/demo-model", str(self.model))
        for port, own in self.ports.items():
            text = re.sub(rf"(0\.0\.0\.0:|127\.0\.0\.1:|port: ){port}\b", rf"\g<1>{own}", text)
        return text.replace("0.0.0.0", "127.0.0.1")

    def start(self, name, spec, pod_name, labels=None):
        (container,) = spec["containers"]
        self.ports[9002] = free_port()  # each pod has its own address, here each process its own port
        config = self.directory / f"{name}.yaml"
        config_map = next(volume["configMap"]["name"] for volume in spec["volumes"] if volume["name"] == "config")
        text = self.local(named(self.documents, "ConfigMap", config_map)["data"]["bora.yaml"])
        certificates = self.directory / f"{name}-grpc-tls"
        for secret in [volume["secret"]["secretName"] for volume in spec["volumes"] if volume["name"] == "grpc-tls"]:
            certificates.mkdir(exist_ok=True)
            for key, value in named(self.documents, "Secret", secret)["data"].items():
                (certificates / key).write_bytes(base64.b64decode(value))
        config.write_text(text.replace("/etc/bora/grpc-tls", str(certificates)))
        environment = {}
        for variable in container.get("env", []):
            source = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            if source == "status.podIP":
                value = "127.0.0.1"
            elif source == "metadata.name":
                value = pod_name
            elif source:
                # a label that is not there is empty, as the kubelet has it
                value = labels.get(re.fullmatch(r"metadata\.labels\['(.*)'\]", source)[1], "")
            else:
                value = self.expand(variable["value"], environment)
            environment[variable["name"]] = value
        words = [self.local(self.expand(word, environment)) for word in container["command"] + container.get("args", [])]
        words = [BORA if word == "/usr/local/bin/bora" else str(config) if word == "/etc/bora/bora.yaml" else word for word in words]
        with open(self.directory / f"{name}.log", "w") as log:
            child = subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, **environment})
        self.running.append((name, child))
        return child

    @staticmethod
    def expand(text, environment):
        """$(NAME) as Kubernetes does it: what is not defined stays."""
        return re.sub(r"\$\((\w+)\)", lambda match: environment.get(match[1], match[0]), text)

    def logs(self):
        return "\n".join(f"---- {name}\n{(self.directory / f'{name}.log').read_text()[-1500:]}" for name, _ in self.running)

    def stop(self):
        for _, child in self.running:
            if child.poll() is None:
                child.kill()
            child.wait()


def serve_and_ask(pods, groups):
    api, admin = (f"http://127.0.0.1:{pods.ports[port]}" for port in (8000, 8001))
    try:
        wait_until("the router", lambda: ask_http("GET", f"{admin}/health")[0] == 200, 60)
        wait_until("the groups", lambda: ask_http("GET", f"{admin}/ready")[2].get("ready_groups") == groups, 120)
        answer = run(sys.executable, SCRIPTS / "ask.py", api, "bora-demo", "120", timeout=180)
        assert answer.returncode == 0 and re.search(r"\d+ tokens from bora-demo, group bora-demo-0", answer.stdout), answer.stdout + answer.stderr
        metrics = ask_http("GET", f"{admin}/metrics")[2]
        assert 'bora_router_group_ready{model="bora-demo",group="bora-demo-0"} 1' in metrics
        worker_metrics = ask_http("GET", f"http://127.0.0.1:{pods.ports[9002]}/metrics")[2]
        assert 'bora_worker_sequences_total{model="bora-demo",group="bora-demo-0",end="finished"} 1' in worker_metrics, worker_metrics
        # the API's port has the API; the admin port has not
        assert ask_http("GET", f"{admin}/v1/models")[0] == 404
        # SIGTERM ends everything in order
        for _, child in pods.running:
            child.send_signal(signal.SIGTERM)
        for name, child in pods.running:
            assert child.wait(120) == 0, name
    except AssertionError as error:
        raise AssertionError(f"{error}\n{pods.logs()}") from error


def test_the_demo_preset_serves(tmp_path, demo_model):
    documents = preset(DEMO)
    (tmp_path / "etcd").mkdir()
    with ChartEtcd(tmp_path / "etcd") as etcd:
        # without its certificate nobody is let in
        refused = run("etcdctl", "--endpoints", f"https://127.0.0.1:{etcd.client}", "--cacert", etcd.directory / "client" / "ca.crt", "--dial-timeout", "2s",
                      "--command-timeout", "3s", "get", "x", env={**os.environ, "ETCDCTL_API": "3"})
        assert refused.returncode != 0, refused.stdout
        pods = Pods(documents, etcd, tmp_path, demo_model)
        try:
            pods.start("router", named(documents, "Deployment", "bora-router")["spec"]["template"]["spec"], "bora-router-abc")
            pods.start("worker", named(documents, "StatefulSet", "bora-demo")["spec"]["template"]["spec"], "bora-demo-0")
            serve_and_ask(pods, 1)
        finally:
            pods.stop()


def test_the_question_is_answered_where_routers_ask_for_keys(tmp_path, demo_model):
    documents = parse(render_text([DEMO], ['router.keys.secret="tenants"', 'test.apiKey.secret="question"']))
    secrets = {("question", "api-key"): "helm-test-key"}
    (tmp_path / "keys").mkdir()
    digest = hashlib.sha256(b"helm-test-key").hexdigest()
    (tmp_path / "keys" / "keys.yaml").write_text(f"tenants:\n- name: tests\n  keys: [{{name: helm, sha256: {digest}}}]\n")
    (container,) = named(documents, "Pod", "bora-test")["spec"]["containers"]
    (tmp_path / "etcd").mkdir()
    with ChartEtcd(tmp_path / "etcd") as etcd:
        pods = Pods(documents, etcd, tmp_path, demo_model)

        def question(environment):
            words = [SCRIPTS / "ask.py" if word == "/scripts/ask.py" else word for word in container["command"][1:]]
            words = [f"http://127.0.0.1:{pods.ports[8000]}" if str(word).startswith("http://bora.llm.svc") else word for word in words]
            return run(sys.executable, *words, env={**os.environ, **environment}, timeout=400)

        try:
            pods.start("router", named(documents, "Deployment", "bora-router")["spec"]["template"]["spec"], "bora-router-abc")
            pods.start("worker", named(documents, "StatefulSet", "bora-demo")["spec"]["template"]["spec"], "bora-demo-0")
            wait_until("the group", lambda: ask_http("GET", f"http://127.0.0.1:{pods.ports[8001]}/ready")[2].get("ready_groups") == 1, 120)
            references = {variable["name"]: variable["valueFrom"]["secretKeyRef"] for variable in container["env"]}
            answered = question({name: secrets[place["name"], place["key"]] for name, place in references.items()})
            assert answered.returncode == 0 and "tokens from bora-demo" in answered.stdout, f"{answered}\n{pods.logs()}"
            refused = question({})
            assert refused.returncode != 0 and "HTTP 401" in refused.stderr, refused
        finally:
            pods.stop()


def test_a_group_of_two_pods_forms(tmp_path, demo_model):
    sets = ['models.demo.workers.kind="LeaderWorkerSet"', "models.demo.workers.ranksPerPod=1"]
    documents = parse(render_text([DEMO], sets))
    template = named(documents, "LeaderWorkerSet", "bora-demo")["spec"]["leaderWorkerTemplate"]
    assert template["size"] == 2
    (tmp_path / "etcd").mkdir()
    with ChartEtcd(tmp_path / "etcd") as etcd:
        pods = Pods(documents, etcd, tmp_path, demo_model)
        label = "leaderworkerset.sigs.k8s.io/"
        try:
            pods.start("router", named(documents, "Deployment", "bora-router")["spec"]["template"]["spec"], "bora-router-abc")
            pods.start("follower", template["workerTemplate"]["spec"], "bora-demo-0-1", {f"{label}group-index": "0", f"{label}worker-index": "1", f"{label}template-revision-hash": "7d9"})
            probe = template["workerTemplate"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]
            follower = f"http://127.0.0.1:{pods.ports[9002]}{probe['path']}"
            # alone it is not ready, so that it may be evicted: a budget counts ready pods
            wait_until("the follower's port", lambda: ask_http("GET", follower)[0] == 503, 60)
            pods.start("leader", template["leaderTemplate"]["spec"], "bora-demo-0", {f"{label}group-index": "0", f"{label}worker-index": "0", f"{label}template-revision-hash": "7d9"})
            wait_until("the follower to be ready", lambda: ask_http("GET", follower)[0] == 200, 120)
            serve_and_ask(pods, 1)
        finally:
            pods.stop()


def test_a_member_of_etcd_that_lost_its_volume_comes_back(tmp_path):
    """As docs/runbooks/BoraEtcdMemberAway.md says it: removed, added, and started with initialClusterState existing."""
    ports = {(index, port): free_port() for index in range(3) for port in (2379, 2380, 2381)}
    running = {}

    def start(index, state):
        documents = parse(render_text(sets=["etcd.builtin.tls.enabled=false", f'etcd.builtin.initialClusterState="{state}"']))
        (container,) = named(documents, "StatefulSet", "bora-etcd")["spec"]["template"]["spec"]["containers"]
        words = [word.replace("$(POD_NAME)", f"bora-etcd-{index}").replace("/var/lib/etcd", str(tmp_path / str(index))) for word in container["command"]]
        # each member's host becomes this one and its own ports
        words = [re.sub(r"bora-etcd-(\d)\.bora-etcd\.llm\.svc\.cluster\.local:(\d+)", lambda match: f"127.0.0.1:{ports[int(match[1]), int(match[2])]}", word) for word in words]
        words = [re.sub(r"0\.0\.0\.0:(\d+)", lambda match: f"127.0.0.1:{ports[index, int(match[1])]}", word) for word in words]
        (tmp_path / str(index)).mkdir(exist_ok=True)
        with open(tmp_path / f"{index}.log", "a") as log:
            running[index] = subprocess.Popen(words, stdout=log, stderr=log)

    def ctl(index, *words):
        return run("etcdctl", "--endpoints", f"127.0.0.1:{ports[index, 2379]}", "--command-timeout", "5s", *words, env={**os.environ, "ETCDCTL_API": "3"})

    try:
        for index in range(3):
            start(index, "new")
        wait_until("three members", lambda: ctl(0, "put", "k", "v").returncode == 0 and ctl(2, "get", "k").stdout.split() == ["k", "v"], 60)
        running[2].kill()
        running[2].wait()
        shutil.rmtree(tmp_path / "2")
        start(2, "new")
        assert running[2].wait(60) != 0 and "already been bootstrapped" in (tmp_path / "2.log").read_text()
        address = f"http://127.0.0.1:{ports[2, 2380]}"
        members = lambda: [line for line in ctl(0, "member", "list").stdout.splitlines() if line]

        def removed():
            # a command that ran out of time may have been obeyed
            for line in members():
                if address in line:
                    ctl(0, "member", "remove", line.split(",")[0])
            return len(members()) == 2

        def added():
            ctl(0, "member", "add", "bora-etcd-2", f"--peer-urls={address}")
            return any(address in line for line in members())

        # etcd wants a moment of health before it changes its members
        wait_until("the member to be removed", removed, 60)
        wait_until("the member to be added", added, 60)
        shutil.rmtree(tmp_path / "2")
        start(2, "existing")
        wait_until("the member to be back", lambda: ctl(2, "get", "k").stdout.split() == ["k", "v"], 60)
    finally:
        for child in running.values():
            child.kill()
            child.wait()


def test_old_backups_go_and_the_newest_stays(tmp_path):
    for name, days in [("a.db", 30), ("b.db", 9), ("c.db", 8), ("other.txt", 99)]:
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (time.time() - days * 86400,) * 2)
    assert run(sys.executable, SCRIPTS / "prune_backups.py", tmp_path, "7").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.db", "other.txt"]


def test_a_backup_is_a_snapshot_that_etcd_restores(tmp_path):
    documents = parse(render_text(sets=["etcd.builtin.replicas=1", "etcd.builtin.backup.enabled=true"]))
    (job,) = [one for one in documents if one["kind"] == "CronJob" and one["metadata"]["name"] == "bora-etcd-backup"]
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["initContainers"]
    (tmp_path / "etcd").mkdir()
    (tmp_path / "backup").mkdir()
    with ChartEtcd(tmp_path / "etcd") as etcd:
        environment = {"PATH": os.environ["PATH"]}
        for variable in container["env"]:
            value = variable.get("value", "backup-1")
            value = value.replace("/etc/bora/etcd-tls", str(etcd.directory / "client"))
            environment[variable["name"]] = value.replace("bora-etcd-0.bora-etcd.llm.svc.cluster.local:2379", f"127.0.0.1:{etcd.client}")
        words = [word.replace("/backup/", f"{tmp_path}/backup/").replace("$(POD_NAME)", "backup-1") for word in container["command"]]
        assert run("etcdctl", "put", "k", "v", env=environment).returncode == 0
        saved = run(*words, env=environment)
        assert saved.returncode == 0, saved.stderr
        defrag = next(one for one in documents if one["metadata"]["name"] == "bora-etcd-defrag")
        (container,) = defrag["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        done = run(*container["command"], env=environment)
        assert done.returncode == 0 and "Finished defragmenting" in done.stdout + done.stderr, done.stdout + done.stderr
    restored = run("etcdctl", "snapshot", "restore", tmp_path / "backup" / "backup-1.db", "--data-dir", tmp_path / "restored", env={**os.environ, "ETCDCTL_API": "3"})
    assert restored.returncode == 0 and (tmp_path / "restored" / "member").is_dir(), restored.stderr

"""Real processes for the chart's tests: a router over a fake group, and an etcd with the flags and certificates that the chart gives it."""

import base64
import functools
import pathlib
import re
import subprocess
import tempfile


from chart import named, parse, render_text
from cluster import Cluster, free_port, http, wait_until

MODEL = "tiny"


def names(text):
    """Names of the samples of a text in Prometheus' form."""
    return {match[1] for line in text.splitlines() if (match := re.match(r"([a-zA-Z_:][\w:]*)[ {]", line)) and not line.startswith("#")}


def scrape(url):
    return http("GET", url)[2]


@functools.cache
def bora_metrics():
    """Every metric name that a router and the leader of a group of two ranks export after two requests: a real model on the CPU."""
    with Cluster(registry="static", model=MODEL) as one:
        admin = f"127.0.0.1:{free_port()}"
        worker = one.start_worker("only", port=one.etcd_port, model=MODEL, size=2, admin=admin)
        router = one.start_router()
        one.wait_ready()
        for more in ({}, {"guided_choice": ["yes", "no"]}):
            question = {"model": MODEL, "max_tokens": 8, "messages": [{"role": "user", "content": "Hello"}], **more}
            status, _, body = one.post("/v1/chat/completions", question)
            assert status == 200, body
        assert worker.running()
        return names(scrape(f"{router.url}/metrics")), names(scrape(f"http://{admin}/metrics"))


def router_metrics():
    return bora_metrics()[0] | {"bora_router_requests_total"}


# what only a machine with a GPU tells
GPU_METRICS = {"bora_worker_gpu_memory_bytes", "bora_worker_step_floor_seconds_total"}


def worker_metrics():
    return bora_metrics()[1] | GPU_METRICS


class ChartEtcd:
    """One member of etcd as the chart starts it, but for addresses and the directory."""

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        self.client, self.peer, self.metrics = free_port(), free_port(), free_port()
        documents = parse(render_text(sets=["etcd.builtin.replicas=1"]))
        for part in ("server", "client"):
            (self.directory / part).mkdir()
            for key, value in named(documents, "Secret", f"bora-etcd-{part}")["data"].items():
                (self.directory / part / key).write_bytes(base64.b64decode(value))
        (container,) = named(documents, "StatefulSet", "bora-etcd")["spec"]["template"]["spec"]["containers"]
        self.command = [self.local(word) for word in container["command"]]

    def local(self, word):
        word = word.replace("$(POD_NAME)", "bora-etcd-0").replace("/var/lib/etcd", str(self.directory)).replace("/etc/etcd/tls", str(self.directory / "server"))
        word = re.sub(r"(bora-etcd-0\.bora-etcd\.llm\.svc\.cluster\.local|0\.0\.0\.0)", "127.0.0.1", word)
        for port, own in ((2379, self.client), (2380, self.peer), (2381, self.metrics)):
            word = word.replace(f":{port}", f":{own}")
        return word

    def __enter__(self):
        with open(self.directory / "etcd.log", "w") as log:
            self.child = subprocess.Popen(self.command, stdout=log, stderr=log)
        try:
            wait_until("etcd", lambda: self.child.poll() is None and http("GET", f"http://127.0.0.1:{self.metrics}/health")[0] == 200, 20)
        except AssertionError:
            self.child.kill()
            raise AssertionError((self.directory / "etcd.log").read_text()[-2000:]) from None
        return self

    def __exit__(self, *_):
        self.child.kill()
        self.child.wait()


@functools.cache
def etcd_metrics():
    """Every metric name that etcd exports."""
    with tempfile.TemporaryDirectory() as directory, ChartEtcd(directory) as etcd:
        return names(scrape(f"http://127.0.0.1:{etcd.metrics}/metrics"))

"""Starts real parts of Bora on free loopback ports: etcd, routers, worker processes. Ends them by their id."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
BORA = os.environ.get("BORA_BIN", str(ROOT / "target" / "debug" / "bora"))
TOKENIZER_8K = FIXTURES / "tokenizers" / "tekken-v13-8k.json"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def limited(soft, hard, *command):
    """A command under limits of open files."""
    return ["sh", "-c", f'ulimit -S -n {soft} && ulimit -H -n {hard} && exec "$@"', "sh", *command]


def new_secret(path):
    """A cluster secret's file."""
    path.touch(mode=0o600)
    path.write_text(os.urandom(32).hex())
    return path


def http(method, url, body=None, headers=None, timeout=60, context=None):
    """(status, headers, parsed JSON or text); never raises on an HTTP status."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, method=method, headers={"content-type": "application/json", **(headers or {})})
    try:
        response = urllib.request.urlopen(request, timeout=timeout, context=context)
    except urllib.error.HTTPError as error:
        response = error
    text = response.read().decode("utf-8", "replace")
    try:
        return response.status, response.headers, json.loads(text)
    except ValueError:
        return response.status, response.headers, text


def wait_until(what, check, seconds=60, every=0.05):
    end = time.monotonic() + seconds
    last = None
    while time.monotonic() < end:
        try:
            last = check()
            if last:
                return last
        except (OSError, urllib.error.URLError) as error:
            last = error
        time.sleep(every)
    raise AssertionError(f"{what}: not within {seconds} s (last: {last!r})")


class Process:
    """One process of the cluster with its log file."""

    def __init__(self, name, args, directory, env=None):
        self.name, self.args, self.env = name, [str(a) for a in args], env
        self.log_path = pathlib.Path(directory) / f"{name}.log"
        self.start()

    def start(self, stderr=None):
        """`stderr`: a file in place of the log."""
        with open(self.log_path, "ab") as log:
            self.child = subprocess.Popen(self.args, stdout=log, stderr=stderr or log, stdin=subprocess.DEVNULL, env={**os.environ, **(self.env or {})})

    def log(self):
        return self.log_path.read_text(errors="replace")

    def running(self):
        return self.child.poll() is None

    def signal(self, number):
        self.child.send_signal(number)

    def kill(self):
        if self.running():
            self.child.kill()
        self.child.wait()

    def stop(self, seconds=20):
        """Ends it politely; returns its exit status."""
        if self.running():
            self.child.terminate()
        try:
            return self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not stop within {seconds} s:\n{self.log()[-3000:]}")

    def wait_exit(self, seconds):
        try:
            return self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs after {seconds} s:\n{self.log()[-3000:]}")


class Cluster:
    """A cluster under test. Use as a context manager: everything it started ends with it."""

    def __init__(self, model_dir=None, model="tiny", tokenizer=TOKENIZER_8K, registry="etcd", skip_tokenizer=False, models=None):
        self.directory = tempfile.TemporaryDirectory(prefix="bora-e2e-")
        self.path = pathlib.Path(self.directory.name)
        self.processes = []
        self.model = model
        self.models = models  # as in the configuration, where there are several
        self.model_dir = str(model_dir or FIXTURES / "tiny_text")
        self.tokenizer = None if skip_tokenizer else tokenizer
        self.registry = registry
        self.sections = {}  # of every configuration file, for example {"grpc": {"tls": ...}}
        self.router_url = None
        self.key = None
        self.sections = {}  # of every process's configuration
        self.etcd_port, self.etcd_peer_port = free_port(), free_port()
        self.secret = new_secret(self.path / "cluster-secret")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for process in reversed(self.processes):
            process.kill()
        if kind is not None:
            for process in self.processes:
                print(f"---- {process.name}\n{process.log()[-4000:]}")
        self.directory.cleanup()

    def spawn(self, name, args, env=None):
        process = Process(name, args, self.path, env)
        self.processes.append(process)
        return process

    # ---- parts

    def start_etcd(self, data="etcd"):
        client, peer = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{self.etcd_peer_port}"
        self.etcd = self.spawn("etcd", ["etcd", "--name", "e", "--data-dir", self.path / data, "--listen-client-urls", client,
                                        "--advertise-client-urls", client, "--listen-peer-urls", peer,
                                        "--initial-advertise-peer-urls", peer, "--initial-cluster", f"e={peer}"])
        self.wait_etcd()
        return self.etcd

    def etcdctl(self, *args):
        command = ["etcdctl", "--endpoints", f"127.0.0.1:{self.etcd_port}", *map(str, args)]
        return subprocess.run(command, env={**os.environ, "ETCDCTL_API": "3"}, check=True, capture_output=True, text=True).stdout

    def restore_etcd(self, snapshot):
        """Starts etcd anew from a snapshot, in a directory of its own."""
        peer, data = f"http://127.0.0.1:{self.etcd_peer_port}", f"restored-{len(self.processes)}"
        self.etcdctl("snapshot", "restore", snapshot, "--name", "e", "--data-dir", self.path / data,
                     "--initial-cluster", f"e={peer}", "--initial-advertise-peer-urls", peer)
        return self.start_etcd(data)

    def wait_etcd(self):
        wait_until("etcd", lambda: http("GET", f"http://127.0.0.1:{self.etcd_port}/health")[2].get("health") == "true")

    def config(self, name, registry_port=None, **sections):
        document = {
            "cluster": "e2e",
            "cluster_secret_file": str(self.secret),
            "registry": {"kind": self.registry, "endpoints": [f"127.0.0.1:{registry_port or self.etcd_port}"], "lease_seconds": 3},
            "models": [{"name": self.model, "path": self.model_dir}],
            **self.sections,
            **sections,
        }
        # most tests want to hear at once that there is no group
        document["router"] = {"wait_for_group_seconds": 1, **document.get("router", {})}
        if self.models:
            document["models"] = self.models
        elif self.tokenizer:
            document["models"][0]["tokenizer"] = str(self.tokenizer)
        else:
            document["models"][0]["skip_tokenizer_init"] = True
        path = self.path / f"{name}.yaml"
        path.write_text(json.dumps(document, indent=1))  # JSON is YAML
        return path

    def start_router(self, name="router", registry_port=None, port=None, files=None, **options):
        """`registry_port`: where it finds etcd, if not at its own port. `files`: how many it may open. Options of `router:`."""
        port = port or free_port()
        config = self.config(name, registry_port, router=options)
        command = [BORA, "router", "--config", config, "--port", port]
        process = self.spawn(name, limited(files, files, *command) if files else command)
        url = f"http://127.0.0.1:{port}"
        wait_until(f"{name} is alive", lambda: process.running() and http("GET", f"{url}/health")[0] == 200)
        self.router_url = self.router_url or url
        process.url = url
        return process

    def start_worker(self, group, ranks=None, size=1, device="cpu", port=None, env=None, flags=(), registry_port=None, **options):
        name = "-".join(map(str, [group, *(ranks or []), *(flags[1:2])]))
        worker = {"group": group, "device": device, "tensor_parallel_size": size, "listen": f"127.0.0.1:{port or free_port()}",
                  "kv_cache": {"blocks": 512}, **options}
        if ranks is not None:
            worker["ranks"] = ranks
        config = self.config(name, registry_port, worker=worker)
        process = self.spawn(name, [BORA, "worker", "--config", config, *flags], env)
        process.address = worker["listen"]
        return process

    def start_digest(self, group, **options):
        """A fake group whose every id depends on all ids before it and on the seed."""
        fake = {"mode": "digest", **options.pop("fake", {})}
        return self.start_worker(group, device="fake", max_model_len=16384, kv_cache={"blocks": 4096}, fake=fake, **options)

    def groups(self, url=None):
        """What a router knows, by name."""
        return {group["group"]: group for group in self.ask_groups(url or self.router_url)[2]["groups"]}

    def ask_groups(self, url):
        """Where the router has keys, the list of groups wants one."""
        return http("GET", f"{url}/groups", headers={"authorization": f"Bearer {self.key}"} if self.key else None)

    def wait_ready(self, groups=1, seconds=60, url=None):
        """Waits until the router knows that many ready groups."""
        url = url or self.router_url

        def ready():
            status, _, body = self.ask_groups(url)
            return status == 200 and sum(g["state"] == "ready" and g["watched"] for g in body["groups"]) == groups

        for process in self.processes:
            assert process.running(), f"{process.name} ended:\n{process.log()[-3000:]}"
        wait_until(f"{groups} ready groups", ready, seconds)

    # ---- requests

    def post(self, path, body, **kw):
        return http("POST", self.router_url + path, body, **kw)

    def get(self, path, **kw):
        return http("GET", self.router_url + path, **kw)


def serve(cluster, *flags, model_dir=None, port=None, env=None):
    """`bora serve` beside the cluster's other processes; returns the process with its url."""
    port = port or free_port()
    process = cluster.spawn("serve", [BORA, "serve", "--model", model_dir or cluster.model_dir, "--port", port, *flags],
                            {"XDG_STATE_HOME": str(cluster.path / "state"), **(env or {})})
    process.url = f"http://127.0.0.1:{port}"
    wait_until("bora serve is ready", lambda: process.running() and http("GET", process.url + "/ready")[0] == 200)
    cluster.router_url = process.url
    return process


SIGSTOP, SIGCONT = signal.SIGSTOP, signal.SIGCONT

"""The script that fetches a checkpoint, run as the chart's init containers run it, against a hub on the loopback interface that fails as real ones do."""

import contextlib
import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from chart import CHART, named, parse, render_text, run

SCRIPT = CHART / "files" / "scripts" / "fetch_model.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def blob(data):
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    """A Hugging Face. `state.fault(path, count)` says what is wrong with a request: nothing, `cut` (broken off half-way), `drip` (a byte at a time),
    `page` (not the hub's answer), or a status with its headers."""

    state = None

    def do_GET(self):
        state = self.state
        state.asked.append((self.path, self.headers.get("Range"), self.headers.get("Authorization"), time.monotonic()))
        fault = state.fault(self.path, sum(path == self.path for path, *_ in state.asked))
        if isinstance(fault, tuple):
            status, headers = fault
            return self.respond(b"", status, headers)
        if fault == "page":
            return self.respond(b"<html>sign in to the proxy</html>")
        if "/tree/" in self.path:
            entries = [{"type": "directory", "path": "sub", "oid": "x", "size": 0}]
            for path, data in state.files.items():
                large = len(data) > 1000
                entries.append({"type": "file", "path": path, "size": len(data), "oid": blob(data), **({"lfs": {"oid": hashlib.sha256(data).hexdigest()}} if large else {})})
            # by pages, as the real one
            if "cursor" not in self.path:
                return self.respond(json.dumps(entries[:2]).encode(), headers={"Link": f'<http://elsewhere{self.path}&cursor=2>; rel="next"'})
            return self.respond(json.dumps(entries[2:]).encode())
        data = state.files.get(re.sub(r"^/org/model/resolve/[^/]+/", "", self.path))
        if data is None:
            return self.respond(b"", 404)
        begin = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        return self.respond(data[begin:], 206 if begin else 200, fault=fault)

    def respond(self, data, status=200, headers=(), fault=None):
        self.send_response(status)
        self.send_header("content-length", len(data))
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            if fault == "cut":
                self.wfile.write(data[: len(data) // 3])
            elif fault == "drip":
                for number in range(len(data)):
                    self.wfile.write(data[number : number + 1])
                    time.sleep(0.02)
            else:
                self.wfile.write(data)

    def log_message(self, *_):
        pass


class Running:
    """A hub on a port of its own, and what it was asked."""

    def __init__(self):
        self.files = {"config.json": b'{"a": 1}', "model-00001.safetensors": os.urandom(300_000), "sub/tokenizer.json": b"{}", "consolidated.bin": b"not wanted"}
        self.asked, self.fault = [], lambda path, count: None
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), {"state": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub():
    running = Running()
    yield running
    with contextlib.suppress(OSError):
        running.stop()


def start(hub, to, *more, revision="main"):
    environment = {"PATH": os.environ["PATH"], "HF_TOKEN": "secret", "FETCH_FIRST_PAUSE": "0.005"}
    words = [sys.executable, SCRIPT, "--endpoint", hub.url, "--repository", "org/model", "--revision", revision, "--to", to, "--include=*.json", "--include=model*", *more]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def fetch(hub, to, *more, revision="main"):
    pod = start(hub, to, *more, revision=revision)
    output = pod.communicate(timeout=60)[0]
    return pod.returncode, output


def content(to):
    return {path: (to / path).read_bytes() for path in ("config.json", "model-00001.safetensors", "sub/tokenizer.json")}


def wanted(hub):
    return {path: data for path, data in hub.files.items() if path != "consolidated.bin"}


def test_a_model_is_fetched_whole_by_one_of_two_pods(hub, tmp_path):
    hub.fault = lambda path, count: "cut" if "safetensors" in path and count == 1 else None
    documents = parse(render_text(sets=[
        'models={"m": {}}', 'download.kind="huggingFace"', 'download.huggingFace.repository="org/model"', f'download.huggingFace.endpoint="{hub.url}"']))
    (init,) = named(documents, "StatefulSet", "bora-m")["spec"]["template"]["spec"]["initContainers"]
    (tmp_path / "fetch_model.py").write_text(named(documents, "ConfigMap", "bora-scripts")["data"]["fetch_model.py"])
    words = [word.replace("/scripts", str(tmp_path)).replace("/models/m", str(tmp_path / "model")) for word in init["command"][1:]]
    environment = {"PATH": os.environ["PATH"], "HF_TOKEN": "secret", "FETCH_FIRST_PAUSE": "0.05"}
    pods = [subprocess.Popen([sys.executable, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    outputs = [pod.communicate(timeout=60)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], outputs
    assert content(tmp_path / "model") == wanted(hub)
    assert not (tmp_path / "model" / "consolidated.bin").exists() and not list((tmp_path / "model").rglob("*.partial"))
    assert "bytes=100000-" in {byte_range for _, byte_range, *_ in hub.asked}, "a broken transfer resumes where it ended"
    assert sum("there already" in output for output in outputs) == 1 and {token for _, _, token, _ in hub.asked} == {"Bearer secret"}
    # a router takes no weights
    (init,) = named(documents, "Deployment", "bora-router")["spec"]["template"]["spec"]["initContainers"]
    assert "--include=*.json" in init["command"] and not any("safetensors" in word for word in init["command"])
    volumes = named(documents, "Deployment", "bora-router")["spec"]["template"]["spec"]["volumes"]
    assert {"name": "model-m", "emptyDir": {"sizeLimit": "1Gi"}} in volumes


AWAY = {
    "no server": "stop", "an error": (503, {}), "too many requests": (429, {"Retry-After": "3600"}), "another's page": "page",
    "a token that is refused": (401, {}), "a repository that is gone": (404, {}),
}


@pytest.mark.parametrize("away", AWAY)
def test_a_pod_starts_with_its_files_if_the_hub_is_away(away, hub, tmp_path):
    assert fetch(hub, tmp_path / "m")[0] == 0
    files = wanted(hub)
    if AWAY[away] == "stop":
        hub.stop()
    else:
        hub.fault = lambda path, count: AWAY[away]
    began = time.monotonic()
    status, output = fetch(hub, tmp_path / "m", "--timeout=30")
    assert status == 0 and "starting with the files that were fetched before" in output, output
    assert time.monotonic() - began < 25 and content(tmp_path / "m") == files
    # a set that is not whole is no reason to start
    (tmp_path / "m" / "sub" / "tokenizer.json").unlink()
    status, output = fetch(hub, tmp_path / "m", "--timeout=2")
    assert status != 0 and "list of files" in output, output


def test_a_fixed_commit_asks_nobody(hub, tmp_path):
    assert fetch(hub, tmp_path / "m", revision=COMMIT)[0] == 0
    hub.asked.clear()
    assert fetch(hub, tmp_path / "m", revision=COMMIT)[0] == 0 and not hub.asked
    # another choice of the same repository is another set
    assert fetch(hub, tmp_path / "m", "--include=consolidated*", revision=COMMIT)[0] == 0 and (tmp_path / "m" / "consolidated.bin").exists()


def test_retry_after_is_waited_for(hub, tmp_path):
    later = lambda: time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
    for header in (lambda: "1", later):
        hub.asked.clear()
        hub.fault = lambda path, count, header=header: (429, {"Retry-After": header()}) if "config.json" in path and count == 1 else None
        target = tmp_path / f"m{len(list(tmp_path.iterdir()))}"
        status, output = fetch(hub, target)
        assert status == 0, output
        first, second = (at for path, _, _, at in hub.asked if "config.json" in path)
        assert second - first > 0.9, output
    # longer than all may take: it fails at once and says so
    hub.fault = lambda path, count: (503, {"Retry-After": "600"})
    began = time.monotonic()
    status, output = fetch(hub, tmp_path / "none", "--timeout=60")
    assert status != 0 and "beyond the 60 s" in output and time.monotonic() - began < 20, output


def test_a_download_takes_no_longer_than_it_may(hub, tmp_path):
    hub.fault = lambda path, count: "drip" if "safetensors" in path else None
    began = time.monotonic()
    status, output = fetch(hub, tmp_path / "m", "--timeout=1")
    assert status != 0 and "not done within 1 s" in output and time.monotonic() - began < 20, output
    # so does a pod that waits for another one
    first = start(hub, tmp_path / "w", "--timeout=60")
    try:
        while not (tmp_path / "w" / "model-00001.safetensors.partial").exists():
            assert first.poll() is None
            time.sleep(0.01)
        status, output = fetch(hub, tmp_path / "w", "--timeout=1")
        assert status != 0 and "waiting for the pod that fetches" in output, output
    finally:
        first.kill()
        first.communicate()


def test_what_will_not_pass_is_an_error_at_once(hub, tmp_path):
    hub.fault = lambda path, count: (404, {}) if "/tree/" in path else None
    began = time.monotonic()
    status, output = fetch(hub, tmp_path / "m")
    assert status != 0 and "HTTP 404" in output and time.monotonic() - began < 20, output


def test_a_new_revision_replaces_the_old_one_as_a_set(hub, tmp_path):
    assert fetch(hub, tmp_path / "m")[0] == 0
    old = wanted(hub)
    # of the same size, and small: only its digest differs
    hub.files["config.json"] = b'{"a": 2}'
    hub.files["model-00001.safetensors"] = os.urandom(300_000)
    hub.fault = lambda path, count: (500, {}) if "safetensors" in path else None
    status, output = fetch(hub, tmp_path / "m")
    assert status == 0 and "starting with the files" in output and content(tmp_path / "m") == old, "half of a new set beside half of an old one"
    hub.fault = lambda path, count: None
    status, output = fetch(hub, tmp_path / "m")
    assert status == 0 and content(tmp_path / "m") == wanted(hub), output


def test_a_directory_that_can_not_be_written_serves_if_it_is_whole(hub, tmp_path):
    assert fetch(hub, tmp_path / "m")[0] == 0
    lock = tmp_path / "m" / ".bora-fetch.lock"
    lock.unlink()
    # as on a file system that is mounted for reading: the lock can't be taken
    lock.mkdir()
    status, output = fetch(hub, tmp_path / "m")
    assert status == 0 and "starting with the files" in output, output
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / ".bora-fetch.lock").mkdir()
    assert fetch(hub, tmp_path / "n")[0] != 0


def copy(source, to, seconds="30", *more):
    """The container that copies from object storage, with the real rclone: a folder stands for the bucket."""
    documents = parse(render_text(sets=['models={"m": {}}', 'download.kind="objectStore"', f'download.objectStore.source="{source}"', f"download.timeoutSeconds={seconds}",
                                       'etcd.builtin.tls={"source": "existing", "existingSecret": "given"}']))
    (init,) = named(documents, "StatefulSet", "bora-m")["spec"]["template"]["spec"]["initContainers"]
    script = to.with_suffix(".sh")
    script.write_text(named(documents, "ConfigMap", "bora-scripts")["data"]["fetch_objects.sh"])
    words = [word.replace("/scripts/fetch_objects.sh", str(script)).replace("/models/m", str(to)) for word in init["command"]]
    began = time.monotonic()
    ended = run(*words, *more, env={"PATH": os.environ["PATH"], "RCLONE_CONFIG": str(to.with_suffix(".conf")), "HOME": str(to.parent)})
    return ended.returncode, ended.stdout + ended.stderr, time.monotonic() - began


def test_object_storage_is_copied_and_a_pod_starts_with_its_files_if_it_is_away(hub, tmp_path):
    bucket, to = tmp_path / "bucket", tmp_path / "m"
    for path, data in hub.files.items():
        (bucket / path).parent.mkdir(parents=True, exist_ok=True)
        (bucket / path).write_bytes(data)
    status, output, _ = copy(bucket, to)
    assert status == 0 and "4 files are in" in output and content(to) == wanted(hub), output
    bucket.rename(tmp_path / "away")
    status, output, _ = copy(bucket, to)
    assert status == 0 and "starting with the files that were copied before" in output, output
    # a set that is not whole is no reason to start
    (to / "config.json").unlink()
    status, output, _ = copy(bucket, to)
    assert status != 0 and "can't be listed" in output, output
    # a changed set, copied half: the old one is not whole any more
    (tmp_path / "away").rename(bucket)
    assert copy(bucket, to)[0] == 0
    (bucket / "config.json").write_bytes(b'{"a": 2222}')
    status, output, _ = copy(bucket, to, "30", "--max-transfer=1B", "--cutoff-mode=hard")
    assert status != 0 and "could not be copied" in output, output
    # a router takes no weights
    status, output, _ = copy(bucket, tmp_path / "router", "30", "--exclude=*.safetensors")
    assert status == 0 and not (tmp_path / "router" / "model-00001.safetensors").exists() and (tmp_path / "router" / "config.json").exists(), output


def test_object_storage_that_does_not_respond_is_given_up(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        status, output, seconds = copy(f":http,url='http://127.0.0.1:{silent.getsockname()[1]}':", tmp_path / "m", "2")
    assert status != 0 and "can't be listed" in output and seconds < 20, output


@pytest.mark.parametrize("path", ["../outside", "/etc/outside"])
def test_no_file_leads_out_of_the_directory(path, hub, tmp_path):
    hub.files = {"config.json": b"{}", f"{path}.json": b"{}"}
    status, output = fetch(hub, tmp_path / "m")
    assert status != 0 and "leads out of the directory" in output, output

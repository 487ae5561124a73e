"""A log that cannot be written must not hurt: blocked pipes, full disks, closed pipes; and what each signal does."""

import os
import signal
import subprocess
import time

import pytest

from cluster import BORA, Cluster, free_port, http, wait_until

CHAT = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 2, "temperature": 0}


class Server:
    """`bora serve` with a standard error of our choice; every request leaves lines at this log level."""

    def __init__(self, cluster, stderr, env=None):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [BORA, "serve", "--model", cluster.model_dir, "--tokenizer", cluster.tokenizer, "--served-model-name", "tiny", "--device", "cpu", "--port", port]
        environment = {**os.environ, "BORA_LOG": "trace", **(env or {})}
        self.child = subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, env=environment)
        wait_until("ready", lambda: self.child.poll() is None and http("GET", self.url + "/ready")[0] == 200)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()

    def completes(self):
        return http("POST", self.url + "/v1/completions", CHAT, timeout=30)[0] == 200

    def lost_lines(self):
        text = http("GET", self.url + "/metrics")[2]
        return max(float(line.split()[1]) for line in text.splitlines() if line.startswith("bora_log_lines_lost_total"))

    def ends_at_sigterm(self):
        self.child.terminate()
        return self.child.wait(20) == 0


@pytest.fixture(scope="module")
def cluster():
    with Cluster(registry="memory") as cluster:
        yield cluster


def test_serves_while_nobody_reads_the_log(cluster):
    """A pipe holds 64 KiB and the queue 4 MiB: the test writes more than both together."""
    reader, writer = os.pipe()
    with Server(cluster, writer) as server:
        os.close(writer)
        end = time.monotonic() + 60
        while server.lost_lines() == 0 and time.monotonic() < end:
            assert server.completes()
        assert server.lost_lines() > 0, "more was logged than the pipe and the queue hold"
        assert http("GET", server.url + "/health")[0] == 200
        # the reader recovers: the loss is reported
        os.set_blocking(reader, False)
        seen = b""

        def reported():
            nonlocal seen
            try:
                seen = seen[-1000:] + os.read(reader, 1 << 20)
            except BlockingIOError:
                server.completes()
            return b"log lines were lost" in seen

        wait_until("the report of the loss", reported, every=0.001)
        assert server.completes()
    os.close(reader)


def test_ends_at_sigterm_while_nobody_reads_the_log(cluster):
    reader, writer = os.pipe()
    with Server(cluster, writer) as server:
        os.close(writer)
        end = time.monotonic() + 60
        while server.lost_lines() == 0 and time.monotonic() < end:
            assert server.completes()
        assert server.ends_at_sigterm()
    os.close(reader)


def test_serves_with_a_full_disk(cluster):
    with open("/dev/full", "wb") as full, Server(cluster, full) as server:
        assert server.completes() and server.completes()
        assert server.lost_lines() > 0
        assert server.ends_at_sigterm()


def test_serves_with_a_closed_pipe(cluster):
    reader, writer = os.pipe()
    with Server(cluster, writer) as server:
        os.close(writer)
        os.close(reader)
        assert server.completes() and server.completes()
        assert server.lost_lines() > 0
        assert server.ends_at_sigterm()


def test_an_error_at_the_start_needs_no_standard_error(cluster):
    with open("/dev/full", "wb") as full:
        outcome = subprocess.run([BORA, "serve", "--model", "/nowhere"], stderr=full, timeout=60)
    assert outcome.returncode == 1


def test_signals_that_ask_for_nothing_do_no_harm(cluster):
    with Server(cluster, subprocess.DEVNULL) as server:
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGHUP):
            server.child.send_signal(number)
            time.sleep(0.1)
            assert server.completes()
        assert server.ends_at_sigterm()


def test_sighup_applies_a_new_log_level_and_new_keys():
    with Cluster() as cluster:
        cluster.start_etcd()
        keys = cluster.path / "keys.yaml"
        digest = "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"  # of "key"
        keys.write_text("tenants: [{name: a, keys: [{sha256: %s}]}]" % digest)
        router = cluster.start_router(access={"keys": str(keys)})
        worker = cluster.start_digest("g")
        config = cluster.path / "router.yaml"
        config.write_text(config.read_text().replace('"cluster":', '"log": {"level": "debug"}, "cluster":'))
        router.signal(signal.SIGHUP)
        wait_until("the router says so", lambda: "SIGHUP: log level" in router.log())
        wait_until("debug lines", lambda: " DEBUG " in router.log() or http("GET", router.url + "/v1/models")[0] == 0)
        good = config.read_text()
        config.write_text(good.replace("debug", "loud"))
        router.signal(signal.SIGHUP)
        wait_until("the error is named", lambda: "nothing was reloaded" in router.log())
        assert f"{config}:" in router.log() and "`loud` is no level" in router.log()
        assert router.running()
        worker.signal(signal.SIGHUP)
        wait_until("the worker says so", lambda: "SIGHUP: log level" in worker.log())
        assert worker.running()

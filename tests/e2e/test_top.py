"""`bora top` beside a real router and real groups: as text, and on a real terminal (a pty)."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time

import pytest

from certificates import Authority
from cluster import BORA, FIXTURES, TOKENIZER_8K, Cluster, free_port, wait_until
from test_access import key_file

REQUEST = {"model": "tiny", "prompt": [1000, 1001, 1002], "max_tokens": 3}


@pytest.fixture(scope="module")
def fleet():
    # groups of one model have the same weights, and a fake has none
    models = [{"name": name, "path": str(FIXTURES / "tiny_text"), "tokenizer": str(TOKENIZER_8K)} for name in ("tiny", "pretended")]
    with Cluster(models=models) as cluster:
        cluster.start_etcd()
        cluster.start_router()
        cluster.start_worker("pair", model="tiny", size=2)
        cluster.start_worker("pretender", model="pretended", device="fake", max_model_len=4096)
        cluster.wait_ready(2)
        cluster.address = cluster.router_url.removeprefix("http://")
        yield cluster


def top(*args, **kw):
    return subprocess.run([BORA, "top", *args], capture_output=True, text=True, timeout=60, **kw)


def test_once_writes_everything_as_text(fleet):
    process = subprocess.Popen([BORA, "top", fleet.address, "--once", "--interval", "2"], stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        assert fleet.post("/v1/completions", REQUEST)[0] == 200
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"at {fleet.address}: 2 of 2 groups ready" in text
    assert float(re.search(r"requests ([\d.]+)/s", text)[1]) > 0 and re.search(r"answer tokens [1-9]\d*/s", text)
    assert re.search(r"first token p50 [\d.]+ m?s p95 [\d.]+ m?s", text)
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("GROUP") and "QUEUE s" in line).split()
    groups = {line.split()[0]: line.split() for line in lines if line.startswith(("pair ", "pretender ")) and " ready " in line}
    assert groups["pair"][1:5] == ["tiny", "ready", "cpu", "2"] and groups["pretender"][3] == "fake"
    assert len(groups["pair"]) == len(head) - 3, "QUEUE s, KV % and CACHED % are two words each"
    ranks = [line.split() for line in lines if re.match(r"pair +[01] ", line)]
    assert [rank[1] for rank in ranks] == ["0", "1"] and all(int(rank[4]) > 0 for rank in ranks), text


def test_a_pipe_gets_a_text_for_each_look_and_may_close(fleet):
    answer = top(fleet.address, "--interval", "0.2", "--count", "3", "--no-ranks")
    assert answer.returncode == 0 and answer.stdout.count("groups ready") == 3
    assert "HOST" not in answer.stdout
    piped = subprocess.run(f"{BORA} top {fleet.address} --interval 0.1 | head -n 1", shell=True, capture_output=True, text=True, timeout=30)
    assert "groups ready" in piped.stdout and "panicked" not in piped.stderr


def test_a_wrong_address_is_named(fleet):
    nobody = top("127.0.0.1:1", "--once")
    assert nobody.returncode != 0 and "127.0.0.1:1" in nobody.stderr
    etcd = top(f"127.0.0.1:{fleet.etcd_port}", "--once")
    assert etcd.returncode != 0 and re.search("is it a router|/groups|/version", etcd.stderr), etcd.stderr
    assert top(fleet.address, "--once", "--interval", "0").returncode != 0


def test_a_router_with_keys_and_tls(tmp_path):
    authority, stranger = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs", "stranger")
    certificate, private = authority.issue("api", into=tmp_path)
    keys = tmp_path / "keys.yaml"
    keys.write_text(key_file({"people": ({}, ["top-key"])}))
    with Cluster(registry="static") as cluster:
        cluster.etcd_port, port = free_port(), free_port()
        cluster.start_worker("pretender", device="fake", port=cluster.etcd_port)
        cluster.sections = {"http": {"tls": {"certificate_file": str(certificate), "key_file": str(private)}}}
        cluster.spawn("router", [BORA, "router", "--config", cluster.config("router", router={"access": {"keys": str(keys)}}), "--port", port])
        look = ["--once", "--interval", "0.2"]

        def seen():
            answer = top(f"https://localhost:{port}", *look, "--ca-file", authority.certificate, "--api-key", "top-key")
            return "1 of 1 groups ready" in answer.stdout and answer
        wait_until("the group is seen", seen, every=0.3)
        assert "top-key" not in seen().stdout
        # a file of authorities means TLS, and the key may come by the environment
        environment = {**os.environ, "BORA_API_KEY": "top-key"}
        assert top(f"localhost:{port}", *look, "--ca-file", authority.certificate, env=environment).returncode == 0
        for words, address, arguments in [
            (["401", "--api-key"], f"https://localhost:{port}", ["--ca-file", authority.certificate]),
            (["401", "--api-key"], f"https://localhost:{port}", ["--ca-file", authority.certificate, "--api-key", "another"]),
            (["UnknownIssuer"], f"https://localhost:{port}", ["--ca-file", stranger.certificate, "--api-key", "top-key"]),
            (["--ca-file"], f"http://localhost:{port}", ["--ca-file", authority.certificate]),
            (["absent.crt"], f"localhost:{port}", ["--ca-file", tmp_path / "absent.crt"]),
            (["localhost"], f"localhost:{port}", ["--api-key", "top-key"]),
        ]:
            refused = top(address, *look, *arguments)
            assert refused.returncode != 0 and all(word in refused.stderr for word in words), (words, refused.stderr)


def screen_of(master, seconds):
    """What the terminal was sent within some time, without colours and with each jump of the cursor as a space."""
    sent, end = b"", time.monotonic() + seconds
    while time.monotonic() < end and select.select([master], [], [], max(0, end - time.monotonic()))[0]:
        try:
            sent += os.read(master, 65536)
        except OSError:
            break
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", " ", sent.decode("utf-8", "replace"))


def test_on_a_terminal_it_fills_the_screen_and_leaves_it_as_it_was(fleet):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    before = termios.tcgetattr(slave)
    child = subprocess.Popen([BORA, "top", fleet.address, "--interval", "0.3"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                             preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), env={**os.environ, "TERM": "xterm-256color"})
    try:
        text = screen_of(master, 3)
        for word in ("groups ready", "GROUP", "pretender", "pair", "ready", "q quit"):
            assert word in text, (word, text)
        os.write(master, b"r")
        time.sleep(0.5)
        os.write(master, b"q")
        wait_until("it ends", lambda: child.poll() is not None, 10)
        assert child.returncode == 0
        assert termios.tcgetattr(slave) == before, "echo and line mode are back"
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
        os.close(master)
        os.close(slave)

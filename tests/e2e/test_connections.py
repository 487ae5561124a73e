"""Open files, audit lines and ports of real processes under clients that behave badly."""

import concurrent.futures
import http.client
import json
import socket
import time
import urllib.parse

import pytest

from cluster import BORA, Cluster, free_port, http as ask, limited, wait_until

STREAM = {"model": "fake", "prompt": [1000] * 8, "max_tokens": 40, "stream": True, "ignore_eos": True}
FILES = 160


def start_router(cluster, name, files, worker_address, **http_options):
    port, admin = free_port(), free_port()
    config = cluster.config(name, registry={"kind": "static", "endpoints": [worker_address]},
                            http={"port": port, "admin": f"127.0.0.1:{admin}", **http_options})
    process = cluster.spawn(name, limited(*files, BORA, "router", "--config", config))
    process.url, process.admin = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}"
    wait_until(f"{name} is ready", lambda: process.running() and ask("GET", process.admin + "/ready")[0] == 200)
    return process


@pytest.fixture(scope="module")
def group():
    with Cluster(model="fake", registry="memory", skip_tokenizer=True) as cluster:
        address = f"127.0.0.1:{free_port()}"
        worker = {"group": "g", "device": "fake", "listen": address, "kv_cache": {"blocks": 4096}, "max_model_len": 4096,
                  "fake": {"time_scale": 1}}
        static = {"kind": "static", "endpoints": [address]}
        cluster.spawn("worker", [BORA, "worker", "--config", cluster.config("worker", registry=static, worker=worker)])
        cluster.address = address
        yield cluster


def metric(url, name):
    text = ask("GET", url + "/metrics")[2]
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(name + " "))


def open_stream(url):
    where = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(STREAM), {"content-type": "application/json"})
    return connection, connection.getresponse()


def test_files_run_out_and_nothing_but_new_requests_is_refused(group):
    router = start_router(group, "narrow", (64, FILES), group.address)
    assert metric(router.admin, "process_max_fds") == FILES, "the soft limit is raised to the hard one"
    where = urllib.parse.urlsplit(router.url)
    streams = [open_stream(router.url) for _ in range(40)]
    assert all(response.status == 200 for _, response in streams)
    flood = []
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for _ in range(FILES * 2):
            connection = socket.create_connection((where.hostname, where.port), timeout=10)
            flood.append(connection)
        wait_until("files run out", lambda: metric(router.admin, 'bora_router_http_refusals_total{reason="connections"}') > 0)
        whole = pool.submit(lambda: [response.read() for _, response in streams])
        end = time.monotonic() + 3
        while time.monotonic() < end:
            for path in ("/health", "/ready", "/metrics"):
                assert ask("GET", router.admin + path, timeout=5)[0] == 200
            assert metric(router.admin, "process_open_fds") < FILES
        bodies = whole.result()
    for body in bodies:
        assert body.endswith(b"data: [DONE]\n\n") and body.count(b'"text"') >= 40, body[-300:]
    statuses = []
    for _ in range(3):
        status, headers, body = ask("POST", router.url + "/v1/completions", {**STREAM, "stream": False}, timeout=30)
        statuses.append(status)
        if status == 503:
            assert headers["retry-after"] and headers["connection"] == "close" and body["error"]["code"] == "unavailable"
    assert set(statuses) <= {200, 503}
    log = router.log()
    assert 1 <= log.count("connections are refused") <= 4 and "panicked" not in log, log[-3000:]
    for connection in flood:
        connection.close()
    wait_until("it serves again", lambda: ask("POST", router.url + "/v1/completions", {**STREAM, "stream": False})[0] == 200)
    assert router.stop() == 0


def test_ports_show_what_they_should(group):
    router = start_router(group, "plain", (1024, 4096), group.address)
    assert ask("GET", router.url + "/metrics")[0] == 404 and ask("GET", router.admin + "/metrics")[0] == 200
    evil = {"host": "evil.example"}
    for url, path in ((router.url, "/v1/models"), (router.url, "/health"), (router.admin, "/metrics"), (router.admin, "/groups")):
        status, _, body = ask("GET", url + path, headers=evil)
        assert status == 403 and body["error"]["code"] == "host_not_allowed", body
        status, _, body = ask("GET", url + path, headers={"origin": "https://evil.example"})
        assert status == 403 and body["error"]["code"] == "origin_not_allowed", body
    chosen = start_router(group, "chosen", (1024, 4096), group.address, metrics=True, allowed_hosts=["evil.example", "*.svc"],
                          allowed_origins=["*"])
    assert ask("GET", chosen.url + "/metrics")[0] == 200
    assert ask("GET", chosen.url + "/v1/models", headers=evil)[0] == 200
    status, headers, _ = ask("GET", chosen.admin + "/groups", headers={"host": "bora-admin.ns.svc:8001"})
    assert status == 200
    preflight = {"origin": "http://localhost:3000", "access-control-request-method": "POST",
                 "access-control-request-headers": "authorization,content-type"}
    status, headers, _ = ask("OPTIONS", chosen.url + "/v1/chat/completions", headers=preflight)
    assert status in (200, 204) and headers["access-control-allow-origin"] == "*"


def test_a_body_that_its_client_gives_up_has_a_line_with_a_status(group):
    router = start_router(group, "audited", (1024, 4096), group.address)
    where = urllib.parse.urlsplit(router.url)
    with socket.create_connection((where.hostname, where.port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                       b"x-request-id: given-up\r\ncontent-length: 1000\r\n\r\n{")
        wait_until("it is read", lambda: metric(router.admin, "bora_router_open_requests") == 1)
    line = wait_until("its line", lambda: next((line for line in router.log().splitlines() if "given-up" in line), None))
    assert "status=499" in line and 'outcome="cut off"' in line, line


def test_audit_lines_name_the_client_both_identifiers_the_group_and_the_first_token(group):
    router = start_router(group, "proxied", (1024, 4096), group.address, trusted_proxies=["127.0.0.0/8"])
    forwarded = {"x-forwarded-for": "192.0.2.9, 198.51.100.7", "x-request-id": "mine"}
    status, headers, _ = ask("POST", router.url + "/v1/completions", {**STREAM, "stream": False}, forwarded)
    own = headers["x-bora-request-id"]
    assert status == 200 and headers["x-request-id"] == "mine" != own
    line = wait_until("its line", lambda: audit_line(router, own))
    for field in ('client_request_id="mine"', "peer=127.0.0.1:", "client=198.51.100.7", 'group="g"', "completion_tokens=40"):
        assert field in line, (field, line)
    first, whole = (int(line.split(f" {name}=")[1].split()[0]) for name in ("first_token_milliseconds", "milliseconds"))
    assert 0 < first <= whole, line


def test_refusals_of_every_route_leave_an_audit_line(group):
    router = start_router(group, "refusing", (1024, 4096), group.address)
    for base, method, path, headers, expected in [
        (router.url, "GET", "/no/such/route", {}, 404),
        (router.url, "DELETE", "/v1/models", {}, 405),
        (router.url, "GET", "/v1/models", {"host": "evil.example"}, 403),
        (router.url, "GET", "/health", {"host": "evil.example"}, 403),
        (router.admin, "GET", "/groups", {"origin": "https://evil.example"}, 403),
        (router.admin, "POST", "/v1/completions", {}, 404),
    ]:
        status, answered, _ = ask(method, base + path, None, headers)
        assert status == expected, (method, path, status)
        line = wait_until("its line", lambda: audit_line(router, answered["x-bora-request-id"]))
        assert f'request="{method} {path}"' in line and f"status={expected}" in line and "peer=127.0.0.1:" in line, line
    where = urllib.parse.urlsplit(router.url)
    with socket.create_connection((where.hostname, where.port)) as client:
        client.sendall(b"no HTTP at all\r\n\r\n")
        head = client.makefile("rb").read().split(b"\r\n\r\n")[0].decode()
    own = next(line.split()[1] for line in head.splitlines() if line.startswith("x-bora-request-id"))
    assert "status=400" in wait_until("its line", lambda: audit_line(router, own))
    # probes that are as they should be leave none
    assert not any("GET /ready" in line for line in router.log().splitlines())


def audit_line(process, request_id):
    return next((line for line in process.log().splitlines() if "bora::audit" in line and f'request_id="{request_id}"' in line), None)


@pytest.mark.parametrize("key, value", [
    ("trusted_proxies", ["10.0.0.0/99"]), ("keep_alive_seconds", 0), ("read_timeout_seconds", -1), ("max_connections", 0), ("max_body_memory", "1MiB"),
    ("allowed_origins", ["chat.example"]), ("allowed_hosts", ["a/b"]), ("min_body_bytes_per_second", -1),
])
def test_values_that_can_not_work_are_named(tmp_path, key, value):
    import subprocess
    path = tmp_path / "bora.yaml"
    path.write_text(json.dumps({"http": {key: value}}))
    ended = subprocess.run([BORA, "check", "--config", path], capture_output=True, text=True)
    assert ended.returncode == 1 and (f"http.{key}" in ended.stderr or "bora.yaml:1" in ended.stderr), ended.stderr

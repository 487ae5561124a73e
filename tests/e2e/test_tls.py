"""TLS of the API, and mutual TLS between routers, leaders and followers, with certificates made by openssl."""

import http.client as http_client
import shutil
import socket
import ssl
import time
import urllib.error
import warnings

import pytest

from certificates import Authority
from cluster import BORA, Cluster, free_port, http, wait_until

ASK = {"model": "tiny", "prompt": [1000, 1001], "max_tokens": 2}


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """An authority that nobody trusts."""
    return Authority(tmp_path_factory.mktemp("tls"), "stranger")


def trusting(authority):
    return ssl.create_default_context(cafile=authority.certificate)


def static(cluster, port):
    cluster.registry, cluster.etcd_port = "static", port
    return cluster


# ---- the API


@pytest.fixture(scope="module")
def api(authority, tmp_path_factory):
    """A router that serves HTTPS, and plain HTTP on its admin port; no group."""
    directory = tmp_path_factory.mktemp("api")
    certificate, key = authority.issue("api", into=directory)
    with Cluster(registry="static") as cluster:
        port, admin = free_port(), free_port()
        cluster.sections = {"http": {"admin": f"127.0.0.1:{admin}", "tls": {"certificate_file": str(certificate), "key_file": str(key)}}}
        cluster.url, cluster.port, cluster.files = f"https://localhost:{port}", port, (certificate, key)
        cluster.spawn("router", [BORA, "router", "--config", cluster.config("router"), "--port", port])
        wait_until("the router is alive", lambda: http("GET", f"http://127.0.0.1:{admin}/health")[0] == 200)
        yield cluster


def test_the_api_speaks_tls_and_nothing_else(api, authority):
    status, headers, _ = http("GET", api.url + "/health", context=trusting(authority))
    assert status == 200 and headers["x-request-id"]
    # an error keeps its form
    status, _, body = http("POST", api.url + "/v1/completions", ASK, context=trusting(authority))
    assert status in (404, 503) and body["error"]["message"]
    with pytest.raises(urllib.error.URLError) as error:
        http("GET", f"https://127.0.0.1:{api.port}/health")
    assert "CERTIFICATE_VERIFY_FAILED" in str(error.value)
    with pytest.raises((OSError, http_client.HTTPException)):  # an alert in place of an answer
        http("GET", f"http://127.0.0.1:{api.port}/health")


def test_old_versions_are_refused_and_1_2_and_1_3_are_spoken(api, authority):
    for version, name in [(ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")]:
        context = trusting(authority)
        context.minimum_version = context.maximum_version = version
        with socket.create_connection(("127.0.0.1", api.port)) as plain, context.wrap_socket(plain, server_hostname="localhost") as stream:
            assert stream.version() == name
    context = trusting(authority)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", api.port)) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname="localhost")


def test_a_client_that_never_finishes_its_handshake_holds_nobody_up(api, authority):
    silent = [socket.create_connection(("127.0.0.1", api.port)) for _ in range(20)]
    try:
        for _ in range(5):
            assert http("GET", api.url + "/health", context=trusting(authority))[0] == 200
    finally:
        for one in silent:
            one.close()


def serial(api, authority):
    with socket.create_connection(("127.0.0.1", api.port)) as plain, trusting(authority).wrap_socket(plain, server_hostname="localhost") as stream:
        return stream.getpeercert()["serialNumber"]


def test_a_renewed_certificate_is_used_without_a_restart(api, authority, tmp_path):
    before = serial(api, authority)
    for new, old in zip(authority.issue("renewed", into=tmp_path), api.files):
        shutil.copy(new, old)
    wait_until("the new certificate is shown", lambda: serial(api, authority) != before, every=0.5)
    renewed = serial(api, authority)
    # files that can't be used leave what was in force, and say so
    api.files[1].write_text("no key")

    def told():
        # files are looked at when connections come
        assert serial(api, authority) == renewed
        return "a private key in PEM is expected" in api.processes[0].log()
    wait_until("the file that can't be used was seen", told, every=0.5)
    assert "tls certificates stay as they were" in api.processes[0].log()


def test_a_router_does_not_start_with_files_that_cannot_be_used(authority, tmp_path):
    certificate, key = authority.issue("good", into=tmp_path)
    _, other_key = authority.issue("other", into=tmp_path)
    cases = {
        str(tmp_path / "absent.crt"): (tmp_path / "absent.crt", key),
        "a certificate in PEM is expected": (key, key),
        "a private key in PEM is expected": (certificate, certificate),
        "KeyMismatch": (certificate, other_key),
    }
    for word, (certificate_file, key_file) in cases.items():
        with Cluster(registry="static") as cluster:
            cluster.sections = {"http": {"tls": {"certificate_file": str(certificate_file), "key_file": str(key_file)}}}
            process = cluster.spawn("router", [BORA, "router", "--config", cluster.config("router"), "--port", free_port()])
            assert process.wait_exit(60) != 0
            assert word in process.log() and "http.tls" in process.log(), process.log()


# ---- gRPC


def test_a_cluster_with_mutual_tls_answers(authority):
    """Two ranks in two processes and a router, all three with certificates of their own."""
    with Cluster() as cluster:
        cluster.start_etcd()
        health = free_port()
        cluster.sections = {"grpc": {"tls": authority.grpc("leader", role="worker")}}
        leader = cluster.start_worker("pair", ranks=[0], size=2, health=f"127.0.0.1:{health}")
        cluster.sections = {"grpc": {"tls": authority.grpc("follower", role="follower")}}
        cluster.start_worker("pair", ranks=[1], size=2)
        cluster.sections = {"grpc": {"tls": authority.grpc("router", role="router")}}
        cluster.start_router()
        cluster.wait_ready(1)
        status, headers, body = cluster.post("/v1/completions", ASK)
        assert status == 200 and headers["x-bora-group"] == "pair", body

        # what is on the wire is TLS: plain gRPC gets nothing
        host, port = leader.address.split(":")
        with socket.create_connection((host, int(port))) as plain:
            plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
            plain.settimeout(60)
            answer = plain.recv(64)
        assert answer[:1] in (b"", b"\x15"), answer  # closed, or a TLS alert
        # the health service alone is plain: an HTTP/2 SETTINGS frame comes back
        with socket.create_connection(("127.0.0.1", health)) as plain:
            plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
            plain.settimeout(60)
            assert plain.recv(64)[3:4] == b"\4"


@pytest.fixture(scope="module")
def guarded(authority):
    """A fake group that asks for certificates."""
    with Cluster() as cluster:
        port = free_port()
        static(cluster, port)
        cluster.sections = {"grpc": {"tls": authority.grpc("group", role="worker")}}
        cluster.group = cluster.start_worker("fake", device="fake", port=port)
        yield cluster


def router_of(cluster, name, tls):
    """A router of its own towards the group; (url, process)."""
    cluster.sections = {"grpc": {"tls": tls}} if tls else {}
    process = cluster.start_router(name)
    return process.url, process


def groups(url):
    return http("GET", url + "/groups")[2]["groups"]


def test_a_router_with_a_certificate_is_let_in(guarded, authority):
    url, _ = router_of(guarded, "good", authority.grpc("good-router", role="router"))
    guarded.wait_ready(1, url=url)
    assert http("POST", url + "/v1/completions", ASK)[0] == 200


@pytest.mark.parametrize("case", ["without a certificate", "of another authority", "expired", "with plain text", "that trusts another authority"])
def test_a_router_is_refused(case, guarded, authority, stranger, request):
    name = request.node.callspec.id.replace(" ", "-")
    if case == "of another authority":
        tls = stranger.grpc(name, role="router", authority=authority)
    elif case == "expired":
        certificate, key = authority.expired(name, names="DNS:router.e2e.bora.internal")
        tls = {"ca_file": str(authority.certificate), "certificate_file": str(certificate), "key_file": str(key)}
    elif case == "that trusts another authority":
        tls = {**authority.grpc(name, role="router"), "ca_file": str(stranger.certificate)}
    else:
        tls = None
    if case == "without a certificate":
        host, port = guarded.group.address.split(":")
        context = trusting(authority)
        context.set_alpn_protocols(["h2"])
        with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain, server_hostname="worker.e2e.bora.internal") as stream:
            # with TLS 1.3 a client learns of the refusal when it reads
            with pytest.raises(ssl.SSLError) as error:
                stream.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                stream.recv(1)
        assert "CERTIFICATE_REQUIRED" in str(error.value).upper(), error.value
        return
    url, process = router_of(guarded, name, tls)
    time.sleep(3)
    assert not any(group["state"] == "ready" and group["watched"] for group in groups(url)), groups(url)
    assert http("POST", url + "/v1/completions", ASK)[0] in (404, 503)
    process.stop()
    guarded.processes.remove(process)
    # others are served on
    assert guarded.group.running()


def test_a_worker_whose_certificate_is_renewed_goes_on(guarded, authority, tmp_path):
    """The router's and the group's certificates change in place; new connections use them."""
    tls = authority.grpc("renewing", role="router")
    url, process = router_of(guarded, "renewing", tls)
    guarded.wait_ready(1, url=url)
    for new, old in zip(authority.issue("renewing-2", names="DNS:router.e2e.bora.internal", into=tmp_path), (tls["certificate_file"], tls["key_file"])):
        shutil.copy(new, old)
    # the group is started again: the router has to connect anew
    guarded.group.stop()
    guarded.group.start()  # under the same address
    wait_until("the group answers again", lambda: http("POST", url + "/v1/completions", ASK)[0] == 200, every=0.3)
    wait_until("the files were read again", lambda: "tls certificates were read again" in process.log())

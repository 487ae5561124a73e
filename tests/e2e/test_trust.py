"""Who may call what between the processes of a cluster: certificates with roles, identities, and plain text."""

import json
import os
import socket
import subprocess
import urllib.request

import grpc
import pytest

from certificates import Authority, role_name
from cluster import BORA, Cluster, free_port, http, serve, wait_until

CONTRACT = 2
GENERATE, WATCH = "/bora.v1.Inference/Generate", "/bora.v1.Inference/Watch"
STATUS, DRAIN, RESUME, FLUSH = (f"/bora.v1.Admin/{name}" for name in ("Status", "Drain", "Resume", "FlushCache"))
JOIN = "/bora.v1.Peers/Join"
ROLES = {GENERATE: ["router"], WATCH: ["router"], STATUS: ["router", "operator"], DRAIN: ["operator"], RESUME: ["operator"], FLUSH: ["operator"]}
ALL_ROLES = ["router", "worker", "follower", "operator"]


# ---- calls as a stranger makes them: bytes in, bytes out


def varint(number):
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def text(field, value):
    return bytes([field << 3 | 2]) + varint(len(value.encode())) + value.encode()


def identity(record, cluster="e2e", contract=CONTRACT, **other):
    """`bora.v1.Identity` of a record."""
    record = {**record, **other}
    return (b"\x08" + varint(contract) + text(2, cluster) + text(3, record["model"]) + text(4, record["group"])
            + b"\x28" + varint(record["epoch"]) + text(6, record["weight_fingerprint"]))


def channel(address, tls=None, key_of=None):
    """A channel with the certificate of a `grpc.tls` section; without one (`key_of` false), or in plain text."""
    if tls is None:
        return grpc.insecure_channel(address)
    read = lambda name: open(tls[name], "rb").read()  # noqa: E731
    own = {} if key_of is False else {"private_key": read("key_file"), "certificate_chain": read("certificate_file")}
    credentials = grpc.ssl_channel_credentials(root_certificates=read("ca_file"), **own)
    return grpc.secure_channel(address, credentials, [("grpc.ssl_target_name_override", role_name("worker"))])


def call(open_channel, method, expected=None, body=b"", count=1):
    """(code, details or the first messages)."""
    metadata = [("bora-expected-bin", expected)] if expected is not None else []
    try:
        responses = open_channel.stream_stream(method)(iter([body]), metadata=metadata, timeout=30)
        messages = []
        for message in responses:
            messages.append(message)
            if len(messages) == count:
                responses.cancel()
                break
        return grpc.StatusCode.OK, messages
    except grpc.RpcError as error:
        return error.code(), error.details()


def describe(open_channel):
    code, messages = call(open_channel, "/bora.v1.Inference/Describe")
    assert code == grpc.StatusCode.OK, messages
    return json.JSONDecoder().raw_decode(messages[0][messages[0].index(b"{"):].decode("utf-8", "replace"))[0]


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("trust"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("trust"), "stranger")


@pytest.fixture(scope="module")
def sections(authority):
    """A `grpc.tls` section of each role."""
    return {role: authority.grpc(f"the-{role}", role=role) for role in ALL_ROLES}


@pytest.fixture(scope="module")
def guarded(sections):
    """A fake group with mutual TLS and a router towards it."""
    with Cluster() as cluster:
        cluster.start_etcd()
        cluster.sections = {"grpc": {"tls": sections["worker"]}}
        cluster.health = free_port()
        cluster.group = cluster.start_worker("fake", device="fake", health=f"127.0.0.1:{cluster.health}")
        cluster.sections = {"grpc": {"tls": sections["router"]}}
        cluster.start_router()
        cluster.wait_ready(1)
        cluster.record = describe(channel(cluster.group.address, sections["router"]))
        yield cluster


@pytest.mark.parametrize("method", list(ROLES))
def test_a_method_takes_its_roles_and_no_other(method, guarded, sections, authority):
    expected = identity(guarded.record)
    refused = {role: sections[role] for role in ALL_ROLES if role not in ROLES[method]}
    refused["no role"] = authority.grpc("no-role", names="DNS:localhost,IP:127.0.0.1")
    refused["a wildcard"] = authority.grpc("wildcard", names="DNS:*.e2e.bora.internal")
    refused["another cluster"] = authority.grpc("of-another-cluster", role=ROLES[method][0], cluster="other")
    for who, tls in refused.items():
        code, details = call(channel(guarded.group.address, tls), method, expected)
        assert code == grpc.StatusCode.PERMISSION_DENIED, (who, code, details)
    if method != DRAIN:
        for role in ROLES[method]:
            code, details = call(channel(guarded.group.address, sections[role]), method, expected)
            assert code in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT), (role, code, details)


@pytest.mark.parametrize("method", list(ROLES))
def test_without_a_certificate_of_the_cluster_nothing_is_answered(method, guarded, sections, authority, stranger):
    expected, address = identity(guarded.record), guarded.group.address
    role = ROLES[method][0]
    for who, open_channel in {
        "plain text": channel(address),
        "no certificate": channel(address, sections[role], key_of=False),
        "another authority": channel(address, stranger.grpc(f"stranger-{role}", role=role, authority=authority)),
    }.items():
        code, details = call(open_channel, method, expected)
        assert code == grpc.StatusCode.UNAVAILABLE, (who, code, details)


@pytest.mark.parametrize("method", list(ROLES))
def test_another_identity_is_refused_and_learns_nothing(method, guarded, sections):
    open_channel = channel(guarded.group.address, sections[ROLES[method][0]])
    record = guarded.record
    wrong = {
        "cluster": identity(record, cluster="elsewhere"),
        "model": identity(record, model="another"),
        "group": identity(record, group="another"),
        "epoch": identity(record, epoch=record["epoch"] + 1),
        "weights": identity(record, weight_fingerprint="another"),
    }
    for part, expected in wrong.items():
        code, details = call(open_channel, method, expected)
        assert code == grpc.StatusCode.FAILED_PRECONDITION and "identity mismatch" in details, (part, code, details)
        for value in (record["model"], record["group"], str(record["epoch"]), "e2e"):
            assert value not in details, (part, details)
    # a peer of release 0.1 names nothing, and is told so by name
    for expected in (None, identity(record, contract=1)):
        code, details = call(open_channel, method, expected)
        assert code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAVAILABLE), code
        assert "peer speaks contract 1 (bora 0.1), this process speaks contract 2" in details


def test_a_group_is_drained_and_resumed_by_an_operator_and_both_are_audited(guarded, sections):
    open_channel = channel(guarded.group.address, sections["operator"])
    expected = identity(guarded.record, epoch=0, weight_fingerprint="")
    state = lambda: guarded.groups()["fake"]["state"]  # noqa: E731
    health = lambda: call(channel(f"127.0.0.1:{guarded.health}"), "/grpc.health.v1.Health/Check")[1]  # noqa: E731
    assert call(open_channel, DRAIN, expected)[0] == grpc.StatusCode.OK
    wait_until("the router knows", lambda: state() == "draining")
    assert guarded.post("/v1/completions", {"model": "tiny", "prompt": [1000, 1001], "max_tokens": 2})[0] == 503
    # not ready, and alive
    wait_until("it is not ready", lambda: health() == [b"\x08\x02"])
    assert guarded.group.running() and call(open_channel, STATUS, expected)[0] == grpc.StatusCode.OK
    metrics = guarded.get("/metrics")[2]
    assert 'bora_router_group_draining{model="tiny",group="fake"} 1' in metrics
    assert call(open_channel, RESUME, expected)[0] == grpc.StatusCode.OK
    wait_until("the router knows", lambda: state() == "ready")
    assert guarded.post("/v1/completions", {"model": "tiny", "prompt": [1000, 1001], "max_tokens": 2})[0] == 200
    audit = [line for line in guarded.group.log().splitlines() if "bora::audit" in line]
    for operation in ("drain", "resume"):
        mine = [line for line in audit if f'operation="{operation}"' in line]
        assert any("operator.e2e.bora.internal" in line and 'outcome="done"' in line for line in mine), audit


@pytest.mark.parametrize("seconds", [b"\x9a\x99\x99\x99\x99\x39\xef\x43", b"\x00\x00\x00\x00\x00\x00\xf0\x7f", b"\x00\x00\x00\x00\x00\x00\xf8\x7f", b"\x00\x00\x00\x00\x00\x00\xf0\xbf"])
def test_a_drain_of_a_time_that_cannot_be_is_refused(seconds, guarded, sections):
    code, details = call(channel(guarded.group.address, sections["operator"]), DRAIN, identity(guarded.record), b"\x09" + seconds)
    assert code == grpc.StatusCode.INVALID_ARGUMENT and "timeout_seconds" in details
    assert guarded.groups()["fake"]["state"] == "ready"


def test_a_process_whose_certificate_lacks_its_role_does_not_start(guarded, sections):
    for command, role, needed in [("router", "worker", "router"), ("worker", "router", "worker")]:
        guarded.sections = {"grpc": {"tls": sections[role]}}
        worker = {"group": "second", "device": "fake", "listen": f"127.0.0.1:{free_port()}"}
        config = guarded.config(f"{command}-as-{role}", worker=worker)
        flags = ["--port", free_port()] if command == "router" else []
        process = guarded.spawn(f"{command}-as-{role}", [BORA, command, "--config", config, *flags])
        assert process.wait_exit(60) != 0
        assert f"{needed}.e2e.bora.internal" in process.log() and "grpc.tls" in process.log(), process.log()
        guarded.processes.remove(process)


def test_a_forming_group_admits_its_own_and_says_nothing_to_others(sections, authority):
    with Cluster() as cluster:
        cluster.start_etcd()
        cluster.sections = {"grpc": {"tls": sections["worker"]}}
        peers = free_port()
        leader = cluster.start_worker("pair", ranks=[0], size=2, peers=f"127.0.0.1:{peers}")
        wait_until("it waits for its followers", lambda: "waiting for the followers" in leader.log())
        record = {"model": "tiny", "group": "pair", "epoch": 0, "weight_fingerprint": "guessed"}
        for role in ("router", "operator"):
            code, _ = call(channel(f"127.0.0.1:{peers}", sections[role]), JOIN, identity(record))
            assert code == grpc.StatusCode.PERMISSION_DENIED, role
        for wrong in (record, {**record, "group": "other"}, {**record, "model": "other"}):
            code, details = call(channel(f"127.0.0.1:{peers}", sections["follower"]), JOIN, identity(wrong))
            assert code == grpc.StatusCode.FAILED_PRECONDITION, details
            assert "identity mismatch" in details and "pair" not in details and "tiny" not in details, details
        code, details = call(channel(f"127.0.0.1:{peers}", sections["follower"]), JOIN)
        assert "contract 1" in details
        # connections that say nothing do not keep the group from forming
        idle = [socket.create_connection(("127.0.0.1", peers)) for _ in range(300)]
        cluster.sections = {"grpc": {"tls": sections["follower"]}}
        cluster.start_worker("pair", ranks=[1], size=2)
        cluster.sections = {"grpc": {"tls": sections["router"]}}
        cluster.start_router()
        cluster.wait_ready(1)
        for one in idle:
            one.close()


# ---- plain text


def test_plain_text_beyond_loopback_is_refused_unless_it_is_asked_for():
    with Cluster() as cluster:
        cluster.start_etcd()
        worker = {"group": "g", "device": "fake", "listen": f"127.0.0.1:{free_port()}", "advertise": "elsewhere.invalid:9000"}
        for command, sections, key in [
            ("worker", {"worker": worker}, "worker.advertise"),
            ("router", {"registry": {"kind": "static", "endpoints": ["elsewhere.invalid:9000"]}}, "registry.endpoints"),
        ]:
            process = cluster.spawn(command, [BORA, command, "--config", cluster.config(command, **sections)])
            assert process.wait_exit(60) != 0
            assert key in process.log() and "grpc.insecure" in process.log(), process.log()
            cluster.processes.remove(process)
        # a router without TLS does not follow a record to another host either
        cluster.start_router("strict")
        cluster.sections = {"grpc": {"insecure": True}}
        admin = free_port()
        process = cluster.start_worker("g", device="fake", advertise="elsewhere.invalid:9000", admin=f"127.0.0.1:{admin}")
        wait_until("it is refused", lambda: "group refused" in cluster.processes[1].log())
        assert cluster.groups() == {}
        assert "grpc.insecure" in process.log()
        assert "bora_grpc_insecure 1" in http("GET", f"http://127.0.0.1:{admin}/metrics")[2]


def listening(process):
    """The TCP ports that a process listens on."""
    inodes = set()
    for fd in os.listdir(f"/proc/{process.child.pid}/fd"):
        try:
            inodes.add(os.readlink(f"/proc/{process.child.pid}/fd/{fd}"))
        except OSError:
            pass
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in open(f"/proc/net/{table}").read().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                ports.add(int(fields[1].rsplit(":", 1)[1], 16))
    return ports


def test_serve_opens_no_port_for_grpc():
    with Cluster() as cluster:
        process = serve(cluster, "--device", "fake", "--skip-tokenizer-init", "--served-model-name", "tiny")
        assert cluster.post("/v1/completions", {"model": "tiny", "prompt": [1000, 1001], "max_tokens": 2})[0] == 200
        assert listening(process) == {int(process.url.rsplit(":", 1)[1])}
        port = free_port()
        other = serve(cluster, "--device", "fake", "--skip-tokenizer-init", "--served-model-name", "tiny", "--grpc-listen", f"127.0.0.1:{port}")
        assert port in listening(other)
        refused = cluster.spawn("refused", [BORA, "serve", "--model", cluster.model_dir, "--grpc-listen", "0.0.0.0:9000"])
        assert refused.wait_exit(60) != 0 and "loopback" in refused.log()


# ---- a recycled address


def test_a_recycled_address_serves_no_other_model():
    """A group is killed and another model's group takes its address, while the registry still lists the first one."""
    with Cluster() as cluster:
        models = [{"name": name, "path": cluster.model_dir, "skip_tokenizer_init": True} for name in ("first", "second")]
        cluster.models = models
        cluster.start_etcd()
        cluster.sections = {"registry": {"kind": "etcd", "endpoints": [f"127.0.0.1:{cluster.etcd_port}"], "lease_seconds": 60}}
        first = cluster.start_worker("one", device="fake", model="first")
        cluster.start_router(max_waiting_seconds=1)
        cluster.wait_ready(1)
        ask = lambda model: cluster.post("/v1/completions", {"model": model, "prompt": [1000, 1001], "max_tokens": 2})  # noqa: E731
        assert ask("first")[1]["x-bora-group"] == "one"
        first.kill()
        cluster.processes.remove(first)
        port = int(first.address.rsplit(":", 1)[1])
        cluster.start_worker("two", device="fake", model="second", port=port)
        wait_until("the second one serves", lambda: ask("second")[0] == 200)
        for _ in range(5):
            status, headers, body = ask("first")
            assert status == 503, (status, dict(headers), body)
        assert cluster.etcdctl("get", "--prefix", "--keys-only", "/bora/v1/e2e/groups/first").strip(), "the lease has not ended"
        metrics = cluster.get("/metrics")[2]
        assert "bora_router_identity_mismatches_total" in metrics and 'part="model"' in metrics
        # another group of the first model is taken
        cluster.start_worker("three", device="fake", model="first")
        wait_until("the first model is served again", lambda: ask("first")[0] == 200)


# ---- bora admin


def admin(cluster, *arguments):
    command = [BORA, "admin", "--router", cluster.router_url.removeprefix("http://"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_an_operator_lists_drains_and_resumes_groups(guarded, sections):
    tls = {"grpc": {"tls": sections["operator"]}}
    guarded.sections = tls
    config = guarded.config("operator")
    listed = admin(guarded, "groups")
    assert listed.returncode == 0 and "GROUP" in listed.stdout and " ready " in listed.stdout, listed
    drained = admin(guarded, "drain", "fake", "--config", config, "--json")
    assert drained.returncode == 0 and json.loads(drained.stdout)["unfinished"] == 0, drained
    wait_until("it is drained", lambda: json.loads(admin(guarded, "groups", "--json").stdout)[0]["state"] == "draining")
    resumed = admin(guarded, "resume", "fake", "--config", config)
    assert resumed.returncode == 0 and "takes requests again" in resumed.stdout, resumed
    wait_until("it is ready", lambda: guarded.groups()["fake"]["state"] == "ready")
    assert "knows no group" in admin(guarded, "drain", "another", "--config", config).stderr
    # a router's certificate is none of an operator, and plain text is not answered
    guarded.sections = {"grpc": {"tls": sections["router"]}}
    refused = admin(guarded, "drain", "fake", "--config", guarded.config("no-operator"))
    assert refused.returncode == 1 and "operator.e2e.bora.internal" in refused.stderr, refused
    assert admin(guarded, "drain", "fake").returncode == 1


def test_open_requests_are_listed_on_the_admin_port_alone():
    with Cluster(skip_tokenizer=True) as cluster:
        cluster.start_etcd()
        admin_port = free_port()
        cluster.sections = {"http": {"admin": f"127.0.0.1:{admin_port}"}}
        cluster.start_worker("slow", device="fake", fake={"decode_step_seconds": 0.2, "time_scale": 1.0})
        cluster.start_router()
        cluster.wait_ready(1)
        cluster.api_url, cluster.router_url = cluster.router_url, f"http://127.0.0.1:{admin_port}"
        body = {"model": "tiny", "prompt": [1000, 1001, 1002], "max_tokens": 200, "ignore_eos": True, "stream": True}
        request = urllib.request.Request(cluster.api_url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json", "x-request-id": "mine"})
        with urllib.request.urlopen(request, timeout=60):
            def listed():
                found = json.loads(admin(cluster, "requests", "--json").stdout)
                return [one for one in found if one["client_request_id"] == "mine" and one["completion_tokens"] > 0]
            mine = wait_until("it is listed", listed)[0]
        assert (mine["model"], mine["group"], mine["prompt_tokens"]) == ("tiny", "slow", 3), mine
        assert mine["age_seconds"] > 0 and mine["request"] == "POST /v1/completions"
        wait_until("it is not open any more", lambda: json.loads(admin(cluster, "requests", "--json").stdout) == [])
        assert http("GET", cluster.api_url + "/requests")[0] == 404

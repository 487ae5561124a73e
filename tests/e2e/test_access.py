"""Keys, tenants and limits at the real router: 401, 403, 429, and a key file that changes while it serves."""

import hashlib
import json
import pathlib
import shutil
import subprocess
import time

import openai
import pytest

from cluster import BORA, Cluster, http, serve, wait_until


def sha(key):
    return hashlib.sha256(key.encode()).hexdigest()


def key_file(tenants):
    lines = ["tenants:"]
    for name, (limits, keys) in tenants.items():
        lines.append(f"- name: {name}")
        lines += [f"  {field}: {value}" for field, value in limits.items()]
        lines.append("  keys: [" + ", ".join(f"{{name: {name}-{i}, sha256: {sha(key)}}}" for i, key in enumerate(keys)) + "]")
    return "\n".join(lines) + "\n"


TENANTS = {
    "free": ({}, ["free-key"]),
    "slow": ({"requests_per_minute": 2}, ["slow-key"]),
    "narrow": ({"max_context": 20}, ["narrow-key"]),
    "elsewhere": ({"models": "[large]"}, ["elsewhere-key"]),
    "metered": ({"tokens_per_minute": 1000}, ["metered-key"]),
}
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.write_text(key_file(TENANTS))
    with Cluster(registry="memory") as cluster:
        serve(cluster, "--served-model-name", "tiny", "--tokenizer", cluster.tokenizer, "--device", "cpu", "--num-kv-blocks", "64",
              "--api-key-file", path)
        cluster.key_path = path
        yield cluster


def ask(cluster, key=None, **more):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return http("POST", cluster.router_url + "/v1/chat/completions", {**ASK, **more}, headers)


def test_without_a_key_nothing_but_probes_is_answered(guarded):
    status, headers, body = ask(guarded)
    assert status == 401 and body["error"]["code"] == "missing_api_key" and headers["x-request-id"]
    assert ask(guarded, "wrong")[0] == 401
    for path in ("/v1/models", "/v1/models/tiny"):
        assert http("GET", guarded.router_url + path)[0] == 401
    assert http("POST", guarded.router_url + "/tokenize", {"prompt": "a"})[0] == 401
    for path in ("/health", "/ready", "/metrics", "/version"):
        assert http("GET", guarded.router_url + path)[0] == 200


def test_a_key_opens_everything_it_may(guarded):
    client = openai.OpenAI(base_url=guarded.router_url + "/v1", api_key="free-key", max_retries=0)
    assert client.chat.completions.create(**ASK).usage.completion_tokens <= 4
    assert [model.id for model in client.models.list()] == ["tiny"]
    status, _, _ = http("POST", guarded.router_url + "/tokenize", {"prompt": "a"}, {"x-api-key": "free-key"})
    assert status == 200


def test_what_a_tenant_may_not_is_403(guarded):
    status, _, body = ask(guarded, "elsewhere-key")
    assert status == 403 and body["error"]["type"] == "permission_error", body
    status, _, body = ask(guarded, "narrow-key", messages=[{"role": "user", "content": "word " * 100}])
    assert status == 403 and "20 tokens" in body["error"]["message"]
    assert ask(guarded, "narrow-key")[0] == 200


def until_refused(ask_once, a_minute, most=20):
    """Asks until it is refused for its rate; (granted answers, the refusal). However slow the machine is: what was granted is at most a
    minute's worth and what came back meanwhile."""
    granted, began = [], time.monotonic()
    for _ in range(most):
        answer = ask_once()
        if answer[0] == 429:
            assert a_minute <= len(granted) <= a_minute * (1 + (time.monotonic() - began) / 60)
            return granted, answer
        assert answer[0] == 200, answer
        granted.append(answer)
    raise AssertionError(f"{most} requests were granted")


def test_requests_a_minute(guarded):
    granted, (_, headers, body) = until_refused(lambda: ask(guarded, "slow-key"), 2)
    for _, answered, _ in granted:
        assert answered["x-ratelimit-limit-requests"] == "2" and int(answered["x-ratelimit-remaining-requests"]) <= 1
        assert answered["x-ratelimit-reset-requests"].endswith("s")
    assert body["error"]["code"] == "rate_limit_exceeded" and 1 <= int(headers["retry-after"]) <= 30
    assert headers["x-ratelimit-remaining-requests"] == "0"
    client = openai.OpenAI(base_url=guarded.router_url + "/v1", api_key="slow-key", max_retries=0)
    with pytest.raises(openai.RateLimitError):
        for _ in range(20):
            client.chat.completions.create(**ASK)


def test_tokens_are_settled_on_real_use(guarded):
    """A bucket of 1,000 tokens a minute gets 17 back in a second: what takes most of it can't be granted twice by waiting a while."""
    def large():
        # reserves nearly everything and uses little of it
        return ask(guarded, "metered-key", max_tokens=900, stop=["e", "a", "i", "o", " "])

    status, headers, body = large()
    assert status == 200 and body["usage"]["total_tokens"] < 100, body
    assert headers["x-ratelimit-limit-tokens"] == "1000"
    for _ in range(3):
        # without what was given back this would take most of a minute each time
        wait_until("what was not used is given back", lambda: large()[0] == 200, seconds=25)

    def long():
        return ask(guarded, "metered-key", messages=[{"role": "user", "content": "word " * 450}], max_tokens=1)

    # the prompt itself is counted, and used up
    began = time.monotonic()
    used, granted = 0, 0
    while (answer := long())[0] == 200:
        used, granted = used + answer[2]["usage"]["total_tokens"], granted + 1
        assert answer[2]["usage"]["total_tokens"] > 400 and used <= 1000 * (1 + (time.monotonic() - began) / 60)
    assert answer[0] == 429 and granted >= 1
    assert answer[2]["error"]["code"] == "rate_limit_exceeded" and 1 <= int(answer[1]["retry-after"]) <= 60


def test_the_key_file_is_read_again(guarded):
    process = guarded.processes[-1]
    assert ask(guarded, "new-key")[0] == 401
    guarded.key_path.write_text(key_file({**TENANTS, "new": ({}, ["new-key"])}))
    wait_until("the new key works", lambda: ask(guarded, "new-key")[0] == 200, every=0.3)
    # a broken file changes nothing
    guarded.key_path.write_text("tenants: 7\n")
    wait_until("the broken file was seen", lambda: "expected a sequence" in process.log(), every=0.3)
    assert "cannot reload api keys, keeping the previous ones" in process.log()
    assert ask(guarded, "new-key")[0] == 200 and ask(guarded, "free-key")[0] == 200
    # a key that is taken out is refused
    guarded.key_path.write_text(key_file(TENANTS))
    wait_until("the key is gone", lambda: ask(guarded, "new-key")[0] == 401, every=0.3)
    log = process.log()
    for key in ("free-key", "slow-key", "new-key"):
        assert key not in log, "a secret in the log"
    # refused requests leave a line too, and none holds a prompt
    refused = [line for line in log.splitlines() if "bora::audit" in line and "missing_api_key" in line]
    assert refused and "refused" in refused[0] and "status=401" in refused[0]
    assert "Hello there" not in log
    assert "bora::audit" in log and "tenant=\"free\"" in log.replace("tenant=free", 'tenant="free"')


def can_be_alone():
    """Whether this machine gives a process a network of its own: there it may listen on all addresses, and nobody reaches it."""
    return shutil.which("ip") and shutil.which("unshare") and subprocess.run(["unshare", "--map-root-user", "--net", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_be_alone(), reason="needs a network namespace of its own")
@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("level", ["error", "off"])
def test_an_open_door_is_told_whatever_the_log_level(level, form, tmp_path):
    keys = tmp_path / "keys.yaml"
    keys.write_text(key_file(TENANTS))
    told = "ANYBODY WHO REACHES THIS PORT MAY USE THE MODELS"
    with Cluster(registry="static") as cluster:
        def log_of(name, host, **options):
            config = cluster.config(name, router=options, log={"level": level, "format": form}, http={"host": host, "port": 8000, "admin": "127.0.0.1:8001"})
            process = cluster.spawn(name, ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up; exec "$0" router --config "$1"', BORA, config])
            wait_until("it listens or ended", lambda: not process.running() or ":1F40" in listening(process), every=0.2)
            assert process.running(), process.log()
            process.stop(60)
            return process.log()

        log = log_of("open", "0.0.0.0")
        assert told in log
        if form == "json":
            assert any(json.loads(line).get("message", "").startswith(told) for line in log.splitlines()), "every line is JSON"
        assert told not in log_of("loopback", "127.0.0.1")
        assert told not in log_of("keys", "0.0.0.0", access={"keys": str(keys)})


def listening(process):
    """The sockets of the process's own network, as the kernel writes them: port 8000 is 1F40."""
    return pathlib.Path(f"/proc/{process.child.pid}/net/tcp").read_text()

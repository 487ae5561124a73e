"""The cluster secret in real processes: without it none starts, tenants see their own caches alone, and another secret is another cluster."""

import os
import stat
import subprocess

import pytest

from cluster import BORA, Cluster, http, new_secret, serve, wait_until
from test_access import key_file

TENANTS = {
    "one": ({}, ["key-one"]),
    "two": ({}, ["key-two"]),
    # the operator lets these two share
    "red": ({"cache_salt": "team"}, ["key-red"]),
    "blue": ({"cache_salt": "team"}, ["key-blue"]),
    # as another tenant's name, and as what a request may say
    "thief": ({"cache_salt": "one"}, ["key-thief"]),
}
PROMPT = " ".join(f"Line {number} of a file that every tenant has." for number in range(60))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys.write_text(key_file(TENANTS))
    with Cluster(registry="static") as cluster:
        cluster.key = "key-one"
        cluster.start_digest("only", port=cluster.etcd_port)
        cluster.routers = [cluster.start_router(name, access={"keys": str(keys)}) for name in ("first", "second")]
        for router in cluster.routers:
            cluster.wait_ready(1, url=router.url)
        yield cluster


def cached(cluster, key, text, router=0, **more):
    """Tokens of a prompt that were found in the cache."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 2, **more}
    status, _, answer = http("POST", cluster.routers[router].url + "/v1/chat/completions", body, {"authorization": f"Bearer {key}"})
    assert status == 200, answer
    return answer["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0)


def test_tenants_see_their_own_cache_alone_unless_they_name_a_shared_one(cluster):
    assert cached(cluster, "key-one", PROMPT) == 0
    own = cached(cluster, "key-one", PROMPT)
    assert own >= 256
    for key in ("key-two", "key-red", "key-thief"):
        assert cached(cluster, key, PROMPT) == 0, key
    assert cached(cluster, "key-blue", PROMPT) == own, "red and blue share by name"
    # a salt of the request's own divides a tenant's cache further, and leads nowhere else
    for salt in ("one", "two", "team"):
        assert cached(cluster, "key-two", PROMPT, cache_salt=salt) == 0, salt
        assert cached(cluster, "key-two", PROMPT, cache_salt=salt) == own, salt
    # the same for token IDs that are given as such
    prompt = list(range(1000, 1400))
    of_ids = lambda key: http("POST", cluster.routers[0].url + "/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 1},
                              {"authorization": f"Bearer {key}"})[2]["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0)
    assert (of_ids("key-one"), of_ids("key-two"), of_ids("key-one")) == (0, 0, 384)


def test_every_router_derives_the_same_salts(cluster):
    text = "Another " + PROMPT
    assert cached(cluster, "key-two", text, router=0) == 0
    assert cached(cluster, "key-two", text, router=1) >= 256
    assert cached(cluster, "key-one", text, router=1) == 0


def test_another_secret_is_refused_until_it_agrees(cluster):
    """Rotation: a new secret in the file, and what is restarted has it."""
    router = cluster.routers[1]
    metric = lambda: http("GET", f"{router.url}/metrics")[2]
    before = cluster.secret.read_text()
    router.stop()
    cluster.secret.write_text(os.urandom(32).hex())
    router.start()
    wait_until("the group is refused", lambda: "bora_router_refused_groups 1" in metric())
    assert "its cluster secret differs" in router.log()
    assert http("GET", f"{router.url}/ready")[0] == 503
    # the other one goes on
    assert cached(cluster, "key-one", PROMPT, router=0) >= 256
    router.stop()
    cluster.secret.write_text(before)
    router.start()
    cluster.wait_ready(1, url=router.url)
    assert cached(cluster, "key-one", PROMPT, router=1) >= 256


@pytest.mark.parametrize("command", ["router", "worker", "check"])
def test_a_process_of_a_cluster_wants_a_secret_that_is_one(command, tmp_path):
    with Cluster(registry="static") as cluster:
        config = cluster.config("one")
        outcome = lambda *flags: subprocess.run([BORA, command, "--config", config, *map(str, flags)], capture_output=True, text=True, timeout=60)
        config.write_text(config.read_text().replace('"cluster_secret_file"', '"cluster_secret_fil"'))
        assert "unknown field `cluster_secret_fil`" in outcome().stderr
        config.write_text("\n".join(line for line in config.read_text().splitlines() if "cluster_secret" not in line))
        missing = outcome()
        assert missing.returncode != 0 and "cluster_secret_file" in missing.stderr and "head -c 32 /dev/urandom | base64" in missing.stderr
        short = tmp_path / "short"
        short.touch(mode=0o600)
        short.write_text("secret\n")
        refused = outcome("--cluster-secret-file", short)
        assert refused.returncode != 0 and str(short) in refused.stderr and "at least 32 bytes" in refused.stderr
        exposed = new_secret(tmp_path / "exposed")
        exposed.chmod(0o602)
        refused = outcome("--cluster-secret-file", exposed)
        assert refused.returncode != 0 and str(exposed) in refused.stderr and "chmod 600" in refused.stderr
        assert exposed.read_text() not in refused.stderr


def test_serve_keeps_its_secret_for_itself():
    with Cluster(registry="memory") as cluster:
        process = serve(cluster, "--tokenizer", cluster.tokenizer, "--device", "cpu", "--num-kv-blocks", "16")
        path = cluster.path / "state" / "bora" / "cluster-secret"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        secret = path.read_text()
        assert len(secret.strip()) >= 32 and secret.strip() not in process.log()
        process.stop()
        path.chmod(0o640)
        process.start()
        assert process.wait_exit(30) != 0
        assert f"{path}: the cluster secret: mode 0640 lets others read or change it" in process.log()

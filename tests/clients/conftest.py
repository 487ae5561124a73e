"""One cluster for all clients: etcd, a router with API keys, a bora-demo group, two scripted groups of Devstral's shape that
answer by heart (`conversations.py`), one like them with a short context, and a slow group that echoes. None of it is a mock: a fake group is the real worker
without weights."""

import hashlib
import os
import pathlib
import shutil
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))

from cluster import FIXTURES, ROOT, Cluster  # noqa: E402

import conversations  # noqa: E402
import scripting  # noqa: E402

DEMO, SCRIPTED, SHORT, SLOW = "bora-demo", "devstral-small-2", "devstral-short", "slow-echo"
SHORT_CONTEXT = 98304
CARD_NAME = "mistralai/Devstral-Small-2-24B-Instruct-2512"
TEKKEN = FIXTURES / "tokenizers" / "tekken-v13.json"
TOOLS = ROOT / ".tools" / "clients"
KEY = "key-of-the-clients"
TENANTS = {
    "clients": (KEY, ""),
    "one-at-a-time": ("key-one-at-a-time", "parallel_requests: 1"),
    "two-a-minute": ("key-two-a-minute", "requests_per_minute: 2"),
}


def tool_path(variable, *names):
    """An installed client: named by a variable, else where scripts/test-clients puts it. Without it the test is skipped, or
    fails where `BORA_CLIENTS=all` says that everything has to be there."""
    if named := os.environ.get(variable):
        return named
    for name in names:
        if (TOOLS / name).exists():
            return str(TOOLS / name)
    if found := shutil.which(pathlib.Path(names[0]).name):
        return found
    if os.environ.get("BORA_CLIENTS") == "all":
        pytest.fail(f"{names[0]} is not installed")
    pytest.skip(f"{names[0]} is not installed: scripts/test-clients installs it")


def key_file(path):
    lines = ["tenants:"]
    for name, (key, limit) in TENANTS.items():
        digest = hashlib.sha256(key.encode()).hexdigest()
        lines += [f"- name: {name}", *([f"  {limit}"] if limit else []), f"  keys: [{{name: {name}, sha256: {digest}}}]"]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def cluster():
    shape = str(FIXTURES / "tiny_text")  # a fake group reads no weights
    models = [
        {"name": DEMO, "path": str(FIXTURES / "bora-demo" / "fp8")},
        {"name": SCRIPTED, "aliases": [CARD_NAME], "path": shape, "tokenizer": str(TEKKEN)},
        {"name": SHORT, "path": shape, "tokenizer": str(TEKKEN)},
        {"name": SLOW, "path": shape, "tokenizer": str(TEKKEN)},
    ]
    rules = scripting.script(TEKKEN, conversations.ALL)
    with Cluster(models=models) as cluster:
        cluster.start_etcd()
        cluster.start_router(access={"keys": str(key_file(cluster.path / "keys.yaml"))}, heartbeat_seconds=0.5)
        cluster.key = KEY
        cluster.start_worker("demo", model=DEMO, kv_cache={"blocks": 1024})
        for name, model, length in (("scripted-one", SCRIPTED, 262144), ("scripted-two", SCRIPTED, 262144), ("short", SHORT, SHORT_CONTEXT)):
            cluster.start_worker(name, model=model, device="fake", max_model_len=length, kv_cache={"blocks": 8192},
                                 fake={"script": rules, "time_scale": 0.02, "echo_ids_from": 1000, "images": True})
        cluster.start_worker("slow", model=SLOW, device="fake", kv_cache={"blocks": 4096},
                             fake={"echo_ids_from": 1000, "decode_step_seconds": 0.02})
        cluster.wait_ready(5, seconds=300)  # a busy machine takes long to read the large tokenizer
        yield cluster
        for process in cluster.processes:
            assert process.running(), f"{process.name} ended:\n{process.log()[-3000:]}"


@pytest.fixture(scope="session")
def base_url(cluster):
    return cluster.router_url + "/v1"


def load(cluster, group):
    """What the group last said of its load."""
    return cluster.groups()[group]["load"]

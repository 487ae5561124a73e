"""The `bora` command: flags, configuration, tokenize."""

import json
import subprocess

import pytest

from cluster import BORA, FIXTURES, Cluster, http, new_secret, serve
from goldens import json_lines


def bora(*args, stdin=None):
    return subprocess.run([BORA, *map(str, args)], input=stdin, capture_output=True, text=True, timeout=120)


def write(tmp_path, text):
    path = tmp_path / "bora.yaml"
    path.write_text(text.replace("SECRET", str(new_secret(tmp_path / "cluster-secret"))))
    return path


GOOD = """
cluster: test
registry: {kind: etcd, endpoints: ["127.0.0.1:2379"]}
models:
  - name: tiny
    path: MODEL
    tokenizer: TOKENIZER
worker:
  device: cpu
  tensor_parallel_size: 2
cluster_secret_file: SECRET
""".replace("MODEL", str(FIXTURES / "tiny_text")).replace("TOKENIZER", str(FIXTURES / "tokenizers" / "tekken-v13-8k.json"))


def test_check_accepts_a_good_file(tmp_path):
    result = bora("check", "--config", write(tmp_path, GOOD))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("change, line, expected", [
    (("cluster: test", "clutser: test"), 2, "unknown field `clutser`"),
    (("kind: etcd", "kind: zookeeper"), 3, "expected one of"),
    (("tensor_parallel_size: 2", "tensor_parallel_size: two"), 10, "tensor_parallel_size"),
    (("device: cpu", "device: tpu"), 9, "expected one of"),
    (("127.0.0.1:2379", "localhost"), 3, "host:port"),
])
def test_check_names_file_line_and_what_was_expected(tmp_path, change, line, expected):
    path = write(tmp_path, GOOD.replace(*change))
    for command in ("check", "router", "worker"):
        result = bora(command, "--config", path)
        assert result.returncode != 0
        assert f"{path}:{line}:" in result.stderr and expected in result.stderr, result.stderr


def test_check_names_what_does_not_go_together(tmp_path):
    result = bora("check", "--config", write(tmp_path, GOOD.replace("tensor_parallel_size: 2", "tensor_parallel_size: 3")))
    assert result.returncode != 0 and "3" in result.stderr and "heads" in result.stderr, result.stderr
    result = bora("check", "--config", write(tmp_path, GOOD.replace("/tiny_text", "/no_such_model")))
    assert result.returncode != 0 and "no_such_model" in result.stderr


@pytest.mark.parametrize("change, line, expected", [
    (("cluster: test", "cluster: test\nlog: {level: loud}"), 3, "log.level: `loud` is no level: expected one of off, error, warn"),
    (("127.0.0.1:2379", "https://etcd:2379"), 3, "without a scheme"),
    (("kind: etcd", "kind: memory"), 3, "registry.kind: a router or worker of a cluster needs etcd or static"),
    (("  device: cpu", "  device: cpu\n  listen: 0.0.0.0:9000"), 10, "worker.listen: `0.0.0.0:9000` is no address that routers can reach"),
    (("  device: cpu", "  device: cpu\n  listen: 10.0.0.1:9000\n  advertise: '[::]:9000'"), 11, "worker.advertise:"),
    (("cluster: test", "cluster: test\nhttp: {port: 8000, admin: '127.0.0.1:8000'}"), 3, "http.admin: `127.0.0.1:8000` is the port of http.port"),
    (("  device: cpu", "  device: cpu\n  listen: 127.0.0.1:9000\n  peers: 127.0.0.1:9000"), 11, "worker.peers:"),
    (("cluster: test", "cluster: test\nrouter: {access: {keys: /no/such/keys.yaml}}"), 3, "router.access.keys: cannot read /no/such/keys.yaml"),
    (("2379\"]", "2379\"], username: u, password_file: /no/such/password"), 3, "registry.password_file: /no/such/password"),
    (("cluster: test", "cluster: test\nrouter: {heartbeat_seconds: 0}"), 3, "router.heartbeat_seconds: a number of seconds above 0"),
    (("tensor_parallel_size: 2", "tensor_parallel_size: 99999999999"), 10, "a whole number from 0 to 4294967295"),
    (("- name: tiny", "- name: other\n    path: /nowhere\n  - name: tiny\n    aliases: [other]"), 7, "the name `other` is empty or used twice"),
])
def test_check_finds_what_a_start_finds_and_more(tmp_path, change, line, expected):
    assert change[0] in GOOD
    path = write(tmp_path, GOOD.replace(*change))
    result = bora("check", "--config", path)
    assert result.returncode != 0
    assert f"{path}:{line}:" in result.stderr and expected in result.stderr, result.stderr


def test_check_refuses_files_that_configure_nothing(tmp_path):
    for text, expected in [("", "the file is empty"), ("# only this\n", "the file is empty"), ("cluster: x\nregistry: {kind: static, endpoints: ['127.0.0.1:1']}\n", "models: expected at least one")]:
        result = bora("check", "--config", write(tmp_path, text))
        assert result.returncode != 0 and expected in result.stderr, result.stderr
    result = bora("check", "--config", write(tmp_path, GOOD.replace("  device: cpu", "  device: cpu\n  listen: 0.0.0.0:9000")), "--advertise", "worker-0:9000")
    assert result.returncode != 0 and "worker.listen: `0.0.0.0:9000` is beyond loopback" in result.stderr, result.stderr
    insecure = GOOD.replace("  device: cpu", "  device: cpu\n  listen: 0.0.0.0:9000") + "grpc: {insecure: true}\n"
    result = bora("check", "--config", write(tmp_path, insecure), "--advertise", "worker-0:9000")
    assert result.returncode == 0, result.stderr


def test_serve_says_what_is_wrong():
    result = bora("serve", "--model", FIXTURES / "no_such_model")
    assert result.returncode != 0 and "no_such_model" in result.stderr
    result = bora("serve", "--model", FIXTURES / "tiny_text")
    assert result.returncode != 0 and "tokenizer" in result.stderr and "--skip-tokenizer-init" in result.stderr
    result = bora("serve", "--model", FIXTURES / "tiny_text", "--skip-tokenizer-init", "--device", "cuda")
    assert result.returncode != 0 and "cuda" in result.stderr.lower() and "panicked" not in result.stderr


@pytest.mark.parametrize("tokenizer", ["tekken-v13.json", "tekken-v13-8k.json"])
def test_tokenize_reads_requests_by_line(tokenizer):
    goldens = [g for g in json_lines("golden_encodings.jsonl") if g["tokenizer"] == tokenizer and "token_ids" in g and "fixture://" not in json.dumps(g["request"])]
    refused = json_lines("golden_rejections.jsonl")
    lines = [json.dumps(g["request"]) for g in goldens] + [json.dumps(g["request"]) for g in refused] + ["not json", ""]
    result = bora("tokenize", "--tokenizer", FIXTURES / "tokenizers" / tokenizer, stdin="\n".join(lines) + "\n")
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    for golden, answer in zip(goldens, answers):
        assert answer["token_ids"] == golden["token_ids"], golden["name"]
    for golden, answer in zip(refused, answers[len(goldens):]):
        assert answer["error"]["message"], golden["name"]
    assert "error" in answers[len(goldens) + len(refused)]


def test_a_checkpoint_without_tokenizer():
    with Cluster() as cluster:
        serve(cluster, "--skip-tokenizer-init", "--max-model-len", "512", "--device", "cpu")
        name = http("GET", cluster.router_url + "/v1/models")[2]["data"][0]
        assert name["max_model_len"] == 512
        status, _, body = cluster.post("/v1/completions", {"model": name["id"], "prompt": [1000, 1001], "max_tokens": 3, "temperature": 0, "return_token_ids": True, "ignore_eos": True})
        assert status == 200 and len(body["choices"][0]["token_ids"]) == 3
        status, _, body = cluster.post("/v1/completions", {"model": name["id"], "prompt": "text", "max_tokens": 3})
        assert status == 400 and body["error"]["param"] == "prompt"
        status, _, body = cluster.post("/v1/chat/completions", {"model": name["id"], "messages": [{"role": "user", "content": "hi"}]})
        assert status == 400


def test_a_fake_group_says_so(fake_cluster):
    model = http("GET", fake_cluster.router_url + "/v1/models")[2]["data"][0]
    assert "fake" in json.dumps({k: v for k, v in model.items() if k != "id"})
    assert "fake" in fake_cluster.processes[-1].log()

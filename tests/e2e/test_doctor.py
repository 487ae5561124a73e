"""`bora doctor` on this node: what is right is said to be right, and each thing that is broken is found and named with what to do."""

import hashlib
import json
import shutil
import socket
import subprocess

import pytest

from cluster import BORA, FIXTURES, TOKENIZER_8K, Cluster, free_port


def doctor(*args, limit=None):
    command = [BORA, "doctor", "--json", "--no-bandwidth", *map(str, args)]
    if limit:
        command = ["bash", "-c", f'ulimit -n {limit}; exec "$@"', "bash", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    report = json.loads(done.stdout)
    assert (done.returncode == 0) == report["healthy"], done.stderr
    return report


def of(report, name):
    return [check for check in report["checks"] if check["name"] == name]


@pytest.fixture
def model(tmp_path):
    """A whole checkpoint with its checksums."""
    folder = shutil.copytree(FIXTURES / "tiny_text", tmp_path / "model")
    shutil.copy(TOKENIZER_8K, folder / "tekken.json")
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.iterdir()) if path.is_file()]
    (folder / "SHA256SUMS").write_text("".join(sums))
    return folder


@pytest.fixture(scope="module")
def etcd():
    with Cluster() as cluster:
        cluster.start_etcd()
        yield cluster


def config(tmp_path, model, **sections):
    path = tmp_path / "bora.yaml"
    path.write_text(json.dumps({"registry": {"kind": "memory"}, "models": [{"name": "tiny", "path": str(model)}],
                                "http": {"port": free_port()}, "worker": {"device": "cpu"}, **sections}))
    return path


def test_a_node_that_is_ready(tmp_path, model, etcd):
    worker = {"device": "cpu", "tensor_parallel_size": 2, "listen": f"127.0.0.1:{free_port()}", "advertise": "localhost:9000"}
    registry = {"kind": "etcd", "endpoints": [f"127.0.0.1:{etcd.etcd_port}"]}
    report = doctor("--config", config(tmp_path, model, worker=worker, registry=registry), "--checksums")
    assert report["healthy"], report
    (weights,) = of(report, "model")
    assert weights["outcome"] == "good" and "complete, fingerprint" in weights["found"]
    assert "files are what was published" in of(report, "checksums")[0]["found"]
    assert "a read takes" in of(report, "etcd")[0]["found"]
    assert of(report, "clock of etcd")[0]["outcome"] == "good"
    assert of(report, "worker.advertise")[0]["outcome"] == "good"
    (driver,) = of(report, "driver")
    assert driver["outcome"] in ("skipped", "good")
    assert all("fix" not in check for check in report["checks"] if check["outcome"] in ("good", "skipped"))


def test_it_looks_at_a_node_without_a_configuration_and_speaks_to_people():
    done = subprocess.run([BORA, "doctor", "--no-bandwidth"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "open files" in done.stdout and "shared memory" in done.stdout and "-     configuration" in done.stdout


def cut_short(model):
    shard = next(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])


def one_bit(model):
    shard = next(model.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))


@pytest.mark.parametrize("harm, name, words", [
    (cut_short, "model", "safetensors"),
    (one_bit, "checksums", "is not what was published"),
    (lambda model: (model / "tekken.json").write_text("{}"), "tokenizer", "tiny"),
    (lambda model: (model / "config.json").write_text("{"), "model", "config.json"),
    (lambda model: (model / "SHA256SUMS").write_text("nonsense\n"), "checksums", "is no checksum"),
])
def test_files_that_are_broken(tmp_path, model, harm, name, words):
    harm(model)
    report = doctor("--config", config(tmp_path, model), "--checksums")
    assert not report["healthy"]
    (check,) = of(report, name)
    assert check["outcome"] == "failure" and words in check["found"] and check["fix"], check


def test_what_is_wrong_around_a_worker(tmp_path, model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        worker = {"device": "cpu", "listen": f"127.0.0.1:{taken.getsockname()[1]}", "advertise": "no-such-host.invalid:1"}
        registry = {"kind": "etcd", "endpoints": [f"127.0.0.1:{free_port()}"]}
        path = config(tmp_path, model, worker=worker, registry=registry)
        report = doctor("--config", path, limit=512)
    outcomes = {check["name"]: check["outcome"] for check in report["checks"]}
    assert outcomes["etcd member"] == outcomes["worker.advertise"] == outcomes["open files"] == "failure"
    assert any("is in use" in check["found"] and check["outcome"] == "warning" for check in of(report, "port"))
    assert not report["healthy"] and doctor("--config", path)["healthy"] is False


def test_a_gpu_that_is_asked_for_must_be_there(tmp_path, model):
    report = doctor("--config", config(tmp_path, model, worker={"device": "cuda"}))
    (driver,) = of(report, "driver")
    if driver["outcome"] != "good":
        assert driver["outcome"] == "failure" and "driver" in driver["fix"] and not report["healthy"]


def test_a_configuration_that_is_wrong_is_one_of_the_findings(tmp_path):
    path = tmp_path / "bora.yaml"
    path.write_text("worker:\n  divice: cpu\n")
    report = doctor("--config", path)
    (check,) = of(report, "configuration")
    assert check["outcome"] == "failure" and "divice" in check["found"] and of(report, "open files")

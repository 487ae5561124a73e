import pytest

from cluster import Cluster, serve


@pytest.fixture(scope="session")
def served():
    """`bora serve` on the tiny text model: two ranks on CPU threads."""
    with Cluster() as cluster:
        serve(cluster, "--served-model-name", "tiny", "--tokenizer", cluster.tokenizer, "--tensor-parallel-size", "2",
              "--device", "cpu", "--num-kv-blocks", "256", "--strict-conversations")
        yield cluster
        assert cluster.processes[0].running(), cluster.processes[0].log()[-3000:]


@pytest.fixture(scope="session")
def fake_cluster():
    """etcd, a router and one scripted fake group, which serves long prompts at once."""
    with Cluster(model="fake-devstral") as cluster:
        cluster.start_etcd()
        cluster.start_router()
        cluster.start_worker("fake", device="fake", max_model_len=1048576, kv_cache={"blocks": 40000}, fake={"time_scale": 0})
        cluster.wait_ready()
        yield cluster

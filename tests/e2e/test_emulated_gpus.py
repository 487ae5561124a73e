"""Groups of several GPUs on the emulator (scripts/gpu/emulator): the CUDA backend, its graphs and its way through NCCL are
the real ones, the GPUs and libnccl are stand-ins. Left out where the emulator was not built or bora has no kernels."""

import time

import pytest

from cluster import FIXTURES, SIGSTOP, Cluster
from goldens import cases

EMULATOR = FIXTURES.parents[1] / ".tools" / "gpu-emulator"
ENVIRONMENT = {"LD_LIBRARY_PATH": str(EMULATOR), "BORA_EMULATED_GPUS": "2"}
# what serves here need not be fast to be right
OPTIONS = {"env": ENVIRONMENT, "device": "cuda", "max_model_len": 1024, "schedule": {"max_num_batched_tokens": 256, "max_num_seqs": 4}, "kv_cache": {"blocks": 64}}

pytestmark = pytest.mark.skipif(not (EMULATOR / "libnccl.so.2").exists(), reason="no emulator: scripts/gpu/emulator builds it")


def processes(cluster, group):
    """A group of two ranks, each a process with a GPU of its own: follower and leader."""
    ranks = [cluster.start_worker(group, ranks=[rank], size=2, **OPTIONS) for rank in (1, 0)]
    if "no GPU kernels" in ranks[1].log():
        pytest.skip("bora was built without nvcc")
    return ranks


def decided():
    """Golden cases whose best ids lead by more than bf16 can lose."""
    return [case for case, info in cases("tiny_text") if info["greedy_min_margin"] > 0.05 and len(case.ids) < 400]


def answer(cluster, case):
    status, headers, body = cluster.post("/v1/completions", {"model": "tiny", "prompt": case.ids, "max_tokens": len(case.greedy), "temperature": 0,
                                                             "ignore_eos": True, "return_token_ids": True}, timeout=120)
    assert status == 200, body
    return body["choices"][0]["token_ids"], headers["x-bora-group"]


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_ranks_on_gpus_answer_together_and_end_together(how):
    with Cluster() as cluster:
        cluster.start_etcd()
        cluster.start_router()
        follower, leader = processes(cluster, "gpus")
        cluster.wait_ready(1, seconds=120)
        chosen = decided()
        assert chosen
        for case in chosen:
            ids, group = answer(cluster, case)
            assert (ids, group) == (case.greedy, "gpus"), case.name
        assert "connected the GPUs" in leader.log() and "connected the GPUs" in follower.log()

        # a rank that dies or stands still takes its group down, although the other waits for it in NCCL
        cluster.start_worker("spare", device="cpu")
        cluster.wait_ready(2)
        follower.kill() if how == "killed" else follower.signal(SIGSTOP)
        since = time.monotonic()
        ids, group = answer(cluster, chosen[0])
        assert ids == chosen[0].greedy
        assert leader.wait_exit(15) != 0
        assert time.monotonic() - since < 12
        assert "rank 1" in leader.log(), leader.log()[-3000:]
        assert answer(cluster, chosen[0]) == (chosen[0].greedy, "spare")

        # started again it serves again, under a new epoch
        follower.kill()
        leader.start()
        follower.start()
        cluster.wait_ready(2, seconds=120)


@pytest.mark.parametrize("flags", [(), ("--disable-custom-all-reduce",)])
def test_a_group_of_two_threads(flags):
    with Cluster() as cluster:
        cluster.start_etcd()
        cluster.start_router()
        worker = cluster.start_worker("gpus", size=2, flags=flags, **OPTIONS)
        cluster.wait_ready(1, seconds=120)
        for case in decided():
            assert answer(cluster, case) == (case.greedy, "gpus"), case.name
        assert worker.log().count("connected the GPUs") == 2
        # the two ways of a sum are measured and said where there is a choice
        assert ("all-reduce: rows" in worker.log()) == (not flags)

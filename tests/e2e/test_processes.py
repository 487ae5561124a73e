"""Ranks as separate processes that meet through etcd."""

import signal
import time

from cluster import Cluster, free_port, wait_until
from goldens import cases
from sse import Stream, token_ids


def test_two_processes_answer_like_one():
    with Cluster() as cluster:
        cluster.start_etcd()
        cluster.start_router()
        # the follower first: it waits for the leader
        follower = cluster.start_worker("pair", ranks=[1], size=2)
        leader = cluster.start_worker("pair", ranks=[0], size=2)
        cluster.wait_ready(1)
        for case, info in cases("tiny_text"):
            if info["greedy_min_margin"] < 0.01:
                continue
            status, headers, body = cluster.post("/v1/completions", {"model": "tiny", "prompt": case.ids, "max_tokens": len(case.greedy), "temperature": 0, "ignore_eos": True, "return_token_ids": True})
            assert status == 200, body
            assert body["choices"][0]["token_ids"] == case.greedy, case.name
            assert headers["x-bora-group"] == "pair"

        # a rank that dies takes its group down within 5 s, and the leader says which and why
        follower.kill()
        since = time.monotonic()
        assert leader.wait_exit(10) != 0
        assert time.monotonic() - since < 5
        assert "rank 1" in leader.log(), leader.log()[-2000:]
        status, _, body = cluster.post("/v1/completions", {"model": "tiny", "prompt": [1000], "max_tokens": 1})
        assert status in (503, 404), body

        # started again, it serves again
        leader.start()
        follower.start()
        cluster.wait_ready(1)
        assert cluster.post("/v1/completions", {"model": "tiny", "prompt": [1000], "max_tokens": 1})[0] == 200

        # the leader dies: the follower ends by itself
        leader.kill()
        assert follower.wait_exit(10) != 0


def test_static_registry_and_a_given_leader():
    with Cluster(registry="static") as cluster:
        port, peers = free_port(), f"127.0.0.1:{free_port()}"
        cluster.etcd_port = port  # the list of a static registry: the leader's address
        cluster.start_worker("pair", ranks=[0], size=2, port=port, peers=peers)
        cluster.start_worker("pair", ranks=[1], size=2, leader=peers)
        cluster.start_router()
        cluster.wait_ready(1)
        assert cluster.post("/v1/completions", {"model": "tiny", "prompt": [1000, 1001], "max_tokens": 2})[0] == 200


def test_a_follower_of_another_revision_joins_no_group():
    """As in a rolling update: the old group's follower is still there when the new one's leader comes, under the same name."""
    with Cluster() as cluster:
        cluster.start_etcd()
        cluster.start_router()
        old = cluster.start_worker("pair", ranks=[1], size=2, flags=("--revision", "old"))
        cluster.start_worker("pair", ranks=[0], size=2, env={"BORA_REVISION": "new"})
        wait_until("it is said", lambda: "the group's leader is of another revision" in old.log(), 60)
        new = cluster.start_worker("pair", ranks=[1], size=2, flags=("--revision", "new"))
        cluster.wait_ready(1)
        assert cluster.post("/v1/completions", {"model": "tiny", "prompt": [1000], "max_tokens": 1})[0] == 200
        assert "joined the group" in new.log() and "joined the group" not in old.log() and old.running()


def test_a_missing_rank_is_named():
    with Cluster() as cluster:
        cluster.start_etcd()
        leader = cluster.start_worker("pair", ranks=[0], size=2, rendezvous_seconds=2)
        assert leader.wait_exit(20) != 0
        assert "rank 1" in leader.log(), leader.log()[-2000:]


def test_a_group_that_is_stopped_lets_its_streams_finish():
    """A pod's end comes to all processes of a group at once: followers stay until the leader has drained."""
    with Cluster() as cluster:
        cluster.start_etcd()
        cluster.start_router()
        follower = cluster.start_worker("pair", size=2, host="127.0.0.1", flags=["--process-index", "1", "--ranks-per-process", "1"])
        leader = cluster.start_worker("pair", size=2, host="127.0.0.1", flags=["--process-index", "0", "--ranks-per-process", "1"])
        cluster.wait_ready(1)
        body = {"model": "tiny", "prompt": [1000, 1001], "max_tokens": 300, "ignore_eos": True, "return_token_ids": True}
        with Stream(cluster.router_url, "/v1/completions", body) as stream:
            for number, _ in enumerate(stream):
                if number == 0:
                    follower.signal(signal.SIGTERM)
                    leader.signal(signal.SIGTERM)
            ids = token_ids(stream.events)
        assert len(ids) == 300
        assert leader.wait_exit(20) == 0, leader.log()[-2000:]
        assert follower.wait_exit(20) == 0, follower.log()[-2000:]
        assert "until the leader has drained" in follower.log()

"""etcd killed, hung, cut off, slow and restored from a backup, keys deleted and names taken: routers serve throughout, and no group that is gone stays."""

import concurrent.futures
import time

from cluster import SIGCONT, SIGSTOP, Cluster, http, wait_until
from proxy import Proxy
from traffic import Traffic, digest_requests

LEASE = 3.0


def names(cluster, url=None):
    return set(cluster.groups(url))


def start(cluster, groups=("a", "b"), router_port=None, worker_port=None, **options):
    cluster.start_etcd()
    cluster.start_router(registry_port=router_port, **options)
    workers = {name: cluster.start_digest(name, registry_port=worker_port) for name in groups}
    cluster.wait_ready(len(groups))
    return workers


def wait_for_groups(cluster, expected, url=None, seconds=20):
    def seen():
        groups = cluster.groups(url)
        return set(groups) == set(expected) and all(g["watched"] and g["announced"] for g in groups.values())

    wait_until(f"groups {sorted(expected)}", seen, seconds)


def test_etcd_killed_and_back():
    with Cluster() as cluster:
        workers = start(cluster, ("a", "b", "c"))
        with Traffic([cluster.router_url], digest_requests()) as traffic:
            cluster.etcd.kill()
            time.sleep(LEASE + 2)
            assert names(cluster) == {"a", "b", "c"}
            # one of the groups that nobody can say anything about dies: requests go elsewhere
            workers["c"].kill()
            traffic.wait_for(60)
            # a router that starts meanwhile waits, and does not fail
            late = cluster.start_router("late")
            assert http("GET", late.url + "/ready")[0] == 503
            cluster.etcd.start()
            cluster.wait_etcd()
            # its record stood in etcd's data, and goes with its lease
            wait_for_groups(cluster, {"a", "b"})
            wait_for_groups(cluster, {"a", "b"}, late.url)
            traffic.wait_for(20)
        # a router counts itself and the late one
        wait_until("two routers", lambda: http("GET", late.url + "/groups")[2]["routers"] == 2, 10)


def test_etcd_that_hangs():
    """SIGSTOP: connections stay, nobody answers, and when it wakes all leases are over."""
    with Cluster() as cluster:
        start(cluster)
        with Traffic([cluster.router_url], digest_requests()) as traffic:
            cluster.etcd.signal(SIGSTOP)
            # beyond the keep-alive of etcd's client: 10 s, and 3 s for the answer
            time.sleep(15)
            traffic.wait_for(20)
            cluster.etcd.signal(SIGCONT)
            wait_for_groups(cluster, {"a", "b"})
            late = cluster.start_router("late")
            wait_for_groups(cluster, {"a", "b"}, late.url)


def test_a_router_that_is_cut_off_from_etcd():
    """It serves with the groups that it saw last; what changed meanwhile it learns afterwards."""
    with Cluster() as cluster, Proxy(cluster.etcd_port) as network:
        workers = start(cluster, router_port=network.port)
        with Traffic([cluster.router_url], digest_requests()) as traffic:
            network.cut()
            workers["b"].stop()
            workers["c"] = cluster.start_digest("c")
            other = cluster.start_router("other")
            wait_for_groups(cluster, {"a", "c"}, other.url)
            traffic.wait_for(60)
            assert "c" not in names(cluster), "it can't know yet"
            assert not cluster.groups().get("b", {"watched": False})["watched"]
            network.mend()
            wait_for_groups(cluster, {"a", "c"})
            traffic.wait_for(20)


def test_groups_that_are_cut_off_from_etcd():
    """Their leases end; routers keep them while they answer, and see them announced again afterwards."""
    with Cluster() as cluster, Proxy(cluster.etcd_port) as network:
        workers = start(cluster, worker_port=network.port)
        with Traffic([cluster.router_url], digest_requests()) as traffic:
            network.cut()
            wait_until("the leases end", lambda: all(not g["announced"] for g in cluster.groups().values()), 15)
            assert names(cluster) == {"a", "b"}
            traffic.wait_for(40)
            # one that dies now is gone at once: nothing speaks for it any more
            workers["b"].kill()
            wait_until("the dead group is gone", lambda: names(cluster) == {"a"}, 10)
            traffic.wait_for(40)
            network.mend()
            wait_for_groups(cluster, {"a"}, seconds=30)
            workers["b"].start()
            wait_for_groups(cluster, {"a", "b"}, seconds=30)


def test_etcd_that_is_slow():
    """0.4 s each way: leases hold, groups come and go a little later, requests notice nothing."""
    with Cluster() as cluster, Proxy(cluster.etcd_port) as network:
        workers = start(cluster, router_port=network.port, worker_port=network.port)
        with Traffic([cluster.router_url], digest_requests()) as traffic:
            network.delay = 0.4
            since = time.monotonic()
            traffic.slowest_first_event = 0.0
            while time.monotonic() - since < 3 * LEASE:
                assert all(g["announced"] for g in cluster.groups().values())
                time.sleep(0.2)
            assert traffic.slowest_first_event < 0.4, "etcd is on the road of a request"
            workers["c"] = cluster.start_digest("c", registry_port=network.port)
            wait_for_groups(cluster, {"a", "b", "c"})
            workers["a"].stop()
            wait_for_groups(cluster, {"b", "c"})
            traffic.wait_for(20)


def test_etcd_restored_from_a_backup():
    """The backup is older than what routers saw: it lists a group that is gone and one under an older epoch, and
    knows nothing of one that came later."""
    with Cluster() as cluster:
        workers = start(cluster)
        cluster.etcdctl("snapshot", "save", cluster.path / "backup")
        with Traffic([cluster.router_url], digest_requests()) as traffic:
            workers["c"] = cluster.start_digest("c")
            wait_for_groups(cluster, {"a", "b", "c"})
            workers["b"].stop()
            workers["a"].stop()
            workers["a"].start()
            wait_for_groups(cluster, {"a", "c"})
            epoch = cluster.groups()["a"]["epoch"]
            revision = cluster.etcdctl("get", "--prefix", "/bora/", "-w", "json")
            cluster.etcd.kill()
            traffic.wait_for(20)
            cluster.restore_etcd(cluster.path / "backup")
            assert cluster.etcdctl("get", "--prefix", "/bora/", "-w", "json") != revision
            # the record of the group that is gone goes with its lease
            wait_for_groups(cluster, {"a", "c"})
            wait_until("etcd lists what lives", lambda: listed(cluster) == {"a", "c"}, 20)
            assert cluster.groups()["a"]["epoch"] == epoch
            traffic.wait_for(20)
            # a router that knew nothing before sees the same
            late = cluster.start_router("late")
            wait_for_groups(cluster, {"a", "c"}, late.url)
            assert cluster.groups(late.url)["a"]["epoch"] == epoch


def listed(cluster):
    keys = cluster.etcdctl("get", "--prefix", "--keys-only", "/bora/v1/e2e/groups/").split()
    return {key.rsplit("/", 1)[1] for key in keys}


def test_deleted_keys_come_back():
    """Whoever deletes what Bora has in etcd: groups and routers restore their keys, and no request fails."""
    with Cluster() as cluster:
        start(cluster)
        before = cluster.etcdctl("get", "--prefix", "--keys-only", "/bora/").split()
        assert len(before) == 3, before
        with Traffic([cluster.router_url], digest_requests()) as traffic:
            for _ in range(3):
                cluster.etcdctl("del", "--prefix", "/bora/")
                wait_until("the keys are back", lambda: cluster.etcdctl("get", "--prefix", "--keys-only", "/bora/").split() == before, 10)
            wait_for_groups(cluster, {"a", "b"})
            traffic.wait_for(20)


def test_a_taken_name_is_refused_and_free_when_its_group_is_gone():
    with Cluster() as cluster:
        workers = start(cluster, ("a",))
        address = workers["a"].address
        second = cluster.start_digest("a", flags=("--revision", "second"))
        assert second.wait_exit(30) != 0
        assert "the name is taken" in second.log() and address in second.log(), second.log()[-2000:]
        metrics = http("GET", cluster.router_url + "/metrics")[2]
        assert "bora_router_duplicate_groups 1" in metrics
        # the first one is what it was
        wait_for_groups(cluster, {"a"})
        assert cluster.groups()["a"]["endpoint"] == address
        # killed, it leaves its key behind for the time of its lease
        workers["a"].kill()
        second.start()
        wait_for_groups(cluster, {"a"})
        assert cluster.groups()["a"]["endpoint"] == second.address
        assert http("POST", cluster.router_url + "/v1/completions", {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 3})[0] == 200


def test_requests_wait_while_the_only_group_restarts():
    with Cluster() as cluster:
        workers = start(cluster, ("a",), wait_for_group_seconds=120)
        ask = lambda: http("POST", cluster.router_url + "/v1/completions", {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 3})
        assert ask()[0] == 200
        workers["a"].stop()
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            asked = [pool.submit(ask) for _ in range(20)]
            wait_until("they wait", lambda: 'bora_router_waiting_sequences{model="tiny",class="interactive"} 20' in http("GET", cluster.router_url + "/metrics")[2], 20)
            workers["a"].start()
            assert [request.result()[0] for request in asked] == [200] * 20


def test_a_group_that_becomes_ready_while_etcd_hangs_breaks_no_protocol():
    # The router knows its loading record alone, which states no sizes and no weights.
    with Cluster() as cluster:
        workers = start(cluster, ("a",), wait_for_group_seconds=120, failover_wait_seconds=60)
        router, first = cluster.processes[1], workers["a"]
        ask = lambda: http("POST", cluster.router_url + "/v1/completions", {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 3}, timeout=100)
        first.kill()
        first.start()
        wait_until("its start is announced", lambda: cluster.groups().get("a", {}).get("state") in ("loading", "ready"), every=0.005)
        cluster.etcd.signal(SIGSTOP)
        time.sleep(3)
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            asked = [pool.submit(ask) for _ in range(10)]
            time.sleep(2)
            cluster.etcd.signal(SIGCONT)
            assert [request.result()[0] for request in asked] == [200] * 10
        assert "broke the protocol" not in router.log()


def test_a_request_without_a_model_waits_as_one_with_its_name_does():
    with Cluster() as cluster:
        workers = start(cluster, ("a",), wait_for_group_seconds=0.2)
        ask = lambda: http("POST", cluster.router_url + "/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 3})
        assert ask()[0] == 200
        workers["a"].kill()
        wait_until("it is gone", lambda: not cluster.groups(), 20)
        status, headers, body = ask()
        assert status == 503 and headers["retry-after"], body

"""Everything is restarted under load, and no request fails."""

from cluster import Cluster, http, wait_until
from sse import Stream
from traffic import Traffic, digest_requests


def test_every_group_and_every_router_is_restarted():
    with Cluster() as cluster:
        cluster.start_etcd()
        routers = [cluster.start_router(name) for name in ("r0", "r1")]
        workers = [cluster.start_digest(name) for name in ("g0", "g1", "g2")]
        for router in routers:
            cluster.wait_ready(3, url=router.url)
        # long enough that every process ends under streams that it has
        requests = digest_requests(max_tokens=(60, 120))
        with Traffic([router.url for router in routers], requests, clients=8) as traffic:
            for worker in workers:
                assert worker.stop(seconds=40) == 0, worker.log()[-2000:]
                traffic.wait_for(4)
                worker.start()
                for router in routers:
                    cluster.wait_ready(3, url=router.url)
                traffic.wait_for(8)
            for router in routers:
                assert router.stop(seconds=40) == 0, router.log()[-2000:]
                traffic.wait_for(8)
                router.start()
                wait_until("the router is back", lambda: http("GET", router.url + "/ready")[0] == 200)
                cluster.wait_ready(3, url=router.url)
                traffic.wait_for(8)


def test_a_router_that_is_killed_loses_its_own_connections_only():
    with Cluster() as cluster:
        cluster.start_etcd()
        doomed, stays = cluster.start_router("doomed"), cluster.start_router("stays")
        worker = cluster.start_digest("g")
        for router in (doomed, stays):
            cluster.wait_ready(1, url=router.url)
        with Traffic([stays.url], digest_requests(max_tokens=(30, 60))) as traffic:
            body = {"prompt": [1000] * 100, "max_tokens": 4000, "ignore_eos": True}
            with Stream(doomed.url, "/v1/completions", body) as lost:
                next(iter(lost))
                doomed.kill()
                try:
                    answer = lost.answer()
                except OSError as error:
                    answer = {"error": repr(error)}
                assert "error" in answer and not lost.done
            # nobody generates for a client that is gone
            wait_until("its sequence ends", lambda: running(stays.url) <= 4, 10)
            traffic.wait_for(20)
        wait_until("the group is idle", lambda: running(stays.url) == 0, 10)
        assert worker.running()


def running(url):
    return sum(group["load"]["running"] for group in http("GET", url + "/groups")[2]["groups"])

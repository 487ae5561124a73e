"""What a client sees when parts die, and that nothing leaks."""

import concurrent.futures
import json
import threading
import time
from http.client import HTTPConnection

from cluster import SIGSTOP, Cluster, http, wait_until


def stream(url, body, on_event=None):
    """Reads an SSE stream; returns (events, done). Raises nothing on an error event."""
    host = url.removeprefix("http://")
    connection = http_connection(host)
    connection.request("POST", "/v1/completions", json.dumps({**body, "stream": True}), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    events, done = [], False
    for line in response:
        if line.startswith(b"data: "):
            data = line[6:].strip()
            if data == b"[DONE]":
                done = True
                continue
            events.append(json.loads(data))
            if on_event:
                on_event(events)
    connection.close()
    return events, done, response.headers


def http_connection(host):
    return HTTPConnection(host, timeout=60)


def token_ids(events):
    return [t for event in events for choice in event.get("choices", []) for t in choice.get("token_ids") or []]


LONG = {"model": "tiny", "prompt": list(range(1000, 1100)), "max_tokens": 400, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


def two_groups(cluster):
    cluster.start_etcd()
    cluster.start_router()
    workers = {name: cluster.start_worker(name, size=2) for name in ("a", "b")}
    cluster.wait_ready(2)
    return workers


def test_a_worker_killed_in_mid_stream():
    """The other group goes on with the stream, or the client gets an error event and no [DONE]."""
    with Cluster() as cluster:
        workers = two_groups(cluster)
        undisturbed = token_ids(stream(cluster.router_url, LONG)[0])
        assert len(undisturbed) == 400
        connection = http_connection(cluster.router_url.removeprefix("http://"))
        connection.request("POST", "/v1/completions", json.dumps({**LONG, "stream": True}), {"content-type": "application/json"})
        response = connection.getresponse()
        serving = response.headers["x-bora-group"]
        events, done, killed = [], False, None
        for line in response:
            if not line.startswith(b"data: "):
                continue
            data = line[6:].strip()
            if data == b"[DONE]":
                done = True
                continue
            events.append(json.loads(data))
            if not killed and len(token_ids(events)) > 20:
                workers[serving].kill()
                killed = serving
        assert killed
        if any("error" in event for event in events):
            assert not done
        else:
            assert done and token_ids(events) == undisturbed
        # the cluster goes on
        assert http("POST", cluster.router_url + "/v1/completions", {**LONG, "max_tokens": 5})[0] == 200
        # and the group that is started again serves again
        workers[killed].start()
        cluster.wait_ready(2)


def test_etcd_killed_and_back():
    with Cluster() as cluster:
        two_groups(cluster)
        cluster.etcd.kill()
        end = time.monotonic() + 8  # beyond the lease of 3 s
        while time.monotonic() < end:
            assert http("POST", cluster.router_url + "/v1/completions", {**LONG, "max_tokens": 2})[0] == 200
            time.sleep(0.3)
        cluster.etcd.start()
        cluster.wait_etcd()
        # a router that starts now sees both groups: they have announced themselves again
        late = cluster.start_router("late")
        cluster.wait_ready(2, url=late.url)
        assert http("POST", late.url + "/v1/completions", {**LONG, "max_tokens": 2})[0] == 200


def test_a_router_that_starts_before_etcd():
    with Cluster() as cluster:
        cluster.start_router()
        cluster.start_worker("a")
        time.sleep(1)
        cluster.start_etcd()
        cluster.wait_ready(1)


def test_a_client_that_leaves_frees_its_blocks(served):
    def load():
        return sum(group["load"]["blocks_used"] for group in http("GET", served.router_url + "/groups")[2]["groups"])

    wait_until("an idle group", lambda: load() == 0)
    connection = http_connection(served.router_url.removeprefix("http://"))
    body = {**LONG, "max_tokens": 1500, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    response.readline()
    wait_until("blocks in use", lambda: load() > 0, every=0.01)
    connection.sock.close()
    response.close()
    wait_until("the blocks are free again", lambda: load() == 0, seconds=5)


def test_200_concurrent_streams(served):
    """All answer, each what it answers alone."""
    prompts = [[1000 + (i * 7 + j) % 8000 for j in range(20 + i % 50)] for i in range(200)]
    ask = lambda prompt: {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    alone = [token_ids(stream(served.router_url, ask(prompt))[0]) for prompt in prompts[:10]]
    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        results = list(pool.map(lambda prompt: stream(served.router_url, ask(prompt)), prompts))
    assert all(done for _, done, _ in results)
    assert all(len(token_ids(events)) == 12 for events, _, _ in results)
    assert [token_ids(events) for events, _, _ in results[:10]] == alone


def test_a_prompt_of_1_mb(fake_cluster):
    text = "".join(f"fn line_{i}(x: u32) -> u32 {{ x * {i} }}\n" for i in range(25000))
    assert len(text) > 1_000_000
    status, _, body = fake_cluster.post("/v1/chat/completions", {"model": "fake-devstral", "messages": [{"role": "user", "content": text}], "max_tokens": 4})
    assert status == 200, body
    assert body["usage"]["prompt_tokens"] > 200_000


def test_a_stopped_rank_takes_its_group_down():
    """SIGSTOP of a follower: the leader names it and ends, and the group serves again when both are started."""
    with Cluster() as cluster:
        cluster.start_etcd()
        cluster.start_router()
        leader = cluster.start_worker("pair", ranks=[0], size=2)
        follower = cluster.start_worker("pair", ranks=[1], size=2)
        cluster.wait_ready(1)
        assert http("POST", cluster.router_url + "/v1/completions", {**LONG, "max_tokens": 3})[0] == 200
        follower.signal(SIGSTOP)
        answers = []
        thread = threading.Thread(target=lambda: answers.append(http("POST", cluster.router_url + "/v1/completions", {**LONG, "max_tokens": 3})))
        thread.start()
        since = time.monotonic()
        assert leader.wait_exit(20) != 0
        assert time.monotonic() - since < 12
        assert "rank 1" in leader.log()
        follower.kill()
        thread.join(60)
        assert answers[0][0] >= 500
        leader.start()
        follower.start()
        cluster.wait_ready(1)
        assert http("POST", cluster.router_url + "/v1/completions", {**LONG, "max_tokens": 3})[0] == 200

"""Streams while random groups are killed, each compared token by token with an undisturbed run.

`scripts/bench/failover` runs it long, `test_failover.py` short. The groups are fakes whose every id depends on all
ids before it and on the seed: one id lost, doubled or drawn with another seed changes all that follow.
"""

import argparse
import json
import random
import threading
import time

from cluster import Cluster, http
from sse import ask

TOOLS = [{"type": "function", "function": {"name": "run", "parameters": {"type": "object", "properties": {}}}}]


def requests(count, seed=1):
    """Distinct requests: greedy and seeded, one choice and several, with and without logprobs, chat with tools."""
    rng = random.Random(seed)
    for number in range(count):
        body = {"temperature": 0.7 if number % 2 else 0, "seed": rng.randrange(2**31), "max_tokens": rng.randrange(40, 120),
                "ignore_eos": True, "return_token_ids": True, "n": 2 if number % 5 == 0 else 1,
                "stream_options": {"include_usage": True}}
        if number % 3 == 0:
            body["messages"] = [{"role": "user", "content": f"Question {number}: " + "why? " * rng.randrange(200)}]
            body["tools"] = TOOLS
            if number % 2:
                body |= {"logprobs": True, "top_logprobs": 2}
            yield "/v1/chat/completions", body
        else:
            body["prompt"] = [rng.randrange(1000, 8000) for _ in range(rng.randrange(10, 600))]
            if number % 4 == 1:
                body["logprobs"] = 2
            yield "/v1/completions", body


def run(streams, concurrency, kill_every, groups=4, distinct=60, time_scale=1.0):
    """Returns what happened as a dictionary."""
    with Cluster(model="fake-devstral", skip_tokenizer=False) as cluster:
        cluster.start_etcd()
        cluster.start_router()
        fake = {"mode": "digest", "time_scale": time_scale}
        workers = [cluster.start_worker(f"g{number}", device="fake", max_model_len=16384, kv_cache={"blocks": 8192}, fake=fake)
                   for number in range(groups)]
        cluster.wait_ready(groups)
        wanted = list(requests(distinct))
        undisturbed = [ask(cluster.router_url, path, body) for path, body in wanted]
        assert all("error" not in one for one in undisturbed), undisturbed

        next_number, lock, over = iter(range(streams)), threading.Lock(), threading.Event()
        result = {"kind": "failover", "streams": streams, "concurrency": concurrency, "kill_every_s": kill_every, "groups": groups,
                  "failed": 0, "corrupted": 0, "kills": 0}
        examples = []

        def client():
            while True:
                with lock:
                    number = next(next_number, None)
                if number is None:
                    return
                got = ask(cluster.router_url, *wanted[number % distinct])
                if got == undisturbed[number % distinct]:
                    continue
                with lock:
                    result["failed" if "error" in got else "corrupted"] += 1
                    examples.append((wanted[number % distinct], undisturbed[number % distinct], got))

        def killer():
            rng = random.Random(2)
            while not over.wait(kill_every):
                worker = rng.choice(workers)
                worker.kill()
                result["kills"] += 1
                if over.wait(min(1.0, kill_every / 3)):
                    return
                worker.start()

        began = time.monotonic()
        killing = threading.Thread(target=killer)
        killing.start()
        clients = [threading.Thread(target=client) for _ in range(concurrency)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        over.set()
        killing.join()
        metrics = http("GET", f"{cluster.router_url}/metrics")[2]
        moved = [line for line in metrics.splitlines() if line.startswith("bora_router_failovers_total")]
        result["moved"] = {line.split('"')[1]: int(float(line.split()[-1])) for line in moved}
        result["seconds"] = round(time.monotonic() - began, 1)
        return result, examples


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--kill-every", type=float, default=5.0)
    parser.add_argument("--groups", type=int, default=4)
    options = parser.parse_args()
    outcome, examples = run(options.streams, options.concurrency, options.kill_every, options.groups)
    print(json.dumps(outcome))
    for request, expected, got in examples[:3]:
        print(json.dumps({"request": request, "expected": expected, "got": got})[:3000])
    raise SystemExit(outcome["failed"] + outcome["corrupted"] > 0)

"""Streams while random groups are killed, each compared token by token with an undisturbed run.

`scripts/bench/failover` runs it long, `test_failover.py` short. The groups are fakes whose every id depends on all
ids before it and on the seed: one id lost, doubled or drawn with another seed changes all that follow.
"""

import argparse
import json
import random
import threading
import time
from http.client import HTTPConnection

from cluster import Cluster, http

TOOLS = [{"type": "function", "function": {"name": "run", "parameters": {"type": "object", "properties": {}}}}]


def requests(count, seed=1):
    """Distinct requests: greedy and seeded, one choice and several, with and without logprobs, chat with tools."""
    rng = random.Random(seed)
    for number in range(count):
        body = {"temperature": 0.7 if number % 2 else 0, "seed": rng.randrange(2**31), "max_tokens": rng.randrange(40, 120),
                "ignore_eos": True, "return_token_ids": True, "stream": True, "n": 2 if number % 5 == 0 else 1,
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


def answer(host, path, body):
    """What a client has at the end, in a form that does not depend on how it came in pieces."""
    connection = HTTPConnection(host, timeout=120)
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            return {"error": f"status {response.status}: {response.read()[:300]!r}"}, ""
        choices, usage, done = {}, None, False
        for line in response:
            if not line.startswith(b"data: "):
                continue
            data = line[6:].strip()
            if data == b"[DONE]":
                done = True
                continue
            event = json.loads(data)
            if "error" in event:
                return {"error": event["error"]}, ""
            if event.get("usage"):
                usage = {name: event["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
            for chunk in event.get("choices", []):
                choice = choices.setdefault(chunk["index"], {"ids": [], "text": "", "calls": [], "logprobs": [], "finish": None})
                delta = chunk.get("delta", {})
                choice["ids"] += chunk.get("token_ids") or []
                choice["text"] += chunk.get("text") or delta.get("content") or ""
                for call in delta.get("tool_calls") or []:
                    choice["calls"].append([call["index"], call["function"].get("name"), call["function"].get("arguments")])
                logprobs = chunk.get("logprobs") or {}
                choice["logprobs"] += logprobs.get("content") or logprobs.get("token_logprobs") or []
                choice["finish"] = chunk.get("finish_reason") or choice["finish"]
        if not done:
            return {"error": "no [DONE]"}, ""
        return {"choices": choices, "usage": usage}, response.headers.get("x-bora-group", "")
    except OSError as error:
        return {"error": repr(error)}, ""
    finally:
        connection.close()


def run(streams, concurrency, kill_every, groups=4, distinct=60, time_scale=1.0):
    """Returns what happened as a dictionary."""
    with Cluster(model="fake-devstral", skip_tokenizer=False) as cluster:
        cluster.start_etcd()
        cluster.start_router()
        fake = {"mode": "digest", "time_scale": time_scale}
        workers = [cluster.start_worker(f"g{number}", device="fake", max_model_len=16384, kv_cache={"blocks": 8192}, fake=fake)
                   for number in range(groups)]
        cluster.wait_ready(groups)
        host = cluster.router_url.removeprefix("http://")
        wanted = list(requests(distinct))
        undisturbed = [answer(host, path, body)[0] for path, body in wanted]
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
                got, _ = answer(host, *wanted[number % distinct])
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
        moved = [line for line in metrics.splitlines() if line.startswith("bora_router_moved_sequences_total")]
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

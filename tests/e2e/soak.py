"""A fleet at half of its capacity: agents whose conversations grow and end, each answer as long as it was asked for,
and the resident memory of router and groups by the minute. `scripts/bench/soak` runs it.

Caches fill first: the router's cache of conversations is given 16 MB and a group 1,024 blocks, so that both are full
after a few minutes. Memory is flat when the mean of the last quarter is within 5 % of that of the second quarter.
"""

import argparse
import json
import random
import threading
import time

from cluster import Cluster, http
from sse import ask

SEQUENCES, GROUPS = 16, 3


def resident_mb(process):
    for line in open(f"/proc/{process.child.pid}/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{process.name} has no resident memory")


def agent(url, number, over, counts, lock):
    """One conversation after the other, of up to 30 turns."""
    rng = random.Random(number)
    while not over.is_set():
        messages = [{"role": "user", "content": f"Task {rng.random()}: " + "look at this. " * rng.randrange(50, 400)}]
        for _ in range(rng.randrange(3, 30)):
            length = rng.randrange(8, 40)
            got = ask(url, "/v1/chat/completions", {"messages": messages, "max_tokens": length, "ignore_eos": True, "return_token_ids": True})
            right = "error" not in got and len(got["choices"][0]["ids"]) == length
            with lock:
                counts["answers" if right else "wrong"] += 1
                if not right and counts["wrong"] < 4:
                    print(json.dumps(got)[:500], flush=True)
            if over.is_set():
                return
            messages += [{"role": "assistant", "content": f"Step {rng.random()}"}, {"role": "user", "content": f"{rng.random()} " + "and then? " * rng.randrange(5, 80)}]


def run(minutes, every=10.0):
    with Cluster(model="fake-devstral") as cluster:
        cluster.start_etcd()
        router = cluster.start_router(conversation_cache_bytes=16 << 20)
        groups = [cluster.start_worker(f"g{number}", device="fake", max_model_len=32768, kv_cache={"blocks": 1024},
                                       fake={"mode": "digest"}, schedule={"max_num_seqs": SEQUENCES}) for number in range(GROUPS)]
        cluster.wait_ready(GROUPS)
        over, lock, counts = threading.Event(), threading.Lock(), {"answers": 0, "wrong": 0}
        agents = [threading.Thread(target=agent, args=(cluster.router_url, number, over, counts, lock)) for number in range(GROUPS * SEQUENCES // 2)]
        for thread in agents:
            thread.start()
        samples, end = {process.name: [] for process in [router, *groups]}, time.monotonic() + minutes * 60
        while time.monotonic() < end:
            time.sleep(min(every, max(0.0, end - time.monotonic())))
            for process in [router, *groups]:
                samples[process.name].append(round(resident_mb(process), 1))
        over.set()
        for thread in agents:
            thread.join()
        metrics = http("GET", cluster.router_url + "/metrics")[2]
        cache = next(line for line in metrics.splitlines() if line.startswith("bora_router_conversation_cache_bytes "))
        result = {"kind": "soak", "minutes": minutes, **counts, "conversation_cache_mb": round(float(cache.split()[1]) / 1e6, 1), "megabytes": {}}
        flat = True
        for name, values in samples.items():
            quarter = max(1, len(values) // 4)
            second, last = values[quarter:2 * quarter], values[-quarter:]
            at = {minute: values[round(minute * 60 / every) - 1] for minute in (2, 5, 10, 15, 20) if minute <= minutes}
            growth = sum(last) / len(last) / (sum(second) / len(second)) - 1 if second else 0.0
            flat &= growth < 0.05
            result["megabytes"][name] = {"first": values[0], "at_minute": at, "second_quarter": round(sum(second) / max(1, len(second)), 1),
                                         "last_quarter": round(sum(last) / len(last), 1), "growth": round(growth, 4)}
        return {**result, "flat": flat}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    outcome = run(parser.parse_args().minutes)
    print(json.dumps(outcome))
    raise SystemExit(outcome["wrong"] > 0 or not outcome["flat"])

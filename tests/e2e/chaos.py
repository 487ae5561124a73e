"""Fifty clients ask two routers and three groups while everything is killed, stopped, cut off and filled up. Every request that is
accepted must end in the complete, correct response.

`scripts/chaos` runs it for ten minutes, `test_chaos.py` for one. Responses are greedy and compared with those of the cluster
before the first fault. A client asks one router, and the other one only if the first does not accept connections: what a load
balancer does. Routers are stopped in order and never killed: a router that is killed loses its own connections.

A request is `lost` if it was accepted (status 200, or a plain request that the router took) and did not end in a complete
response, and `refused` if it got 429 or 503 with `Retry-After` before it was accepted. It may be refused only while the router
is out of open files or has no ready group of the model.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import random
import shutil
import sys
import threading
import time

from chaos_faults import Faults, Fleet, Windows
from chaos_load import MODELS, OTHER_MODEL, Load, cases
from cluster import Cluster


class Journal:
    """What happened when, in a file and, if `shows`, on standard output."""

    def __init__(self, path, shows):
        self.file, self.shows, self.began, self.lock = open(path, "w"), shows, time.monotonic(), threading.Lock()

    def __call__(self, line):
        with self.lock:
            line = f"{time.strftime('%H:%M:%S', time.gmtime())} {time.monotonic() - self.began:7.2f}  {line}"
            print(line, file=self.file, flush=True)
            if self.shows:
                print(line, flush=True)


def ask_all(load, name, asked):
    """Asks each case once; returns the records in order."""
    ask = lambda number, case: load.ask(f"{name}-{number}", case, number % 2 == 1)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, range(len(asked)), asked))


def note_expected(load, asked):
    """The responses that the cluster gives before the first fault."""
    for case, record in zip(asked, ask_all(load, "reference", asked)):
        assert record.got is not None, (record.outcome, record.cause)
        case.expected = record.got


def run(seconds, seed, clients=50, keep=None, shows=False):
    """The result as a dictionary, and the requests that failed."""
    with Cluster(models=MODELS) as cluster:
        journal, windows = Journal(cluster.path / "journal.log", shows), Windows()
        journal(f"seed {seed}")
        with contextlib.closing(Fleet(cluster, windows, journal)) as fleet:
            fleet.start()
            main, other = cases(), cases(OTHER_MODEL)
            load = Load(fleet.routers, main, windows, seed, clients)
            note_expected(load, main)
            with fleet.other_model():
                note_expected(load, other)
            load.records.clear()
            journal(f"{len(main)} responses are known, faults begin")
            faults = Faults(fleet, seed, load, other)
            load.start()
            faults.run(seconds)
            journal("the faults are over, open requests finish")
            load.stop()
            recovered = recovers(fleet, load, main)
            result, failures = judge(load, windows)
            result |= {"seed": seed, "seconds": seconds, "faults": dict(faults.injected), "recovered": recovered, "broken": fleet.broken,
                       "groups_that_ended_by_themselves": fleet.exits}
        if keep:
            keep_evidence(pathlib.Path(keep), cluster, journal.began, load.records, result, failures)
        return result, failures


def recovers(fleet, load, asked):
    """Whether everything serves again. Notes what did not hold."""
    began = time.monotonic()
    try:
        fleet.wait_ready()
        recovered = all(record.outcome == "right" for record in ask_all(load, "final", asked[::2]))
    except AssertionError as error:
        fleet.broken.append(str(error))
        recovered = False
    fleet.journal(f"recovered: {recovered}, {time.monotonic() - began:.1f} s after the last response")
    fleet.broken += [f"{process.name} panicked" for process in fleet.cluster.processes if "panicked" in process.log()]
    fleet.broken += [f"{router.name} ended by itself" for router in fleet.routers if not router.process.running()]
    return recovered


def judge(load, windows):
    """Counts what became of the requests; returns those that failed, too."""
    counts, refused, failures = collections.Counter(), collections.Counter(), []
    for record in load.records:
        counts[record.outcome] += 1
        if record.outcome == "refused":
            span = (record.sent, record.ended)
            if windows.overlap(("files",), record.router, *span):
                reason = "open files ran out"
            elif windows.overlap(("no group",), (record.router, record.body["model"]), *span):
                reason = "no group was ready"
            else:
                reason = "NO REASON"
                failures.append(record)
            refused[f"{record.cause} ({reason})"] += 1
        elif record.outcome != "right":
            failures.append(record)
    first_tokens = sorted(record.first_token_after for record in load.records if record.first_token_after is not None)
    durations = sorted(record.ended - record.sent for record in load.records)
    result = {"requests": len(load.records), **{outcome: counts[outcome] for outcome in ("right", "lost", "wrong", "refused")},
              "refused_without_reason": sum(record.outcome == "refused" for record in failures), "refused_by_cause": dict(refused),
              "failed_over": load.failed_over, "sent_again_on_a_new_connection": load.stale,
              "first_token_seconds": spread(first_tokens), "response_seconds": spread(durations)}
    return result, failures


def spread(values):
    if not values:
        return {}
    return {"median": round(values[len(values) // 2], 2), "p99": round(values[int(len(values) * 0.99)], 2), "longest": round(values[-1], 2)}


def passed(result):
    """Whether nothing was lost."""
    return result["recovered"] and not result["broken"] and not any(result[name] for name in ("lost", "wrong", "refused_without_reason"))


def keep_evidence(folder, cluster, began, records, result, failures):
    """Times are those of the journal."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    for record in records:
        record.sent, record.ended = round(record.sent - began, 2), round(record.ended - began, 2)
    for name, some in (("requests", records), ("failures", failures)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for record in some:
                print(json.dumps(dataclasses.asdict(record)), file=file)
    for path in [*cluster.path.glob("*.log"), *cluster.path.glob("*.yaml")]:
        shutil.copy(path, folder)


def table(result):
    """For people."""
    rows = [("injected faults", sum(result["faults"].values()))]
    rows += [(f"  {kind}", count) for kind, count in sorted(result["faults"].items())]
    rows += [(name, result[name]) for name in ("requests", "right", "lost", "wrong", "refused")]
    rows += [(f"  {cause}", count) for cause, count in sorted(result["refused_by_cause"].items())]
    rows += [("asked the other router (connection refused)", result["failed_over"]),
             ("sent again (an idle connection was closed)", result["sent_again_on_a_new_connection"]),
             ("groups that ended by themselves", result["groups_that_ended_by_themselves"])]
    for title, name in (("time to first token", "first_token_seconds"), ("time of a response", "response_seconds")):
        rows += [(f"{title}, {which}", f"{value} s") for which, value in result[name].items()]
    rows.append(("all groups and routers serve afterwards", "yes" if result["recovered"] else "no"))
    rows += [("BROKEN", text) for text in result["broken"]]
    return "\n".join(f"{name:<58} {value}" for name, value in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long faults are injected")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000), help="of the faults and of what clients ask")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--keep", help="a folder for the logs of all processes, the journal of the faults and the requests that failed")
    parser.add_argument("--verbose", action="store_true", help="shows the faults as they are injected")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    result, failures = run(options.seconds, options.seed, options.clients, options.keep, options.verbose)
    print(table(result))
    for record in failures[:3]:
        print(json.dumps(dataclasses.asdict(record))[:2000])
    return 0 if passed(result) else 1


if __name__ == "__main__":
    sys.exit(main())

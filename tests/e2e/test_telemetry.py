"""Traces and metrics of real processes: a router, and a group whose two ranks are processes of their own, tell a real OTLP receiver."""

import json
import re
import time

import pytest

from certificates import Authority
from cluster import Cluster, free_port, http, wait_until
from collector import Collector

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "ignore_eos": True, "temperature": 0}


def under(trace, sampled=True):
    return {"traceparent": f"00-{trace}-{CALLER}-0{int(sampled)}"}


@pytest.fixture(scope="module")
def traced():
    with Collector() as collector, Cluster() as cluster:
        cluster.collector = collector
        cluster.sections = {"telemetry": {"otlp_endpoint": collector.url, "sample_ratio": 0, "metrics_seconds": 0.5},
                            "log": {"format": "json", "level": "info,bora_worker=debug"}}
        cluster.start_etcd()
        cluster.start_router()
        cluster.admin = [f"127.0.0.1:{free_port()}" for _ in range(2)]
        for rank in range(2):
            cluster.start_worker("pair", ranks=[rank], size=2, admin=cluster.admin[rank])
        cluster.wait_ready(1)
        yield cluster


def value(text, name, **labels):
    """A sample of this name and these labels, among others."""
    for line in text.splitlines():
        match = re.match(rf"{name}(?:\{{(.*?)\}})? ([\d.e+-]+)", line)
        if match and all(f'{key}="{wanted}"' in (match[1] or "") for key, wanted in labels.items()):
            return float(match[2])
    raise AssertionError(f"{name} {labels} is not in\n{text}")


def whole_trace(collector, trace, names):
    """Waits until spans of these names are there."""
    return wait_until(f"spans {names}", lambda: names <= {span.name for span in collector.spans(trace)} and collector.spans(trace), 15)


def test_one_trace_goes_from_the_client_through_router_and_leader_to_every_rank(traced):
    status, headers, answer = traced.post("/v1/chat/completions", HELLO, headers=under(TRACE))
    assert status == 200, answer
    names = {"chat tiny", "encode", "place", "bora.v1.Inference/Generate", "generate", "queue", "prefill", "decode", "rank", "prefill chunk"}
    whole_trace(traced.collector, TRACE, names)
    spans = wait_until("both ranks", lambda: len({s.pid for s in traced.collector.spans(TRACE) if s.name == "rank"}) == 2
                       and traced.collector.spans(TRACE), 15)
    by_name = {span.name: span for span in spans}
    by_id = {span.id: span for span in spans}
    request, call, generate = by_name["chat tiny"], by_name["bora.v1.Inference/Generate"], by_name["generate"]

    assert request.parent == CALLER and request.service == "bora-router"
    assert {by_name[name].parent for name in ("encode", "place", call.name)} == {request.id}
    assert generate.parent == call.id and generate.service == "bora-worker" and generate.resource["bora.group"] == "pair"
    assert {by_name[name].parent for name in ("queue", "prefill", "decode")} == {generate.id}
    ranks = [span for span in spans if span.name == "rank"]
    assert {span.attributes["bora.rank"] for span in ranks} == {0, 1} and {span.parent for span in ranks} == {generate.id}
    chunks = [span for span in spans if span.name == "prefill chunk"]
    assert {by_id[span.parent].name for span in chunks} == {"rank"}
    assert len({span.pid for span in spans}) == 3, "router, leader, follower"

    usage = answer["usage"]
    assert request.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert request.attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 6
    assert request.attributes["gen_ai.operation.name"] == "chat" and request.attributes["gen_ai.request.model"] == "tiny"
    assert request.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["bora.request_id"] == headers["x-request-id"] == generate.attributes["bora.request_id"]
    (candidate,) = by_name["place"].attributes["bora.place.candidates"]
    assert re.match(r"pair: [\d.]+s held_blocks=0 ", candidate)
    assert by_name["place"].attributes["bora.place.reason"] == "only"
    for rank in (0, 1):
        of_rank = [span for span in chunks if span.attributes["bora.rank"] == rank]
        assert sum(span.attributes["bora.tokens"] for span in of_rank) == usage["prompt_tokens"]
    assert all(span.begin <= span.end for span in spans)
    assert all(request.begin <= span.begin and span.end <= request.end + 5e6 for span in (call, by_name["encode"], by_name["place"]))
    assert generate.end - generate.begin <= call.end - call.begin + 5e6

    # the logs of both sides name the trace
    leader = next(process for process in traced.processes if process.name == "pair-0")
    line = next(json.loads(line) for line in leader.log().splitlines() if '"message":"generate"' in line)
    assert line["trace_id"] == TRACE and line["request_id"] == headers["x-request-id"]
    # and the time to the first token has it as an exemplar
    assert f'trace_id="{TRACE}"' in traced.get("/metrics")[2]


def test_a_client_that_does_not_trace_is_obeyed_and_its_refusals_are_traced_too(traced):
    before = len(traced.collector.spans())
    assert traced.post("/v1/chat/completions", HELLO, headers=under("1" * 32, sampled=False))[0] == 200
    assert traced.post("/v1/chat/completions", HELLO)[0] == 200, "sample_ratio is 0"
    for broken in ("", "00", "00-zz-1-01", "x" * 5000):
        assert traced.post("/v1/chat/completions", HELLO, headers={"traceparent": broken})[0] == 200
    wrong = "2" * 32
    assert traced.post("/v1/chat/completions", {**HELLO, "temperature": -1}, headers=under(wrong))[0] == 400
    spans = whole_trace(traced.collector, wrong, {"chat", "encode"})
    assert next(span for span in spans if span.name == "encode").status.code == 2, "the reason of the refusal"
    assert {span.trace for span in traced.collector.spans()[before:]} == {wrong}


def test_metrics_come_to_the_collector_too_and_say_what_the_port_says(traced):
    traced.post("/v1/chat/completions", HELLO)
    metrics = wait_until("metrics", lambda: {"bora-router", "bora-worker"} <= set(traced.collector.metrics) and
                         "bora_worker_step_seconds" in traced.collector.metrics["bora-worker"] and traced.collector.metrics, 15)
    steps = metrics["bora-worker"]["bora_worker_step_seconds"].histogram
    assert sum(point.count for point in steps.data_points) > 0
    point = steps.data_points[0]
    assert len(point.bucket_counts) == len(point.explicit_bounds) + 1 and sum(point.bucket_counts) == point.count
    assert metrics["bora-router"]["bora_router_requests"].sum.is_monotonic
    assert "process_cpu_seconds" in metrics["bora-router"]


def test_every_process_of_a_group_serves_its_own_metrics(traced):
    assert traced.post("/v1/chat/completions", HELLO)[0] == 200
    leader, follower = (http("GET", f"http://{address}/metrics")[2] for address in traced.admin)
    assert value(leader, "bora_worker_step_seconds_count", kind="decode") > 0
    assert value(leader, "bora_worker_tokens_total", kind="prefill") > 0
    assert value(leader, "bora_worker_kv_blocks", state="free") > 0
    assert value(leader, "bora_worker_sequences_total", end="finished") > 0
    for rank, text in enumerate((leader, follower)):
        assert value(text, "bora_worker_rank_steps", rank=rank) > 0
        assert value(text, "bora_worker_collective_seconds_count", rank=rank,operation="all_reduce") > 0
        assert value(text, "process_resident_memory_bytes") > 1e6 and text.endswith("# EOF\n")
        assert text.count("# TYPE bora_worker_rank_steps ") == 1
    assert value(leader, "bora_worker_group_rank_steps", rank="1") > 0
    assert "bora_worker_step_seconds" not in follower, "only the leader plans steps"
    assert http("GET", f"http://{traced.admin[1]}/health")[0] == 200
    assert http("GET", f"http://{traced.admin[1]}/v1/models")[0] == 404


def test_a_collector_that_is_away_or_stuck_holds_nothing_up():
    """Nobody listens at all; the last spans are tried for a moment at the end."""
    with Cluster(registry="static") as cluster:
        cluster.sections = {"telemetry": {"otlp_endpoint": f"http://127.0.0.1:{free_port()}", "sample_ratio": 1, "metrics_seconds": 0.2}}
        worker = cluster.start_worker("only", device="fake", port=cluster.etcd_port)
        router = cluster.start_router()
        cluster.wait_ready()
        begun = time.monotonic()
        for _ in range(200):
            assert cluster.post("/v1/chat/completions", HELLO)[0] == 200
        assert time.monotonic() - begun < 30
        wait_until("the outage is said", lambda: "takes no metrics" in router.log(), 10)
        assert router.log().count("takes no metrics") == 1, "once"
        assert router.stop() == 0 and worker.stop() == 0


def test_an_endpoint_that_can_not_work_is_named():
    with Cluster(registry="static") as cluster:
        worker = cluster.start_worker("only", device="fake", env={"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4317"})
        assert worker.wait_exit(10) != 0
        assert "telemetry.otlp_endpoint" in worker.log() and "http://host:port" in worker.log()


def test_a_collector_is_spoken_to_over_tls(tmp_path):
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    with Collector(authority.issue("collector")) as collector, Cluster(registry="static") as cluster:
        telemetry = {"otlp_endpoint": collector.url, "otlp_ca_file": str(authority.certificate), "sample_ratio": 1, "metrics_seconds": 0.2}
        cluster.sections = {"telemetry": telemetry}
        cluster.start_worker("only", device="fake", port=cluster.etcd_port)
        cluster.start_router()
        cluster.wait_ready()
        assert cluster.post("/v1/chat/completions", HELLO, headers=under(TRACE))[0] == 200
        whole_trace(collector, TRACE, {"encode", "place", "generate"})
        wait_until("metrics are there", lambda: collector.metrics, 30)
        # one that the authority did not sign gets nothing
        telemetry["otlp_ca_file"] = str(stranger.certificate)
        suspicious = cluster.start_router("suspicious")
        wait_until("the outage is said", lambda: "takes no metrics" in suspicious.log(), 30)
        # the environment's own variable
        missing = cluster.start_worker("other", device="fake", env={"OTEL_EXPORTER_OTLP_CERTIFICATE": str(tmp_path / "nowhere.crt")})
        assert missing.wait_exit(30) != 0
        assert "telemetry.otlp_ca_file" in missing.log() and "nowhere.crt" in missing.log()


@pytest.mark.parametrize("vllm_names", [True, False])
def test_vllm_s_names_are_exported_by_one_part_each_and_can_be_turned_off(vllm_names):
    with Cluster() as cluster:
        cluster.sections = {"telemetry": {"vllm_names": vllm_names}}
        cluster.start_etcd()
        cluster.start_router()
        admin = f"127.0.0.1:{free_port()}"
        cluster.start_worker("alone", admin=admin)
        cluster.wait_ready(1)
        ask = {"model": "tiny", "prompt": [1000] * 130, "max_tokens": 5, "ignore_eos": True}
        for _ in range(2):
            assert cluster.post("/v1/completions", ask)[0] == 200
        texts = [http("GET", url + "/metrics")[2] for url in (cluster.router_url, f"http://{admin}")]
    lines = [line for text in texts for line in text.splitlines() if line.startswith("vllm:")]
    names = [{line.split("{")[0] for line in text.splitlines() if line.startswith("vllm:")} for text in texts]
    assert all(text.endswith("# EOF\n") for text in texts) and not names[0] & names[1]
    if not vllm_names:
        assert lines == []
        return
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
    model = '{model_name="tiny"}'
    assert values["vllm:prompt_tokens_total" + model] == 260 and values["vllm:generation_tokens_total" + model] == 10
    assert values["vllm:prefix_cache_queries_total" + model] == 260 and values["vllm:prefix_cache_hits_total" + model] == 128
    assert values['vllm:request_success_total{model_name="tiny",finished_reason="length"}'] == 2
    assert values["vllm:time_to_first_token_seconds_count" + model] == 2 == values["vllm:e2e_request_latency_seconds_count" + model]
    assert values["vllm:inter_token_latency_seconds_count" + model] >= 2
    assert values["vllm:num_requests_running" + model] == 0 == values["vllm:num_requests_waiting" + model]
    assert 0 <= values["vllm:kv_cache_usage_perc" + model] < 1

"""What agents sent when they failed, replayed: cases of public bug reports (`api`) and requests of coding agents (`agents`), against bora-demo
and a group that says what its script says. `agent_faults/script_ids.json` is that script."""

import json

import pytest

from cluster import FIXTURES, Cluster, http

FAULTS = FIXTURES / "agent_faults"
CASES = [json.loads(path.read_text()) for path in sorted((FAULTS / "api").glob("*.json"))]
AGENTS = {path.stem: json.loads(path.read_text())["request"] for path in sorted((FAULTS / "agents").glob("*.json"))}


@pytest.fixture(scope="module")
def cluster():
    script = json.loads((FAULTS / "script_ids.json").read_text())
    models = [{"name": "bora-demo", "path": str(FIXTURES / "bora-demo/fp8")},
              {"name": "scripted", "path": str(FIXTURES / "tiny_text"), "tokenizer": str(FIXTURES / "tokenizers/tekken-v13.json")}]
    with Cluster(models=models) as cluster:
        cluster.start_etcd()
        cluster.start_router(heartbeat_seconds=0.5)
        cluster.strict = cluster.start_router("strict", conversation="strict", heartbeat_seconds=0.5)
        cluster.start_worker("demo", model="bora-demo", kv_cache={"blocks": 1024})
        cluster.start_worker("scripted", model="scripted", device="fake", max_model_len=65536, kv_cache={"blocks": 4096},
                             fake={"script": script, "time_scale": 0.02, "echo_ids_from": 1000})
        cluster.wait_ready(2, seconds=300)
        cluster.wait_ready(2, url=cluster.strict.url)
        yield cluster


def ask(url, step):
    body = step["body_text"].encode() if "body_text" in step else step.get("body")
    status, headers, answer = http(step["method"], url + step["path"], body, step["headers"], timeout=120)
    # as it was written: JSON without spaces
    return status, headers, answer if isinstance(answer, str) else json.dumps(answer, separators=(",", ":"), ensure_ascii=False), answer


def check(expect, status, headers, text, answer):
    assert status == expect.get("status", status), text
    assert status in expect.get("status_in", [status]), text
    assert expect.get("header", "content-type") in headers
    assert all(part in text for part in expect.get("contains", [])), text
    assert not any(part in text for part in expect.get("lacks", [])), text
    if "joined_arguments" in expect:
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        calls = [call for chunk in chunks for choice in chunk["choices"] for call in choice["delta"].get("tool_calls") or []]
        assert "".join(call["function"].get("arguments") or "" for call in calls) == expect["joined_arguments"]
    if expect.get("offsets_within_text"):
        choice = answer["choices"][0]
        assert max(choice["logprobs"]["text_offset"]) <= len(choice["text"])


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_case_of_a_report(cluster, case):
    if case["id"] == "43-cors-preflight":
        pytest.skip("the router of these cases answers no pages of other origins")
    for step in case["steps"]:
        check(step["expect"], *ask(cluster.router_url, step))


# of each request of an agent: the status, and what the answer says and does not say
EXPECTED = {
    "01-codex-namespace-tool": (200, ['"type":"namespace"'], []),
    "02-codex-web_search-tool": (200, [], []),
    "03-codex-custom-tool": (200, [], []),
    "04-codex-developer-after-assistant": (200, [], []),
    "05-claude-system-after-tool_result": (200, [], []),
    "06-claude-tool_reference": (200, [], []),
    "07-claude-document": (400, ["messages.2.content.0.document: this model does not support PDF input"], []),
    "08-claude-image-blind-model": (400, ["messages.2.content.0.image: this model does not support image input"], []),
    "09-claude-web_search": (200, [], []),
    "10-chat-reasoning_effort": (200, [], []),
    "11-responses-reasoning-effort": (200, [], []),
    "12-messages-effort-is-taken": (200, [], []),
    "13-messages-prompt-too-long": (400, ["prompt is too long"], []),
    "15-chat-custom-tool": (400, ["tools[0].type"], []),
    "16-deferred-tools-are-shown": (200, ['"input_tokens":41'], []),
    "17-deferred-tool-absent": (200, ['"input_tokens":41'], []),
    "18-models-anthropic": (200, ["bora-demo"], []),
    "20-strict-tool-choice-none": (200, ['"stop_reason"'], ["tool_use"]),
}


@pytest.mark.parametrize("rules", ["lenient", "strict"])
@pytest.mark.parametrize("name", AGENTS)
def test_request_of_an_agent(cluster, name, rules):
    request, (status, contains, lacks) = AGENTS[name], EXPECTED[name]
    body = request["body"]
    if name.startswith("13-"):  # as its file says
        body = {**body, "messages": [{"role": "user", "content": "a b c d e f g " * 9000}]}
    url = cluster.router_url if rules == "lenient" else cluster.strict.url
    step = {"method": "POST" if body else "GET", "path": request["path"], "headers": {}, **({"body": body} if body else {})}
    got = ask(url, step)
    check({"status": status, "contains": contains, "lacks": lacks}, *got)
    if status == 400:
        assert got[1]["x-should-retry"] == "false"

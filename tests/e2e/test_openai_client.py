"""The official Python client against `bora serve`: plain, streamed, tools, token ids."""

import openai
import pytest

from cluster import Cluster
from goldens import cases


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=served.router_url + "/v1", api_key="none", max_retries=0, timeout=60)


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_models(client):
    model = client.models.retrieve("tiny")
    assert model.id == "tiny" and model.object == "model"
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert model.model_extra["max_model_len"] == 2048
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-5")
    assert error.value.code == "model_not_found"


def test_plain_equals_streamed(client):
    ask = dict(model="tiny", messages=QUESTION, max_tokens=40, temperature=0)
    plain = client.chat.completions.create(**ask)
    assert plain.choices[0].finish_reason in ("length", "stop") and plain.choices[0].message.role == "assistant"
    assert plain.usage.completion_tokens <= 40 and plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens
    text, finish, usage, ids = "", None, None, set()
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        ids.add(chunk.id)
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
        usage = chunk.usage or usage
    assert text == plain.choices[0].message.content
    assert finish == plain.choices[0].finish_reason and len(ids) == 1
    assert usage.prompt_tokens == plain.usage.prompt_tokens and usage.completion_tokens == plain.usage.completion_tokens


def test_seed_decides_every_draw(client):
    ask = lambda seed: client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=24, temperature=1.0, top_p=0.9, seed=seed).choices[0].message.content
    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) > 1


def test_choices_and_logprobs(client):
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=6, n=3, temperature=1, seed=5, logprobs=True, top_logprobs=4)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens <= 18
    for choice in answer.choices:
        for token in choice.logprobs.content:
            assert token.logprob <= 0 and len(token.top_logprobs) == 4
            best = [t.logprob for t in token.top_logprobs]
            assert best == sorted(best, reverse=True)


def test_prefix_cache_is_reported(client):
    messages = [{"role": "system", "content": "You keep to the facts. " * 60}, {"role": "user", "content": "one"}]
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, temperature=0)
    again = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, temperature=0)
    assert first.choices[0].message.content == again.choices[0].message.content
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert cached % 64 == 0 and 0 < again.usage.prompt_tokens - cached <= 64


def test_token_ids_in_and_out(client):
    case = next(case for case, info in cases("tiny_text") if case.name == "card_small_talk")
    answer = client.completions.create(model="tiny", prompt=case.ids, max_tokens=8, temperature=0, extra_body={"ignore_eos": True, "return_token_ids": True})
    assert answer.choices[0].model_extra["token_ids"] == case.greedy
    streamed = []
    for chunk in client.completions.create(model="tiny", prompt=case.ids, max_tokens=8, temperature=0, stream=True, extra_body={"ignore_eos": True, "return_token_ids": True}):
        for choice in chunk.choices:
            streamed += choice.model_extra.get("token_ids") or []
    assert streamed == case.greedy


def test_stop_strings(client):
    ask = dict(model="tiny", prompt="def main():", max_tokens=40, temperature=0)
    whole = client.completions.create(**ask).choices[0].text
    stop = whole[10:14]
    cut = client.completions.create(**ask, stop=[stop]).choices[0]
    assert cut.finish_reason == "stop" and cut.text == whole[: whole.index(stop)]
    streamed = "".join(c.choices[0].text for c in client.completions.create(**ask, stop=[stop], stream=True) if c.choices)
    assert streamed == cut.text


TOOL = {"type": "function", "function": {"name": "read_file", "description": "Reads a file.", "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}}}


@pytest.fixture(scope="module")
def tool_client():
    """A scripted fake group that always answers with content and two tool calls."""
    with Cluster(model="fake-devstral") as cluster:
        cluster.start_etcd()
        cluster.start_router()
        # the ids of: I will look.[TOOL_CALLS]read_file[ARGS]{"path": "a.txt"}[TOOL_CALLS]read_file[ARGS]{"path": "ü.txt"}</s>
        cluster.start_worker("plain", device="fake")
        cluster.wait_ready()
        encode = lambda text: cluster.post("/tokenize", {"model": "fake-devstral", "prompt": text, "add_special_tokens": False})[2]["tokens"]
        call = lambda path: [9, *encode("read_file"), 32, *encode('{"path": "%s"}' % path)]
        answer = [*encode("I will look."), *call("a.txt"), *call("ü.txt"), 2]
        cluster.processes.pop().stop()
        cluster.start_worker("scripted", device="fake", fake={"script": [{"emit": answer[:-1]}]})
        cluster.wait_ready()
        yield openai.OpenAI(base_url=cluster.router_url + "/v1", api_key="none", max_retries=0, timeout=60)


def test_tool_calls(tool_client):
    ask = dict(model="fake-devstral", messages=[{"role": "user", "content": "read a.txt"}], tools=[TOOL])
    plain = tool_client.chat.completions.create(**ask).choices[0]
    assert plain.finish_reason == "tool_calls" and plain.message.content == "I will look."
    calls = [(c.function.name, c.function.arguments) for c in plain.message.tool_calls]
    assert calls == [("read_file", '{"path": "a.txt"}'), ("read_file", '{"path": "ü.txt"}')]
    assert len({c.id for c in plain.message.tool_calls}) == 2
    content, streamed, finish = "", {}, None
    for chunk in tool_client.chat.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            finish = choice.finish_reason or finish
            for delta in choice.delta.tool_calls or []:
                call = streamed.setdefault(delta.index, {"name": "", "arguments": "", "id": None})
                call["id"] = delta.id or call["id"]
                call["name"] += delta.function.name or ""
                call["arguments"] += delta.function.arguments or ""
    assert content == "I will look." and finish == "tool_calls"
    assert [(c["name"], c["arguments"]) for _, c in sorted(streamed.items())] == calls
    assert all(c["id"] for c in streamed.values())

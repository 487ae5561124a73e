"""Anthropic's Python client against the Messages API, and its rules on the raw bytes."""

import json
import threading

import anthropic
import pytest

from conftest import DEMO, KEY, SCRIPTED, SLOW, load
from cluster import wait_until
from conversations import LOOP, LOOP_ANSWER, LOOP_CALLS, PARALLEL, PARALLEL_CALLS, PARALLEL_TEXT, PLAIN, PLAIN_ANSWER, SINGLE, SINGLE_CALL, TOOLS, run_tool
from test_wire import post

OWN_TOOLS = [{"name": t["function"]["name"], "description": t["function"]["description"], "input_schema": t["function"]["parameters"]} for t in TOOLS]


def connect(cluster, key=KEY, **more):
    return anthropic.Anthropic(base_url=cluster.router_url, api_key=key, timeout=60, **{"max_retries": 0, **more})


@pytest.fixture(scope="module")
def client(cluster):
    return connect(cluster)


def user(text):
    return [{"role": "user", "content": text}]


def ask(client, messages, **more):
    return client.messages.create(**{"model": SCRIPTED, "max_tokens": 500, "messages": messages, **more})


def test_plain_and_streamed(client):
    plain = ask(client, user(PLAIN))
    assert plain.content[0].text == PLAIN_ANSWER and plain.stop_reason == "end_turn"
    with client.messages.stream(model=SCRIPTED, max_tokens=500, messages=user(PLAIN)) as stream:
        assert "".join(stream.text_stream) == PLAIN_ANSWER
        final = stream.get_final_message()
    assert final.usage.output_tokens == plain.usage.output_tokens


def test_the_order_of_raw_events(cluster):
    body = {"model": SCRIPTED, "max_tokens": 500, "messages": user(PARALLEL), "tools": OWN_TOOLS, "stream": True}
    status, headers, raw = post(cluster, body, {"x-api-key": KEY, "anthropic-version": "2023-06-01"}, path="/v1/messages")
    assert status == 200 and headers["content-type"].startswith("text/event-stream") and raw.endswith(b"\n\n") and b"[DONE]" not in raw
    events = []
    for block in raw.split(b"\n\n")[:-1]:
        first, second = block.split(b"\n")
        assert first.startswith(b"event: ") and second.startswith(b"data: ")
        data = json.loads(second[6:])
        assert data["type"] == first[7:].decode(), "the event's name is said twice, alike"
        if data["type"] != "ping":
            events.append(data)
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert events[0]["message"]["usage"]["input_tokens"] >= 0 and events[-2]["usage"]["output_tokens"] > 0
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    open_block, blocks = None, []
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert open_block is None, "one block after the other"
            open_block = event["index"]
            assert open_block == len(blocks)
            blocks.append({**event["content_block"], "got": ""})
        elif event["type"] == "content_block_delta":
            assert event["index"] == open_block
            blocks[-1]["got"] += event["delta"].get("text", "") + event["delta"].get("partial_json", "")
        else:
            assert event["type"] == "content_block_stop" and event["index"] == open_block
            open_block = None
    assert [block["type"] for block in blocks] == ["text", "tool_use", "tool_use"]
    assert blocks[0]["got"] == PARALLEL_TEXT
    assert [(block["name"], block["got"]) for block in blocks[1:]] == [(call.name, call.arguments) for call in PARALLEL_CALLS]


@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_of_tools(client, stream):
    messages, called = user(LOOP), []
    for _ in range(5):
        if stream:
            with client.messages.stream(model=SCRIPTED, max_tokens=500, messages=messages, tools=OWN_TOOLS) as events:
                message = events.get_final_message()
        else:
            message = ask(client, messages, tools=OWN_TOOLS)
        messages.append({"role": "assistant", "content": message.content})
        used = [block for block in message.content if block.type == "tool_use"]
        if not used:
            break
        called += [(block.name, block.input) for block in used]
        messages.append({"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": block.id, "content": run_tool(block.name, block.input)} for block in used]})
    assert called == [(call.name, json.loads(call.arguments)) for call in LOOP_CALLS]
    assert message.content[0].text == LOOP_ANSWER and message.stop_reason == "end_turn"


def test_a_call_of_a_trained_model(client):
    message = ask(client, user(SINGLE), model=DEMO, tools=OWN_TOOLS[:1], extra_body={"temperature": 0})
    (block,) = [block for block in message.content if block.type == "tool_use"]
    assert (block.name, block.input) == (SINGLE_CALL.name, json.loads(SINGLE_CALL.arguments)) and message.stop_reason == "tool_use"


def test_counting(client):
    assert client.messages.count_tokens(model=SCRIPTED, messages=user(PLAIN)).input_tokens == ask(client, user(PLAIN)).usage.input_tokens


@pytest.mark.parametrize("key, more, error", [
    ("wrong", {}, anthropic.AuthenticationError),
    (KEY, {"model": "gpt-5"}, anthropic.NotFoundError),
    (KEY, {"messages": user("x y " * 200_000)}, anthropic.BadRequestError),
    (KEY, {"messages": []}, anthropic.BadRequestError),
])
def test_errors(cluster, key, more, error):
    with pytest.raises(error) as raised:
        ask(connect(cluster, key), **{"messages": user(PLAIN), **more})
    assert raised.value.body["type"] == "error" and raised.value.body["error"]["message"]


def test_the_client_waits_and_tries_again(cluster):
    busy = connect(cluster, "key-one-at-a-time").messages.create(model=SLOW, max_tokens=60, messages=user("a"), stream=True, extra_body={"ignore_eos": True})
    next(iter(busy))
    with pytest.raises(anthropic.RateLimitError):
        ask(connect(cluster, "key-one-at-a-time"), user(PLAIN))
    drain = threading.Thread(target=lambda: list(busy))
    drain.start()
    assert ask(connect(cluster, "key-one-at-a-time", max_retries=6), user(PLAIN)).content[0].text == PLAIN_ANSWER
    drain.join()


def test_cancelling_frees_the_place(client, cluster):
    stream = client.messages.create(model=SLOW, max_tokens=4000, messages=user("count"), stream=True, extra_body={"ignore_eos": True})
    for number, _ in enumerate(stream):
        if number == 3:
            break
    wait_until("it runs", lambda: load(cluster, "slow")["running"] == 1, seconds=10)
    stream.close()
    wait_until("it ended", lambda: load(cluster, "slow")["running"] == 0, seconds=10)

"""The Messages API with Anthropic's Python client, against bora-demo: text, events, a loop of tools, counting, errors, and a
group that dies in mid-answer."""

import anthropic
import pytest

from cluster import FIXTURES, Cluster, serve
from files import TASK, TASK_CALLS, Files

MODEL = "bora-demo"
WEIGHTS = FIXTURES / "bora-demo" / "fp8"
KEY = "an-api-key"
GREEDY = {"temperature": 0}  # the client knows the field no more


def tool(name, description, **properties):
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}, "required": list(properties)}
    return {"name": name, "description": description, "input_schema": schema}


TOOLS = [tool("get_weather", "Get the weather of a city.", city="string"), tool("read_file", "Read a file.", path="string"),
         tool("write_file", "Write a file.", path="string", content="string")]


@pytest.fixture(scope="module")
def served_demo():
    with Cluster(model=MODEL, model_dir=WEIGHTS) as cluster:
        serve(cluster, "--served-model-name", MODEL, "--device", "cpu", "--num-kv-blocks", "256", "--api-key", KEY, "--strict-conversations")
        yield cluster


@pytest.fixture(scope="module")
def client(served_demo):
    return anthropic.Anthropic(base_url=served_demo.router_url, api_key=KEY, max_retries=0, timeout=120)


def ask(client, messages, **more):
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return client.messages.create(model=MODEL, max_tokens=400, messages=messages, extra_body=GREEDY, **more)


def test_plain(client):
    message = ask(client, "Who are you?", metadata={"user_id": "u"})
    (block,) = message.content
    assert block.type == "text" and block.text.startswith("I am bora-demo, a toy model")
    assert (message.stop_reason, message.stop_sequence, message.role) == ("end_turn", None, "assistant")
    assert message.usage.input_tokens > 3 and message.usage.output_tokens > 3 and message.usage.cache_read_input_tokens == 0
    assert message._request_id
    cut = client.messages.create(model=MODEL, max_tokens=20, extra_body=GREEDY, messages=[{"role": "user", "content": "Count from 1 to 60."}])
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 20
    stopped = ask(client, "Count from 1 to 60.", stop_sequences=[", 7"])
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[0].text) == ("stop_sequence", ", 7", "1, 2, 3, 4, 5, 6")


def test_streamed_is_plain(client):
    plain = ask(client, "Count from 1 to 60.")
    with client.messages.stream(model=MODEL, max_tokens=400, extra_body=GREEDY, messages=[{"role": "user", "content": "Count from 1 to 60."}]) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == plain.content[0].text == final.content[0].text
    assert final.stop_reason == "end_turn" and final.usage.output_tokens == plain.usage.output_tokens
    # all of the prompt but its last block was in the cache by now
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == plain.usage.input_tokens + plain.usage.cache_read_input_tokens


def test_an_answer_that_was_begun_is_continued(client):
    question = {"role": "user", "content": "Count from 1 to 60."}
    whole = ask(client, "Count from 1 to 60.").content[0].text
    rest = ask(client, [question, {"role": "assistant", "content": whole[:20]}]).content[0].text
    assert whole[:20] + rest == whole


def loop(client, question, answers, turns=6, stream=False):
    """Runs the model until it answers without a call; returns the calls by turn and the final text."""
    messages, calls = [{"role": "user", "content": question}], []
    for _ in range(turns):
        if stream:
            with client.messages.stream(model=MODEL, max_tokens=200, messages=messages, tools=TOOLS, extra_body=GREEDY) as events:
                message = events.get_final_message()
        else:
            message = ask(client, messages, tools=TOOLS)
        messages.append({"role": "assistant", "content": message.content})
        if message.stop_reason != "tool_use":
            return calls, message.content[-1].text
        used = [block for block in message.content if block.type == "tool_use"]
        calls.append([(block.name, block.input) for block in used])
        results = []
        for block in used:
            answer = answers(block.name, block.input)
            results.append({"type": "tool_result", "tool_use_id": block.id, "content": answer, "is_error": answer.startswith("error")})
        messages.append({"role": "user", "content": results})
    raise AssertionError(f"no answer within {turns} turns: {calls}")


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_a_loop_of_tools(client, stream):
    files = Files()
    calls, text = loop(client, TASK, files, stream=stream)
    assert calls == TASK_CALLS and files == {"notes/a.txt": "green tree"} and "green tree" in text
    files["src/main.rs"], files["lib/util.py"] = "one", "two"
    calls, text = loop(client, "Read the file src/main.rs and also Read the file lib/util.py", files, stream=stream)
    assert calls == [[("read_file", {"path": "src/main.rs"}), ("read_file", {"path": "lib/util.py"})]]
    assert "one" in text and "two" in text


def test_choices(client):
    forced = ask(client, "What is the weather in Rome?", tools=TOOLS, tool_choice={"type": "tool", "name": "get_weather"})
    assert [(block.type, block.name, set(block.input)) for block in forced.content] == [("tool_use", "get_weather", {"city"})]
    one = ask(client, "Read the file a.rs and also Read the file b.rs", tools=TOOLS, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    assert [block.type for block in one.content] == ["tool_use"] and one.stop_reason == "tool_use"
    none = ask(client, "Read the file a.rs", tools=TOOLS, tool_choice={"type": "none"})
    assert all(block.type == "text" for block in none.content)


def test_tokens_are_counted(client):
    messages = [{"role": "user", "content": "Who are you?"}]
    count = client.messages.count_tokens(model=MODEL, messages=messages, system="Be brief.", tools=TOOLS).input_tokens
    usage = ask(client, messages, system="Be brief.", tools=TOOLS).usage
    assert count == usage.input_tokens + usage.cache_read_input_tokens
    assert client.messages.count_tokens(model=MODEL, messages=messages).input_tokens < count


def test_keys_in_both_headers(served_demo, client):
    bearer = anthropic.Anthropic(base_url=served_demo.router_url, auth_token=KEY, max_retries=0)
    assert bearer.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": "a"}]).input_tokens > 2
    wrong = anthropic.Anthropic(base_url=served_demo.router_url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as error:
        wrong.messages.create(model=MODEL, max_tokens=1, messages=[{"role": "user", "content": "a"}])
    assert error.value.body["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("extra, kind, status, named", [
    ({"model": "claude"}, anthropic.NotFoundError, "not_found_error", "claude"),
    ({"messages": []}, anthropic.BadRequestError, "invalid_request_error", "messages"),
    ({"max_tokens": 0, "tool_choice": {"type": "any"}}, anthropic.BadRequestError, "invalid_request_error", "max_tokens"),
    ({"extra_body": {"temperature": 9}}, anthropic.BadRequestError, "invalid_request_error", "temperature"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}], "tool_choice": {"type": "tool", "name": "web_search"}}, anthropic.BadRequestError, "invalid_request_error", "tool_choice"),
    ({"tool_choice": {"type": "any"}}, anthropic.BadRequestError, "invalid_request_error", "tool_choice"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": "y"}]}]},
     anthropic.BadRequestError, "invalid_request_error", "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "word " * 60_000}]}, anthropic.BadRequestError, "invalid_request_error", "prompt is too long"),
])
def test_refusals(client, extra, kind, status, named):
    with pytest.raises(kind) as error:
        client.messages.create(**{"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "a"}], **extra})
    body = error.value.body
    assert body["type"] == "error" and body["error"]["type"] == status and named in body["error"]["message"], body


def test_an_answer_outlives_its_group():
    with Cluster(model=MODEL, model_dir=WEIGHTS) as cluster:
        cluster.start_etcd()
        cluster.start_router()
        workers = {name: cluster.start_worker(name, kv_cache={"blocks": 128}) for name in ("a", "b")}
        cluster.wait_ready(2, seconds=120)
        client = anthropic.Anthropic(base_url=cluster.router_url, api_key="none", max_retries=0, timeout=120)
        text, killed, events = "", False, []
        stream = client.messages.with_raw_response.create(model=MODEL, max_tokens=400, extra_body=GREEDY, stream=True,
                                                          messages=[{"role": "user", "content": "Count from 1 to 60."}])
        serving = stream.headers["x-bora-group"]
        for event in stream.parse():
            events.append(event.type)
            if event.type == "content_block_delta":
                text += event.delta.text
            if not killed and len(text) > 20:
                workers[serving].kill()
                killed = True
        assert killed and events[0] == "message_start" and events[-1] == "message_stop"
        assert events.count("message_start") == 1
        assert text == ", ".join(map(str, range(1, 61))) + "."

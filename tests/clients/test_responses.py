"""The Responses API with the official Python client, 2.x and 3.x."""

import json

import openai
import pytest

from conftest import DEMO, KEY, SCRIPTED
from conversations import LOOP, LOOP_ANSWER, LOOP_CALLS, PARALLEL, PARALLEL_CALLS, PARALLEL_TEXT, PLAIN, PLAIN_ANSWER, SINGLE, SINGLE_CALL, TOOLS, run_tool

OWN_TOOLS = [{"type": "function", "strict": False, **tool["function"]} for tool in TOOLS]


@pytest.fixture(scope="module")
def client(base_url):
    return openai.OpenAI(base_url=base_url, api_key=KEY, max_retries=0, timeout=60)


def test_plain_and_streamed(client):
    plain = client.responses.create(model=SCRIPTED, input=PLAIN)
    assert plain.output_text == PLAIN_ANSWER and plain.status == "completed"
    with client.responses.stream(model=SCRIPTED, input=PLAIN) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == PLAIN_ANSWER == final.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    assert final.usage.output_tokens == plain.usage.output_tokens


def test_parallel_calls(client):
    with client.responses.stream(model=SCRIPTED, input=PARALLEL, tools=OWN_TOOLS) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_text == PARALLEL_TEXT
    assert [(item.name, item.arguments) for item in final.output if item.type == "function_call"] == [(call.name, call.arguments) for call in PARALLEL_CALLS]


@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_of_tools(client, stream):
    items, called = [{"role": "user", "content": LOOP}], []
    for _ in range(5):
        if stream:
            with client.responses.stream(model=SCRIPTED, input=items, tools=OWN_TOOLS) as events:
                for _ in events:
                    pass
                answer = events.get_final_response()
        else:
            answer = client.responses.create(model=SCRIPTED, input=items, tools=OWN_TOOLS)
        calls = [item for item in answer.output if item.type == "function_call"]
        items += [item.to_dict() for item in answer.output]
        if not calls:
            break
        for call in calls:
            called.append((call.name, call.arguments))
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": run_tool(call.name, json.loads(call.arguments))})
    assert called == [(call.name, call.arguments) for call in LOOP_CALLS]
    assert answer.output_text == LOOP_ANSWER


def test_a_call_of_a_trained_model(client):
    answer = client.responses.create(model=DEMO, input=SINGLE, tools=OWN_TOOLS[:1], temperature=0)
    (call,) = [item for item in answer.output if item.type == "function_call"]
    assert (call.name, call.arguments) == (SINGLE_CALL.name, SINGLE_CALL.arguments)


@pytest.mark.parametrize("key, more, error, code", [
    ("wrong", {}, openai.AuthenticationError, "invalid_api_key"),
    (KEY, {"model": "gpt-5"}, openai.NotFoundError, "model_not_found"),
    (KEY, {"input": "x y " * 200_000}, openai.BadRequestError, "context_length_exceeded"),
    (KEY, {"previous_response_id": "resp_1"}, openai.BadRequestError, None),
])
def test_errors(base_url, key, more, error, code):
    with pytest.raises(error) as raised:
        openai.OpenAI(base_url=base_url, api_key=key, max_retries=0).responses.create(**{"model": SCRIPTED, "input": PLAIN, **more})
    if code:
        assert raised.value.code == code

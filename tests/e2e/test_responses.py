"""The Responses API with the official Python client, against bora-demo: text, events, a loop of tools, forms, errors."""

import json

import openai
import pydantic
import pytest

from cluster import FIXTURES, Cluster, serve
from files import TASK, TASK_CALLS, Files

MODEL = "bora-demo"
WEIGHTS = FIXTURES / "bora-demo" / "fp8"
COUNT = {"input": "Count from 1 to 60.", "model": MODEL, "temperature": 0}


def tool(name, description, **properties):
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}, "required": list(properties),
              "additionalProperties": False}
    return {"type": "function", "name": name, "description": description, "parameters": schema, "strict": True}


TOOLS = [tool("get_weather", "Get the weather of a city.", city="string"), tool("read_file", "Read a file.", path="string"),
         tool("write_file", "Write a file.", path="string", content="string")]


@pytest.fixture(scope="module")
def client():
    with Cluster(model=MODEL, model_dir=WEIGHTS) as cluster:
        serve(cluster, "--served-model-name", MODEL, "--device", "cpu", "--num-kv-blocks", "256", "--strict-conversations")
        yield openai.OpenAI(base_url=cluster.router_url + "/v1", api_key="none", max_retries=0, timeout=120)


def test_plain(client):
    response = client.responses.create(model=MODEL, input="Who are you?", temperature=0, store=False, metadata={"team": "a"})
    assert response.status == "completed" and response.output_text.startswith("I am bora-demo, a toy model")
    assert response.store is False and response.metadata == {"team": "a"} and response.error is None
    usage = response.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens and usage.input_tokens_details.cached_tokens == 0
    cut = client.responses.create(model=MODEL, input="Count from 1 to 60.", temperature=0, max_output_tokens=20)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens" and cut.usage.output_tokens == 20


def test_streamed_is_plain(client):
    plain = client.responses.create(**COUNT)
    events = list(client.responses.create(**COUNT, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == plain.output_text == events[-1].response.output_text
    # the client's own accumulator
    with client.responses.stream(**COUNT) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == text


def loop(client, question, answers, turns=6):
    """Runs the model until it answers without a call; returns the calls by turn and the final text."""
    conversation, calls = [{"role": "user", "content": question}], []
    for _ in range(turns):
        response = client.responses.create(model=MODEL, input=conversation, tools=TOOLS, temperature=0)
        conversation += response.output
        asked = [item for item in response.output if item.type == "function_call"]
        if not asked:
            return calls, response.output_text
        calls.append([(item.name, json.loads(item.arguments)) for item in asked])
        for item, (name, arguments) in zip(asked, calls[-1]):
            conversation.append({"type": "function_call_output", "call_id": item.call_id, "output": answers(name, arguments)})
    raise AssertionError(f"no answer within {turns} turns: {calls}")


def test_a_loop_of_tools(client):
    files = Files()
    calls, text = loop(client, TASK, files)
    assert calls == TASK_CALLS and files == {"notes/a.txt": "green tree"} and "green tree" in text
    files["src/main.rs"], files["lib/util.py"] = "one", "two"
    calls, text = loop(client, "Read the file src/main.rs and also Read the file lib/util.py", files)
    assert calls == [[("read_file", {"path": "src/main.rs"}), ("read_file", {"path": "lib/util.py"})]]
    assert "one" in text and "two" in text


def test_streamed_calls(client):
    events = list(client.responses.create(model=MODEL, input="Read the file src/words.rs", tools=TOOLS, temperature=0, stream=True))
    deltas = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    (call,) = [item for item in events[-1].response.output if item.type == "function_call"]
    assert deltas == done.arguments == call.arguments and json.loads(deltas) == {"path": "src/words.rs"}
    assert call.name == "read_file" and call.status == "completed" and call.call_id


class Weather(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=20)
    temperature: int = pydantic.Field(ge=0, le=99)
    sunny: bool


def test_a_form_is_kept(client):
    parsed = client.responses.parse(model=MODEL, input="The weather in Rome?", text_format=Weather, temperature=0, max_output_tokens=200)
    assert isinstance(parsed.output_parsed, Weather)
    forced = client.responses.create(model=MODEL, input="What is the weather in Rome?", tools=TOOLS, tool_choice={"type": "function", "name": "get_weather"},
                                     temperature=0, max_output_tokens=200)
    (call,) = forced.output
    assert call.name == "get_weather" and set(json.loads(call.arguments)) == {"city"}


def test_the_prefix_cache_is_reported(client):
    item = lambda role, text: {"role": role, "content": text}
    conversation = [item("user", "The code of the green locker is KX-4821. " * 20)]
    first = client.responses.create(model=MODEL, input=conversation, temperature=0, max_output_tokens=8)
    conversation += [*first.output, item("user", "What is the code of the green locker?")]
    second = client.responses.create(model=MODEL, input=conversation, temperature=0, max_output_tokens=40)
    assert second.usage.input_tokens_details.cached_tokens >= (first.usage.input_tokens - 1) // 64 * 64


@pytest.mark.parametrize("extra, param", [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice"),
    ({"input": [{"role": "user", "content": "a"}, {"type": "item_reference", "id": "msg_1"}]}, "input[1].type"),
    ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input[0].role"),
    ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "nothing"}, "strict": True}}}, "text.format"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"temperature": 9}, "temperature"),
])
def test_refusals_name_the_field(client, extra, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(**{"model": MODEL, "input": "Hi", **extra})
    assert error.value.param == param, error.value


def test_a_context_that_is_too_long_has_its_code(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model=MODEL, input="word " * 60_000)
    assert error.value.code == "context_length_exceeded" and error.value.param == "input"

"""Faulty conversations, as agents send them, at a router that repairs them: bora-demo goes on, and its prefix cache too."""

import openai
import pytest

from cluster import FIXTURES, Cluster, serve

MODEL = "bora-demo"
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Get the weather of a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}


@pytest.fixture(scope="module")
def client():
    with Cluster(model=MODEL, model_dir=FIXTURES / "bora-demo" / "fp8") as cluster:
        serve(cluster, "--served-model-name", MODEL, "--device", "cpu", "--num-kv-blocks", "256", "--lenient-conversations")
        yield openai.OpenAI(base_url=cluster.router_url + "/v1", api_key="none", max_retries=0, timeout=300)


def ask(client, messages, **more):
    return client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=60, **more)


def test_a_denied_call_and_a_conversation_that_grows(client):
    fact = "The code of the green locker is KX-4821. " + "Remember it. " * 30
    messages = [{"role": "user", "content": fact}, {"role": "assistant", "content": ""}, {"role": "assistant", "content": "Noted."},
                {"role": "user", "content": "What is the weather in Rome?"}]
    asked = ask(client, messages, tools=[WEATHER])
    assert asked.choices[0].finish_reason == "tool_calls"
    before = asked.usage.prompt_tokens
    # the user denies the call, and the agent says so in its own way
    messages += [asked.choices[0].message.model_dump(exclude_none=True), {"role": "system", "content": "The call was denied."},
                 {"role": "user", "content": "What is the code of the green locker?"}]
    for _ in range(2):
        answer = ask(client, messages, tools=[WEATHER])
        assert answer.usage.prompt_tokens_details.cached_tokens >= (before - 1) // 64 * 64 > 64
        before = answer.usage.prompt_tokens
        messages += [{"role": "assistant", "content": answer.choices[0].message.content or "-"}, {"role": "tool", "tool_call_id": "gone", "content": "x"},
                     {"role": "user", "content": "Who are you?"}]


def test_what_is_not_on_the_list_is_refused_by_its_place(client):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}, {"role": "wizard", "content": "b"}])
    assert error.value.param == "messages[2].role"

"""LangChain's two chat models: through OpenAI's client, and its own for Mistral."""

import asyncio

import pytest

pytest.importorskip("langchain_core")
from langchain_core.messages import HumanMessage, ToolMessage  # noqa: E402
from langchain_core.tools import tool  # noqa: E402
from langchain_mistralai import ChatMistralAI  # noqa: E402
from langchain_openai import ChatOpenAI  # noqa: E402

from conftest import DEMO, KEY, SCRIPTED  # noqa: E402
from conversations import AS_JSON, LOOP, LOOP_ANSWER, LOOP_CALLS, PARALLEL, PARALLEL_CALLS, PARALLEL_TEXT, PLAIN, PLAIN_ANSWER, SINGLE  # noqa: E402


@tool
def add(a: float, b: float) -> float:
    """Add two numbers."""
    return a + b


@tool
def multiply(a: float, b: float) -> float:
    """Multiply two numbers."""
    return a * b


@tool
def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return city


TOOLS = {one.name: one for one in (add, multiply, get_weather)}


def openai_model(base_url, model=SCRIPTED, key=KEY):
    return ChatOpenAI(model=model, base_url=base_url, api_key=key, max_retries=0, timeout=60, temperature=0, stream_usage=True)


def mistral_model(base_url, model=SCRIPTED, key=KEY):
    return ChatMistralAI(model=model, endpoint=base_url, api_key=key, max_retries=1, timeout=60, temperature=0)


@pytest.fixture(params=[openai_model, mistral_model], ids=["openai", "mistral"])
def make(request, base_url):
    return lambda **more: request.param(base_url, **more)


def test_plain_and_streamed(make):
    plain = make().invoke(PLAIN)
    assert plain.content == PLAIN_ANSWER and plain.usage_metadata["output_tokens"] > 0
    whole = None
    for chunk in make().stream(PLAIN):
        whole = chunk if whole is None else whole + chunk
    assert whole.content == PLAIN_ANSWER
    assert whole.usage_metadata["output_tokens"] == plain.usage_metadata["output_tokens"]
    assert whole.usage_metadata["input_tokens"] == plain.usage_metadata["input_tokens"]


def test_streamed_parallel_calls(make):
    whole = None
    for chunk in make().bind_tools(list(TOOLS.values())).stream(PARALLEL):
        whole = chunk if whole is None else whole + chunk
    assert whole.content == PARALLEL_TEXT
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Curaçao"})]
    assert len(PARALLEL_CALLS) == len({call["id"] for call in whole.tool_calls})


@pytest.mark.parametrize("streamed", [False, True])
def test_a_loop_of_tools(make, streamed):
    model, messages, called = make().bind_tools(list(TOOLS.values())), [HumanMessage(LOOP)], []
    for _ in range(5):
        if streamed:
            message = None
            for chunk in model.stream(messages):
                message = chunk if message is None else message + chunk
        else:
            message = model.invoke(messages)
        messages.append(message)
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            called.append(call["name"])
            messages.append(ToolMessage(str(TOOLS[call["name"]].invoke(call["args"])), tool_call_id=call["id"], name=call["name"]))
    assert called == [call.name for call in LOOP_CALLS]
    assert message.content == LOOP_ANSWER


def test_an_answer_in_a_given_form(make):
    import pydantic

    class Facts(pydantic.BaseModel):
        """What is said."""

        color: str
        city: str

    answer = make(model=DEMO).with_structured_output(Facts, method="json_schema").invoke(AS_JSON)
    assert answer == Facts(color="red", city="Rome")


def test_a_forced_call(make):
    """`with_structured_output` by way of a tool that has to be called."""
    import pydantic

    class GetWeather(pydantic.BaseModel):
        """Get the weather of a city."""

        city: str

    answer = make(model=DEMO).with_structured_output(GetWeather, method="function_calling").invoke(SINGLE)
    assert answer == GetWeather(city="Paris")


def test_a_wrong_key(make):
    with pytest.raises(Exception) as raised:
        make(key="wrong").invoke(PLAIN)
    status = getattr(raised.value, "status_code", None) or raised.value.response.status_code
    assert status == 401


def test_asynchronous(make):
    async def ask():
        return "".join([chunk.content async for chunk in make().astream(PLAIN)])

    assert asyncio.run(ask()) == PLAIN_ANSWER

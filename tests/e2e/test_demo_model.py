"""bora-demo, the toy model that answers (docs/demo-model.md): what the tiny random models cannot show. Tool loops with
the official client, a conversation that grows, an answer that outlives its group."""

import json
import os
import shutil
import subprocess

import openai
import pytest

from cluster import FIXTURES, Cluster, serve
from files import TASK, TASK_CALLS, Files

VIBE = os.environ.get("VIBE_BIN") or shutil.which("vibe")

WEIGHTS = FIXTURES / "bora-demo"
MODEL = "bora-demo"
# what Devstral writes a call with
CALL_TOKENS = {"[TOOL_CALLS]": 9, "[ARGS]": 32, "[CALL_ID]": 33}


def tool(name, description, **properties):
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [tool("get_weather", "Get the weather of a city.", city="string"), tool("read_file", "Read a file.", path="string"),
         tool("write_file", "Write a file.", path="string", content="string")]


@pytest.fixture(scope="module", params=[("fp8", 2), ("bf16", 1)], ids=lambda p: f"{p[0]}-tp{p[1]}")
def client(request):
    weights, ranks = request.param
    with Cluster(model=MODEL, model_dir=WEIGHTS / weights) as cluster:
        serve(cluster, "--served-model-name", MODEL, "--tensor-parallel-size", ranks, "--device", "cpu", "--num-kv-blocks", "256")
        yield openai.OpenAI(base_url=cluster.router_url + "/v1", api_key="none", max_retries=0, timeout=120)


def ask(client, messages, **more):
    return client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=200, **more)


def tool_loop(client, messages, answers, turns=6):
    """Runs the model until it answers without a call; `answers(name, arguments)` are the tools. Returns the calls
    by turn and the final text."""
    calls = []
    for _ in range(turns):
        choice = ask(client, messages, tools=TOOLS).choices[0]
        messages.append(choice.message.model_dump(exclude_none=True))
        if choice.finish_reason != "tool_calls":
            return calls, choice.message.content
        calls.append([(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls])
        for call, (name, arguments) in zip(choice.message.tool_calls, calls[-1]):
            messages.append({"role": "tool", "tool_call_id": call.id, "content": answers(name, arguments)})
    raise AssertionError(f"no answer within {turns} turns: {calls}")


def test_who_it_is(client):
    for question in ("Who are you?", "What is your name?", "Which model are you?"):
        answer = ask(client, [{"role": "user", "content": question}]).choices[0]
        assert answer.message.content.startswith("I am bora-demo, a toy model"), question
        assert answer.finish_reason == "stop"


def test_one_call_and_its_result(client):
    weather = json.dumps({"city": "Rome", "temperature": 17, "sky": "cloudy"})
    calls, text = tool_loop(client, [{"role": "user", "content": "What is the weather in Rome?"}], lambda name, arguments: weather)
    assert calls == [[("get_weather", {"city": "Rome"})]]
    assert text == "It is 17 degrees and cloudy in Rome."


def test_calls_in_sequence_and_at_once(client):
    files = Files()
    calls, text = tool_loop(client, [{"role": "user", "content": TASK}], files)
    assert calls == TASK_CALLS and files == {"notes/a.txt": "green tree"} and "green tree" in text

    files["src/main.rs"], files["lib/util.py"] = "one", "two"
    calls, text = tool_loop(client, [{"role": "user", "content": "Read the file src/main.rs and also Read the file lib/util.py"}], files)
    assert calls == [[("read_file", {"path": "src/main.rs"}), ("read_file", {"path": "lib/util.py"})]]
    assert "one" in text and "two" in text


def test_tools_are_not_called_when_none_is_needed(client):
    answer = ask(client, [{"role": "user", "content": "Who are you?"}], tools=TOOLS).choices[0]
    assert answer.message.tool_calls is None and answer.message.content.startswith("I am bora-demo")


def test_streamed_calls_are_the_plain_ones(client):
    question = [{"role": "user", "content": "Read the file src/words.rs"}]
    plain = ask(client, question, tools=TOOLS).choices[0].message.tool_calls
    name = arguments = ""
    for chunk in ask(client, question, tools=TOOLS, stream=True):
        for delta in (d for choice in chunk.choices for d in choice.delta.tool_calls or []):
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
    assert [(name, arguments)] == [(call.function.name, call.function.arguments) for call in plain] == [("read_file", '{"path": "src/words.rs"}')]


def test_a_growing_conversation_hits_the_prefix_cache(client):
    """Facts told early are recalled later, and each turn computes only what is new."""
    messages = [{"role": "user", "content": "The code of the green locker is KX-4821. Anna lives in Oslo."}]
    turns = ["Remember that blue_key = 77310.", "What is the code of the green locker?", "Where does Anna live?", "What is blue_key?"]
    expected = ["Noted.", "Noted.", "The code of the green locker is KX-4821.", "Anna lives in Oslo.", "blue_key = 77310"]
    before = 0
    for turn, answer_expected in enumerate(expected):
        answer = ask(client, messages)
        assert answer.choices[0].message.content == answer_expected
        usage = answer.usage
        # every full block of 64 that the turn before left behind is found again
        assert usage.prompt_tokens_details.cached_tokens >= (before - 1) // 64 * 64
        before = usage.prompt_tokens
        messages.append({"role": "assistant", "content": answer_expected})
        if turn < len(turns):
            messages.append({"role": "user", "content": turns[turn]})
    assert before > 64


def test_ranks_agree():
    """The same greedy answer at 1, 2 and 4 ranks."""
    questions = [("Count from 1 to 40.", None), ("What is the weather in Paris?", TOOLS), ("Write a function that reverses a string.", None)]
    answers = []
    for ranks in (1, 2, 4):
        with Cluster(model=MODEL, model_dir=WEIGHTS / "fp8") as cluster:
            serve(cluster, "--served-model-name", MODEL, "--tensor-parallel-size", ranks, "--device", "cpu", "--num-kv-blocks", "256")
            client = openai.OpenAI(base_url=cluster.router_url + "/v1", api_key="none", max_retries=0, timeout=120)
            messages = [ask(client, [{"role": "user", "content": text}], **({"tools": tools} if tools else {})).choices[0].message for text, tools in questions]
            answers.append([(m.content, [(c.function.name, c.function.arguments) for c in m.tool_calls or []]) for m in messages])
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0][0] == ", ".join(map(str, range(1, 41))) + "."
    assert answers[0][1][1] == [("get_weather", '{"city": "Paris"}')]


def test_structured_output(client):
    """What it would say anyway, and forms that bend it: with real weights the mask and the model's own wish meet."""
    facts = [{"role": "user", "content": "The city is Rome, the color is red. Answer in JSON with the keys color, city."}]
    schema = {"type": "object", "properties": {"color": {"type": "string"}, "city": {"type": "string"}}, "required": ["color", "city"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "facts", "strict": True, "schema": schema}}
    free = ask(client, facts).choices[0].message.content
    for one in (form, {"type": "json_object"}):
        answer = ask(client, facts, response_format=one).choices[0]
        assert json.loads(answer.message.content) == json.loads(free) == {"color": "red", "city": "Rome"} and answer.finish_reason == "stop"
    streamed = "".join(c.choices[0].delta.content or "" for c in ask(client, facts, response_format=form, stream=True) if c.choices)
    assert json.loads(streamed) == {"color": "red", "city": "Rome"}
    # it would answer red: the form leaves it blue or green
    bent = ask(client, facts, extra_body={"guided_json": {**schema, "properties": {**schema["properties"], "color": {"enum": ["blue", "green"]}}}})
    assert json.loads(bent.choices[0].message.content) in ({"color": color, "city": "Rome"} for color in ("blue", "green"))


def test_forced_calls(client):
    question = [{"role": "user", "content": "What is the weather in Rome?"}]
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        message = ask(client, question, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False).choices[0].message
        assert [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls] == [("get_weather", {"city": "Rome"})]


def test_no_call_where_none_is_allowed(client):
    """It says that it would need a call. Nor is there a call or a part of one wherever it would begin or go on with one: the end of the answer
    is ignored, so there are as many places as tokens."""
    tokens = 64
    question = [{"role": "user", "content": "Read the file src/main.rs"}]
    answer = ask(client, question, tools=TOOLS, tool_choice="none").choices[0]
    assert answer.message.content == "Without a call of read_file I cannot read the file." and answer.finish_reason == "stop"
    for skip_special in (True, False):
        more = {"ignore_eos": True, "return_token_ids": True, "skip_special_tokens": skip_special}
        choice = client.chat.completions.create(model=MODEL, messages=question, temperature=0, max_tokens=tokens, tools=TOOLS, tool_choice="none", extra_body=more).choices[0]
        assert choice.message.tool_calls is None
        assert choice.finish_reason == "length" and len(choice.token_ids) == tokens
        assert not set(CALL_TOKENS.values()) & set(choice.token_ids)
        assert not any(name in (choice.message.content or "") for name in CALL_TOKENS)


@pytest.mark.parametrize("form", [{}, {"guided_regex": r"(\d+, )*\d+\."}, {"guided_regex": r"(\d+, ){30}\d+\."}], ids=["free", "form", "short form"])
def test_a_group_that_dies_in_mid_answer(form):
    """The client of a killed group sees one answer, whole, with no word missing or twice; a given form goes on where it was."""
    with Cluster(model=MODEL, model_dir=WEIGHTS / "fp8") as cluster:
        cluster.start_etcd()
        cluster.start_router()
        workers = {name: cluster.start_worker(name) for name in ("a", "b")}
        cluster.wait_ready(2)
        client = openai.OpenAI(base_url=cluster.router_url + "/v1", api_key="none", max_retries=0, timeout=120)
        question = [{"role": "user", "content": "Count from 1 to 60."}]
        stream = client.chat.completions.with_raw_response.create(model=MODEL, messages=question, temperature=0, max_tokens=400, stream=True, extra_body=form)
        serving, text, killed, finish = stream.headers["x-bora-group"], "", False, None
        for chunk in stream.parse():
            for choice in chunk.choices:
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
            if not killed and len(text) > 20:
                workers[serving].kill()
                killed = True
        assert killed and finish == "stop"
        last = 31 if "{30}" in form.get("guided_regex", "") else 60
        assert text == ", ".join(map(str, range(1, last + 1))) + "."


@pytest.mark.skipif(VIBE is None, reason="Mistral Vibe is not installed (mistral-vibe 3, Python 3.12): put it on the PATH or in VIBE_BIN")
def test_vibe_reads_a_file(tmp_path):
    """Mistral Vibe's prompt and ten tools are longer than anything the model saw; it gets a call that it can run,
    and an answer that holds what the tool returned."""
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir(), home.mkdir()
    (work / "notes.txt").write_text("the owl sleeps at noon\n")
    with Cluster(model=MODEL, model_dir=WEIGHTS / "fp8") as cluster:
        serve(cluster, "--served-model-name", MODEL, "--device", "cpu", "--num-kv-blocks", "1024")
        (home / "config.toml").write_text(f"""active_model = "{MODEL}"
enable_telemetry = false
enable_update_checks = false
enable_auto_update = false

[[providers]]
name = "bora"
api_base = "{cluster.router_url}/v1"
api_key_env_var = "BORA_KEY"
api_style = "openai"
backend = "generic"

[[models]]
name = "{MODEL}"
alias = "{MODEL}"
provider = "bora"
temperature = 0.0
""")
        command = [VIBE, "--trust", "--auto-approve", "--workdir", work, "--max-turns", "4", "--output", "json", "-p", "Read the file notes.txt"]
        run = subprocess.run(command, env={**os.environ, "VIBE_HOME": str(home), "BORA_KEY": "none"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=500)
        assert run.returncode == 0, run.stderr[-2000:]
    entries = json.loads(run.stdout)
    (effect,) = [entry for entry in entries if entry["type"] == "effect"]
    assert effect["state"]["status"] == "completed" and effect["detail"]["input"]["filePath"] == "notes.txt"
    assert "the owl sleeps at noon" in entries[-1]["content"][0]["text"] and entries[-1]["role"] == "assistant"

"""What the scripted groups say: opening -> turns. Each opening is a text of its own, so that tests don't meet."""

import json

import coding_agents
from cluster import FIXTURES
from scripting import Call, Turn

PLAIN = "Say something in four languages."
PLAIN_ANSWER = "Hello, grüß dich, 你好, 🙂 and bonjour."

SINGLE = "What is the weather in Paris?"
SINGLE_CALL = Call("get_weather", city="Paris")
SINGLE_ANSWER = "It is 21 degrees in Paris."

PARALLEL = "Compare the weather of Oslo with that of Curaçao."
PARALLEL_TEXT = "I will ask for both."
PARALLEL_CALLS = (Call("get_weather", city="Oslo"), Call("get_weather", city="Curaçao"))
PARALLEL_ANSWER = "Curaçao is warmer than Oslo."

LOOP = "Add one to twenty, then double it."
LOOP_CALLS = [Call("add", a=20, b=1), Call("multiply", a=21, b=2)]
LOOP_ANSWER = "That makes 42."

EMPTY_ARGUMENTS = "What time is it?"
EMPTY_CALL = Call("now")

# ---- agents

VIBE_TASK = "Make greeting.py say good morning instead of hello."
VIBE_LINE_BEFORE, VIBE_LINE_AFTER = '    return "hello"', '    return "good morning"'
VIBE_EDIT = [
    Turn("I will look at the file first.", Call("read_file", path="greeting.py")),
    Turn("", Call("edit", file_path="greeting.py", old_string=VIBE_LINE_BEFORE, new_string=VIBE_LINE_AFTER)),
    Turn("Done: greeting.py says good morning."),
]

MINI_TASKS = {f"calculator-{number}": f"Ticket {number}: subtract() of calculator.py adds instead of subtracting" for number in (1, 2)}


def mini_turns(name):
    """Every command names the instance, so that the two conversations differ in every turn."""
    enter = f"cd $WORK/{name} && "
    bash = lambda text, command: Turn(text, Call("bash", command=enter + command))
    return [
        bash("THOUGHT: I look at the code.", "cat calculator.py"),
        bash("THOUGHT: I turn the sign.", "sed -i 's/a + b/a - b/' calculator.py && python3 -c 'import calculator; assert calculator.subtract(3, 1) == 2'"),
        bash("THOUGHT: I make the patch.", "git diff -- calculator.py > patch.txt && cat patch.txt"),
        # the agent looks for this at the beginning of the output
        bash("THOUGHT: I hand it in.", "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && cat patch.txt"),
    ]


OPENHANDS_TASK = "Make the file made.txt with one line in it."
OPENHANDS_TURNS = [
    Turn("I make it with the shell.", Call("terminal", command="echo made by an agent > made.txt && cat made.txt")),
    Turn("", Call("finish", message="made.txt is there.")),
]


# for bora-demo, in words that it knows
AS_JSON = "The city is Rome, the color is red. Answer in JSON with the keys color, city."

ALL = {
    PLAIN: [Turn(PLAIN_ANSWER)],
    SINGLE: [Turn("", SINGLE_CALL), Turn(SINGLE_ANSWER)],
    PARALLEL: [Turn(PARALLEL_TEXT, *PARALLEL_CALLS), Turn(PARALLEL_ANSWER)],
    LOOP: [*(Turn("", call) for call in LOOP_CALLS), Turn(LOOP_ANSWER)],
    EMPTY_ARGUMENTS: [Turn("", EMPTY_CALL), Turn("It is noon.")],
    VIBE_TASK: VIBE_EDIT,
    OPENHANDS_TASK: OPENHANDS_TURNS,
    **{task: mini_turns(name) for name, task in MINI_TASKS.items()},
    **coding_agents.CONVERSATIONS,
}


def function(name, description, **properties):
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    function("get_weather", "Get the weather of a city.", city="string"),
    function("add", "Add two numbers.", a="number", b="number"),
    function("multiply", "Multiply two numbers.", a="number", b="number"),
    function("now", "Tell the time."),
]


def run_tool(name, arguments):
    """What the tools of these conversations return."""
    if name == "get_weather":
        return {"Paris": "21 degrees", "Oslo": "-3 degrees", "Curaçao": "31 degrees"}[arguments["city"]]
    if name == "add":
        return str(arguments["a"] + arguments["b"])
    if name == "multiply":
        return str(arguments["a"] * arguments["b"])
    assert name == "now" and arguments == {}
    return "12:00"


# ---- the model card's conversations, answered as in its traces

CARD_FILES = {path.stem: json.loads(path.read_text()) for path in sorted((FIXTURES / "model_card").glob("[1-5]_*.json"))}
CARD = {name: file["expected_trace"] for name, file in CARD_FILES.items()}


def card_request(name):
    """The whole request, with the messages of the long one written out."""
    request = dict(CARD_FILES[name]["request"])
    messages = []
    for entry in request.pop("messages_spec", None) or request["messages"]:
        messages += entry["messages"] * entry["repeat"] if "repeat" in entry else [entry]
    request["messages"] = messages
    return request


def card_turn(message):
    calls = [Call(call["function"]["name"], **json.loads(call["function"]["arguments"])) for call in message.get("tool_calls") or []]
    return Turn(message.get("content") or "", *calls)


def last_text(messages):
    return [part["text"] for part in messages[-1]["content"] if part["type"] == "text"][-1]


for _name, _trace in CARD.items():
    ALL[last_text(card_request(_name)["messages"])] = [card_turn(message) for message in _trace if message["role"] == "assistant"]

"""The coding agents of docs/agents, one entry each: what its tools are called, and in which words it asks and reports. How it is installed,
configured and run stands in its page; `test_coding_agents.py` does as the page says."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable

from cluster import ROOT
from scripting import Call, Turn

GREETING = {"greeting.py": ('    return "hello"', '    return "good morning"'), "farewell.py": ('    return "bye"', '    return "good night"')}
DONE = "Done, the functions say what they should"
SUMMARY = "The notes are read and ask for nothing; what remains of ticket {ticket} is the edit"
REMINDER = "Every greeting is a whole sentence, says ticket {ticket}"
NOTES, NOTE_LINES = 20, 240  # more than fits into the context of the test


@dataclasses.dataclass(frozen=True)
class Agent:
    name: str
    # the calls of its tools
    read: Callable[[str], Call]
    edit: Callable[[str, str, str], Call]
    # what the result says if a file is not there
    not_found: str
    # the file beside a file, of which the agent reminds the model after it read that file; None: it has no reminders
    reminders: dict[str, str] = dataclasses.field(default_factory=dict)
    # in what words it asks for a summary of a conversation; None: it does not shorten one
    asks_for_summary: str | None = None
    # where its commands lie
    commands: str = "node_modules/.bin"


def shell(name, argument="command"):
    """Tools of an agent whose only tool is a shell."""
    read = lambda path: Call(name, **{argument: f"cat {path}"})
    edit = lambda path, old, new: Call(name, **{argument: f"sed -i 's/{old.strip()}/{new.strip()}/' {path}"})
    return {"read": read, "edit": edit}


def tools(read, path, edit, edit_path, old, new, **others):
    """`others`: arguments that the agent adds to a call of its edit tool, in the place where it puts them."""
    return {"read": lambda file: Call(read, **{path: file}),
            "edit": lambda file, before, after: Call(edit, **others, **{edit_path: file, old: before, new: after})}


AGENTS = {agent.name: agent for agent in [
    Agent("codex", **shell("exec_command", "cmd"), not_found="No such file or directory", asks_for_summary=" CONTEXT CHECKPOINT COMPACTION"),
    Agent("claude-code", **tools("Read", "file_path", "Edit", "file_path", "old_string", "new_string", replace_all=False), not_found="does not exist",
          reminders={"CLAUDE.md": REMINDER}, asks_for_summary=" create a detailed summary of the conversation so far"),
]}


def ticket(agent, case):
    return f"{agent.name}-{case}"


def task(agent, case):
    return f"Please work on ticket {ticket(agent, case)} now and make its functions greet properly"


def opening(agent, case):
    return f" ticket {ticket(agent, case)}"


def turns(agent, case):
    """What the model says. All paths name agent and case, so that no two conversations have a call in common."""
    folder = ticket(agent, case)
    read = lambda name: agent.read(f"{folder}/{name}")
    edit = lambda name: agent.edit(f"{folder}/{name}", *GREETING[name])
    done = Turn(DONE)
    match case:
        case "error":
            return [Turn("I look at the file first.", read("missing.py")), Turn("", read("greeting.py")), Turn("", edit("greeting.py")), done]
        case "parallel":
            return [Turn("I look at both.", read("greeting.py"), read("farewell.py")), Turn("", edit("greeting.py"), edit("farewell.py")), done]
        case "reminder":
            return [Turn("", read("greeting.py")), Turn("", edit("greeting.py")), done]
        case "compaction":
            reads = [Turn("", read(f"notes-{number}.txt")) for number in range(NOTES)]
            summary = SUMMARY.format(ticket=folder)
            return [Turn("", read("greeting.py")), *reads, Turn(summary, after=agent.asks_for_summary), Turn("", edit("greeting.py"), after=summary[3:]), done]


def files(agent, case):
    """The scratch repository: name -> content."""
    folder = ticket(agent, case)
    made = {name: f"def greet():\n{before}\n" for name, (before, _) in GREETING.items()}
    if case == "reminder":
        made |= {name: text.format(ticket=folder) + "\n" for name, text in agent.reminders.items()}
    if case == "compaction":
        for number in range(NOTES):
            made[f"notes-{number}.txt"] = "".join(f"Remark {number}.{line}: greetings are short, friendly, and are never shouted at anybody.\n" for line in range(NOTE_LINES))
    return {"README.md": "Greetings.\n", **{f"{folder}/{name}": text for name, text in made.items()}}


def cases(agent):
    return ["error", "parallel", *(["reminder"] if agent.reminders else []), *(["compaction"] if agent.asks_for_summary else [])]


CONVERSATIONS = {opening(agent, case): turns(agent, case) for agent in AGENTS.values() for case in cases(agent)}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The code blocks of a page: files by their path, and shell commands to install the agent and to run it."""

    files: dict[str, str]
    install: str
    run: str


BLOCK = re.compile(r"(?:^`(~?[^`\n]+)`:\n\n)?^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def recipe(name, **values):
    """The page of an agent, with values in the place of BASE, KEY, MODEL, CONTEXT and TASK."""
    page = (ROOT / "docs" / "agents" / f"{name}.md").read_text()
    filled = lambda text: re.sub(rf"\b({'|'.join(values)})\b", lambda found: str(values[found[0]]), text)
    blocks = BLOCK.findall(page)
    shell = [text for path, language, text in blocks if language == "bash" and not path]
    return Recipe({path: filled(text) for path, _, text in blocks if path}, shell[0], filled("".join(shell[1:])))

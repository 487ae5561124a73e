"""The coding agents of docs/agents, one entry each: the calls of its tools, and in which words it asks and reports. How an agent is installed,
configured and run stands on its page; `test_coding_agents.py` does as the page says."""

import dataclasses
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable

from cluster import ROOT
from scripting import Call, Turn

WORK = pathlib.Path(tempfile.gettempdir()) / f"bora-agents-{os.getpid()}"  # of the scratch repositories: calls name whole paths
LINES = {"greeting.py": ('    return "hello"', '    return "good morning"'), "farewell.py": ('    return "bye"', '    return "good night"')}
DONE = "Done, the functions say what they should"
RULE, REMARK = "Every greeting is a whole sentence", "Greetings need no full stop"  # of a folder's rules, and of a hook
SUMMARY = "The notes ask for nothing; what remains of ticket {ticket} is the edit"
NOTES, NOTE_LINES = 40, 240  # several times the context of the test, read one by one until the agent shortens the conversation


@dataclasses.dataclass(frozen=True)
class Agent:
    name: str
    # the calls of its tools; an agent without tools reads nothing, and its edits are texts
    read: Callable[[str], Call] | None
    edit: Callable[[str, str, str], Call | str]
    # what the result of reading a missing file, or of a text that edits what is not there, says
    error: str
    # files with RULE or REMARK, of which the agent reminds the model after a result
    reminders: dict[str, str] = dataclasses.field(default_factory=dict)
    # words with which the agent asks for a summary, and the element in which it expects one
    asks_for_summary: str | None = None
    summary_element: str | None = None
    # when it shortens a conversation and ends with status 0: near the end of the context that it is configured with (compaction), and if a
    # request is refused as too long (overflow)
    compacts: tuple[str, ...] = ("compaction", "overflow")
    # where its commands lie
    commands: str = "node_modules/.bin"

    def cases(self):
        return ["error", "parallel", *(["reminder"] if self.reminders else []), *(self.compacts if self.asks_for_summary else [])]


def tools(read, path, edit, edit_path, old, new, **others):
    """`others`: arguments that the agent adds to a call of its edit tool, in the place where it puts them."""
    return {"read": lambda file: Call(read, **{path: file}),
            "edit": lambda file, before, after: Call(edit, **others, **{edit_path: file, old: before, new: after})}


SAID = json.dumps({"hookSpecificOutput": {"hookEventName": "PostToolUse", "additionalContext": REMARK}})
HOOK = json.dumps({"hooks": {"PostToolUse": [{"hooks": [{"type": "command", "command": f"echo '{SAID}'"}]}]}})
OPENCODE = tools("read", "filePath", "edit", "filePath", "oldString", "newString")
AGENTS = {agent.name: agent for agent in [
    Agent("codex",
          read=lambda path: Call("exec_command", cmd=f"cat {path}"),
          edit=lambda path, old, new: Call("exec_command", cmd=f"sed -i 's/{old.strip()}/{new.strip()}/' {path}"),
          error="No such file or directory", asks_for_summary=" CONTEXT CHECKPOINT COMPACTION", compacts=("compaction",)),
    Agent("claude-code", **tools("Read", "file_path", "Edit", "file_path", "old_string", "new_string", replace_all=False),
          error="does not exist", reminders={"src/CLAUDE.md": RULE, ".claude/settings.json": HOOK},
          asks_for_summary=" create a detailed summary of the conversation so far", summary_element="summary"),
    # before opencode: it asks with the same words, and with these before them
    Agent("kilo", **OPENCODE, error="File not found", reminders={"src/AGENTS.md": RULE}, commands="node_modules/@kilocode/cli-linux-x64/bin",
          asks_for_summary=" standards and best practices.\nYou are a context summarization agent", compacts=("compaction",)),
    Agent("opencode", **OPENCODE, error="File not found", reminders={"src/AGENTS.md": RULE},
          asks_for_summary=" given a conversation between a user and an agent", compacts=("compaction",)),
    Agent("cline",
          read=lambda path: Call("read_files", files=[{"path": path}]),
          edit=lambda path, old, new: Call("editor", path=path, old_text=old, new_text=new),
          error="ENOENT", asks_for_summary=" session for continuation. Be concise", compacts=("overflow",)),
    Agent("continue", **tools("Read", "filepath", "Edit", "file_path", "old_string", "new_string"),
          error="does not exist", asks_for_summary=" provide a concise summary of our conversation so far", compacts=("compaction",)),
    Agent("qwen-code", **tools("read_file", "file_path", "edit", "file_path", "old_string", "new_string"),
          error="not found", reminders={".qwen/settings.json": HOOK}, asks_for_summary=" produce the <state_snapshot> XML", summary_element="state_snapshot"),
    Agent("pi",
          read=lambda path: Call("read", path=path),
          edit=lambda path, old, new: Call("edit", path=path, edits=[{"oldText": old, "newText": new}]),
          error="ENOENT", asks_for_summary=" PREFIX of a turn that was too large to keep", compacts=("overflow",)),
    Agent("aider", read=None, edit=lambda path, old, new: f"{path}\n```python\n<<<<<<< SEARCH\n{old}\n=======\n{new}\n>>>>>>> REPLACE\n```",
          error="failed to match", asks_for_summary=" summarize this partial conversation about programming", compacts=("compaction",), commands="bin"),
]}


def ticket(agent, case):
    """Names a conversation. Both cases of a conversation that does not fit have the same."""
    return f"{agent.name}-{'long' if case in ('compaction', 'overflow') else case}"


def task(agent, case):
    return f"Please work on ticket {ticket(agent, case)} now and make its functions greet properly"


def opening(agent, case):
    return f" ticket {ticket(agent, case)}"


def turns(agent, case):
    """What the model says. All paths name agent and case, so that no two conversations have a call in common."""
    if not agent.read:
        return texts(agent, case)
    repository = WORK / ticket(agent, case)
    read = lambda name: agent.read(f"{repository}/src/{name}")
    edit = lambda name: agent.edit(f"{repository}/src/{name}", *LINES[name])
    done = Turn(DONE)
    match case:
        case "error":
            return [Turn("I look at the files first.", read("missing.py")), Turn("", read("greeting.py")), Turn("", edit("greeting.py")), done]
        case "parallel":
            return [Turn("I look at both.", read("greeting.py"), read("farewell.py")), Turn("", edit("greeting.py"), edit("farewell.py")), done]
        case "reminder":
            return [Turn("", read("greeting.py")), Turn("", edit("greeting.py")), done]
    reads = [Turn("", read(f"notes-{number}.txt")) for number in range(NOTES)]
    summary = SUMMARY.format(ticket=ticket(agent, case))
    element = agent.summary_element
    answer = f"<{element}>\n{summary}\n</{element}>" if element else summary
    shortened = Turn("", read("greeting.py"), after=summary.removeprefix("The"))
    return [*reads, Turn(answer, after=agent.asks_for_summary), shortened, Turn("", edit("greeting.py")), done]


def texts(agent, case):
    """What the model says to an agent without tools, which asks at last for the message of its commit."""
    commit = Turn("greetings: say what they should", after=" generates concise, one-line Git commit messages")
    said = lambda *names, **how: Turn("\n\n".join([f"{DONE} ({ticket(agent, case)})", *(agent.edit(f"src/{name}", *LINES[name]) for name in names)]), **how)
    match case:
        case "error":
            return [Turn(agent.edit("src/greeting.py", "    return nothing", "    return more")), said("greeting.py"), commit]
        case "parallel":
            return [said("greeting.py", "farewell.py"), commit]
    summary = SUMMARY.format(ticket=ticket(agent, case))
    return [Turn(summary, after=agent.asks_for_summary), said("greeting.py", after=summary.removeprefix("The")), commit]


def files(agent, case):
    """The scratch repository: name -> content."""
    made = {f"src/{name}": f"def greet():\n{before}\n" for name, (before, _) in LINES.items()}
    if case == "reminder":
        return made | agent.reminders
    if case in agent.compacts and not agent.read:  # the conversation that is too long is an earlier one
        earlier = "".join(f"#### What is remark {line}?\n\nRemark {line}: greetings are short, friendly, and are never shouted.\n\n" for line in range(1000))
        return made | {".aider.chat.history.md": earlier, ".aider.conf.yml": "restore-chat-history: true\n"}
    if case in agent.compacts:
        for number in range(NOTES):
            made[f"src/notes-{number}.txt"] = "".join(f"Remark {number}.{line}: greetings are short, friendly, and are never shouted at anybody.\n" for line in range(NOTE_LINES))
    return made


CONVERSATIONS = {opening(agent, case): turns(agent, case) for agent in AGENTS.values() for case in agent.cases()}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The code blocks of a page: files by their path, and the commands that run the agent."""

    files: dict[str, str]
    run: str


BLOCK = re.compile(r"(?:^`(~?[^`\n]+)`:\n\n)?^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def recipe(name, **values):
    """The page of an agent, with values in the place of BASE, KEY, MODEL, CONTEXT, TASK and FILES. Its first block of commands installs the agent."""
    page = (ROOT / "docs" / "agents" / f"{name}.md").read_text()
    filled = lambda text: re.sub(rf"\b({'|'.join(values)})\b", lambda found: str(values[found[0]]), text)
    blocks = BLOCK.findall(page)
    commands = [text for path, language, text in blocks if language == "bash" and not path]
    return Recipe({path: filled(text) for path, _, text in blocks if path}, filled("".join(commands[1:])))

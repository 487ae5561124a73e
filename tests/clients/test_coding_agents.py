"""Coding agents, unmodified, by the recipes of docs/agents: each edits a file of a scratch repository by scripted outputs and ends with status 0,
over the result of a call that failed, parallel calls, a reminder behind a result, and a conversation that it has to shorten."""

import json
import os
import pathlib
import signal
import subprocess

import pytest

import coding_agents
from coding_agents import AGENTS, DONE, GREETING, REMINDER
from conftest import KEY, SCRIPTED, SHORT, SHORT_CONTEXT, TOOLS, tool_path
from recorder import Recorder

CHOSEN = os.environ.get("BORA_AGENTS", "").split() or list(AGENTS)
CASES = [pytest.param(AGENTS[name], case, id=f"{name}-{case}") for name in CHOSEN for case in coding_agents.cases(AGENTS[name])]
SECONDS = 120


def end_processes(home):
    """Ends what an agent left running: processes whose home is this folder."""
    for entry in pathlib.Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"HOME={home}".encode() in entry.read_bytes().split(b"\0"):
                os.kill(int(entry.parent.name), signal.SIGKILL)
        except OSError:
            pass  # ended, or another user's


def run(agent, recipe, home, work, proxy):
    """(status, output) of the recipe's command, with nothing of this user's environment."""
    commands = [pathlib.Path(tool_path(f"{agent.name.upper()}_PATH", f"{agent.name}/{agent.commands}")), TOOLS / "node/node_modules/.bin"]
    environment = {"PATH": ":".join([*map(str, commands), os.environ["PATH"]]), "HOME": str(home), "LANG": "C.UTF-8", "TERM": "dumb",
                   "HTTPS_PROXY": proxy, "https_proxy": proxy, "NO_PROXY": "127.0.0.1,localhost"}
    command = ["bash", "-euo", "pipefail", "-c", recipe.run]
    with open(home / "output", "w+") as output:
        child = subprocess.Popen(command, cwd=work, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
        try:
            status = child.wait(SECONDS)
        except subprocess.TimeoutExpired:
            status = f"none after {SECONDS} s"
        finally:
            end_processes(home)
            child.wait()
        output.seek(0)
        return status, output.read()


@pytest.mark.parametrize("agent, case", CASES)
def test_it_edits_a_file(cluster, tmp_path, agent, case):
    home, work = tmp_path / "home", tmp_path / "work"
    for root, files in ((work, coding_agents.files(agent, case)), (home, {})):
        root.mkdir()
        for name, text in files.items():
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_text(text)
    git = lambda *args: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.com", *args], cwd=work, check=True, capture_output=True, timeout=60)
    git("init", "-q"), git("add", "."), git("commit", "-q", "-m", "first")

    long = case == "compaction"
    with Recorder(cluster.router_url) as recorder:
        recipe = coding_agents.recipe(agent.name, BASE=recorder.url, KEY=KEY, MODEL=SHORT if long else SCRIPTED,
                                      CONTEXT=SHORT_CONTEXT if long else 200000, TASK=coding_agents.task(agent, case))
        for path, text in recipe.files.items():
            file = home / path.removeprefix("~/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        status, output = run(agent, recipe, home, work, recorder.url)
    if record := os.environ.get("BORA_RECORD"):
        pathlib.Path(record, f"{agent.name}-{case}.json").write_text(json.dumps([one._asdict() for one in recorder.exchanges], indent=1))
    requests = recorder.requests()
    shown = f"{output[-3000:]}\n" + "\n".join(f"{one.path} {one.status} {one.response[-600:]}" for one in requests[-6:])

    assert status == 0, f"status {status}\n{shown}"
    for name in GREETING if case == "parallel" else ["greeting.py"]:
        assert (work / coding_agents.ticket(agent, case) / name).read_text() == f"def greet():\n{GREETING[name][1]}\n", f"{name}\n{shown}"
    assert DONE in output, shown
    refused = [one for one in requests if one.status != 200]
    assert all(long and one.status == 400 for one in refused), shown
    expected = {"error": agent.not_found, "reminder": REMINDER.format(ticket=coding_agents.ticket(agent, case))}.get(case)
    assert not expected or any(expected in json.dumps(one.body, ensure_ascii=False) for one in requests), f"{expected}\n{shown}"

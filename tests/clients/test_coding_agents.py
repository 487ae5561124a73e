"""Coding agents, unmodified, by the recipes of docs/agents: each edits a file of a scratch repository by scripted outputs and ends with status 0,
over the result of a call that failed, parallel calls, a reminder behind a result, and a conversation that it has to shorten."""

import json
import os
import pathlib
import shutil
import signal
import subprocess

import pytest

import coding_agents
from coding_agents import AGENTS, DONE, LINES, REMARK, RULE, WORK
from conftest import KEY, SCRIPTED, SHORT, SHORT_CONTEXT, TOOLS, tool_path
from recorder import Recorder

CHOSEN = os.environ.get("BORA_AGENTS", "").split() or list(AGENTS)
CASES = [pytest.param(AGENTS[name], case, id=f"{name}-{case}") for name in CHOSEN for case in AGENTS[name].cases()]
SECONDS = 180


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def repository(agent, case):
    path = WORK / coding_agents.ticket(agent, case)
    shutil.rmtree(path, ignore_errors=True)  # of a run before a rerun
    write(path, coding_agents.files(agent, case))
    for args in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *args], cwd=path, check=True, timeout=60)
    yield path
    shutil.rmtree(WORK, ignore_errors=True)


def end_processes(home):
    """Ends what an agent left running: the processes with this home."""
    for entry in pathlib.Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"HOME={home}".encode() in entry.read_bytes().split(b"\0"):
                os.kill(int(entry.parent.name), signal.SIGKILL)
        except OSError:
            pass  # ended meanwhile, or another user's


def run(agent, commands, home, directory, proxy):
    """(status, output) of a recipe's commands. They see nothing of this user's environment and reach no other machine."""
    path = [tool_path(f"{agent.name.upper().replace('-', '_')}_PATH", f"{agent.name}/{agent.commands}"), TOOLS / "node" / "node_modules" / ".bin", os.environ["PATH"]]
    environment = {"PATH": ":".join(map(str, path)), "HOME": str(home), "LANG": "C.UTF-8", "TERM": "dumb",
                   "HTTPS_PROXY": proxy, "https_proxy": proxy, "NO_PROXY": "127.0.0.1,localhost"}
    with open(home / "output", "w+") as output:
        child = subprocess.Popen(["bash", "-euo", "pipefail", "-c", commands], cwd=directory, env=environment, stdin=subprocess.DEVNULL,
                                 stdout=output, stderr=output, start_new_session=True)
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
def test_it_edits_a_file(cluster, tmp_path, repository, agent, case):
    long = case in agent.compacts
    with Recorder(cluster.router_url) as recorder:
        recipe = coding_agents.recipe(agent.name, BASE=recorder.url, KEY=KEY, MODEL=SHORT if long else SCRIPTED,
                                      CONTEXT=SHORT_CONTEXT if case == "compaction" else 200000, TASK=coding_agents.task(agent, case), FILES=" ".join(f"src/{name}" for name in LINES))
        write(tmp_path, {path.removeprefix("~/"): text for path, text in recipe.files.items()})
        status, output = run(agent, recipe.run, tmp_path, repository, recorder.url)
    if record := os.environ.get("BORA_RECORD"):
        pathlib.Path(record, f"{agent.name}-{case}.json").write_text(json.dumps([one._asdict() for one in recorder.exchanges], indent=1))
    requests = recorder.requests()
    shown = f"{output[-3000:]}\n" + "\n".join(f"{one.path} {one.status} {one.response[-600:]}" for one in requests[-6:])

    assert status == 0, f"status {status}\n{shown}"
    for name in LINES if case == "parallel" else ["greeting.py"]:
        assert (repository / "src" / name).read_text() == f"def greet():\n{LINES[name][1]}\n", f"{name}\n{shown}"
    # pi has printed what it prints before it shortens a conversation
    assert DONE in output or (agent.name, case) == ("pi", "overflow"), shown
    # an agent that knows how much fits sends nothing that is too long
    assert {one.status for one in requests} == ({200, 400} if case == "overflow" else {200}), shown
    expected = {"error": [agent.error], "reminder": [text for text in (RULE, REMARK) if text in str(agent.reminders)]}.get(case, [])
    bodies = [json.dumps(one.body, ensure_ascii=False) for one in requests]
    for text in expected:
        assert text not in bodies[0] and any(text in body for body in bodies), f"{text}\n{shown}"

"""The OpenHands agent (its SDK and tools from PyPI): a shell command in a scratch folder, then its `finish` tool."""

import json
import os
import pathlib
import subprocess

from conftest import KEY, SCRIPTED, tool_path
from conversations import OPENHANDS_TASK


def test_it_runs_a_command_and_finishes(base_url, tmp_path):
    python = tool_path("OPENHANDS_PYTHON", "openhands/bin/python")
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "BORA_URL": base_url, "BORA_KEY": KEY, "BORA_MODEL": SCRIPTED, "BORA_TASK": OPENHANDS_TASK, "HOME": str(tmp_path),
                   "LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENHANDS_SUPPRESS_BANNER": "1"}
    script = pathlib.Path(__file__).parent / "openhands_agent.py"
    run = subprocess.run([python, script, work], env=environment, cwd=work, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["errors"] == [] and report["status"] == "finished", report
    assert report["actions"] == ["terminal", "finish"] and report["prompt_tokens"] > 0
    assert (work / "made.txt").read_text() == "made by an agent\n"

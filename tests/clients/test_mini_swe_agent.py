"""mini-swe-agent 2.4.6 over a small repository of our own: its benchmark runner with the local environment, plain answers,
two instances at once; the patch that it hands in is the one that the shell commands made."""

import json
import os
import subprocess


from conftest import KEY, SCRIPTED, tool_path
from conversations import MINI_TASKS

CALCULATOR = "def subtract(a, b):\n    return a + b\n"


def repository(path):
    path.mkdir(parents=True)
    (path / "calculator.py").write_text(CALCULATOR)
    git = ["git", "-C", str(path), "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "a calculator"]):
        subprocess.run([*git, *command], check=True)
    return path


def test_it_solves_and_hands_in(base_url, tmp_path):
    mini = tool_path("MINI_EXTRA_BIN", "mini/bin/mini-extra")
    data = tmp_path / "data"
    data.mkdir()
    instances = [{"instance_id": name, "problem_statement": f"{task}\n\nThe repository is {repository(tmp_path / name)}."} for name, task in MINI_TASKS.items()]
    (data / "test.jsonl").write_text("".join(json.dumps(instance) + "\n" for instance in instances))
    model = tmp_path / "model.yaml"
    model.write_text(json.dumps({
        "model": {"model_name": f"openai/{SCRIPTED}", "cost_tracking": "ignore_errors", "model_kwargs": {"api_base": base_url, "api_key": KEY, "temperature": 0.0}},
        "environment": {"cwd": str(tmp_path), "env": {"BASH_ENV": "", "WORK": str(tmp_path)}},
        "agent": {"step_limit": 6},
    }))
    out = tmp_path / "out"
    command = [mini, "swebench", "--subset", data, "--split", "test", "-w", "2", "-o", out, "-c", "swebench.yaml", "-c", model, "--environment-class", "local"]
    environment = {**os.environ, "MSWEA_GLOBAL_CONFIG_DIR": str(tmp_path / "config"), "MSWEA_CONFIGURED": "true", "MSWEA_SILENT_STARTUP": "1",
                   "LITELLM_LOCAL_MODEL_COST_MAP": "True", "MSWEA_MODEL_RETRY_STOP_AFTER_ATTEMPT": "2", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    run = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    predictions = json.loads((out / "preds.json").read_text())
    assert set(predictions) == set(MINI_TASKS), run.stdout[-3000:]
    for name in MINI_TASKS:
        trajectory = json.loads((out / name / f"{name}.traj.json").read_text())
        assert trajectory["info"]["exit_status"] == "Submitted", trajectory["info"]
        patch = predictions[name]["model_patch"]
        assert "-    return a + b" in patch and "+    return a - b" in patch, patch
        clean = tmp_path / f"{name}-clean"
        repository(clean)
        subprocess.run(["git", "-C", str(clean), "apply", "-"], input=patch, text=True, check=True)
        assert (clean / "calculator.py").read_text() == CALCULATOR.replace("a + b", "a - b")



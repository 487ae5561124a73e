"""The shipped thresholds of the batch groups on a night and a noon of batch, by the model of scripts/bench/autoscaling. No chance is in it, and no clock."""

import importlib.machinery
import importlib.util

import pytest

from chart import ROOT


@pytest.fixture(scope="module")
def model():
    loader = importlib.machinery.SourceFileLoader("autoscaling", str(ROOT / "scripts" / "bench" / "autoscaling"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("autoscaling", loader))
    loader.exec_module(module)
    return module


def test_groups_for_batch_come_and_go_once_for_each_job(model):
    settings, sequences = model.shipped_for_batch()
    row = model.simulate("as shipped", settings, 1, 0, 1, jobs=model.night_and_noon(), kv_tokens=2 * model.KV_TOKENS, max_sequences=sequences)
    assert [job["done"] for job in row["jobs"]] == [1.0, 1.0] and row["flaps_a_day"] == 0
    # up by steps and down by steps within a job, and none between the two
    assert row["hours_at_zero"] > 18 and row["changes_a_day"] <= 20
    # a request that finds no group wakes one: a scrape and a rule, then loading
    assert all(job["first_s"] <= model.METRIC_SECONDS + 15 + model.LOAD_SECONDS + model.RETRY_SECONDS for job in row["jobs"])


def test_no_agent_is_lost_where_groups_come_and_go(model):
    """What a group that is taken away was at goes back to the line."""
    class Counted(model.Job):
        worst = 0.0

        def ended(self, count, now):
            super().ended(count, now)
            if self.end is None:
                there = self.thinking + self.away + self.line + self.running
                self.worst = max(self.worst, abs(there - min(self.agents, self.left)))

    settings, sequences = model.shipped_for_batch()
    hasty = {**settings, "kvOccupancyPercent": 60.0, "scaleUp.stabilizationSeconds": 0.0, "scaleDown.stabilizationSeconds": 0.0, "scaleDown.groups": 4.0}
    job = Counted(0, 40, 64)
    row = model.simulate("no windows", hasty, 0.2, 0, 1, jobs=[job], kv_tokens=2 * model.KV_TOKENS, max_sequences=sequences)
    assert row["flaps_a_day"] > 10, "it is what the windows are there for"
    assert job.end is not None and job.worst < 1e-6

"""The short form of `scripts/bench/failover`."""

import failover


def test_streams_are_exact_while_groups_are_killed():
    result, examples = failover.run(streams=240, concurrency=24, kill_every=2.0, groups=3)
    assert (result["failed"], result["corrupted"]) == (0, 0), (result, examples[:1])
    assert result["kills"] >= 2 and result["moved"]["mid_stream"] > 0, result

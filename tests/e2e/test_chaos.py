"""The short form of `scripts/chaos`."""

import chaos


def test_no_accepted_request_is_lost_in_chaos(tmp_path):
    result, failures = chaos.run(seconds=40, seed=19, keep=tmp_path / "chaos")
    print(chaos.table(result))
    assert chaos.passed(result), (chaos.table(result), failures[:3])
    assert result["right"] > 100 and sum(result["faults"].values()) >= 8, result

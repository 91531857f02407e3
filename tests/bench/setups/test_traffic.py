"""What is read off the times of tokens, and a ring whose ranks die or hang."""

import sys

import pytest

from exo_kimi.bench.setups.ring import Ring
from exo_kimi.bench.setups.traffic import TokenTimes, Traffic
from exo_kimi.errors import UsageError


def seen(*streams: list[float], submitted: list[float] | None = None) -> TokenTimes:
    return TokenTimes(
        tokens=[[0] * len(times) for times in streams],
        times=list(streams),
        submitted=submitted or [0.0] * len(streams),
    )


def test_the_rate_counts_only_the_time_in_which_all_streams_decode():
    assert seen([1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]).tokens_per_s() == pytest.approx(2.0)
    assert seen([1.0, 1.5, 2.0]).tokens_per_s() == pytest.approx(2.0)
    assert seen([0.0, 7.0, 7.5, 8.0], [1.0, 7.0, 7.5, 8.0]).tokens_per_s(after=2) == pytest.approx(4.0)


def test_the_worst_gap_is_that_of_the_first_stream_while_the_last_one_prefills():
    both = seen([0.0, 5.0, 5.1, 7.1, 7.2, 20.0], [7.15, 8.0], submitted=[0.0, 5.05])
    assert both.worst_gap_s() == pytest.approx(2.0)
    assert both.tokens_meanwhile() == 2
    assert both.ttft_s == pytest.approx(2.1)


def test_traffic_is_the_same_for_the_same_seed_and_stays_in_the_vocabulary():
    requests = [(5, 3, 0), (9, 2, 1)]
    one = Traffic.of(requests, vocab_size=7)
    assert one == Traffic.of(requests, vocab_size=7)
    assert [len(prompt) for prompt in one.prompts] == [5, 9]
    assert all(0 <= token < 7 for prompt in one.prompts for token in prompt)
    assert one.order()["after"] == (0, 1)


RANK = "import sys,time;print('{}',flush=True);line=sys.stdin.readline();"


@pytest.mark.parametrize(
    ("program", "problem"),
    [("sys.exit('no memory')", "died"), ("time.sleep(60)", "does not answer")],
)
def test_a_rank_that_dies_or_hangs_is_an_error_within_the_deadline_and_no_process_is_left(tmp_path, program, problem):
    with Ring.started(tmp_path, ranks=2, command=(sys.executable, "-c", RANK + program)) as ring:
        with pytest.raises(UsageError, match=problem):
            ring.run({"x": 1}, deadline_s=0.5 if "sleep" in program else 20)
        assert all(rank.process.poll() is not None for rank in ring._ranks)

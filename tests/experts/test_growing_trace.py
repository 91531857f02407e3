"""The file of a trace that grows: right after every pass, whatever ends its writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exo_kimi.errors import UsageError
from exo_kimi.experts.traces.growing import GrowingTrace, begin_file
from exo_kimi.experts.traces.trace import ExpertTrace, read_trace, read_traces

PASSES = [np.array([[[1, 300], [2, 3]], [[0, 5], [7, 6]]]), np.array([[[9, 8]], [[4, 2]]])]


def grow(path: Path, passes: list[np.ndarray], *, layers: tuple[int, ...] = (1, 2), source: str = "chats") -> None:
    trace = GrowingTrace.open(path, experts=384, chosen=2, layers=layers, source=source)
    for each in passes:
        trace.add(each)
    trace.close()


def test_it_reads_as_what_was_written(tmp_path: Path) -> None:
    grow(tmp_path / "t.trace", PASSES)
    trace = read_trace(tmp_path / "t.trace")
    assert (trace.experts, trace.layers, trace.source) == (384, (1, 2), "chats")
    assert trace.calls.tolist() == [2, 1]
    assert np.array_equal(trace.ids, np.concatenate(PASSES, axis=1))
    trace.save(tmp_path / "t.npz")
    assert np.array_equal(read_trace(tmp_path / "t.npz").ids, trace.ids)


def test_a_pass_that_was_cut_is_left_out_and_the_next_follows_the_last_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "t.trace"
    grow(path, PASSES)
    whole = path.read_bytes()
    for cut in range(1, 12):  # the last pass takes 4 + 2 * 2 * 2 bytes
        path.write_bytes(whole[:-cut])
        assert read_trace(path).calls.tolist() == [2]
        grow(path, PASSES[1:])
        assert path.read_bytes() == whole
    grow(path, PASSES[1:], source="others")
    assert read_trace(path).calls.tolist() == [1]


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    """Such as two servers with one `--trace-experts`: the passes of both would be no trace."""
    path = tmp_path / "t.trace"
    form: dict[str, Any] = {"experts": 384, "chosen": 2, "layers": (1, 2), "source": "chats"}
    first = GrowingTrace.open(path, **form)
    first.add(PASSES[0])
    for other in (lambda: GrowingTrace.open(path, **form), lambda: begin_file(path)):
        with pytest.raises(OSError, match="another process writes it") as caught:
            other()
        assert caught.value.filename == str(path)
    first.add(PASSES[1])
    first.close()
    assert read_trace(path).calls.tolist() == [2, 1]
    GrowingTrace.open(path, **form).close()


def test_files_of_several_stages_are_one_trace(tmp_path: Path) -> None:
    first, second = tmp_path / "t.stage-0.trace", tmp_path / "t.stage-1.trace"
    grow(first, PASSES)
    grow(second, PASSES, layers=(3, 4))
    trace = read_traces([first, second])
    assert trace.layers == (1, 2, 3, 4) and trace.tokens == 3
    grow(second, PASSES[:1], layers=(3, 4))
    with pytest.raises(UsageError, match="traces of different passes"):
        read_traces([first, second])
    with pytest.raises(UsageError, match="wrong layers"):
        read_traces([first, first])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"exo_kimi_expert_trace":1}\n', "a file that is no trace"),
        (b'{"exo_kimi_expert_trace":2,"experts":4,"chosen":2,"layers":[1],"source":""}\n', "another version"),
        (b'{"exo_kimi_expert_trace":1,"experts":4,"chosen":2,"layers":[1],"source":""}\n', "a trace without tokens"),
        (
            b'{"exo_kimi_expert_trace":1,"experts":2,"chosen":2,"layers":[1],"source":""}\n\x01\0\0\0\x09\0\x01\0',
            "experts that are not there",
        ),
        (b'{"exo_kimi_expert_trace":1,"experts":"x', "a file that is no trace"),
    ],
)
def test_what_is_wrong_with_it_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.trace").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_trace(tmp_path / "t.trace")


def test_a_trace_is_the_same_whether_it_grew_or_was_saved(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    ids = np.stack([np.stack([rng.permutation(16)[:4] for _ in range(30)]) for _ in range(3)])
    saved = ExpertTrace.of_tokens(ids, experts=16, layers=(1, 2, 3))
    trace = GrowingTrace.open(tmp_path / "t", experts=16, chosen=4, layers=(1, 2, 3), source="")
    for token in range(30):
        trace.add(ids[:, token : token + 1])
    found = read_trace(tmp_path / "t")
    assert np.array_equal(found.ids, saved.ids) and np.array_equal(found.calls, saved.calls)
    assert [each.experts for each in found.profile()] == [each.experts for each in saved.profile()]

"""A draft head of the hub: pulled whole, and looked at by its headers alone."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from hub_stand_in import HubStandIn

from exo_kimi.checkpoint.drafts.manifest import resolve_draft
from exo_kimi.checkpoint.drafts.report import inspect_any
from exo_kimi.fetch.hub import HubSource
from exo_kimi.fetch.pull import PullOptions, pull
from exo_kimi.fetch.skeleton import read_skeleton

HEAD = Path(str(files("exo_kimi").joinpath("data", "tiny-kimi-k2-draft")))
Hub = Callable[..., HubStandIn]


def test_a_head_is_pulled_whole(hub: Hub, tmp_path: Path) -> None:
    served = hub(HEAD)
    pull(HubSource(served.model, endpoint=served.url), tmp_path / "here", PullOptions())
    assert resolve_draft(tmp_path / "here").fingerprint == resolve_draft(HEAD).fingerprint


def test_a_heads_headers_are_enough_to_look_at_it(hub: Hub) -> None:
    served = hub(HEAD)
    source = HubSource(served.model, endpoint=served.url)
    report = inspect_any(read_skeleton(source, source.listing()))
    assert not report.problems
    assert "1,024 of 2,256 tokens" in report.to_text()

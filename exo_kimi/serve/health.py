"""What /health says of the engine and of every stage."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from exo_kimi.runtime.requests import EngineSnapshot, StageHealth


def health_report(snapshot: EngineSnapshot, *, model: str, version: str) -> tuple[int, dict[str, Any]]:
    """HTTP status and JSON: 200 when every stage is ready, else 503 with the reason.

    Args:
        snapshot: one look at the engine.
        model: the served id.
        version: of this package.
    """
    reasons = [_reason(stage) for stage in snapshot.stages if stage.state != "ready"]
    if not snapshot.ready and not reasons:
        reasons = ["the stages are starting"]
    healthy = snapshot.ready and not reasons
    report = {
        "status": "ok" if healthy else "unavailable",
        "reason": "; ".join(reasons) or None,
        "model": model,
        "version": version,
        "stages": [_stage(stage) for stage in snapshot.stages],
        "requests": {
            state: sum(request.state == state for request in snapshot.requests)
            for state in ("waiting", "prefill", "decode")
        },
        "context": snapshot.context,
        "kv_capacity_tokens": snapshot.kv_capacity_tokens,
        "kv_reserved_tokens": snapshot.kv_reserved_tokens,
        "restarts": snapshot.restarts_total,
        "events": list(snapshot.events),
    }
    return (200 if healthy else 503), report


def _stage(stage: StageHealth) -> dict[str, Any]:
    progress = stage.loaded_bytes / stage.total_bytes if stage.total_bytes else 0.0
    return {**asdict(stage), "silent_s": round(stage.silent_s, 3), "loading_progress": round(progress, 4)}


def _reason(stage: StageHealth) -> str:
    what = {
        "starting": "is starting",
        "loading": f"is loading ({stage.loaded_bytes} of {stage.total_bytes} bytes)",
        "warming": "is warming up: one pass of each kind, before the first request",
        "ready": "is ready",
        "stalled": f"has been silent for {stage.silent_s:.1f} s",
        "dead": "is dead",
    }[stage.state]
    detail = f": {stage.last_error}" if stage.last_error else ""
    return f"stage {stage.stage} {what}{detail}"

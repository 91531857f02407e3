"""What the Ollama routes answer, as /openapi.json tells it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class OllamaErrorAnswer(BaseModel):
    """The body of a refusal, and the last line of a stream that failed."""

    error: str


class OllamaLine(BaseModel):
    """A line of a stream, or the whole answer; the counts are in the last."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    warnings: list[str] = []


class OllamaChatLine(OllamaLine):
    """Of `/api/chat`."""

    message: dict[str, Any]


class OllamaGenerateLine(OllamaLine):
    """Of `/api/generate`."""

    response: str
    thinking: str | None = None


class OllamaModels(BaseModel):
    """Every name of the one model."""

    models: list[dict[str, Any]]


class OllamaModelInfo(BaseModel):
    """What is known of the model."""

    modelfile: str
    parameters: str
    template: str
    details: dict[str, Any]
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaVersion(BaseModel):
    """The version of Ollama whose API this is."""

    version: str

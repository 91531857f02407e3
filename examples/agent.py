"""An agent in sixty lines: the model calls tools until it can answer.

    exo-kimi demo                      # in one terminal: the tiny Kimi, at http://127.0.0.1:52415
    pip install openai
    python examples/agent.py           # in another

The tiny Kimi knows the weather question; a real Kimi K2 can be asked anything:

    python examples/agent.py --url http://studio.local:52415/v1 "Is it colder in Oslo than in Rome?"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from openai import OpenAI

MOST_ROUNDS = 8


def get_weather(city: str) -> dict[str, Any]:
    """The weather in a city; a real agent would ask a service here."""
    return {"sky": "rain", "degrees": 7} if city == "Oslo" else {"sky": "sun", "degrees": 21}


TOOLS: dict[str, Callable[..., dict[str, Any]]] = {"get_weather": get_weather}
DECLARED: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def run(client: OpenAI, model: str, question: str) -> str:
    """Ask, carry out the calls that the model makes, give it the results, until it answers in words."""
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(MOST_ROUNDS):
        reply = client.chat.completions.create(
            model=model, messages=messages, tools=DECLARED, temperature=0, max_tokens=512
        )
        message = reply.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return message.content or ""
        for call in message.tool_calls:
            result = TOOLS[call.function.name](**json.loads(call.function.arguments))
            print(f"{call.function.name}({call.function.arguments}) -> {json.dumps(result)}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)})
    return f"no answer after {MOST_ROUNDS} rounds of tools"


def main() -> None:
    """Ask one question from the command line."""
    parser = argparse.ArgumentParser(description="an agent with one tool")
    parser.add_argument("question", nargs="?", default="What is the weather in Oslo?")
    parser.add_argument(
        "--url", default="http://127.0.0.1:52415/v1", help="the API (default: exo-kimi's on this machine)"
    )
    parser.add_argument("--api-key", default="none", help="what `exo-kimi serve --api-key` asks for")
    options = parser.parse_args()
    client = OpenAI(base_url=options.url, api_key=options.api_key)
    print(run(client, client.models.list().data[0].id, options.question))


if __name__ == "__main__":
    main()

"""litellm: completion through OpenAI's chat and through Anthropic's Messages, and responses."""

import json
import sys

import litellm
from file_tools import CALLABLE, DECLARED

url, door, asked = sys.argv[1:]
litellm.telemetry = False

if door == "responses":
    flat = [{"type": "function", **tool["function"]} for tool in DECLARED]
    items: list = [{"role": "user", "content": asked}]
    while True:
        answer = litellm.responses(
            model="openai/kimi", input=items, tools=flat, api_base=f"{url}/v1", api_key="x", store=False
        )
        calls = [item for item in answer.output if item.type == "function_call"]
        if not calls:
            print(answer.output[-1].content[0].text)
            break
        items += [item.model_dump(exclude_none=True) for item in answer.output]
        for call in calls:
            result = CALLABLE[call.name](**json.loads(call.arguments))
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": result})
else:
    where = (
        {"model": "openai/kimi", "api_base": f"{url}/v1"}
        if door == "chat"
        else {"model": "anthropic/kimi", "api_base": url}
    )
    messages: list = [{"role": "user", "content": asked}]
    while True:
        chunks = list(
            litellm.completion(**where, messages=messages, tools=DECLARED, api_key="x", stream=True, max_tokens=900)
        )
        message = litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            print(message.content)
            break
        for call in message.tool_calls:
            result = CALLABLE[call.function.name](**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})

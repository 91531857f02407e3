"""openai-agents: through chat completions and through Responses, with strict tools as it makes them, streamed."""

import asyncio
import sys

from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from file_tools import edit_file, read_file
from openai import AsyncOpenAI

url, door, asked = sys.argv[1:]
set_tracing_disabled(True)
client = AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
kind = OpenAIChatCompletionsModel if door == "chat" else OpenAIResponsesModel
agent = Agent(
    name="Editor",
    instructions="You edit files.",
    model=kind(model="kimi", openai_client=client),
    tools=[function_tool(read_file), function_tool(edit_file)],
)


async def main() -> None:
    run = Runner.run_streamed(agent, asked)
    async for _ in run.stream_events():
        pass
    print(run.final_output)


asyncio.run(main())

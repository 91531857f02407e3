"""pydantic-ai: through chat completions, Responses and Messages."""

import sys

from anthropic import AsyncAnthropic
from file_tools import edit_file, read_file
from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

url, door, asked = sys.argv[1:]
openai = OpenAIProvider(base_url=f"{url}/v1", api_key="x")
model = {
    "chat": lambda: OpenAIChatModel("kimi", provider=openai),
    "responses": lambda: OpenAIResponsesModel("kimi", provider=openai),
    "messages": lambda: AnthropicModel(
        "kimi", provider=AnthropicProvider(anthropic_client=AsyncAnthropic(base_url=url, api_key="x"))
    ),
}[door]()
agent = Agent(model, instructions="You edit files.", tools=[read_file, edit_file])
print(agent.run_sync(asked).output)

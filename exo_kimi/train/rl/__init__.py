"""Reinforcement learning of a small Kimi by GRPO: prompts with exact rewards, rollouts by the engine, the objective, the loop."""

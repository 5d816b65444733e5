"""Prompts, parsing, the tool loop and the rollout tree; no Lightning, no vLLM."""

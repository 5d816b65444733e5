"""How a policy writes tool calls and reads their results: one module for each format."""

"""The connection behind ``MCPTool``."""

"""The parts of ``WebSearchTool``."""

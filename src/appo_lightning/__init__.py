"""Train tool-using language-model agents with APPO on PyTorch Lightning."""

__version__ = "0.1.0"

"""A stand-in for TensorRT-LLM 1.2: nothing but the interface of its KV cache connectors."""

__version__ = "1.2.stand-in"

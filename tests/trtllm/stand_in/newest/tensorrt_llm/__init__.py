"""A stand-in for the newest TensorRT-LLM: nothing but the interface of its KV cache connectors."""

__version__ = "newest.stand-in"

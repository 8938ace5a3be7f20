"""A distributed KV-block cache service: leaders, workers and a registry that meet over NATS."""

__version__ = "0.1.0"

"""etcd's protocol as aetcd generates it, and gRPC's asyncio below it; imported quietly.

Of aetcd this is all that we use. Its client speaks no TLS, logs in once and for ever, and keeps
to itself what a server says when it ends a watch (docs/adr/0009-etcd.md).
"""

from __future__ import annotations

import os

# Read by gRPC when it is imported: it would write to stderr whenever a TLS handshake fails.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from aetcd import rpc
from grpc import aio

__all__ = ["aio", "grpc", "rpc"]

"""Who an engine is, and who may share blocks with it: what no engine is asked differently."""

from __future__ import annotations

import hashlib
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from kvbm_schemas.subjects import REGISTRY_NODE, Scope

FINGERPRINT_HEX_DIGITS = 16

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


def scope(namespace: str, described: Mapping[str, Any]) -> Scope:
    """Who can share blocks: an operator's name, and a digest of all that shapes the bytes."""
    digest = hashlib.sha256(msgspec.json.encode(described, order="sorted")).hexdigest()
    return Scope(namespace, digest[:FINGERPRINT_HEX_DIGITS])


def weights(model: object) -> str:
    """A digest of a local model's weight files by size and time; empty for others' models.

    A name says nothing of weights that were replaced under it while no engine ran.
    """
    files = sorted(path for path in Path(str(model)).glob("*") if path.suffix in WEIGHT_SUFFIXES)
    if not files:
        return ""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(msgspec.json.encode(stats)).hexdigest()[:16]


def node_name(engine: str) -> str:
    """A name for an engine that the operator gave none: this host's, and the engine's own."""
    host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:40] or "node"
    name = f"{host}-{engine[:8]}"
    assert name != REGISTRY_NODE
    return name

"""What the tests do about releases of vLLM that differ."""

from __future__ import annotations

import os

import pytest

from kvbm_connectors.vllm_releases import (
    HIT_SOURCES,
    LOST_REQUESTS,
    PATIENCE,
    SHARED_NAMES,
    Novelty,
)


def _needs(novelty: Novelty) -> pytest.MarkDecorator:
    reason = f"only vLLM {novelty.since} and later {novelty.what}"
    return pytest.mark.skipif(not novelty.here, reason=reason)


needs_sources = _needs(HIT_SOURCES)
needs_patience = _needs(PATIENCE)
needs_lost_requests = _needs(LOST_REQUESTS)


def agree_on_names() -> None:
    """Have all engines of these tests name blocks alike, by the means that the release has."""
    if not SHARED_NAMES.here:
        os.environ.setdefault("PYTHONHASHSEED", "0")

"""What we log goes where vLLM's log goes."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from tests.connectors.engine import Engine

MakeEngine = Callable[..., Engine]


def test_where_vllm_leaves_logging_to_its_host_so_do_we(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = logging.getLogger("vllm")
    monkeypatch.setattr(theirs, "handlers", [])  # as with VLLM_CONFIGURE_LOGGING=0
    monkeypatch.setattr(theirs, "propagate", True)
    make_engine(policy="fail")
    assert any(
        record.name.startswith("kvbm_connectors") and "kv_load_failure_policy" in record.message
        for record in caplog.records
    )


def test_where_vllm_configures_logging_ours_is_written_by_its_handlers_once(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    theirs = logging.getLogger("vllm")
    monkeypatch.setattr(theirs, "handlers", [handler])
    monkeypatch.setattr(theirs, "propagate", False)
    make_engine(policy="fail")
    assert sum("kv_load_failure_policy" in line for line in lines) == 1

"""What the connector refuses, and what it takes with it: settings, priorities, metrics."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbm_service.errors import LayoutError, SettingError
from tests.trtllm.conftest import ALONE
from tests.trtllm.engine import Engine, arguments
from tests.trtllm.executor import Request
from tests.trtllm.forms import Form

PROMPT = [17 * i % 401 for i in range(50)]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("changed", "advice"),
    [
        ({"cache": {"enable_partial_reuse": True}}, "enable_partial_reuse: false"),
        ({"cache": {"enable_block_reuse": False}}, "leave it on"),
        ({"cache": {"host_cache_size": 1 << 30}}, "DYN_KVBM_CPU_CACHE_GB"),
        ({"pipeline_parallel_size": 2}, "pipelines"),
        ({"context_parallel_size": 2}, "set it to 1"),
        ({"enable_attention_dp": True}, "set it to false"),
        ({"max_beam_width": 4}, "set it to 1"),
    ],
)
def test_arguments_that_cannot_be_served_are_refused_with_advice(
    form: Form, changed: dict[str, Any], advice: str
) -> None:
    for made in (form.connector.KvbmConnectorLeader, form.connector.KvbmConnectorWorker):
        with pytest.raises(SettingError, match=advice):
            made(arguments(**changed))


def test_arguments_that_a_release_does_not_have_are_not_missed(form: Form) -> None:
    args = arguments()
    del args.context_parallel_size, args.kv_cache_config.max_attention_window
    form.connector.KvbmConnectorLeader(args).shutdown()


def test_a_window_is_refused_where_nobody_says_what_has_left_it(loaded: dict[str, Form]) -> None:
    with pytest.raises(SettingError, match="use_kv_cache_manager_v2"):
        Engine(loaded["release_1_2"], ALONE, cache={"max_attention_window": [512]})


def test_pages_that_a_window_shares_are_refused(loaded: dict[str, Form]) -> None:
    with pytest.raises(SettingError, match="enable_swa_scratch_reuse"):
        Engine(loaded["newest"], ALONE, windows=(None, 8), cache={"enable_swa_scratch_reuse": True})


def test_groups_of_layers_that_are_numbered_otherwise_are_refused(loaded: dict[str, Form]) -> None:
    with pytest.raises(LayoutError, match=r"are numbered \[1, 2\]"):
        Engine(loaded["newest"], ALONE, windows=(None, 8), described={"numbered_from": 1})


def test_a_request_with_other_groups_than_the_pool_has_is_refused(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine()
    request = Request(request_id=1, tokens=PROMPT, max_new=1)
    engine.leader.get_num_new_matched_tokens(request, 0)
    with pytest.raises(LayoutError, match="in 2 groups of layers"):
        engine.leader._side.allocated(request, [[1], [2]])
    engine.leader.request_finished(request, [])


def test_blocks_of_too_low_a_priority_are_not_kept(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine({"DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY": "50"})
    engine.run(PROMPT, priority=49)
    engine.forget_cached()
    assert engine.run(PROMPT, priority=50).matched == 0
    engine.forget_cached()
    assert engine.run(PROMPT).matched == 48


@pytest.mark.parametrize(("least", "kept"), [("0", 48), ("1", 0)])
def test_blocks_that_nobody_gave_a_priority_have_none(
    make_engine: Callable[..., Engine], least: str, kept: int
) -> None:
    engine = make_engine({"DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY": least})
    engine.run(PROMPT)
    engine.forget_cached()
    assert engine.run(PROMPT).matched == kept


def test_metrics_are_served_under_the_names_of_the_guides(
    make_engine: Callable[..., Engine],
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    engine = make_engine(
        {
            "DYN_KVBM_METRICS": "true",
            "DYN_KVBM_METRICS_PORT": str(port),
            "KVBM_METRICS_HOST": "127.0.0.1",
        }
    )
    engine.run(PROMPT)
    engine.forget_cached()
    engine.run(PROMPT)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))

    def value(name: str) -> float:
        return sum(float(v) for key, v in values.items() if key.split("{")[0] == name)

    assert value("kvbm_matched_tokens") == 48
    assert value("kvbm_offload_blocks_d2h") == 12
    assert value("kvbm_onboard_blocks_h2d") == 12
    assert value("kvbm_host_cache_hit_rate") > 0


def test_the_package_can_be_imported_where_tensorrt_llm_is_not() -> None:
    program = (
        "import importlib, kvbm_connectors, kvbm_connectors.trtllm_layout\n"
        "try:\n    importlib.import_module('kvbm_connectors.trtllm')\n"
        "except ModuleNotFoundError as error:\n    print(error.name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": f"{ROOT}/connectors:{ROOT}/schemas:{ROOT}"},
    )
    assert done.stdout.strip() == "tensorrt_llm"

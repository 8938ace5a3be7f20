"""The example configurations name what exists, and nothing in them is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kvbm_connectors import trtllm_layout
from tests.trtllm.engine import arguments
from tests.trtllm.forms import Form

EXAMPLES = sorted((Path(__file__).parents[2] / "deploy" / "trtllm").glob("*.yaml"))


def read(path: Path) -> dict[str, Any]:
    options = yaml.safe_load(path.read_text())
    assert isinstance(options, dict)
    return options


WITH_US = [path for path in EXAMPLES if "kv_connector_config" in read(path)]


@pytest.mark.parametrize("path", WITH_US, ids=lambda path: path.name)
def test_an_example_names_our_classes_and_is_not_refused(path: Path, form: Form) -> None:
    options = read(path)
    names = options.pop("kv_connector_config")
    assert names["connector_module"] == form.connector.__name__
    leader, worker = form.bases
    assert issubclass(getattr(form.connector, names["connector_scheduler_class"]), leader)
    assert issubclass(getattr(form.connector, names["connector_worker_class"]), worker)
    trtllm_layout.check(arguments(cache=options.pop("kv_cache_config"), **options))


def test_the_baseline_differs_from_the_example_by_the_connector_alone() -> None:
    by_name = {path.name: read(path) for path in EXAMPLES}
    with_us = dict(by_name["kvbm_llm_api_config.yaml"])
    del with_us["kv_connector_config"]
    assert by_name["llm_api_config.yaml"] == with_us

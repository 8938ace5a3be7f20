"""What is said of vLLM's releases is true of the one at hand, and too old ones are refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from kvbm_connectors.vllm_releases import LOWEST, NEEDED, NOVELTIES, Novelty

OLD = """
import warnings

warnings.simplefilter("ignore")
from vllm.distributed.kv_transfer.kv_connector.v1 import base

del base.KVConnectorWorkerMetadata, base.KVConnectorBase_V1.{missing}
import kvbm_connectors.vllm
"""
"""A vLLM from before `missing`, which had not all of the classes either."""


def numbers(release: str) -> tuple[int, ...]:
    """Comparable."""
    return tuple(int(number) for number in release.partition("+")[0].split(".")[:2])


@pytest.mark.parametrize("novelty", NOVELTIES, ids=lambda novelty: f"since-{novelty.since}")
def test_what_is_new_in_a_release_is_there_from_it_on_and_not_before(novelty: Novelty) -> None:
    assert novelty.here == (numbers(vllm.__version__) >= numbers(novelty.since)), novelty.what


def test_this_release_is_none_that_is_too_old() -> None:
    assert numbers(vllm.__version__) >= numbers(LOWEST)


@pytest.mark.parametrize("missing", NEEDED)
def test_what_vllm_has_to_ask_is_a_question_of_its_own_and_answered(missing: str) -> None:
    from kvbm_connectors.vllm import KvbmConnector

    assert missing in vars(KVConnectorBase_V1)
    assert missing in vars(KvbmConnector)


@pytest.mark.once
def test_a_vllm_that_is_too_old_is_refused_in_one_line_that_names_the_lowest_that_will_do() -> None:
    old = subprocess.run(
        [sys.executable, "-c", OLD.format(missing="has_pending_push_work")],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    last = old.stderr.strip().splitlines()[-1]
    assert "EngineTooOld: vLLM" in last, old.stderr
    assert "has_pending_push_work" in last
    assert f"install vLLM {LOWEST} or later" in last

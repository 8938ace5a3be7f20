"""Keeping one's own record in the directory, through every outage."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from kvbm_schemas.codec import Decoder, Malformed
from kvbm_schemas.records import DirectoryRecord, NodeRecord, RankRecord
from kvbm_service.adapters.directory import Directory, Membership
from kvbm_service.errors import DirectoryError, NameTaken
from kvbm_service.network import Network

_log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
"""Pause between attempts to join."""

records: Decoder[DirectoryRecord] = Decoder(DirectoryRecord)  # type: ignore[arg-type]


def decode_record(key: str, value: bytes) -> NodeRecord | RankRecord | None:
    """Read a directory value; None, logged, if it is not a record of ours."""
    try:
        return records.decode(value)
    except Malformed as error:
        _log.warning("ignoring the directory record %s: %s", key, error)
        return None


def stop_if_cancelled() -> None:
    """Raise `CancelledError` if this task was cancelled and nobody noticed.

    `asyncio.wait_for` of Python 3.11, which nats-py waits with, loses a cancellation that comes
    at the same moment as what is waited for.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def join(
    network: Network, key: str, make_record: Callable[[int], bytes], after: int = 0
) -> tuple[Membership, int]:
    """Join as `key`, however long it takes. `make_record` is given the epoch to claim.

    Returns the membership, and the epoch claimed: it is greater than `after`, than that of any
    record found under this key, and than that of any earlier life on a host whose clock did not
    go back. Where it did, and nothing is left in the directory, it may be smaller: whoever
    follows a node goes by the life that is listed, not by the greatest epoch.
    """
    directory = network.directory
    said = ""
    while True:
        try:
            epoch = max(after + 1, await _next_epoch(directory, key))
            return await directory.join(key, make_record(epoch)), epoch
        except NameTaken as error:
            problem = f"{error}; set another KVBM_NODE_NAME, or wait for the lease to end"
        except DirectoryError as error:
            problem = str(error)
        if problem != said and network.bus.connected:  # otherwise the bus has said so already
            _log.warning("not visible to other nodes yet: %s", problem)
            said = problem
        await asyncio.sleep(RETRY_SECONDS)


async def _next_epoch(directory: Directory, key: str) -> int:
    epoch = time.time_ns() // 1_000_000
    for entry in await directory.entries(key):
        record = decode_record(entry.key, entry.value) if entry.key == key else None
        if isinstance(record, NodeRecord):
            epoch = max(epoch, record.epoch + 1)
    return epoch

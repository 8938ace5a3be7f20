"""Engines from the directory: leaders say where theirs listens, and what it is for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kvbm_schemas.codec import Decoder, Malformed
from kvbm_schemas.records import DirectoryRecord, NodeRecord
from kvbm_schemas.subjects import Scope, is_token
from kvbm_service.adapters.directory import Change, Directory, Watch
from kvbm_service.errors import DirectoryError
from kvbm_service.route.fleet import MAX_ENGINES, Engine, Fleet, Role
from kvbm_service.setting_kind import parse_http_url

RETRY_SECONDS = 1.0
"""Between two attempts to reach the directory."""
MAX_REFUSED_LOGGED = 256
"""Records that make no sense that are named in the log, once each."""

_log = logging.getLogger(__name__)


class Membership:
    """Keeps a fleet as the directory has it."""

    def __init__(
        self, fleet: Fleet, directory: Directory, namespace: str, on_new: Callable[[Engine], None]
    ) -> None:
        self._fleet = fleet
        self._directory = directory
        self._prefix = f"{namespace}."
        self._on_new = on_new
        self._refused: set[str] = set()
        self._records: Decoder[DirectoryRecord] = Decoder(DirectoryRecord)  # type: ignore[arg-type]

    async def follow(self) -> None:
        """Watch until cancelled."""
        watch = await self._watch()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await watch.close()

    async def _watch(self) -> Watch:
        said = ""
        while True:
            try:
                return await self._directory.watch(self._on_change, self._prefix)
            except DirectoryError as error:
                if str(error) != said:
                    said = str(error)
                    _log.warning("membership is not known yet: %s; trying again", said)
                await asyncio.sleep(RETRY_SECONDS)

    def _on_change(self, change: Change) -> None:
        tokens = change.key.split(".")
        if len(tokens) != 3 or not all(map(is_token, tokens)):
            return  # a rank, or nothing of ours
        if change.value is None:
            self._left(change.key)
            return
        record = self._read(change)
        url = self._url_of(change.key, record) if record is not None else ""
        if record is None or not url:
            self._left(change.key)  # should it have had an engine before
            return
        known = {engine.url: engine.listed for engine in self._fleet}
        new = self._fleet.listed(change.key, Scope(tokens[0], tokens[1]), record, url)
        if new is not None:
            _log.info("engine %s has joined: node %s", new, record.node)
            self._on_new(new)
        elif url not in known:
            self._refuse(change.key, f"there are {MAX_ENGINES} engines already")
        elif not known[url]:
            _log.info("engine %s is back: node %s", url, record.node)

    def _left(self, key: str) -> None:
        engine = self._fleet.unlisted(key)
        if engine is not None:
            _log.info("engine %s has left: it ends what it has begun", engine)

    def _read(self, change: Change) -> NodeRecord | None:
        assert change.value is not None
        try:
            record = self._records.decode(change.value)
        except Malformed as error:
            self._refuse(change.key, str(error))
            return None
        return record if isinstance(record, NodeRecord) else None

    def _url_of(self, key: str, record: NodeRecord) -> str:
        """Where its engine listens; empty where nothing is to be routed there."""
        if not record.url:
            return ""
        try:
            Role(record.role)
            return parse_http_url(record.url)
        except ValueError as error:
            self._refuse(key, f"its URL or role makes no sense ({error})")
            return ""

    def _refuse(self, key: str, why: str) -> None:
        if key not in self._refused and len(self._refused) < MAX_REFUSED_LOGGED:
            self._refused.add(key)
            _log.warning("nothing is routed to %s: %s", key, why)

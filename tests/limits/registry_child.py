"""A registry in a process of its own: for each line on stdin, one line of JSON says how it is."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import sys
from dataclasses import asdict
from pathlib import Path

from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_directory import NatsDirectory
from kvbm_service.registry_service import RegistryService


async def main(url: str, lease_seconds: float) -> None:
    """Serve until stdin ends."""
    bus = await NatsBus.connect(url, name="registry")
    events = await NatsBus.connect(url, name="registry, events")
    directory = NatsDirectory(bus, lease_seconds=lease_seconds)
    service = RegistryService(bus, directory, events=events)
    serving = asyncio.create_task(service.run())
    await service.ready.wait()
    questions = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(questions), sys.stdin
    )
    while await questions.readline():
        status = service.status()
        report = status._replace(counts=None)._asdict()  # type: ignore[arg-type]
        report |= {"counts": asdict(status.counts), "troubles": asdict(events.troubles)}
        report |= {"rss_bytes": _rss_bytes(), "peak_bytes": _peak_bytes()}
        print(json.dumps(report), flush=True)
    serving.cancel()


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))

"""Everything that can go wrong and is not our own bug.

    KvbmError
    ├── SettingError          a setting's value is refused: names it, the value, what is allowed
    ├── BusError              NATS
    │   ├── BusUnavailable    not connected, connection refused, wrong credentials
    │   ├── NoAnswer          nobody listens there, or no reply within the deadline
    │   ├── Forbidden         the server knows us, and does not let us do this
    │   └── PortTaken         the embedded server's port is in use
    ├── DirectoryError        membership
    │   └── NameTaken         a live node already has this name
    ├── LayoutError           the engine's memory cannot be cached as configured
    ├── EngineTooOld          the engine lacks what a connector needs: names what will do
    ├── RanksMissing          not every rank reported in time: names the missing ones
    ├── RouteError            a prompt found no answer
    │   ├── NoEngine          there is nobody to send it to
    │   ├── EngineLost        an engine cannot be reached, or died over it
    │   └── ClientGone        nobody takes it
    └── TransferError         bytes did not arrive, or cannot be trusted

Each message is one line that says what is wrong and what to do about it.
"""

from __future__ import annotations


class KvbmError(Exception):
    """Base of the tree above."""


class SettingError(KvbmError):
    """A setting has a value that is not allowed."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(f"{name}={value!r} is not allowed: {allowed}")
        self.name = name


class BusError(KvbmError):
    """Something about NATS."""


class BusUnavailable(BusError):
    """There is no usable connection to NATS."""


class NoAnswer(BusError):
    """Nobody answered within the deadline."""


class Forbidden(BusError):
    """The server does not let this user publish there."""


class PortTaken(BusError):
    """The embedded server cannot have its port."""


class DirectoryError(KvbmError):
    """Something about membership."""


class NameTaken(DirectoryError):
    """Another live node goes by this name."""


class LayoutError(KvbmError):
    """The engine's memory cannot be cached as configured."""


class EngineTooOld(KvbmError):
    """The engine's release lacks what a connector needs."""


class RanksMissing(KvbmError):
    """Not every rank reported in time."""


class RouteError(KvbmError):
    """A prompt found no answer."""


class NoEngine(RouteError):
    """There is no engine that a prompt could be sent to."""


class EngineLost(RouteError):
    """An engine cannot be reached, says that it cannot serve, or died over a request."""


class ClientGone(RouteError):
    """Nobody is left to take an answer, or whoever is does not take it."""


class TransferError(KvbmError):
    """Bytes did not arrive, or cannot be trusted."""

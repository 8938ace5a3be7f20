"""Homes: directories that one engine owns while it lives, and another one finds after it.

    <root>/kvbm-<namespace>-<fingerprint>/claims      locked while someone looks for a home
                                         /generation  another one after each reset of a cache
                                         /0/owner     locked by everyone who lives there
                                         /0/turn      locked by the rank that allocates
                                         /0/…         what they keep
                                         /1/…

All ranks of one engine on a host live in one home; each is a process, and they know each
other by the engine's instance. Locks are flocks: the kernel drops them when their process
ends, however it ends, so a home is free at once. Who lives in a home holds a shared lock on
its `owner` file. An exclusive one is taken only under the lock on `claims`, to see whether
anyone lives there; so two claims never meet, and nobody is mistaken for an inhabitant.

A lock belongs to the open file, and a forked child shares that: it would keep the home
after its parent's death. So children close these files right after the fork.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvbm_schemas.subjects import Scope
from kvbm_service.errors import LayoutError

MAX_HOMES = 64
"""Engines of one scope under one root."""

CLAIM_SECONDS = 30.0
"""How long to wait while other processes look for homes. One of them takes milliseconds."""

TURN_SECONDS = 600.0
"""How long to wait while the other ranks allocate: tens of gigabytes each take a while."""

POLL_SECONDS = 0.005

MAX_INSTANCE_BYTES = 4096

_OWNER = "owner"
_CLAIMS = "claims"
_GENERATION = "generation"
_TURN = "turn"
_PREFIX = "kvbm-"

log = logging.getLogger(__name__)


class Home:
    """A directory that is ours until `close`, or until this process ends."""

    def __init__(self, path: Path, lock: _Lock) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def claim(cls, root: Path, scope: Scope, instance: str, setting: str) -> Home:
        """The home under `root` that the engine `instance` lives in, or a free one.

        Of the free ones, those that somebody left come first, by their number.
        `setting` is the variable that `root` comes from, for messages.

        Raises:
            LayoutError: `root` cannot be used, or every home is taken.
        """
        ours = instance.encode()
        assert 0 < len(ours) <= MAX_INSTANCE_BYTES
        street = _street(root, scope)
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make_private(street)
            with _claims(street):
                return cls(*_move_in(street, ours))
        except _NoLocks as error:
            raise LayoutError(
                f"the file system of {root} has no working file locks ({error}): "
                f"set {setting} to a directory on another one"
            ) from error
        except _Refused as error:
            raise LayoutError(f"{error}: set {setting} to another directory") from None
        except OSError as error:
            raise LayoutError(
                f"{error.filename or street} cannot be made or written ({error.strerror}): "
                f"set {setting} to a directory that this user can write to"
            ) from error

    def close(self) -> None:
        """Leave; what is in the directory stays. Idempotent."""
        if self._lock.open:
            os.utime(self._lock.fd)  # left just now: the last to be removed
            self._lock.close()


def make_room(root: Path, enough: Callable[[], bool]) -> bool:
    """Remove homes under `root` that nobody lives in, oldest first, until there is `enough`.

    Only this user's. Returns whether there is enough in the end.
    """
    left = sorted(_left_behind(root))
    while not enough():
        if not left:
            return False
        since, home = left.pop(0)
        if _remove(home):
            days = max(0.0, time.time() - since) / 86_400
            log.warning("removed %s to make room: no engine has lived there for %.1f days",
                        home, days)  # fmt: skip
    return True


@contextmanager
def turn(home: Path) -> Iterator[None]:
    """Be the only rank in `home` that allocates: room that two have seen is enough for one.

    Raises:
        OSError: it does not come to that.
    """
    lock = _Lock(home / _TURN)
    try:
        if not lock.wait(fcntl.LOCK_EX, TURN_SECONDS):
            raise OSError(errno.ETIMEDOUT, f"another rank allocates for {TURN_SECONDS:g} s")
        yield
    except _NoLocks as error:
        raise OSError(errno.ENOLCK, str(error)) from error
    finally:
        lock.close()


def generation(home: Path) -> str:
    """What is kept in a home is to be believed only in the generation in which it was written."""
    try:
        return (home.parent / _GENERATION).read_text()
    except FileNotFoundError:
        return ""


def begin_generation(root: Path, scope: Scope) -> None:
    """Let no later life believe what any home of `scope` under `root` holds by now.

    Homes that others live in, or have left, are meant as well.

    Raises:
        OSError: it cannot be written down.
    """
    street = _street(root, scope)
    if street.is_dir():
        new = uuid.uuid4().hex
        written = street / f"{_GENERATION}-{new}"
        written.write_text(new)
        written.rename(street / _GENERATION)


def _street(root: Path, scope: Scope) -> Path:
    return root / f"{_PREFIX}{scope.namespace}-{scope.fingerprint}"


def root_of(home: Path) -> Path:
    """The root under which a home was claimed."""
    return home.parent.parent


class _Refused(Exception):
    """We may not or cannot live here; the message says why."""


class _NoLocks(Exception):
    """flock does not work here."""


class _Lock:
    """An open file to be locked. Made if it is not there."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        _open_locks.add(self)

    def take(self, how: int) -> bool:
        """Lock it exclusively or shared, now or not at all."""
        try:
            fcntl.flock(self.fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise _NoLocks(error.strerror) from error
        return True

    def wait(self, how: int, seconds: float) -> bool:
        """As `take`, but try for a while."""
        deadline = time.monotonic() + seconds
        while not self.take(how):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    @property
    def open(self) -> bool:
        return self in _open_locks

    def close(self) -> None:
        """Give the lock up."""
        if self.open:
            _open_locks.remove(self)
            os.close(self.fd)


_open_locks: set[_Lock] = set()


def _close_in_child() -> None:
    """Our parent keeps its locks: closing a file that it has open, too, unlocks nothing."""
    for lock in list(_open_locks):
        lock.close()


os.register_at_fork(after_in_child=_close_in_child)


def _make_private(path: Path) -> None:
    """Make a directory that only this user can use, or see that it is one."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        found = path.lstat()
        private = stat.S_ISDIR(found.st_mode) and found.st_mode & 0o022 == 0
        if not private or found.st_uid != os.geteuid():
            raise _Refused(f"{path} is another user's, or others can write to it") from None


@contextmanager
def _claims(street: Path) -> Iterator[None]:
    """Be the only one who looks for homes here."""
    lock, second = _Lock(street / _CLAIMS), None
    try:
        if not lock.wait(fcntl.LOCK_EX, CLAIM_SECONDS):
            raise _Refused(f"another process has held {street / _CLAIMS} for {CLAIM_SECONDS:g} s")
        second = _Lock(street / _CLAIMS)
        if second.take(fcntl.LOCK_EX):
            raise _NoLocks("they exclude nobody")
        yield
    finally:
        lock.close()
        if second is not None:
            second.close()


def _move_in(street: Path, instance: bytes) -> tuple[Path, _Lock]:
    """Join our engine's home, or take a free one. Under the lock on `claims`."""
    free, others = None, 0
    for home in _homes(street):
        lock = _Lock(home / _OWNER)
        if lock.take(fcntl.LOCK_EX):
            if free is None:
                free = home
        elif os.pread(lock.fd, MAX_INSTANCE_BYTES + 1, 0) == instance:
            taken = lock.take(fcntl.LOCK_SH)
            assert taken, "exclusive locks are taken under the lock on claims"
            return home, lock
        else:
            others += 1
        lock.close()
    home = free or _new_home(street)
    if free is None and others:
        log.info(
            "%s starts empty: %d other engine(s), or what is left of them, live in the homes "
            "beside it", home, others,
        )  # fmt: skip
    lock = _Lock(home / _OWNER)
    try:
        taken = lock.take(fcntl.LOCK_SH)
        assert taken, "nobody can have moved in since"
        os.ftruncate(lock.fd, 0)
        os.pwrite(lock.fd, instance, 0)
    except (OSError, _NoLocks):
        lock.close()
        raise
    return home, lock


def _new_home(street: Path) -> Path:
    for number in range(MAX_HOMES):
        home = street / str(number)
        if not home.exists():
            _make_private(home)
            return home
    raise _Refused(f"{MAX_HOMES} engines live in {street}, which is the most there may be")


def _homes(street: Path) -> list[Path]:
    """By their number."""
    numbers = sorted(int(entry.name) for entry in street.iterdir() if entry.name.isdecimal())
    homes = [street / str(number) for number in numbers]
    for home in homes:
        _make_private(home)
    return homes


def _left_behind(root: Path) -> list[tuple[float, Path]]:
    """This user's homes in which nobody lives, each with the time when it was last left."""
    found = []
    for street in root.glob(f"{_PREFIX}*-*"):
        try:
            _make_private(street)
            with _claims(street):
                for home in _homes(street):
                    lock = _Lock(home / _OWNER)
                    if lock.take(fcntl.LOCK_EX):
                        found.append((os.fstat(lock.fd).st_mtime, home))
                    lock.close()
        except (OSError, _Refused, _NoLocks):
            continue  # another user's, or no home of ours
    return found


def _remove(home: Path) -> bool:
    """Remove a home unless someone has moved in meanwhile."""
    try:
        with _claims(home.parent):
            lock = _Lock(home / _OWNER)
            try:
                if not lock.take(fcntl.LOCK_EX):
                    return False
                shutil.rmtree(home)
            finally:
                lock.close()
    except (OSError, _Refused, _NoLocks) as error:
        log.warning("%s could not be removed: %s", home, error)
        return False
    return True

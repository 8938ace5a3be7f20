"""What etcd's refusals mean, and what to do about them.

DirectoryError
├── Unreachable     this server does not answer, or cannot: another one may
├── LoggedOut       the login is not valid any more: log in again
├── LeaseGone       the lease has ended
└── EtcdRefused     only an operator can help; also all that is not understood
    └── LoginRefused
"""

from __future__ import annotations

from kvbm_service.adapters.etcd_login import (
    CA_SETTING,
    CERTIFICATE_SETTING,
    PREFIX,
    URL_SETTING,
    EtcdLogin,
    Member,
)
from kvbm_service.adapters.etcd_rpc import rpc
from kvbm_service.errors import DirectoryError

MAX_DETAILS = 300
"""Characters of a server's own words that an error of ours quotes."""

_Code = rpc.StatusCode
_CANNOT = (_Code.UNAVAILABLE, _Code.DEADLINE_EXCEEDED, _Code.CANCELLED, _Code.INTERNAL)
_OUT_OF_TIME = "context deadline exceeded"
_GAVE_UP = (_OUT_OF_TIME, "context canceled")
"""What a server that waited in vain for the others says, with a code that tells nothing."""


class Unreachable(DirectoryError):
    """This server does not answer, or cannot: another one may."""


class LoggedOut(DirectoryError):
    """The login is not valid any more: log in again."""


class LeaseGone(DirectoryError):
    """The lease has ended, and its key with it."""


class EtcdRefused(DirectoryError):
    """Only an operator can help."""


class LoginRefused(EtcdRefused):
    """Not with this user and password."""


def explain(login: EtcdLogin, member: Member, code: object, details: str) -> DirectoryError:
    """An error of ours for one of gRPC's. A password is never in it."""
    details = " ".join(details.split())[:MAX_DETAILS]
    if code is _Code.UNAUTHENTICATED or "revision of auth store is old" in details:
        return LoggedOut(f"etcd at {member} has forgotten our login")
    if "lease not found" in details:
        return LeaseGone(f"etcd at {member} has ended the lease")
    if "user name is empty" in details and login.user:
        return LoggedOut(f"etcd at {member} wants a login now")
    for words, kind, meaning in _REFUSALS:
        if words in details:
            return kind(f"etcd at {member} {meaning.format(user=login.user or 'this process')}")
    if code in _CANNOT or any(words in details for words in _GAVE_UP):
        return Unreachable(f"no answer from etcd at {member}: {_why(member, code, details)}")
    return EtcdRefused(f"etcd at {member} refuses: {details}")


_REFUSALS: tuple[tuple[str, type[EtcdRefused], str], ...] = (
    (
        "authentication failed",
        LoginRefused,
        f"refuses user {{user}}: put the right user:password@ into {URL_SETTING}",
    ),
    (
        "user name is empty",
        LoginRefused,
        f"wants a login: put user:password@ into {URL_SETTING}",
    ),
    (
        "permission denied",
        EtcdRefused,
        f"does not let {{user}} do that: grant a role that may read and write {PREFIX} as a prefix",
    ),
    (
        "database space exceeded",
        EtcdRefused,
        "is full and takes nothing more: compact and defragment it, then `etcdctl alarm disarm`",
    ),
    ("request is too large", EtcdRefused, "takes no record of this size: see --max-request-bytes"),
)


_REASONS = (
    ("CERTIFICATE_VERIFY_FAILED", f"its certificate is not trusted; {CA_SETTING} says by whom"),
    ("no leader", "its cluster has no leader: most of its members have to run"),
    ("Connection refused", f"nobody listens there; start it, or set {URL_SETTING}"),
    ("lookup", f"no host has this name; see {URL_SETTING}"),
    ("Expected SETTINGS frame", f"that is no etcd; see {URL_SETTING}"),
    ("Handshake read failed", f"it speaks no TLS, or wants {CERTIFICATE_SETTING}"),
)


_HANGS_UP = ("Socket closed", "reset by peer", "Unwrap failed", "handshake failed")


def _why(member: Member, code: object, details: str) -> str:
    for words, reason in _REASONS:
        if words in details:
            return reason
    if code is _Code.DEADLINE_EXCEEDED or _OUT_OF_TIME in details:
        return "not in time"
    if not any(words in details for words in _HANGS_UP):
        return details
    if member.tls:
        return f"it hangs up; it may want another {CERTIFICATE_SETTING} ({details})"
    return f"it hangs up; if it speaks TLS, {URL_SETTING} has to say etcds://"

"""NATS's JWTs, written here: an operator signs an account, and the account signs a user.

Version 2 of the format: base64url without padding, `alg` is `ed25519-nkey`, and the issuer is the
public nkey whose seed has signed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from typing import Any

import nkeys

from kvbm_service.adapters.nats_permissions import Permissions

OPERATOR, ACCOUNT, USER = (
    nkeys.PREFIX_BYTE_OPERATOR,
    nkeys.PREFIX_BYTE_ACCOUNT,
    nkeys.PREFIX_BYTE_USER,
)
_UNLIMITED = -1


class Key:
    """An nkey: its public part is a name, its seed signs."""

    def __init__(self, kind: int) -> None:
        self.seed = bytes(nkeys.encode_seed(os.urandom(32), kind))
        pair = nkeys.from_seed(bytearray(self.seed))
        self.public = pair.public_key.decode()

    def sign(self, text: bytes) -> bytes:
        return bytes(nkeys.from_seed(bytearray(self.seed)).sign(text))


def signed(issuer: Key, subject: Key, name: str, claims: dict[str, Any]) -> str:
    """A JWT in which `issuer` says `claims` of `subject`."""
    body: dict[str, Any] = {
        "iat": int(time.time()),
        "iss": issuer.public,
        "name": name,
        "sub": subject.public,
        "nats": {**claims, "version": 2},
    }
    digest = hashlib.new("sha512_256", json.dumps(body).encode()).digest()
    body["jti"] = base64.b32encode(digest).decode().rstrip("=")
    head = _part({"typ": "JWT", "alg": "ed25519-nkey"})
    text = f"{head}.{_part(body)}"
    return f"{text}.{_base64(issuer.sign(text.encode()))}"


class Authority:
    """An operator with a system account and one for us; `configuration` is the server's."""

    def __init__(self, store: str) -> None:
        self._operator, self._system, self._account = Key(OPERATOR), Key(ACCOUNT), Key(ACCOUNT)
        self.configuration = (
            f"operator: {signed(self._operator, self._operator, 'op', {'type': 'operator'})}\n"
            f"system_account: {self._system.public}\n"
            "resolver: MEMORY\n"
            f"resolver_preload: {{\n"
            f"  {self._system.public}: {self._signed_account(self._system, 'SYS', storage=0)}\n"
            f"  {self._account.public}: {self._signed_account(self._account, 'KVBM', storage=-1)}\n"
            "}\n"
            f'jetstream {{ store_dir: "{store}" }}\n'
        )

    def _signed_account(self, account: Key, name: str, storage: int) -> str:
        unlimited = dict.fromkeys(
            ("subs", "data", "payload", "imports", "exports", "conn", "leaf"), _UNLIMITED
        )
        limits = {**unlimited, "wildcards": True, "mem_storage": storage, "disk_storage": storage}
        limits |= {"streams": storage, "consumer": storage}
        claims = {
            "type": "account",
            "limits": limits,
            "default_permissions": {"pub": {}, "sub": {}},
        }
        return signed(self._operator, account, name, claims)

    def credentials(self, name: str, permissions: Permissions, seconds: int = 3600) -> str:
        """What a .creds file of this user holds."""
        user = Key(USER)
        claims = {
            "type": "user",
            **dict.fromkeys(("subs", "data", "payload"), _UNLIMITED),
            "pub": {"allow": list(permissions.publish)},
            "sub": {"allow": list(permissions.subscribe), "deny": list(permissions.deaf_to)},
        }
        jwt = signed(self._account, user, name, claims)
        return (
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            "-----BEGIN USER NKEY SEED-----\n"
            f"{user.seed.decode()}\n------END USER NKEY SEED------\n"
        )


def _part(content: dict[str, Any]) -> str:
    return _base64(json.dumps(content, separators=(",", ":")).encode())


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")

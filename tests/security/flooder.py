"""A process that publishes as fast as it can: arguments are port, user, password, CA, subject.

It speaks NATS by itself, so that nothing of ours slows it down; half of what it says is rubbish.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import sys
import threading

from kvbm_schemas.block import Tier
from kvbm_schemas.codec import encode
from kvbm_schemas.events import Stored

BATCH = 100


def main(port: str, user: str, password: str, ca: str, subject: str) -> None:
    plain = socket.create_connection(("127.0.0.1", int(port)))
    plain.recv(1 << 16)
    server = ssl.create_default_context(cafile=ca).wrap_socket(plain, server_hostname="127.0.0.1")
    login = json.dumps({"user": user, "pass": password, "verbose": False, "pedantic": False})
    server.sendall(f"CONNECT {login}\r\nPING\r\n".encode())
    sending = threading.Lock()
    threading.Thread(target=_answer_pings, args=(server, sending), daemon=True).start()
    seq = 0
    while True:
        batch = b""
        for _ in range(BATCH):
            seq += 1
            event = Stored(epoch=1, seq=seq, tier=Tier.HOST, hashes=os.urandom(16))
            for payload in (encode(event), b"rubbish"):
                batch += f"PUB {subject} {len(payload)}\r\n".encode() + payload + b"\r\n"
        with sending:
            server.sendall(batch)
        if seq == BATCH:
            print("flooding", flush=True)


def _answer_pings(server: ssl.SSLSocket, sending: threading.Lock) -> None:
    while said := server.recv(1 << 16):
        if b"PING" in said:
            with sending:
                server.sendall(b"PONG\r\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

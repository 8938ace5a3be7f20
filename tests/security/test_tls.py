"""TLS with NATS: whom we believe, what we show of ourselves, what is never said in the clear."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_login import TlsFiles
from kvbm_service.errors import BusUnavailable, SettingError
from tests.patience import eventually
from tests.security.certificates import Authority, Certificate
from tests.security.guarded_nats import guarded_nats

LOGIN = "me:planted-password"


def configuration(server: Certificate, ca: Path | None = None) -> str:
    """A server with TLS; with `ca`, one that wants a certificate of its clients, too."""
    wants = f'ca_file: "{ca}", verify: true' if ca else ""
    return (
        f'tls {{ cert_file: "{server.certificate}", key_file: "{server.key}", {wants} }}\n'
        'authorization { user: "me", password: "planted-password" }\n'
    )


async def complaint(url: str, tls: TlsFiles) -> str:
    """Why there is no connection."""
    bus = await NatsBus.connect(url, tls=tls)
    try:
        with pytest.raises(BusUnavailable) as absence:
            await bus.publish("x", b"")
    finally:
        await bus.close()
    assert "planted" not in str(absence.value)
    return str(absence.value)


@pytest.mark.parametrize("scheme", ["nats", "tls"])
async def test_a_server_is_believed_that_our_authority_vouches_for(
    tmp_path: Path, scheme: str
) -> None:
    authority = Authority(tmp_path)
    with guarded_nats(tmp_path, configuration(authority.issue("server"))) as server:
        bus = await NatsBus.connect(server.url(LOGIN, scheme), tls=TlsFiles(ca=str(authority.ca)))
        assert bus.connected
        await bus.close()


async def test_a_server_that_nobody_vouches_for_is_told_nothing(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    with guarded_nats(tmp_path, configuration(stranger.issue("server"))) as server:
        for files in (TlsFiles(ca=str(authority.ca)), TlsFiles()):
            words = await complaint(server.url(LOGIN), files)
            assert "cannot prove who it is" in words
            assert "KVBM_NATS_CA" in words
        assert "me" not in [line.split()[-1] for line in server.logged().splitlines()]


async def test_a_server_with_a_certificate_for_another_address_is_told_nothing(
    tmp_path: Path,
) -> None:
    authority = Authority(tmp_path)
    elsewhere = authority.issue("server", address="10.1.2.3")
    with guarded_nats(tmp_path, configuration(elsewhere)) as server:
        words = await complaint(server.url(LOGIN), TlsFiles(ca=str(authority.ca)))
        assert "cannot prove who it is" in words


async def test_a_client_shows_its_certificate_where_the_server_wants_one(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    mine = authority.issue("client")
    conf = configuration(authority.issue("server"), authority.ca)
    with guarded_nats(tmp_path, conf) as server:
        words = await complaint(server.url(LOGIN), TlsFiles(ca=str(authority.ca)))
        assert "KVBM_NATS_CERTIFICATE" in words
        files = TlsFiles(str(authority.ca), str(mine.certificate), str(mine.key))
        bus = await NatsBus.connect(server.url(LOGIN), tls=files)
        assert bus.connected
        await bus.close()
        unknown = Authority(tmp_path, "unknown").issue("impostor")
        files = TlsFiles(str(authority.ca), str(unknown.certificate), str(unknown.key))
        assert "KVBM_NATS_CERTIFICATE" in await complaint(server.url(LOGIN), files)


@pytest.mark.parametrize("demanded_by", ["scheme", "authority"])
async def test_nothing_is_said_in_the_clear_where_tls_is_demanded(
    tmp_path: Path, demanded_by: str
) -> None:
    heard: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.10.0","max_payload":1048576}\r\n')
        heard.append(await reader.read(4096))
        writer.close()

    impostor = await asyncio.start_server(listen, "127.0.0.1", 0)
    port = impostor.sockets[0].getsockname()[1]
    if demanded_by == "scheme":
        url, files = f"tls://{LOGIN}@127.0.0.1:{port}", TlsFiles()
    else:
        url, files = f"nats://{LOGIN}@127.0.0.1:{port}", TlsFiles(ca=str(Authority(tmp_path).ca))
    assert "offers no TLS" in await complaint(url, files)
    impostor.close()
    await impostor.wait_closed()
    assert heard
    assert not any(heard)


async def test_a_renewed_certificate_is_used_from_the_next_connection_on(tmp_path: Path) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    trusted = tmp_path / "trusted.pem"
    files = TlsFiles(ca=str(trusted))
    trusted.write_bytes(old.ca.read_bytes())
    with guarded_nats(tmp_path, configuration(new.issue("server"))) as server:
        bus = await NatsBus.connect(server.url(LOGIN), tls=files)
        assert not bus.connected
        trusted.write_bytes(old.ca.read_bytes() + new.ca.read_bytes())
        await eventually(lambda: bus.connected)
        await bus.close()


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (("nonsense", "", ""), "KVBM_NATS_CA"),
        (("ca", "nonsense", "key"), "KVBM_NATS_CERTIFICATE"),
        (("ca", "certificate", "nonsense"), "KVBM_NATS_CERTIFICATE"),
        (("ca", "certificate", "other key"), "KVBM_NATS_CERTIFICATE"),
        (("ca", "", "key"), "KVBM_NATS_CERTIFICATE"),
        (("missing", "", ""), "KVBM_NATS_CA"),
    ],
)
async def test_a_file_that_cannot_be_used_is_named_and_not_quoted(
    tmp_path: Path, files: tuple[str, str, str], named: str
) -> None:
    authority = Authority(tmp_path)
    mine, other = authority.issue("mine"), authority.issue("other")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("-----BEGIN PRIVATE KEY-----\nplanted\n-----END PRIVATE KEY-----\n")
    paths = {
        "": "",
        "ca": str(authority.ca),
        "certificate": str(mine.certificate),
        "key": str(mine.key),
        "other key": str(other.key),
        "nonsense": str(nonsense),
        "missing": str(tmp_path / "missing"),
    }
    with pytest.raises(SettingError, match=named) as refusal:
        await NatsBus.connect("tls://127.0.0.1:4", tls=TlsFiles(*(paths[file] for file in files)))
    assert "planted" not in str(refusal.value)


async def test_a_key_behind_a_passphrase_is_refused_rather_than_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    authority = Authority(tmp_path)
    mine = authority.issue("mine")
    key = load_pem_private_key(mine.key.read_bytes(), None)
    mine.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"planted"),
        )
    )
    files = TlsFiles(str(authority.ca), str(mine.certificate), str(mine.key))
    caplog.set_level(logging.DEBUG)
    with pytest.raises(SettingError, match="KVBM_NATS_CERTIFICATE"):
        await NatsBus.connect("tls://127.0.0.1:4", tls=files)

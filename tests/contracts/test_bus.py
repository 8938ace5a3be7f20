"""One suite for every bus, and what only a real server can do to us."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvbm_schemas.message import MAX_MESSAGE_BYTES
from kvbm_service.adapters import mailbox
from kvbm_service.adapters.bus import Bus, Delivery
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_login import parse_login
from kvbm_service.adapters.nats_server import EmbeddedNats
from kvbm_service.errors import BusError, BusUnavailable, NoAnswer, SettingError

if TYPE_CHECKING:
    from conftest import BusWorld

Eventually = Callable[..., Awaitable[None]]


class Ears:
    """A handler that remembers what it heard."""

    def __init__(self) -> None:
        self.heard: list[Delivery] = []

    async def __call__(self, delivery: Delivery) -> None:
        self.heard.append(delivery)

    @property
    def payloads(self) -> list[bytes]:
        return [delivery.payload for delivery in self.heard]


async def echo_on(bus: Bus, subject: str, queue: str = "") -> None:
    async def echo(delivery: Delivery) -> None:
        await bus.publish(delivery.reply, delivery.payload)

    await bus.subscribe(subject, echo, queue)


async def test_what_one_publishes_the_others_hear_in_order(
    buses: BusWorld, eventually: Eventually
) -> None:
    one, other = await buses.open(), await buses.open()
    ears = Ears()
    await other.subscribe("a.b", ears)
    sent = [b"%d" % number for number in range(200)]
    for payload in sent:
        await one.publish("a.b", payload, reply="_INBOX.x")
    await eventually(lambda: len(ears.heard) == len(sent))
    assert ears.payloads == sent
    assert ears.heard[0] == Delivery("a.b", b"0", "_INBOX.x")


@pytest.mark.parametrize(
    ("pattern", "subject", "hears"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("*.b", "a.b", True),
        ("a.*.c", "a.b.c", True),
        ("a.>", "a.b", True),
        ("a.>", "a.b.c.d", True),
        ("a.>", "a", False),
        ("a.>", "b.a", False),
        (">", "a.b", True),
    ],
)
async def test_wildcards_hear_what_they_should(
    buses: BusWorld, eventually: Eventually, pattern: str, subject: str, hears: bool
) -> None:
    bus = await buses.open()
    ears, end = Ears(), Ears()
    await bus.subscribe(pattern, ears)
    await bus.subscribe("the.very.end", end)
    await bus.publish(subject, b"x")
    await bus.publish("the.very.end", b"")
    await eventually(lambda: end.heard)
    assert [each.subject for each in ears.heard if each.payload] == [subject] * hears


async def test_each_message_goes_to_one_member_of_a_queue_group(
    buses: BusWorld, eventually: Eventually
) -> None:
    one, other = await buses.open(), await buses.open()
    first, second, alone = Ears(), Ears(), Ears()
    await one.subscribe("q", first, queue="registry")
    await other.subscribe("q", second, queue="registry")
    await other.subscribe("q", alone)
    for number in range(100):
        await one.publish("q", b"%d" % number)
    await eventually(lambda: len(alone.heard) == 100)
    await eventually(lambda: len(first.heard) + len(second.heard) >= 100)
    assert sorted(first.payloads + second.payloads) == sorted(alone.payloads)
    assert first.heard
    assert second.heard


async def test_a_request_gets_its_own_answer(buses: BusWorld) -> None:
    one, other = await buses.open(), await buses.open()
    await echo_on(other, "echo.*")
    answers = await asyncio.gather(
        *(one.request("echo.x", b"%d" % number, 10.0) for number in range(50))
    )
    assert answers == [b"%d" % number for number in range(50)]


async def test_a_request_to_nobody_fails_at_once(buses: BusWorld) -> None:
    bus = await buses.open()
    started = time.monotonic()
    with pytest.raises(NoAnswer, match=r"nobody\.there"):
        await bus.request("nobody.there", b"", 25.0)
    assert time.monotonic() - started < 20.0


async def test_a_request_that_is_not_answered_ends_at_its_deadline(buses: BusWorld) -> None:
    bus = await buses.open()
    await bus.subscribe("deaf", Ears())
    with pytest.raises(NoAnswer, match=r"deaf within 0\.05 s"):
        await bus.request("deaf", b"", 0.05)


async def test_many_answers_arrive_in_order_until_the_asker_has_enough(buses: BusWorld) -> None:
    one, other = await buses.open(), await buses.open()

    async def stream(delivery: Delivery) -> None:
        for number in range(5):
            await other.publish(delivery.reply, b"%d" % number)

    await other.subscribe("stream", stream)
    seen = []
    async with contextlib.aclosing(one.request_many("stream", b"", 10.0)) as answers:
        async for answer in answers:
            seen.append(answer)
            if len(seen) == 5:
                break
    assert seen == [b"0", b"1", b"2", b"3", b"4"]


async def test_many_answers_that_cease_are_an_error_and_so_is_nobody(buses: BusWorld) -> None:
    bus = await buses.open()
    await echo_on(bus, "once")
    answers = bus.request_many("once", b"x", 0.2)
    assert await anext(answers) == b"x"
    with pytest.raises(NoAnswer):
        await anext(answers)
    with pytest.raises(NoAnswer, match="nobody"):
        await anext(bus.request_many("nobody.there", b"", 10.0))


async def test_a_failing_handler_is_logged_and_goes_on(
    buses: BusWorld, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    bus = await buses.open()
    heard = []

    async def fragile(delivery: Delivery) -> None:
        heard.append(delivery.payload)
        if delivery.payload == b"bad":
            raise ValueError("cannot take this")

    await bus.subscribe("f", fragile)
    await bus.publish("f", b"bad")
    await bus.publish("f", b"good")
    await eventually(lambda: heard == [b"bad", b"good"])
    assert "cannot take this" in caplog.text
    assert bus.troubles.errors == 1


async def test_a_closed_subscription_hears_nothing_more(
    buses: BusWorld, eventually: Eventually
) -> None:
    bus = await buses.open()
    closed, end = Ears(), Ears()
    subscription = await bus.subscribe("s", closed)
    await bus.subscribe("s", end)
    await subscription.close()
    await bus.publish("s", b"x")
    await eventually(lambda: end.heard)
    assert closed.heard == []


async def test_a_handler_may_close_its_own_subscription(
    buses: BusWorld, eventually: Eventually
) -> None:
    bus = await buses.open()
    ended = asyncio.Event()

    async def once(delivery: Delivery) -> None:
        await subscription.close()
        ended.set()

    subscription = await bus.subscribe("once", once)
    await bus.publish("once", b"")
    async with asyncio.timeout(20):
        await ended.wait()


async def test_a_slow_handler_costs_messages_and_is_told_of_once(
    buses: BusWorld,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mailbox, "MAX_WAITING_MESSAGES", 4)
    bus = await buses.open()
    gate, end = asyncio.Event(), Ears()

    async def slow(delivery: Delivery) -> None:
        await gate.wait()

    await bus.subscribe("flood.*", slow)
    await bus.subscribe("flood.end", end)
    for _ in range(50):
        await bus.publish("flood.x", b"x")
    await bus.publish("flood.end", b"")
    await eventually(lambda: end.heard)
    gate.set()
    assert bus.troubles.dropped >= 40
    assert caplog.text.count("faster than they are handled") == 1


async def test_a_message_of_a_mebibyte_passes_and_a_larger_one_is_refused(
    buses: BusWorld, eventually: Eventually
) -> None:
    bus = await buses.open()
    ears = Ears()
    await bus.subscribe("big", ears)
    await bus.publish("big", bytes(MAX_MESSAGE_BYTES))
    with pytest.raises(BusError, match="larger than"):
        await bus.publish("big", bytes(MAX_MESSAGE_BYTES + 1))
    await eventually(lambda: [len(each) for each in ears.payloads] == [MAX_MESSAGE_BYTES])
    assert bus.connected


async def test_an_outage_is_told_and_loses_what_is_published_meanwhile(
    buses: BusWorld, eventually: Eventually
) -> None:
    one, other = await buses.open(), await buses.open()
    ears, changes = Ears(), []
    await other.subscribe("o", ears)
    one.on_connection(changes.append)
    await buses.lose()
    for _ in range(3):
        with pytest.raises(BusUnavailable):
            await one.publish("o", b"lost")
    with pytest.raises(BusUnavailable):
        await one.request("o", b"lost", 5.0)
    await buses.recover()
    await eventually(lambda: changes == [False, True])
    await one.publish("o", b"after")
    await eventually(lambda: ears.heard)
    assert ears.payloads == [b"after"]
    assert one.troubles.outages == 1


async def test_a_request_under_way_fails_when_the_connection_is_lost(buses: BusWorld) -> None:
    one, other = await buses.open(), await buses.open()
    asked = asyncio.Event()

    async def mute(delivery: Delivery) -> None:
        asked.set()

    await other.subscribe("mute", mute)
    request = asyncio.create_task(one.request("mute", b"", 60.0))
    await asked.wait()
    await buses.lose()
    with pytest.raises(BusUnavailable):
        async with asyncio.timeout(25):
            await request


async def test_a_subscription_made_during_an_outage_becomes_live_after_it(
    buses: BusWorld, eventually: Eventually
) -> None:
    one, other = await buses.open(), await buses.open()
    await buses.lose()
    ears = Ears()
    await other.subscribe("late", ears)
    await buses.recover()
    await one.publish("late", b"x")
    await eventually(lambda: ears.payloads == [b"x"])


async def test_requests_work_again_after_an_outage(buses: BusWorld) -> None:
    one, other = await buses.open(), await buses.open()
    await echo_on(other, "echo")
    await buses.lose()
    await buses.recover()
    assert await one.request("echo", b"x", 20.0) == b"x"


async def test_a_closed_bus_is_not_connected_and_publishes_nothing(buses: BusWorld) -> None:
    bus = await buses.open()
    await bus.close()
    assert not bus.connected
    with pytest.raises(BusUnavailable):
        await bus.publish("x", b"")


async def test_what_was_published_before_closing_arrives(
    buses: BusWorld, eventually: Eventually
) -> None:
    one, other = await buses.open(), await buses.open()
    ears = Ears()
    await other.subscribe("last", ears)
    await one.publish("last", b"words")
    await one.close()
    await eventually(lambda: ears.payloads == [b"words"])


# NATS only


async def test_nats_may_appear_later_and_is_missed_in_one_line(
    nats_server: EmbeddedNats, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    nats_server.stop()
    url = nats_server.url.replace("//", "//me:secret@")
    bus = await NatsBus.connect(url)
    try:
        assert not bus.connected
        ears = Ears()
        await bus.subscribe("early", ears)
        with pytest.raises(BusUnavailable, match=r"connection refused.*KVBM_NATS_URL"):
            await bus.publish("early", b"lost")
        await asyncio.sleep(0.5)  # several attempts
        missing = [each for each in caplog.messages if "no connection to NATS" in each]
        assert len(missing) == 1
        assert nats_server.url in missing[0]
        assert "secret" not in caplog.text
        await asyncio.to_thread(nats_server.start)
        await eventually(lambda: bus.connected)
        await bus.publish("early", b"x")
        await eventually(lambda: ears.payloads == [b"x"])
        assert [each for each in caplog.messages if each.startswith("connected to NATS")]
    finally:
        await bus.close()


async def test_each_outage_is_logged_once_and_so_is_its_end(
    nats_server: EmbeddedNats, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="kvbm_service")
    bus = await NatsBus.connect(nats_server.url)
    try:
        for _ in range(2):
            nats_server.kill()
            await eventually(lambda: not bus.connected)
            await asyncio.sleep(0.4)  # several attempts
            await asyncio.to_thread(nats_server.start)
            await eventually(lambda: bus.connected)
    finally:
        await bus.close()
    assert [message.split(" NATS")[0] for message in caplog.messages] == [
        "connected to",
        *["lost the connection to", "connected to"] * 2,
    ]


async def test_a_wrong_password_is_one_clear_error(caplog: pytest.LogCaptureFixture) -> None:
    with EmbeddedNats(user="me", password="right@:/") as server:
        with pytest.raises(BusUnavailable) as refusal:
            await NatsBus.connect(server.url.replace("//", "//me:wrong@"))
        words = str(refusal.value)
        assert "KVBM_NATS_URL" in words
        assert "KVBM_NATS_CREDENTIALS" in words
        assert "wrong" not in words
        assert "\n" not in words
        assert caplog.messages == []
        bus = await NatsBus.connect(server.url.replace("//", "//me:right%40%3A%2F@"))
        assert bus.connected
        await bus.close()


async def test_credentials_given_apart_are_used_rather_than_those_in_the_url() -> None:
    with EmbeddedNats(user="me", password="right") as server:
        bus = await NatsBus.connect(server.url.replace("//", "//me:wrong@"), "me:right")
        assert bus.connected
        await bus.close()


async def test_a_server_that_comes_back_with_another_password_is_told_once(
    eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    with EmbeddedNats(user="me", password="one") as server:
        bus = await NatsBus.connect(server.url, "me:one")
        try:
            server.stop()
            with EmbeddedNats(port=server.port, user="me", password="two"):
                await eventually(lambda: "refuses us" in caplog.text)
                await asyncio.sleep(1.0)  # several attempts
                assert caplog.text.count("refuses us") == 1
                with pytest.raises(BusUnavailable, match="refuses us"):
                    await bus.publish("x", b"")
        finally:
            await bus.close()


@pytest.mark.parametrize(
    "greeting",
    [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"INFO {\r\n", b"INFO {}\r\n", b"x" * 200_000],
    ids=["nothing", "http", "broken", "empty", "endless"],
)
async def test_what_answers_but_is_not_nats_is_an_outage_and_not_a_crash(
    greeting: bytes, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    visits = []

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visits.append(writer)
        writer.write(greeting)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    bus = await NatsBus.connect(f"nats://127.0.0.1:{port}")
    try:
        before = len(visits)
        await eventually(lambda: len(visits) > before + 2)
        assert not bus.connected
        with pytest.raises(BusUnavailable):
            await bus.publish("x", b"")
        assert len(caplog.messages) == 1
    finally:
        await bus.close()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0.05)  # the last visit ends


@pytest.mark.parametrize(
    "url", ["http://x:4222", "nats://", "nats://x:port", "nats://u:secret@:4222", "", "a b"]
)
def test_a_url_that_is_none_is_refused_without_showing_a_password(url: str) -> None:
    with pytest.raises(SettingError, match="KVBM_NATS_URL") as refusal:
        parse_login(url)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("content", ["", "hello", "SU" + "B" * 40, None])
def test_a_credentials_file_that_is_none_is_refused(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "me.creds"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingError, match="KVBM_NATS_CREDENTIALS"):
        parse_login("nats://x", str(file))


def test_credentials_come_as_a_token_a_password_a_seed_or_a_creds_file(tmp_path: Path) -> None:
    nkeys = pytest.importorskip("nkeys")
    seed = nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER).decode()
    (tmp_path / "seed").write_text(seed + "\n")
    creds = f"-----BEGIN NATS USER JWT-----\njwt\n-----BEGIN USER NKEY SEED-----\n{seed}\n"
    (tmp_path / "creds").write_text(creds)
    assert parse_login("nats://tok@x").options() == {"token": "tok"}
    assert parse_login("nats://x", "tok").options() == {"token": "tok"}
    assert parse_login("nats://x", "me:p:w").options() == {"user": "me", "password": "p:w"}
    assert parse_login("x", str(tmp_path / "seed")).options() == {"nkeys_seed_str": seed}
    assert list(parse_login("x", str(tmp_path / "creds")).options()) == ["user_credentials"]
    assert str(parse_login("me:pw@one, nats://two:1")) == "nats://one:4222,nats://two:1"


async def test_a_question_is_not_answered_where_its_asker_may_not_speak(
    buses: BusWorld, eventually: Eventually
) -> None:
    one, other = await buses.open(), await buses.open()
    ears = Ears()
    await other.subscribe("a.b", ears)
    for reply in ("kvbm.ns.layout.node.events", "$KV.bucket.ns.layout.node", "_INBOXES.x"):
        await one.publish("a.b", b"", reply)
    await one.publish("a.b", b"", "_INBOX_of_another_client.x")
    await eventually(lambda: len(ears.heard) == 4)
    assert [heard.reply for heard in ears.heard] == ["", "", "", "_INBOX_of_another_client.x"]

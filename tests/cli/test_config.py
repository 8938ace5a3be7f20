"""`kvbm config`, and what every command does with a bad command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kvbm_service.settings import TABLE


def test_every_setting_is_shown_with_value_source_and_meaning(kvbm) -> None:
    done = kvbm("config", KVBM_LOOKUP_DEADLINE_MS="50", KVBM_VERIFY="yes")
    assert done.returncode == 0
    text = done.stdout.decode()
    for setting in TABLE.values():
        assert f"{setting.variable} = " in text
        assert setting.meaning.split()[0] in text
    assert "KVBM_LOOKUP_DEADLINE_MS = 50  (environment)" in text
    assert "KVBM_VERIFY = true  (environment)" in text
    assert "KVBM_WIRE = msgpack  (default)" in text


def test_the_text_fits_eighty_columns(kvbm) -> None:
    for arguments in (["config"], ["--help"], ["tap", "--help"], ["locate", "--help"]):
        lines = kvbm(*arguments).stdout.decode().splitlines()
        assert max(map(len, lines)) <= 80


def test_json_has_the_same_table(kvbm) -> None:
    data = json.loads(kvbm("--nats-url", "nats://a:1", "config", "--json").stdout)
    assert [row["setting"] for row in data["settings"]] == [one.variable for one in TABLE.values()]
    url = next(row for row in data["settings"] if row["setting"] == "KVBM_NATS_URL")
    assert (url["value"], url["source"]) == ("nats://a:1", "command line")
    assert url["meaning"]
    assert url["allowed"]


def test_a_password_is_never_printed(kvbm) -> None:
    for arguments in (["config"], ["config", "--json"]):
        done = kvbm(*arguments, KVBM_NATS_URL="nats://user:secret@host:4222")
        assert b"user:****@host:4222" in done.stdout
        assert b"secret" not in done.stdout + done.stderr


def test_names_not_used_yet_and_unknown_names_are_listed(kvbm) -> None:
    unused = "DYN_KVBM_LEADER_ZMQ_HOST"
    given = {unused: "a", "KVBM_NATS_URI": "x", "DYN_KVBM_NIXL_BACKEND_UCX": "1"}
    text = kvbm("config", **given).stdout.decode()
    assert f"{unused}  not used yet in this version\n    Ranks meet through NATS here" in text
    assert "DYN_KVBM_NIXL_BACKEND_UCX  not used yet in this version\n    KVBM_DISK_BACKEND" in text
    assert "KVBM_NATS_URI  not a setting of ours: ignored\n    Did you mean KVBM_NATS_URL?" in text
    data = json.loads(kvbm("config", "--json", **given).stdout)
    assert data["unknown"] == {"KVBM_NATS_URI": "KVBM_NATS_URL"}
    assert unused in data["not_used_yet"]


def test_the_guides_second_option_is_shown_in_the_units_it_was_given_in(kvbm) -> None:
    given = {"DYN_KVBM_CPU_CACHE_GB": "4", "DYN_KVBM_DISK_CACHE_GB": "0.5"}
    text = kvbm("config", **given, KVBM_HOST_CACHE_DIR="None").stdout.decode()
    assert "DYN_KVBM_CPU_CACHE_GB = 4  (environment)" in text
    assert "DYN_KVBM_DISK_CACHE_GB = 0.5  (environment)" in text
    assert "KVBM_HOST_CACHE_DIR = none  (environment)" in text
    assert "DYN_KVBM_DISK_CACHE_DIR = /tmp  (default)" in text
    assert "KVBM_STAGING_DEADLINE_MS = 200  (default)" in text


def test_a_bad_value_in_the_environment_is_one_line(kvbm) -> None:
    done = kvbm("config", KVBM_WIRE="xml")
    assert done.returncode == 2
    assert done.stderr == b"kvbm: KVBM_WIRE='xml' is not allowed: msgpack or json\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], b"nope"),
        (["tap", "--nope"], b"--nope"),
        (["tap", "--type", "store"], b"--type='store' is not allowed: "),
        (["tap", "--count", "-1"], b"--count"),
        (["--nats-url", "ftp://x", "ls"], b"--nats-url='ftp://x' is not allowed: nats://host:port"),
        (["ls", "--nats-url", "ftp://x"], b"--nats-url='ftp://x' is not allowed"),
        (["ls", "--credentials", "/no/such"], b"--credentials='/no/such' is not allowed"),
        (["ls", "--namespace", "a.b"], b"--namespace='a.b' is not allowed"),
        (["locate"], b"HASH"),
        (["locate", "12"], b"HASH='12' is not allowed: 32 hex digits"),
        (["locate", "g" * 32], b"32 hex digits"),
        (["locate", "0" * 32, "--fingerprint", "*"], b"--fingerprint='*' is not allowed"),
        (["up", "--port", "65536"], b"--port"),
        (["up", "--port", "1", "--nats-url", "nats://a"], b"--port"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_two(
    kvbm, arguments: list[str], said: bytes
) -> None:
    done = kvbm(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.startswith(b"kvbm: ")
    assert done.stderr.count(b"\n") == 1
    assert done.stdout == b""


def test_help_teaches_with_examples(kvbm) -> None:
    done = kvbm("--help")
    assert done.returncode == 0
    for example in ("kvbm up", "kvbm ls", "kvbm locate", "kvbm tap --type", "--translate"):
        assert example in done.stdout.decode()
    assert kvbm().stdout == done.stdout


def test_help_and_decode_load_nothing_heavy() -> None:
    """They are to answer at once: `decode` runs anew for each message."""
    code = (
        "import io, sys\n"
        "from kvbm_service.cli import main\n"
        "sys.stdin = io.TextIOWrapper(io.BytesIO(b'?'))\n"
        "assert main(['--help']) == 0 and main(['decode']) == 1\n"
        "heavy = {'nats', 'numpy', 'numba', 'torch', 'vllm', 'nixl'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()

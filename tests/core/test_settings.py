"""Settings: what is honoured, what is refused and in which words, what is never shown."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from msgspec.structs import replace

from kvbm_schemas.codec import Wire
from kvbm_service import settings as module
from kvbm_service.core.offload_filter import HIGHEST_FREQUENCY
from kvbm_service.errors import SettingError
from kvbm_service.setting_kind import BOOLEAN, mask_urls
from kvbm_service.settings import (
    MAX_SLOTS,
    TABLE,
    Layer,
    Settings,
    Source,
    TierSlots,
    resolve,
    tier_slots,
)
from kvbm_service.unused_settings import NOT_USED_YET

COMPOSE = Path(__file__).parents[2] / "deploy" / "docker-compose.yml"

GUIDES_NAMES = {
    "DYN_KVBM_CPU_CACHE_GB": "cpu_cache_gb",
    "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "cpu_cache_override_num_blocks",
    "DYN_KVBM_DISK_CACHE_GB": "disk_cache_gb",
    "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": "disk_cache_override_num_blocks",
    "DYN_KVBM_DISK_CACHE_DIR": "disk_cache_dir",
    "DYN_KVBM_DISK_ALLOCATOR_TYPE": "disk_allocator_type",
    "DYN_KVBM_DISK_DISABLE_O_DIRECT": "disk_disable_o_direct",
    "DYN_KVBM_DISK_ZEROFILL_FALLBACK": "disk_zerofill_fallback",
    "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "disable_disk_offload_filter",
    "DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY": "host_offload_prefix_min_priority",
    "DYN_KVBM_MAX_CONCURRENT_TRANSFERS": "max_concurrent_transfers",
    "DYN_KVBM_MAX_TRANSFER_BATCH_SIZE": "max_transfer_batch_size",
    "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS": "leader_worker_init_timeout_seconds",
    "DYN_KVBM_METRICS": "metrics",
    "DYN_KVBM_METRICS_PORT": "metrics_port",
    "DYN_KVBM_CACHE_STATS_MAX_REQUESTS": "cache_stats_max_requests",
    "DYN_KVBM_CACHE_STATS_LOG_INTERVAL_SECS": "cache_stats_log_interval_seconds",
}

GUIDES_UNUSED = (
    "DYN_KVBM_LEADER_ZMQ_HOST",
    "DYN_KVBM_LEADER_ZMQ_PUB_PORT",
    "DYN_KVBM_LEADER_ZMQ_ACK_PORT",
    "DYN_KVBM_OBJECT_BUCKET",
    "DYN_KVBM_ENABLE_RECORD",
    "DYN_KVBM_NIXL_BACKEND_GDS_MT",
)


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    module._warn_once.cache_clear()


def test_with_nothing_set_every_setting_has_its_documented_default() -> None:
    settings = Settings.load({})
    assert settings == Settings()
    assert settings.nats_url == "nats://127.0.0.1:4222"
    assert settings.namespace == "default"
    assert settings.node_name == ""
    assert settings.lookup_deadline_seconds == 0.02
    assert settings.leader_worker_init_timeout_seconds == 1800
    assert settings.wire is Wire.MSGPACK
    assert settings.verify is False
    assert (settings.disk_cache_dir, settings.host_cache_dir) == ("/tmp", "/dev/shm")
    assert settings.disk_backend == "POSIX"
    assert (settings.max_concurrent_transfers, settings.max_transfer_batch_size) == (4, 16)
    assert (settings.metrics, settings.metrics_port) == (False, 6880)
    assert (settings.prefetch_share, settings.staging_deadline_seconds) == (0.125, 0.2)


def test_the_guides_offload_filter_is_the_default() -> None:
    settings = Settings()
    assert settings.disable_disk_offload_filter is False
    assert settings.disk_offload_min_frequency == 2
    assert settings.disk_offload_decay_seconds == 600
    assert settings.disk_offload_max_entries == 1_000_000


def test_the_guides_names_are_honoured_exactly() -> None:
    for variable, field in GUIDES_NAMES.items():
        assert TABLE[field].variable == variable
    settings = Settings.load(
        {
            "DYN_KVBM_CPU_CACHE_GB": "0.5",
            "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "7",
            "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS": "3600",
        }
    )
    assert settings.cpu_cache_gb == 0.5
    assert settings.cpu_cache_override_num_blocks == 7
    assert settings.leader_worker_init_timeout_seconds == 3600


def test_the_connector_config_wins_over_the_environment() -> None:
    settings = Settings.load({"KVBM_NAMESPACE": "env", "KVBM_WIRE": "json"}, {"namespace": "extra"})
    assert settings.namespace == "extra"
    assert settings.wire is Wire.JSON


def test_the_connector_config_takes_environment_names_and_field_names() -> None:
    settings = Settings.load({}, {"DYN_KVBM_CPU_CACHE_GB": 4, "verify": True, "KVBM_WIRE": "JSON"})
    assert (settings.cpu_cache_gb, settings.verify, settings.wire) == (4, True, Wire.JSON)


def test_the_environment_does_not_take_field_names() -> None:
    assert Settings.load({"namespace": "other"}).namespace == "default"


@pytest.mark.parametrize("name", ["lookup", "staging"])
def test_a_deadline_is_milliseconds_in_its_variable_and_seconds_in_its_field(name: str) -> None:
    variable, field = f"KVBM_{name.upper()}_DEADLINE_MS", f"{name}_deadline_seconds"
    for settings in (
        Settings.load({variable: "50"}),
        Settings.load({}, {variable: 50}),
        Settings.load({}, {field: 0.05}),
    ):
        assert getattr(settings, field) == 0.05
    assert TABLE[field].kind.show(0.05) == 50


def test_an_empty_variable_counts_as_unset() -> None:
    empty = {setting.variable: "" for setting in TABLE.values()}
    assert Settings.load(empty) == Settings()


def test_the_source_of_every_value_is_known() -> None:
    layers = [
        Layer(Source.ENVIRONMENT, {"KVBM_WIRE": "json", "KVBM_NAMESPACE": "a"}),
        Layer(Source.CONNECTOR, {"namespace": "b"}),
    ]
    sources = resolve(layers).sources
    assert sources["wire"] is Source.ENVIRONMENT
    assert sources["namespace"] is Source.CONNECTOR
    assert sources["verify"] is Source.DEFAULT


SWITCHES = [setting.variable for setting in TABLE.values() if setting.kind is BOOLEAN]


@pytest.mark.parametrize("word", ["1", "true", "True", "YES", "on", " on "])
@pytest.mark.parametrize("variable", SWITCHES)
def test_a_switch_is_on_in_these_words(variable: str, word: str) -> None:
    assert Settings.load({variable: word}) == replace(Settings(), **{_field(variable): True})


@pytest.mark.parametrize("word", ["0", "false", "FALSE", "No", "off"])
@pytest.mark.parametrize("variable", SWITCHES)
def test_a_switch_is_off_in_these_words(variable: str, word: str) -> None:
    assert Settings.load({variable: word}) == replace(Settings(), **{_field(variable): False})


def _field(variable: str) -> str:
    return next(field for field, setting in TABLE.items() if setting.variable == variable)


BAD = [
    ("DYN_KVBM_CPU_CACHE_GB", "four", "a number of GB from 0 to 1000000"),
    ("DYN_KVBM_CPU_CACHE_GB", "-1", "a number of GB"),
    ("DYN_KVBM_CPU_CACHE_GB", "nan", "a number of GB"),
    ("DYN_KVBM_CPU_CACHE_GB", "inf", "a number of GB"),
    ("DYN_KVBM_CPU_CACHE_GB", "1e400", "a number of GB"),
    ("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS", "1.5", "a whole number of blocks from 0 to"),
    ("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS", "-1", "a whole number of blocks"),
    ("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS", str(MAX_SLOTS + 1), "a whole number of blocks"),
    ("DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS", "0", "a number of seconds from 0.1 to 86400"),
    ("KVBM_NATS_URL", "http://host:4222", "nats://host:port"),
    ("KVBM_NATS_URL", "nats://", "nats://host:port"),
    ("KVBM_NATS_URL", "nats://host:0", "nats://host:port"),
    ("KVBM_NATS_URL", "nats://host:99999", "nats://host:port"),
    ("KVBM_NATS_URL", ",", "nats://host:port"),
    (
        "KVBM_NATS_CREDENTIALS",
        "/no/such/file.creds",
        "a .creds file (or nkey seed) that can be read",
    ),
    ("KVBM_NATS_CREDENTIALS", "/", "a .creds file (or nkey seed) that can be read"),
    ("KVBM_NATS_CA", "/no/such/file.pem", "the path of a PEM file"),
    ("KVBM_NATS_CERTIFICATE", "/no/such/file.pem", "the path of a PEM file"),
    ("KVBM_NATS_KEY", "/no/such/file.pem", "the path of a PEM file"),
    ("KVBM_ETCD_CA", "/no/such/file.pem", "the path of a PEM file"),
    ("KVBM_ETCD_CERTIFICATE", "/no/such/file.pem", "the path of a PEM file"),
    ("KVBM_ETCD_KEY", "/no/such/file.pem", "the path of a PEM file"),
    ("KVBM_DIRECTORY_URL", "http://etcd:2379", "etcd://host:port"),
    ("KVBM_DIRECTORY_URL", "etcd://one:2379,nats://two:4222", "several of one kind"),
    (
        "KVBM_NATS_CREDENTIALS",
        "~nobody-is-called-so/x",
        "a .creds file (or nkey seed) that can be read",
    ),
    ("KVBM_NAMESPACE", "a.b", "1 to 64 letters, digits, - or _"),
    ("KVBM_NAMESPACE", "a b", "1 to 64 letters"),
    ("KVBM_NAMESPACE", "*", "1 to 64 letters"),
    ("KVBM_NAMESPACE", "x" * 65, "1 to 64 letters"),
    ("KVBM_NODE_NAME", "registry", "not 'registry', which is reserved"),
    ("KVBM_NODE_NAME", "node.1", "1 to 64 letters"),
    ("KVBM_ENGINE_URL", "host:8000", "http://host:port"),
    ("KVBM_ENGINE_URL", "http://host:0", "without a login"),
    ("KVBM_ROUTE_DEADLINE_MS", "10001", "a number of milliseconds from 0 to 10000"),
    ("KVBM_LOOKUP_DEADLINE_MS", "10001", "a number of milliseconds from 0 to 10000"),
    ("KVBM_LOOKUP_DEADLINE_MS", "-1", "a number of milliseconds"),
    ("KVBM_LOOKUP_DEADLINE_MS", "20ms", "a number of milliseconds"),
    ("KVBM_WIRE", "protobuf", "msgpack or json"),
    ("KVBM_LEASE_SECONDS", "0", "a number of seconds"),
    ("KVBM_MEMBERSHIP_SECONDS", "0", "a number of seconds"),
    ("KVBM_VERIFY", "maybe", "1, true, yes or on; 0, false, no or off"),
    ("KVBM_VERIFY", "2", "1, true, yes or on"),
    ("KVBM_LEND_DEVICE", "host", "1, true, yes or on"),
    ("KVBM_HOST_CACHE_DIR", "/dev/null", "the path of a directory, or none"),
    ("DYN_KVBM_DISK_CACHE_GB", "-0.5", "a number of GB from 0 to 1000000"),
    ("DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS", "many", "a whole number of blocks from 0 to"),
    ("DYN_KVBM_DISK_CACHE_DIR", "/dev/null", "the path of a directory"),
    ("DYN_KVBM_DISK_CACHE_DIR", "~nobody-is-called-so/x", "the path of a directory"),
    ("DYN_KVBM_DISK_ALLOCATOR_TYPE", "sparse", "default or open-direct"),
    ("DYN_KVBM_DISK_DISABLE_O_DIRECT", "please", "1, true, yes or on; 0, false, no or off"),
    ("DYN_KVBM_DISK_ZEROFILL_FALLBACK", "please", "1, true, yes or on"),
    ("KVBM_DISK_BACKEND", "GDS-MT", "the name of a NIXL backend: 1 to 64 letters, digits or _"),
    ("DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER", "please", "1, true, yes or on"),
    ("KVBM_DISK_OFFLOAD_MIN_FREQUENCY", "0", "a whole number from 1 to 1024"),
    ("KVBM_DISK_OFFLOAD_MIN_FREQUENCY", str(HIGHEST_FREQUENCY + 1), "a whole number from 1 to"),
    ("KVBM_DISK_OFFLOAD_DECAY_SECONDS", "0", "a number of seconds from 0.1 to 2592000"),
    ("KVBM_DISK_OFFLOAD_MAX_ENTRIES", "0", "a whole number of blocks from 1 to"),
    ("DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY", "101", "a whole number from 0 to 100"),
    ("DYN_KVBM_MAX_CONCURRENT_TRANSFERS", "0", "a whole number of transfers from 1 to 1024"),
    ("DYN_KVBM_MAX_TRANSFER_BATCH_SIZE", "4097", "a whole number of blocks from 1 to 4096"),
    ("KVBM_PREFETCH_SHARE", "12.5", "a number from 0 to 1"),
    ("KVBM_STAGING_DEADLINE_MS", "-1", "a number of milliseconds from 0 to 60000"),
    ("KVBM_HAND_OVER_DEADLINE_MS", "1h", "a number of milliseconds from 0 to 60000"),
    ("DYN_KVBM_METRICS", "prometheus", "1, true, yes or on; 0, false, no or off"),
    ("DYN_KVBM_METRICS_PORT", "65536", "a whole number from 0 to 65535"),
    ("KVBM_METRICS_HOST", "http://here", "an address or a host's name"),
    ("DYN_KVBM_CACHE_STATS_MAX_REQUESTS", "0", "a whole number of requests from 1 to 1000000"),
    ("DYN_KVBM_CACHE_STATS_LOG_INTERVAL_SECS", "-1", "a number of seconds from 0 to 86400"),
    ("KVBM_TRANSFER_TIMEOUT_SECONDS", "never", "a number of seconds from 0.01 to 3600"),
]


@pytest.mark.parametrize(("variable", "value", "allowed"), BAD)
def test_a_bad_value_is_refused_with_its_name_and_what_is_allowed(
    variable: str, value: str, allowed: str
) -> None:
    with pytest.raises(SettingError) as refused:
        Settings.load({variable: value})
    assert refused.value.name == variable
    assert variable in str(refused.value)
    assert repr(value) in str(refused.value)
    assert allowed in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_setting_has_a_bad_value_in_these_tests() -> None:
    assert {variable for variable, _, _ in BAD} == {one.variable for one in TABLE.values()}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cpu_cache_gb", True),
        ("cpu_cache_gb", [1]),
        ("cpu_cache_override_num_blocks", 1.5),
        ("cpu_cache_override_num_blocks", 10**400),
        ("namespace", 5),
        ("nats_url", ["nats://a"]),
        ("nats_credentials", 1),
        ("verify", 2),
        ("verify", []),
        ("wire", {}),
        ("lookup_deadline_seconds", 20),
        ("staging_deadline_seconds", 200),
        ("disk_cache_dir", 5),
        ("disk_cache_dir", "a\0b"),
        ("host_cache_dir", False),
        ("disk_backend", ["POSIX"]),
        ("metrics_host", 127),
        ("metrics_port", 1.5),
    ],
)
def test_the_connector_config_is_checked_by_type_too(field: str, value: object) -> None:
    with pytest.raises(SettingError, match=field):
        Settings.load({}, {field: value})


def test_an_unknown_key_of_the_connector_config_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(SettingError, match=r"cpu_cache_bg.*cpu_cache_gb"):
        Settings.load({}, {"cpu_cache_bg": 4})


def test_a_setting_given_under_both_of_its_names_is_refused() -> None:
    with pytest.raises(SettingError, match="says it already"):
        Settings.load({}, {"KVBM_WIRE": "json", "wire": "msgpack"})


def test_a_mistyped_variable_is_warned_about_once_with_the_nearest_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    environ = {"DYN_KVBM_CPU_CACHE_BG": "4", "KVBM_NATS_URI": "x", "PATH": "/bin", "KVBMX": ""}
    with caplog.at_level(logging.WARNING):
        Settings.load(environ)
        Settings.load(environ)
    lines = caplog.messages
    assert len(lines) == 2
    assert any(re.search("CPU_CACHE_BG .*DYN_KVBM_CPU_CACHE_GB", line) for line in lines)
    assert any(re.search("NATS_URI .*KVBM_NATS_URL", line) for line in lines)


def test_the_guides_other_names_are_said_to_be_unused_and_are_no_typos(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        Settings.load(dict.fromkeys(GUIDES_UNUSED, "1"), {"DYN_KVBM_NCCL_MLA_MODE": 1})
    assert sorted(line.split()[0] for line in caplog.messages) == sorted(
        [*GUIDES_UNUSED, "DYN_KVBM_NCCL_MLA_MODE"]
    )
    reason = re.compile(r"is set, but not used yet in this version: \w+ .+")
    assert all(reason.search(line) for line in caplog.messages)


def test_a_variable_of_the_compose_file_is_no_typo_to_an_engine() -> None:
    named = re.findall(r"\$\{(KVBM_\w+)", COMPOSE.read_text())
    assert "KVBM_BIND_ADDRESS" in named
    resolved = resolve([Layer(Source.ENVIRONMENT, dict.fromkeys(named, "10.0.0.1"))])
    assert resolved.notices == []


def test_the_readme_lists_every_setting_with_its_default_and_meaning() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for field, setting in TABLE.items():
        value = setting.kind.show(getattr(Settings(), field))
        shown = str(value).lower() if isinstance(value, bool) else str(value) or "–"
        assert f"| `{setting.variable}` | {shown} | {setting.meaning} |" in readme


def test_no_name_is_both_a_setting_and_unused() -> None:
    assert not set(NOT_USED_YET) & {setting.variable for setting in TABLE.values()}


def test_a_server_without_scheme_gets_one_and_several_stay_several() -> None:
    settings = Settings.load({"KVBM_NATS_URL": "one:4222, tls://two:4223 ,nats://[::1]:4222"})
    assert settings.nats_url == "nats://one:4222,tls://two:4223,nats://[::1]:4222"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("nats://user:secret@host:4222", "nats://user:****@host:4222"),
        ("nats://secret@host", "nats://****@host"),
        ("user:secret@host", "user:****@host"),
        ("nats://a:1,nats://u:secret@b:2", "nats://a:1,nats://u:****@b:2"),
        ("nats://user:se@cret@host", "nats://user:****@host"),
        ("nats://host:4222", "nats://host:4222"),
    ],
)
def test_passwords_and_tokens_are_masked(url: str, shown: str) -> None:
    assert mask_urls(url) == shown


def test_a_password_shows_neither_in_the_struct_nor_in_an_error() -> None:
    settings = Settings.load({"KVBM_NATS_URL": "nats://user:secret@host:4222"})
    assert settings.nats_url == "nats://user:secret@host:4222"
    assert "secret" not in repr(settings)
    for bad in ("nats://u:secret@h:99999", "u:sec,secret@h:0", "http://secret@h"):
        with pytest.raises(SettingError) as refused:
            Settings.load({"KVBM_NATS_URL": bad})
        assert "secret" not in str(refused.value)


def test_a_credentials_file_is_accepted_when_it_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "node.creds"
    file.write_text("x")
    assert Settings.load({"KVBM_NATS_CREDENTIALS": str(file)}).nats_credentials == str(file)


MB = 1_000_000


def test_each_of_the_guides_three_options_gives_the_tiers_it_names() -> None:
    cpu, disk = {"DYN_KVBM_CPU_CACHE_GB": "4"}, {"DYN_KVBM_DISK_CACHE_GB": "8"}
    assert tier_slots(Settings.load(cpu), MB) == TierSlots(host=4000, disk=0)
    assert tier_slots(Settings.load(cpu | disk), MB) == TierSlots(host=4000, disk=8000)
    assert tier_slots(Settings.load(disk), MB) == TierSlots(host=0, disk=8000)
    assert [Settings.load(one).disk_only for one in (cpu, cpu | disk, disk)] == [False, False, True]


def test_sizes_are_decimal_gigabytes_over_all_ranks_and_may_be_fractions() -> None:
    assert tier_slots(Settings(cpu_cache_gb=0.5, disk_cache_gb=0.75), MB) == (500, 750)
    assert tier_slots(Settings(cpu_cache_gb=0.0015), MB) == (1, 0)
    assert tier_slots(Settings(disk_cache_gb=0.1), 100 * MB) == (0, 1)


def test_a_number_of_blocks_wins_over_gigabytes() -> None:
    settings = Settings(
        cpu_cache_gb=4,
        cpu_cache_override_num_blocks=7,
        disk_cache_gb=0.000001,
        disk_cache_override_num_blocks=9,
    )
    assert tier_slots(settings, MB) == (7, 9)
    assert tier_slots(Settings(disk_cache_override_num_blocks=9), MB) == (0, 9)
    assert Settings(disk_cache_override_num_blocks=9).disk_only


def test_no_tier_at_all_is_refused_and_all_four_variables_are_named() -> None:
    with pytest.raises(SettingError) as refused:
        tier_slots(Settings(), MB)
    for field in ("cpu_cache_gb", "disk_cache_gb"):
        assert TABLE[field].variable in str(refused.value)
    for field in ("cpu_cache_override_num_blocks", "disk_cache_override_num_blocks"):
        assert TABLE[field].variable in str(refused.value)


@pytest.mark.parametrize("field", ["cpu_cache_gb", "disk_cache_gb"])
def test_a_tier_smaller_than_a_block_is_refused_with_the_least_it_takes(field: str) -> None:
    settings = Settings(**{"cpu_cache_gb": 4, "disk_cache_gb": 4, field: 0.001})
    with pytest.raises(SettingError, match="2000000 bytes") as refused:
        tier_slots(settings, 2 * MB)
    assert refused.value.name == TABLE[field].variable
    assert "at least 0.002," in str(refused.value)


@pytest.mark.parametrize("field", ["cpu_cache_gb", "disk_cache_gb"])
def test_more_blocks_than_a_slot_number_can_count_are_refused(field: str) -> None:
    with pytest.raises(SettingError, match=str(MAX_SLOTS)) as refused:
        tier_slots(Settings(**{field: 1_000_000}), 1)
    assert refused.value.name == TABLE[field].variable


@pytest.mark.parametrize("word", ["none", "NONE", " none "])
def test_the_host_tier_may_be_private_memory(word: str) -> None:
    assert Settings.load({"KVBM_HOST_CACHE_DIR": word}).host_cache_dir == ""
    assert TABLE["host_cache_dir"].kind.show("") == "none"


def test_a_directory_need_not_be_there_yet_and_becomes_a_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"DYN_KVBM_DISK_CACHE_DIR": "a/b", "KVBM_HOST_CACHE_DIR": str(tmp_path)}
    settings = Settings.load(given)
    assert settings.disk_cache_dir == str(tmp_path / "a" / "b")
    assert settings.host_cache_dir == str(tmp_path)


def test_a_credentials_file_in_the_present_folder_becomes_a_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "node.creds").write_text("x")
    monkeypatch.chdir(tmp_path)
    credentials = Settings.load({"KVBM_NATS_CREDENTIALS": "node.creds"}).nats_credentials
    assert credentials == str(tmp_path / "node.creds")

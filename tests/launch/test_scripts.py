"""The launch scripts, with something light in place of engines."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from deploy.launch.plan import free_ports
from tests.launch.script import SCRIPTS, Script, ask, nobody_listens, running
from tests.patience import until

NAMES = ("agg_kvbm.sh", "disagg_kvbm.sh", "disagg_kvbm_2p2d.sh")
START_SECONDS = 90.0

Run = Callable[..., AbstractContextManager[Script]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a script whose vLLM is a fake one, and keeps its logs in `logs`."""
    package = tmp_path / "python" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, *package.parents[:2]):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(Path(__file__).with_name("fake_vllm.py").read_text())
    paths = [str(tmp_path / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}

    def start(name: str, model: str = "good") -> AbstractContextManager[Script]:
        arguments = ("--connector", "none", "--model", str(tmp_path / model))
        arguments += ("--port", str(free_ports(1)[0]), "--logs", str(tmp_path / "logs"))
        return running(name, *arguments, folder=tmp_path, environment=environment)

    return start


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_can_be_chosen(name: str) -> None:
    said = subprocess.run([SCRIPTS / name, "--help"], capture_output=True, text=True, check=True)
    assert said.stdout.startswith(f"usage: {name}")
    for word in ("DYN_KVBM_CPU_CACHE_GB", "DYN_KVBM_METRICS", "CUDA_VISIBLE_DEVICES", "MODEL"):
        assert word in said.stdout


@pytest.mark.parametrize("name", [*NAMES, "engines.sh"])
def test_the_shell_understands_every_script(name: str) -> None:
    subprocess.run(["bash", "-n", SCRIPTS / name], check=True)


def test_what_is_started_answers_on_one_port_and_ends_with_the_script(run: Run) -> None:
    with run("disagg_kvbm_2p2d.sh") as script:
        script.wait_until_ready(START_SECONDS)
        assert list(script.engines) == ["prefill-1", "prefill-2", "decode-1", "decode-2"]
        url = f"http://127.0.0.1:{script.port}"
        answer = json.loads(ask(url, "/v1/completions", {"model": "good", "prompt": "a"}))
        assert answer["said_by"] in script.engines.values()
        assert f"curl localhost:{script.port}/v1/chat/completions" in script.said
        assert script.stop() == 0
        assert script.processes() == []
        assert nobody_listens(int(script.port))


def test_what_does_not_want_to_end_is_ended_by_a_second_ctrl_c(run: Run) -> None:
    with run("agg_kvbm.sh", "stubborn") as script:
        script.wait_until_ready(START_SECONDS)
        script.process.send_signal(signal.SIGINT)
        until(lambda: "waiting for engine-1 to end" in script.said, script)
        assert script.stop(signal.SIGINT) == 0
        assert script.processes() == []


def test_an_engine_that_ends_at_start_is_told_and_nothing_stays(run: Run) -> None:
    with run("disagg_kvbm.sh", "broken") as script:
        assert script.wait_until_ended() == 1
        assert "has ended with status 3" in script.said
        assert "RuntimeError: the weights are torn" in script.said
        assert script.processes() == []


def test_the_others_go_on_when_an_engine_dies_and_all_end_with_the_last(run: Run) -> None:
    with run("disagg_kvbm.sh") as script:
        script.wait_until_ready(START_SECONDS)
        first, second = (pid_of(script, name) for name in ("prefill-1", "decode-1"))
        os.kill(first, signal.SIGKILL)
        until(lambda: "the others go on" in script.said, script)
        os.kill(second, signal.SIGKILL)
        assert script.wait_until_ended() == 1
        assert script.processes() == []


def test_a_script_that_is_killed_takes_everything_along(run: Run) -> None:
    with run("disagg_kvbm.sh") as script:
        script.wait_until_ready(START_SECONDS)
        script.process.kill()
        script.wait_until_ended()
        until(lambda: not script.processes(), script)


def test_a_port_that_is_taken_is_said_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with running("agg_kvbm.sh", "--port", port, folder=tmp_path) as script:
            assert script.wait_until_ended() == 1
            assert f"port {port} is in use" in script.said


def pid_of(script: Script, name: str) -> int:
    """The engine's process."""
    port = script.engines[name].rpartition(":")[2]
    for process in script.processes():
        command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        if port.encode() in command and b"vllm.entrypoints.openai.api_server" in command:
            return process
    raise AssertionError(f"{name} does not run")

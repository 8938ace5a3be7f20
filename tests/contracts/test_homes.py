"""Directories with one owner each: real processes, real locks, real deaths."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbm_schemas.subjects import Scope
from kvbm_service.adapters import homes
from kvbm_service.adapters.homes import Home, begin_generation, generation, make_room, root_of
from kvbm_service.errors import LayoutError

SCOPE = Scope("tests", "f00d")
OTHER = Scope("tests", "cafe")
SETTING = "DYN_KVBM_DISK_CACHE_DIR"

CLAIM = """
import sys
from pathlib import Path
from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.homes import Home
root, instance, repeats = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(repeats) - 1):
    Home.claim(Path(root), Scope("tests", "f00d"), instance, "X").close()
home = Home.claim(Path(root), Scope("tests", "f00d"), instance, "X")
print(home.path, flush=True)
"""
WAIT = "sys.stdin.readline()"
FORK = """
import os, time
if os.fork() == 0:
    print("the child lives", flush=True)
    sys.stdin.readline()
    home.close()
    print("the child has closed it", flush=True)
    sys.stdin.readline()
else:
    time.sleep(3600)
"""


class Claimant:
    """A process that claims a home when told to, and lives in it until it is killed."""

    def __init__(self, root: Path, instance: str, repeats: int = 1, and_then: str = WAIT) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLAIM + and_then, str(root), instance, str(repeats)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        self._said, self._stdin = self._process.stdout, self._process.stdin
        self.hear("ready")

    def begin(self) -> None:
        self._stdin.write("\n")
        self._stdin.flush()

    def home(self) -> Path:
        return Path(self._said.readline().strip())

    def hear(self, words: str) -> None:
        assert self._said.readline() == f"{words}\n"

    def kill(self, *, hang_up: bool = True) -> None:
        self._process.kill()
        self._process.wait()
        if hang_up:
            self.hang_up()

    def hang_up(self) -> None:
        """What the process has forked ends now, too."""
        self._said.close()
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()


@pytest.fixture
def claimants() -> Iterator[list[Claimant]]:
    made: list[Claimant] = []
    yield made
    for claimant in made:
        claimant.kill()


def claim(root: Path, instance: str, scope: Scope = SCOPE) -> Home:
    return Home.claim(root, scope, instance, SETTING)


def test_ranks_of_one_engine_share_a_home_and_another_engine_gets_its_own(tmp_path: Path) -> None:
    ranks = [claim(tmp_path, "a") for _ in range(3)]
    assert {rank.path for rank in ranks} == {tmp_path / "kvbm-tests-f00d" / "0"}
    assert claim(tmp_path, "b").path.name == "1"
    assert claim(tmp_path, "a").path.name == "0"
    assert root_of(ranks[0].path) == tmp_path


def test_an_engine_that_starts_beside_what_is_left_of_an_earlier_one_says_that_it_starts_empty(
    tmp_path: Path, claimants: list[Claimant], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvbm_service")
    lingering = Claimant(tmp_path, "earlier")
    claimants.append(lingering)
    lingering.begin()
    lingering.home()
    claim(tmp_path, "later")
    claim(tmp_path, "later")  # its other rank
    assert caplog.text.count("f00d/1 starts empty: 1 other engine(s)") == 1


def test_engines_of_different_scopes_do_not_meet(tmp_path: Path) -> None:
    one, other = claim(tmp_path, "a"), claim(tmp_path, "b", OTHER)
    assert one.path.parent != other.path.parent
    assert one.path.name == other.path.name == "0"


def test_a_home_is_taken_as_long_as_one_rank_lives_there(tmp_path: Path) -> None:
    first, second = claim(tmp_path, "a"), claim(tmp_path, "a")
    first.close()
    first.close()
    assert claim(tmp_path, "b").path.name == "1"
    second.close()
    assert claim(tmp_path, "c").path.name == "0"


def test_a_restarted_engine_finds_what_the_last_one_left(tmp_path: Path) -> None:
    before = claim(tmp_path, "a")
    neighbour = claim(tmp_path, "b")
    (neighbour.path / "kept").write_text("treasure")
    before.close()
    neighbour.close()
    make_room(tmp_path, lambda: not before.path.exists())
    after = claim(tmp_path, "c")
    assert (after.path / "kept").read_text() == "treasure"


def test_the_lowest_of_several_free_homes_is_taken(tmp_path: Path) -> None:
    for home in [claim(tmp_path, name) for name in "abc"]:
        home.close()
    assert [claim(tmp_path, name).path.name for name in "de"] == ["0", "1"]


def test_a_home_is_free_at_once_when_its_engine_is_killed(
    tmp_path: Path, claimants: list[Claimant]
) -> None:
    engine = Claimant(tmp_path, "a")
    claimants.append(engine)
    engine.begin()
    home = engine.home()
    assert claim(tmp_path, "b").path != home
    engine.kill()
    assert claim(tmp_path, "c").path == home


def test_many_processes_at_once_never_mix_engines_nor_split_one(
    tmp_path: Path, claimants: list[Claimant]
) -> None:
    names = [f"engine-{number % 5}" for number in range(15)]
    claimants.extend(Claimant(tmp_path, name) for name in names)
    for claimant in claimants:
        claimant.begin()
    engines_in, homes_of = defaultdict(set), defaultdict(set)
    for name, claimant in zip(names, claimants, strict=True):
        home = claimant.home()
        engines_in[home].add(name)
        homes_of[name].add(home)
    assert all(len(found) == 1 for found in engines_in.values())
    assert all(len(found) == 1 for found in homes_of.values())
    assert {home.name for home in engines_in} == set("01234")


def test_processes_that_come_and_go_while_others_claim_leave_no_two_engines_in_a_home(
    tmp_path: Path, claimants: list[Claimant]
) -> None:
    claimants.extend(Claimant(tmp_path, f"engine-{n}", repeats=50) for n in range(6))
    for claimant in claimants:
        claimant.begin()
    assert len({claimant.home() for claimant in claimants}) == 6


def test_a_child_that_outlives_its_parent_does_not_keep_the_home(
    tmp_path: Path, claimants: list[Claimant]
) -> None:
    parent = Claimant(tmp_path, "a", and_then=FORK)
    claimants.append(parent)
    parent.begin()
    home = parent.home()
    parent.hear("the child lives")
    assert claim(tmp_path, "b").path != home
    parent.kill(hang_up=False)
    try:
        assert claim(tmp_path, "c").path == home
    finally:
        parent.hang_up()


def test_a_child_that_closes_its_parents_home_does_not_open_it_to_others(
    tmp_path: Path, claimants: list[Claimant]
) -> None:
    parent = Claimant(tmp_path, "a", and_then=FORK)
    claimants.append(parent)
    parent.begin()
    home = parent.home()
    parent.hear("the child lives")
    parent.begin()
    parent.hear("the child has closed it")
    assert claim(tmp_path, "b").path != home


def test_nobody_else_can_look_into_a_home(tmp_path: Path) -> None:
    home = claim(tmp_path, "a")
    for path in (home.path, home.path.parent):
        assert path.stat().st_mode & 0o777 == 0o700
    assert (home.path / "owner").stat().st_mode & 0o777 == 0o600


def test_a_directory_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    street = tmp_path / "kvbm-tests-f00d"
    street.mkdir()
    street.chmod(0o777)
    with pytest.raises(LayoutError, match=SETTING):
        claim(tmp_path, "a")


def test_another_users_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(tmp_path, "a").close()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(LayoutError, match=SETTING):
        claim(tmp_path, "b")


def test_a_link_in_the_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (tmp_path / "kvbm-tests-f00d").symlink_to(elsewhere)
    with pytest.raises(LayoutError, match=SETTING):
        claim(tmp_path, "a")
    assert not list(elsewhere.iterdir())


def test_a_root_that_cannot_be_made_is_refused_with_the_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(LayoutError, match=SETTING):
            claim(root, "a")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(LayoutError, match=rf"no working file locks .*{SETTING}"):
        claim(tmp_path, "a")


def test_a_file_system_whose_locks_exclude_nobody_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with pytest.raises(LayoutError, match="exclude nobody"):
        claim(tmp_path, "a")


def test_a_process_that_stops_while_it_looks_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(homes, "CLAIM_SECONDS", 0.1)
    claim(tmp_path, "a").close()
    with (tmp_path / "kvbm-tests-f00d" / "claims").open("r+") as stuck:
        fcntl.flock(stuck, fcntl.LOCK_EX)
        with pytest.raises(LayoutError, match="another process has held"):
            claim(tmp_path, "b")
    claim(tmp_path, "b")


def test_the_engine_that_finds_every_home_taken_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(homes, "MAX_HOMES", 2)
    first = claim(tmp_path, "a")
    second = claim(tmp_path, "b")
    with pytest.raises(LayoutError, match="2 engines live"):
        claim(tmp_path, "c")
    first.close()
    assert claim(tmp_path, "c").path == first.path
    second.close()


def test_room_is_made_by_removing_the_homes_that_were_left_longest_ago(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = [claim(tmp_path, str(n), scope) for n, scope in enumerate([SCOPE, OTHER, SCOPE])]
    lived_in = claim(tmp_path, "alive", OTHER)
    for age, home in enumerate(left):
        (home.path / "slab").write_bytes(bytes(100))
        home.close()
        os.utime(home.path / "owner", (age, age))

    assert make_room(tmp_path, lambda: not left[1].path.exists())

    assert [home.path.exists() for home in left] == [False, False, True]
    assert [record.message.split()[1] for record in caplog.records] == [
        str(home.path) for home in left[:2]
    ]
    assert not make_room(tmp_path, lambda: False)
    assert lived_in.path.exists()
    assert not left[2].path.exists()


def test_a_home_that_someone_moves_into_while_room_is_made_stays(tmp_path: Path) -> None:
    claim(tmp_path, "a").close()

    def never_and_someone_comes() -> bool:
        claim(tmp_path, "b")
        return False

    (tmp_path / "kvbm-tests-f00d" / "0" / "old").touch()
    assert not make_room(tmp_path, never_and_someone_comes)
    assert (tmp_path / "kvbm-tests-f00d" / "0" / "old").exists()


def test_making_room_removes_nothing_that_is_not_a_home_of_ours(tmp_path: Path) -> None:
    claim(tmp_path, "a").close()
    others = [tmp_path / "kvbm-notes-2024", tmp_path / "data", tmp_path / "kvbm-tests-f00d" / "x"]
    for path in others:
        path.mkdir()
        (path / "file").write_text("")
    shared = tmp_path / "kvbm-tests-open"
    (shared / "0").mkdir(parents=True)
    shared.chmod(0o777)
    assert not make_room(tmp_path, lambda: False)
    assert all((path / "file").exists() for path in others)
    assert (shared / "0").exists()


def test_after_a_reset_no_home_of_the_scope_is_believed_whoever_lives_in_it(tmp_path: Path) -> None:
    ours, others = (Home.claim(tmp_path, SCOPE, life, "A_SETTING") for life in ("ours", "others"))
    elsewhere = Home.claim(tmp_path, Scope("default", "another"), "theirs", "A_SETTING")
    before = [generation(home.path) for home in (ours, others, elsewhere)]
    begin_generation(tmp_path, SCOPE)
    begin_generation(tmp_path, Scope("default", "that nobody has"))
    after = [generation(home.path) for home in (ours, others, elsewhere)]
    assert after[0] == after[1]
    assert after[0] != before[0]
    assert after[2] == before[2]
    for home in (ours, others, elsewhere):
        home.close()
    assert Home.claim(tmp_path, SCOPE, "next", "A_SETTING").path == ours.path

"""Who has a piece of work: one of all that live, by nobody's clock but one's own."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc_ddpm.workers import claims, owner
from hpc_ddpm.workers.claims import Writer, look_at_claims
from hpc_ddpm.workers.owner import Owner, this_process
from hpc_ddpm.workers.sole import sole_owner
from tests.conftest import Stranger

Strangers = Callable[..., Stranger]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / ".state"


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a busy machine keeps this process waiting, it counts as two heartbeats."""
    monkeypatch.setattr(owner, "LEASE_S", 0.3)
    monkeypatch.setattr(owner, "HEARTBEAT_S", 0.02)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def takes(writer: Writer, unit: str = "unit") -> bool:
    with writer.claim(unit) as is_ours:
        return is_ours


def test_a_claim_has_one_owner(state: Path) -> None:
    with Writer(state, "p") as one, Writer(state, "p") as two:
        with one.claim("unit") as first, two.claim("unit") as second:
            assert (first, second) == (True, False)
        assert takes(two)
        assert one.others() == [two.owner]
    assert not list(state.glob("writers/*"))


@pytest.mark.parametrize("ahead_s", [0.0, -180.0, 180.0])
def test_who_is_heard_keeps_its_claim_whatever_its_clock_says(
    state: Path, stranger: Strangers, short_lease: None, ahead_s: float
) -> None:
    other = stranger(state, ahead_s=ahead_s)
    with Writer(state, "p") as writer:
        wait_until(writer.has_heard_all)
        end = time.monotonic() + 3 * owner.LEASE_S
        while time.monotonic() < end:
            assert not takes(writer)
            time.sleep(0.05)
        other.die()
        wait_until(lambda: takes(writer))
        assert not writer.others()
    assert not other.folder.exists()


def test_a_clock_that_runs_backwards_is_heard(state: Path, stranger: Strangers, short_lease: None) -> None:
    other = stranger(state, beat_s=1e9)
    with Writer(state, "p") as writer:
        for second in range(30, 0, -1):
            os.utime(other.folder / "owner.json", (second, second))
            assert not takes(writer)
            time.sleep(0.02)


def test_storage_that_does_not_answer_kills_nobody(
    state: Path, stranger: Strangers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody could write a heartbeat in an hour that this process spent waiting for the file system, either."""
    stranger(state, beat_s=1e9)
    now = time.monotonic()
    with Writer(state, "p") as writer:
        monkeypatch.setattr(time, "monotonic", lambda: now + 3600)
        assert not takes(writer)
        monkeypatch.undo()


@pytest.mark.parametrize("changes", [{"pid": 1, "started": "0"}, {"pid": 2**22 + 1}])
def test_the_dead_of_this_machine_are_known_at_once(state: Path, stranger: Strangers, changes: dict[str, Any]) -> None:
    other, here = stranger(state, beat_s=1e9), this_process("p")
    Owner(**(here.__dict__ | changes)).write(other.folder)
    with Writer(state, "p") as writer:
        assert takes(writer)
    assert not other.folder.exists()


def test_another_machine_of_the_same_name_is_not_asked(state: Path, stranger: Strangers) -> None:
    other, here = stranger(state, beat_s=1e9), this_process("p")
    Owner(**(here.__dict__ | {"pid": 1, "started": "0", "namespace": "of another start of the system"})).write(
        other.folder
    )
    with Writer(state, "p") as writer:
        assert not takes(writer)


def test_one_inherits_from_the_dead(state: Path, stranger: Strangers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second takes over while the first, who has found the same dead one, is about to."""
    other, here = stranger(state, beat_s=1e9), this_process("p")
    Owner(**(here.__dict__ | {"pid": 1, "started": "0"})).write(other.folder)
    took: list[bool] = []
    with Writer(state, "p") as first, Writer(state, "p") as second, second.claim("something else"):
        look = Writer.look

        def look_and_be_overtaken(writer: Writer, name: str) -> Any:
            seen = look(writer, name)
            if writer is first and name == "n7-5" and not took:
                took.append(second._take("unit"))
            return seen

        monkeypatch.setattr(Writer, "look", look_and_be_overtaken)
        assert (first._take("unit"), took) == (False, [True])
        assert first.claimant("unit") == second.name


def test_many_inherit_at_once(state: Path, stranger: Strangers) -> None:
    other, here = stranger(state, beat_s=1e9), this_process("p")
    for _ in range(20):
        other.folder.mkdir(exist_ok=True)
        Owner(**(here.__dict__ | {"pid": 1, "started": "0"})).write(other.folder)
        other.link.unlink(missing_ok=True)
        writers = [Writer(state, "p") for _ in range(4)]
        for writer in writers:
            writer._join()
        other.link.symlink_to("n7-5")
        start, won = threading.Barrier(4), list[str]()

        def run(writer: Writer, start: threading.Barrier = start, won: list[str] = won) -> None:
            start.wait()
            if writer._take("unit"):
                won.append(writer.name)

        threads = [threading.Thread(target=run, args=(writer,)) for writer in writers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [str(other.link.readlink())]
        for writer in writers:
            writer.leave()


def test_a_heartbeat_is_renewed_and_one_who_was_buried_rises(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.02)
    with Writer(state, "p") as writer, writer.claim("unit"), writer.claim("more"):
        record = writer.scratch / "owner.json"
        os.utime(record, (0, 0))
        wait_until(lambda: record.stat().st_mtime > 0)
        record.unlink()
        writer.scratch.rmdir()
        (state / "claims" / "unit").unlink()
        wait_until(record.exists)
        wait_until(lambda: writer.lost == {"unit"})


def test_a_stale_handle_kills_nobody(state: Path, monkeypatch: pytest.MonkeyPatch, short_lease: None) -> None:
    """Neither the one who cannot renew its heartbeat, nor the one whose heartbeat cannot be read."""
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.02)
    utime, num_stale = os.utime, 0

    def stale(*arguments: Any) -> None:
        nonlocal num_stale
        num_stale += 1
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with Writer(state, "p") as one, Writer(state, "p") as two, one.claim("unit"):
        monkeypatch.setattr(os, "utime", stale)
        wait_until(lambda: num_stale > 3)
        monkeypatch.setattr(os, "utime", utime)
        beat = one.scratch / "owner.json"
        utime(beat, (0, 0))
        wait_until(lambda: beat.stat().st_mtime > 0)
        monkeypatch.setattr(owner, "read_owner", stale)
        assert not takes(two)


def test_no_symbolic_links(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and it works alone."""

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.warns(UserWarning, match="has no symbolic links") as said, sole_owner(state, "p", str) as sole:
        assert takes(sole._writer)
        sole.check()
    assert len(said) == 1
    assert not state.exists()


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[1]", '{"host": 1}', "\xff", json.dumps({"pid": "../x"})])
def test_a_damaged_record_keeps_its_claim_while_it_is_renewed(
    state: Path, stranger: Strangers, short_lease: None, text: str
) -> None:
    other = stranger(state)
    (other.folder / "owner.json").write_text(text, encoding="latin-1")
    with Writer(state, "p") as writer:
        wait_until(writer.has_heard_all)
        assert not takes(writer)
        assert [str(one) for one in writer.others()] == ["process 0 on a host that is not known"]
        other.die()
        wait_until(lambda: takes(writer))


@pytest.mark.parametrize("target", ["../../../outside", "", "a/b", "file"])
def test_a_claim_that_leads_nowhere_is_free(state: Path, tmp_path: Path, target: str) -> None:
    """Also one of a copied folder, whose links became files."""
    link = state / "claims" / "unit"
    link.parent.mkdir(parents=True)
    link.symlink_to(target) if target else link.write_text("file")
    with Writer(state, "p") as writer:
        assert takes(writer)


def test_people_see_who_works(state: Path, stranger: Strangers) -> None:
    assert look_at_claims(state) == ([], set())
    other = stranger(state)
    assert look_at_claims(state) == ([Owner("n7", "", 5, "1", "42", "other")], {"unit"})
    other.die()
    os.utime(other.folder / "owner.json", (0, 0))
    assert look_at_claims(state) == ([], set())

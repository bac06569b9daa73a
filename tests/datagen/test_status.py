"""The live view: what is written down while a run goes on, and what is read of it from another terminal."""

import json
import subprocess
import sys

import pytest

from datagen.status import Config, Status, line, main, table
from soul.errors import UserError

SNAPSHOT = {
    "rows": 0, "accepted": 0, "rejected": 0, "already_finished": 0, "sent": 0, "replayed": 0, "in_flight": {"teacher": 0},
    "limit": {"teacher": 32}, "spent_usd": 0.0, "outcomes": {}, "trouble": "",
}  # fmt: skip


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_rate_time_left_and_projected_cost(tmp_path):
    clock = Clock()
    status = Status(tmp_path, 100, clock=clock, wall=clock)
    status(SNAPSHOT | {"rows": 20, "already_finished": 20})  # a resumed run: what was there is no speed
    clock.now += 10
    shown = status(
        SNAPSHOT
        | {"rows": 40, "already_finished": 20, "accepted": 38, "rejected": 2, "sent": 90, "spent_usd": 0.5, "in_flight": {"teacher": 7}}
    )
    assert (shown["rows_per_s"], shown["minutes_left"], shown["projected_usd"]) == (2.0, 0.5, 2.0)
    assert line(shown) == "38 accepted, 2 rejected, 90 calls, 7/32 in flight, $0.50 of about $2.00"


def test_the_file_is_written_once_a_second_and_at_the_end(tmp_path):
    clock = Clock()
    status = Status(tmp_path, 9, clock=clock, wall=clock)
    for n in range(5):
        status(SNAPSHOT | {"rows": n})
        clock.now += 0.3
    assert json.loads((tmp_path / "status.json").read_text())["rows"] == 4  # at 0 s and at 1.2 s
    status(SNAPSHOT | {"rows": 9}, "done")
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"


def test_a_dead_run_is_told_from_a_living_one(tmp_path, capsys):
    clock = Clock()
    shown = Status(tmp_path, 9, clock=clock, wall=clock)(SNAPSHOT | {"outcomes": {"ok": 1200}, "trouble": "429: slow down"})
    rows = dict(table(shown, 103.0))
    assert rows["state"].startswith("running (pid ") and rows["outcomes"] == "ok 1,200" and rows["trouble"] == "429: slow down"
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert dict(table(shown | {"pid": child.pid}, 103.0))["state"].startswith("died")
    assert main(Config(tmp_path)) == 0 and "0 of 9" in capsys.readouterr().out


def test_a_directory_without_a_run(tmp_path):
    with pytest.raises(UserError, match="no run was started here"):
        main(Config(tmp_path))

"""`soulsmith status`: how a run stands, from another terminal."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from soul.console import output, plain
from soul.errors import UserError
from soul.files import read_json, write_json

FILE = "status.json"


@dataclass(frozen=True)
class Config:
    """Show how a run stands: rows, rate, calls in flight, money, outcomes."""

    run: tyro.conf.Positional[Path]
    """The run directory."""
    watch: bool = False
    """Show it again every two seconds, until the run ends."""


class Status:
    """Writes RUN/status.json, at most once a second; `clock` and `wall` are injected by tests."""

    def __init__(self, directory: Path, total: int, *, clock=time.monotonic, wall=time.time):
        self.path, self.total, self._clock, self._wall = directory / FILE, total, clock, wall
        self._began, self._written, self._first = clock(), -10.0, None

    def __call__(self, snapshot: dict, state: str = "running") -> dict:
        """The engine's snapshot with rate, minutes left and projected cost; `state` other than "running" is written at once."""
        now = self._clock()
        self._first = snapshot["rows"] if self._first is None else self._first
        fresh, seconds = snapshot["rows"] - snapshot["already_finished"], now - self._began
        rate = (snapshot["rows"] - self._first) / seconds if seconds > 0 else 0.0
        left = self.total - snapshot["rows"]
        spent = snapshot.get("spent_usd")
        shown = snapshot | {
            "state": state, "total": self.total, "rows_per_s": round(rate, 3), "minutes_left": round(left / rate / 60, 1) if rate else None,
            "projected_usd": round(spent * (1 + left / fresh), 4) if spent and fresh > 0 else spent,
            "pid": os.getpid(), "updated": self._wall(),
        }  # fmt: skip
        if state != "running" or now - self._written >= 1.0:
            write_json(self.path, shown)
            self._written = now
        return shown


def line(shown: dict) -> str:
    """One line for a progress bar."""
    parts = [f"{shown['accepted']:,} accepted, {shown['rejected']:,} rejected, {shown['sent']:,} calls"]
    parts.append(f"{sum(shown['in_flight'].values())}/{sum(shown['limit'].values())} in flight")
    if shown.get("spent_usd"):
        parts.append(f"${shown['spent_usd']:.2f} of about ${shown['projected_usd']:.2f}")
    return ", ".join(parts)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def table(shown: dict, now: float) -> list[tuple[str, str]]:
    state = shown["state"]
    if state in ("running", "draining") and not alive(shown["pid"]):
        state = "died; run the same command again to go on"
    rate = f"{shown['rows_per_s']:,.2f} rows/s" + (f", about {shown['minutes_left']:,.1f} min left" if shown["minutes_left"] else "")
    money = "unknown" if shown.get("spent_usd") is None else f"${shown['spent_usd']:.4f}, projected ${shown['projected_usd'] or 0:.4f}"
    outcomes = ", ".join(f"{name} {count:,}" for name, count in shown["outcomes"].items()) or "none yet"
    return [
        ("state", f"{state} (pid {shown['pid']}, {now - shown['updated']:,.0f} s ago)"),
        ("rows", f"{shown['rows']:,} of {shown['total']:,}: {shown['accepted']:,} accepted, {shown['rejected']:,} rejected"),
        ("rate", rate), ("calls", f"{shown['sent']:,} sent, {shown['replayed']:,} from the journal"),
        ("in flight", ", ".join(f"{role} {count} of {shown['limit'][role]}" for role, count in shown["in_flight"].items())),
        ("outcomes", outcomes), ("spent", money),
        *([("trouble", shown["trouble"])] if shown.get("trouble") else []),
    ]  # fmt: skip


def main(config: Config) -> int:
    while True:
        path = config.run / FILE
        if not path.is_file():
            raise UserError("no run was started here", where=config.run, fix="Give the --out of `soulsmith generate`.")
        shown = read_json(path)
        for name, text in table(shown, time.time()):
            output.print(plain(f"{name:<10} {text}"))
        if not config.watch or shown["state"] not in ("running", "draining") or not alive(shown["pid"]):
            return 0
        time.sleep(2)
        output.print("")

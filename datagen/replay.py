"""`soulsmith replay`: executes every call of every rollout again and compares the results byte for byte.

A data set of rollouts is only as good as its results are true: after an edit by hand, on another machine, or with another
version of the tools, this says which rows still hold.
"""

import difflib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro

from datagen.from_code import Step
from datagen.rollouts import scratch
from datagen.show import files_of
from soul import rows
from soul.console import output, plain, progress
from soul.conversation import arguments, calls_of, name_of
from soul.errors import UserError
from workspace.tools import REJECTED, require_sandbox

SHOWN = 10


@dataclass(frozen=True)
class Config:
    """Run the calls of rollouts again, each row in a fresh workspace made of its `files`; exit code 1 where a result differs."""

    dataset: tyro.conf.Positional[Path]
    """A Parquet file of rollouts, or a run directory."""
    workers: int = 0
    """Processes; 0 for one per core."""
    allow_unsafe: bool = False
    """Run the rows' commands even where there is no sandbox to run them in."""


def replay(row: dict) -> tuple[int, str]:
    """(calls executed, what differs or ""). A call that the person refused, or whose result is not in the row, is not executed."""
    calls, count = list(recorded_calls(row["messages"])), 0
    with scratch({file["path"]: file["content"] for file in row["files"]}, [Step("", name_of(call)) for call, _ in calls]) as workspace:
        for call, recorded in calls:
            if recorded == REJECTED:
                continue
            try:
                result = workspace.run(name_of(call), arguments(call))
            except (KeyError, TypeError, ValueError):
                return count, f"row {row['id']}: call {count + 1} is not a call"
            count += 1
            if result != recorded:
                lines = difflib.unified_diff(recorded.split("\n"), result.split("\n"), "recorded", "replayed", lineterm="", n=1)
                shown = "\n".join(f"  {line:.200}" for line in islice(lines, 2, 40))
                return count, f"row {row['id']}: {name_of(call)} {call['function']['arguments']:.300}\n{shown}"
    return count, ""


def recorded_calls(messages: list[dict]) -> Iterator[tuple[dict, str]]:
    """Each call with its result, where the row has it."""
    waiting = []
    for message in messages:
        if message["role"] != "tool":
            waiting = [*calls_of(message)]
        elif waiting:
            yield waiting.pop(0), message["content"]


def main(config: Config) -> int:
    """Run the command. Raises UserError when there is nothing to replay."""
    found = [row for path in files_of(config.dataset, rejected=False) for row in rows.read_rows(path)]
    found = [row | {"messages": row.get("messages") or row.get("prompt") or []} for row in found]
    found = [row for row in found if any(map(calls_of, row["messages"]))]
    if not found:
        raise UserError("holds no tool call", where=config.dataset)
    if any(name_of(call) == "Bash" for row in found for message in row["messages"] for call in calls_of(message)):
        require_sandbox(config.allow_unsafe)
    workers, count, bad = config.workers or len(os.sched_getaffinity(0)), 0, 0
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) if workers > 1 and len(found) > 200 else None
    with progress("replayed", len(found)) as update:
        for number, (calls, difference) in enumerate(pool.map(replay, found, chunksize=32) if pool else map(replay, found), 1):
            count, bad = count + calls, bad + bool(difference)
            if difference and bad <= SHOWN:
                output.print(plain(difference))
            update(number)
    if pool:
        pool.shutdown()
    output.print(plain(f"{len(found)} rows, {count} calls: " + (f"{bad} rows differ" if bad else "all the same")))
    return int(bad > 0)

"""`soulsmith show`: a dataset's rows, readable in a terminal. People look at data before they trust it."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from soul import rows
from soul.console import output, plain
from soul.conversation import arguments, calls_of, name_of
from soul.errors import UserError

STYLES = {"user": "bold cyan", "assistant": "bold green", "tool": "bold yellow", "system": "bold magenta"}
FILES = ("sft", "rollouts", "preference", "rollouts_preference", "docs")


@dataclass(frozen=True)
class Config:
    """Print rows of a dataset: request, draft, critique, revision, calls and results, checks, pairs."""

    dataset: tyro.conf.Positional[Path]
    """A Parquet file, or a run directory."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 5
    """How many rows of each file."""
    rejected: bool = False
    """Of a run directory, show the rows that were not accepted, with their reasons."""
    seed: int = 0
    """Which rows: the sample depends on this alone."""


def files_of(dataset: Path, rejected: bool) -> list[Path]:
    """The Parquet files to show. Raises UserError when there are none."""
    if not dataset.is_dir():
        return [dataset]
    names = ("rejected",) if rejected else FILES
    found = [path for name in names for folder in ("data", ".") if (path := dataset / folder / f"{name}.parquet").is_file()]
    if not found:
        what = "rejected rows" if rejected else "dataset"
        raise UserError(f"holds no {what}", where=dataset, fix="Give a Parquet file, or a run directory with data/ in it.")
    return found


def indented(text: str, style: str = "") -> Text:
    return plain("\n".join(f"  {line}" for line in text.split("\n")), style)


def message_lines(message: dict) -> Iterator[Text]:
    """One message: its role, its text, and each call with its arguments."""
    role = message["role"]
    yield plain(role, STYLES.get(role, ""))
    if message["content"]:
        yield indented(message["content"], "dim" if role == "tool" else "")
    for call in calls_of(message):
        yield plain(f"  {name_of(call)}", "bold blue")
        try:
            args = arguments(call)
        except ValueError:
            yield indented(f"  {call['function']['arguments']}", "red")
            continue
        for key, value in args.items():
            text = str(value)
            yield indented(f"  {key}:\n{text}".replace("\n", "\n    ") if "\n" in text else f"  {key}: {text}", "blue")


def check_lines(row: dict) -> Iterator[Text]:
    """What passed, by name, and each failure with the words that it is about."""
    failed = [check for check in row["checks"] if not check["ok"]]
    said = row.get("messages") or [*row.get("prompt", ()), *row.get("rejected", ())]
    if passed := sorted({check["principle"] for check in row["checks"]} - {check["principle"] for check in failed}):
        yield plain(f"passed: {', '.join(passed)}", "green")
    for check in failed:
        place, quote = check["message_index"], ""
        if place is not None and 0 <= place < len(said):
            quote = said[place]["content"][check["start"] or 0 : check["end"] or 0]
        at = f" at {quote[:80]!r}" if quote else ""
        yield plain(f"failed: {check['principle']} ({check['check']}): {check['why']}{at}", "red")


def row_lines(row: dict) -> Iterator[Text]:
    """A whole row, in the order in which it came about."""
    words = [row["id"] or "", row["source"], "" if row["accepted"] else "NOT ACCEPTED", row["reason"]]
    yield plain(" · ".join(word for word in words if word), "bold reverse")
    if row["files"]:
        yield plain(f"workspace: {', '.join(file['path'] for file in row['files'])}", "dim")
    for stage in row["trail"]:
        yield plain(f"[{stage['stage']}]", "bold magenta")
        yield indented(stage["text"] or "", "dim")
    if "chosen" in row:
        for side, style in (("prompt", "bold"), ("chosen", "bold green"), ("rejected", "bold red")):
            yield plain(f"── {side}", style)
            for message in row[side]:
                yield from message_lines(message)
    elif "text" in row:
        yield indented(row["text"])
    else:
        for message in row["messages"]:
            yield from message_lines(message)
    yield from check_lines(row)
    if row["principles"]:
        yield plain(f"principles touched: {', '.join(row['principles'])}", "dim")
    if row["served"]:
        yield plain(f"served by: {', '.join(row['served'])}", "dim")


def show(path: Path, n: int, seed: int, console: Console) -> None:
    """Print n rows of one file, drawn by `seed`, in file order. Raises UserError when it isn't a dataset."""
    found = rows.read_rows(path)
    chosen = sorted(random.Random(seed).sample(range(len(found)), min(n, len(found))))
    console.print(plain(f"{path}: {len(found)} {rows.kind_of(found)} rows, {len(chosen)} shown", "bold"))
    for index in chosen:
        console.print()
        for line in row_lines(found[index]):
            console.print(line, soft_wrap=True)


def main(config: Config) -> int:
    """Run the command. Raises UserError when there is nothing to show."""
    if config.n < 1:
        raise UserError("-n begins at 1")
    for path in files_of(config.dataset, config.rejected):
        show(path, config.n, config.seed, output)
    return 0

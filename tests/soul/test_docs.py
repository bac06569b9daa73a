"""The documentation agrees with the code: every check has its row, every command its name, its flags and values that it takes."""

import contextlib
import importlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import tyro

import soulsmith
from soul.checks import CHECKS
from soul.repairs import REPAIRS

ROOT = Path(__file__).resolve().parents[2]
HISTORY = {"log.md"}  # it says what was done, with the commands of then
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in HISTORY)]
FLAG = re.compile(r"(?<![\w-])--?[a-zA-Z][\w.-]*")


def code_blocks(text: str):
    """Lines of fenced and indented code, with continued lines joined."""
    fenced, lines = False, []
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line.strip())
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def commands(path: Path):
    """(where, words after `soulsmith`, whether in a code block) of every command that a page shows."""
    text = path.read_text(encoding="utf-8")
    for line in code_blocks(text):
        if match := re.match(r"(?:\$ )?(?:\.venv/bin/)?soulsmith (.+)", line):
            yield path.name, shlex.split(match[1], comments=True), True
        if match := re.match(r'make quickstart ARGS="(.*)"', line):
            yield path.name, ["quickstart", *shlex.split(match[1])], True
    for match in re.finditer(r"`(?:\.venv/bin/)?soulsmith ([a-z][^`]*)`", text):
        yield path.name, shlex.split(match[1]), False


def split(words: list[str]) -> tuple[str, list[str]]:
    name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in soulsmith.COMMANDS), "")
    assert name, f"no command `soulsmith {' '.join(words)}`"
    return name, words[len(name.split()) :]


@cache
def flags_of(name: str) -> set[str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        tyro.cli(importlib.import_module(soulsmith.COMMANDS[name][0]).Config, args=["--help"])
    return {*FLAG.findall(printed.getvalue()), "--config"}


@pytest.mark.parametrize("where, words, whole", [c for page in PAGES for c in commands(page)])
def test_a_documented_command_exists_and_takes_its_flags(where, words, whole):
    name, rest = split(words)
    unknown = {word.partition("=")[0] for word in rest if FLAG.match(word)} - flags_of(name)
    assert not unknown, f"{where}: soulsmith {name} has no {', '.join(sorted(unknown))}"
    if whole and not {"--config", "--help"} & set(rest):
        try:
            tyro.cli(importlib.import_module(soulsmith.COMMANDS[name][0]).Config, args=rest, console_outputs=False)
        except SystemExit:
            pytest.fail(f"{where}: `soulsmith {' '.join(words)}` cannot be parsed")


def test_pages_show_commands():
    shown = {split(words)[0] for page in PAGES for _, words, _ in commands(page)}
    assert shown == set(soulsmith.COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_flag_in_a_table_of_options_exists(page):
    """Rows like `| `--flag` | …` belong to some command that the page shows."""
    text = page.read_text(encoding="utf-8")
    named = {flag for row in re.findall(r"^\| (`--[^|]*)\|", text, re.MULTILINE) for flag in FLAG.findall(row)}
    known = set().union(*(flags_of(split(words)[0]) for _, words, _ in commands(page)), set())
    assert named <= known, f"{page.name}: no such option: {', '.join(sorted(named - known))}"


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_every_check_has_its_row(name):
    takes = CHECKS[name].takes
    call = f"{name}({', '.join(takes)})" if takes else name
    page = (ROOT / "docs" / "soul.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith(f"| `{call}` |")]
    assert len(rows) == 1, f"docs/soul.md needs one row that begins | `{call}` |"
    _, _, scope, doc, repaired, _ = (cell.strip() for cell in rows[0].split("|"))
    assert (scope, doc, repaired) == (CHECKS[name].scope, CHECKS[name].doc, "yes" if name in REPAIRS else "")


def test_no_row_is_about_a_check_that_is_gone():
    page = (ROOT / "docs" / "soul.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)[^`]*` \| (?:turn|each|final|conversation) \|", page, re.MULTILINE)
    assert sorted(rows) == sorted(CHECKS)

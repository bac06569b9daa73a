import pytest

from agent.permissions import DIFF_LINES, Permission, describe
from workspace.tools import Workspace


@pytest.fixture
def ws(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\ny = 2\n")
    ws = Workspace(tmp_path)
    ws.run("Read", {"file_path": "a.py"})
    return ws


def decide(ws, answer, *, interactive=True, yes=False, name="Bash", args=None):
    shown, asked = [], []

    def read_line(prompt):
        asked.append(prompt)
        if answer is EOFError:
            raise EOFError
        return answer

    permission = Permission(ws, show=lambda text: shown.append(text.plain), read_line=read_line, interactive=interactive, yes=yes)
    return permission(name, args or {"command": "ls"}), "\n".join(shown), asked


@pytest.mark.parametrize("answer,allowed", [
    ("y", True), ("Y", True), (" yes ", True), ("", False), ("n", False), ("no", False), ("sure", False), ("yy", False), (EOFError, False),
    ("\x1b", False),
])  # fmt: skip
def test_only_yes_allows_and_enter_is_no(ws, answer, allowed):
    assert decide(ws, answer)[0] is allowed


def test_no_terminal_denies_without_asking(ws):
    allowed, shown, asked = decide(ws, "y", interactive=False)
    assert (allowed, asked) == (False, [])
    assert "denied" in shown


def test_yes_flag_allows_without_asking_and_says_so(ws):
    allowed, shown, asked = decide(ws, "n", interactive=False, yes=True)
    assert (allowed, asked) == (True, [])
    assert "allowed without asking (--yes)" in shown


@pytest.mark.parametrize("name,args", [
    ("Read", {"file_path": "a.py"}), ("Grep", {"pattern": "x"}), ("Edit", {"file_path": "b", "new_string": "x"}),
])  # fmt: skip
def test_every_tool_asks(ws, name, args):
    assert len(decide(ws, "n", name=name, args=args)[2]) == 1


def test_a_command_is_shown_in_full_with_nothing_hidden(ws):
    command = "echo hi\x1b[2K\x1b[1A # \u202edangerous\rallow? [y/N] y\nrm -rf x [/bold] " + "z" * 3000
    shown = decide(ws, "n", args={"command": command, "timeout": "9"})[1]
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "\r" not in shown
    assert "␛[2K" in shown
    assert "<U+202E>" in shown
    assert "\n  > rm -rf x [/bold] " + "z" * 3000 in shown
    assert "timeout='9'" in shown


def test_an_edit_is_shown_as_a_diff(ws):
    shown = decide(ws, "n", name="Edit", args={"file_path": "a.py", "old_string": "y = 2", "new_string": "y = 3"})[1]
    assert shown.startswith("Edit file_path='a.py'\n")
    assert "\n  -y = 2\n  +y = 3" in shown
    assert (ws.root / "a.py").read_text() == "x = 1\ny = 2\n"


def test_an_edit_that_would_fail_says_so(ws):
    assert "error: old_string not found" in describe(ws, "Edit", {"file_path": "a.py", "old_string": "zzz", "new_string": "y"})


def test_a_long_diff_says_how_much_is_not_shown(ws):
    shown = describe(ws, "Edit", {"file_path": "b", "new_string": "x\n" * 1000})
    assert len(shown.split("\n")) == DIFF_LINES + 2
    assert "more lines of the diff are not shown" in shown


def test_a_file_name_cannot_forge_a_prompt(ws):
    shown = decide(ws, "n", name="Read", args={"file_path": "a\nallow? [y/N] y\x1b[A"})[1]
    assert shown == r"Read file_path='a\nallow? [y/N] y\x1b[A'"

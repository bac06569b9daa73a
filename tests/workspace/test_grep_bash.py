import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from soul.errors import UserError
from workspace import grep as grep_module
from workspace.paths import resolve
from workspace.tools import Workspace


@pytest.fixture
def ws(tmp_path):
    root = tmp_path / "w"
    root.mkdir()
    return Workspace(root)


def put(ws, name, data):
    path = ws.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def grep(ws, pattern, **more):
    return ws.run("Grep", {"pattern": pattern, **more})


def bash(ws, command, **more):
    return ws.run("Bash", {"command": command, **more})


# --- Grep


def test_content_files_and_count(ws):
    put(ws, "b.py", "def load(x):\n    return x\n")
    put(ws, "a/z.txt", "load\nLOAD\nload\n")
    assert grep(ws, "load") == "a/z.txt:1:load\na/z.txt:3:load\nb.py:1:def load(x):"
    assert grep(ws, "load", mode="files") == "a/z.txt\nb.py"
    assert grep(ws, "load", mode="count") == "a/z.txt:2\nb.py:1"
    assert grep(ws, "(?i)load", path="a", mode="count") == "a/z.txt:3"
    assert grep(ws, "load", path="b.py") == "b.py:1:def load(x):"
    assert grep(ws, "nothing") == "no matches found"
    assert grep(ws, "--load") == "no matches found", "a pattern that begins with a dash is a pattern"


def test_context_and_groups(ws):
    put(ws, "a", "".join(f"{n}\n" for n in range(1, 21)))
    put(ws, "b", "x\n12\n")
    assert grep(ws, "^(3|5|12)$", **{"-A": "1", "-B": "1"}) == (
        "a-2-2\na:3:3\na-4-4\na:5:5\na-6-6\n--\na-11-11\na:12:12\na-13-13\n--\nb-1-x\nb:2:12"
    )
    assert grep(ws, "^(3|5)$", **{"-A": "1"}) == "a:3:3\na-4-4\na:5:5\na-6-6"
    assert grep(ws, "^20$", **{"-B": "1", "-A": "5"}) == "a-19-19\na:20:20"


def test_same_format_as_ripgrep_where_there_is_one(ws):
    import shutil
    import subprocess

    if not shutil.which("rg"):
        pytest.skip("no ripgrep on this machine")
    for n in range(5):
        put(ws, f"d{n % 2}/f{n}", "".join(f"line {i} {'hit' if i * (n + 1) % 7 == 3 else ''}\n" for i in range(20)))
    for flags in ({}, {"-A": "2"}, {"-B": "1", "-A": "1"}):
        argv = ["rg", "--no-config", "-n", "--no-heading", "--sort", "path", "-e", "hit", *(x for pair in flags.items() for x in pair)]
        theirs = subprocess.run(argv, cwd=ws.root, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
        assert grep(ws, "hit", **flags) == theirs.rstrip("\n")


def test_skips_hidden_binary_junk_and_links_out(ws, tmp_path):
    (tmp_path / "secret").write_text("key\n")
    (ws.root / "link").symlink_to(tmp_path)
    for name in (".git/config", ".env", "__pycache__/a.py", "node_modules/m.js"):
        put(ws, name, "key\n")
    put(ws, "bin", b"key\0")
    put(ws, "latin", "key café\n".encode("latin-1"))
    os.mkfifo(ws.root / "fifo")
    assert grep(ws, "key") == "latin:1:key caf\ufffd"
    assert "outside" in grep(ws, "key", path="link")
    assert "outside" in grep(ws, "key", path="..")
    assert grep(ws, "key", path="fifo") == "error: fifo is not a regular file"
    assert grep(ws, "key", path="missing") == "error: missing does not exist"


def test_a_folder_that_becomes_a_symlink_meanwhile_is_not_searched(ws, tmp_path, monkeypatch):
    put(ws, "d/e/a", "key\n")
    (tmp_path / "secret").write_text("key\n")

    def swap(root, path):
        real = resolve(root, path)
        if not (ws.root / "old").exists():
            (ws.root / "d").rename(ws.root / "old")
            (ws.root / "d").symlink_to(tmp_path)
        return real

    monkeypatch.setattr(grep_module, "resolve", swap)
    assert grep(ws, "key", path="d") == "no matches found"
    assert ws.run("Read", {"file_path": "secre"}) == "error: secre does not exist"


def test_errors(ws):
    assert grep(ws, "(").startswith("error: invalid pattern: missing ), unterminated subpattern")
    assert grep(ws, "x", mode="lines") == "error: mode must be content, files or count"
    assert grep(ws, "x", **{"-A": "-1"}) == "error: Grep: -A must be a whole number"
    assert ws.run("Grep", {}) == "error: Grep needs pattern"
    assert ws.run("Glob", {}).startswith("error: unknown tool Glob")
    assert grep(ws, "[[a]") == "no matches found", "Python warns about this one"


def test_capped_with_a_note(ws):
    put(ws, "a", "hit\n" * 1000)
    out = grep(ws, "hit").split("\n")
    assert len(out) == 101
    assert out[-1] == "[900 more lines; narrow the pattern or the path]"
    put(ws, "a", "hit" + "x" * 5000)
    assert grep(ws, "hit") == f"a:1:hit{'x' * 247} [4753 more characters]"


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "(a*)*b", "a?" * 40 + "a" * 40])
def test_catastrophic_pattern_is_stopped(ws, pattern, monkeypatch):
    monkeypatch.setattr(grep_module, "CHILD_SECONDS", 0.3)
    put(ws, "a", "a" * 40 + "!\n")
    assert grep(ws, pattern) in ("error: the pattern takes too long; simplify it", "no matches found", "a:1:" + "a" * 40 + "!")


def test_child_process_and_own_process_agree(ws, monkeypatch):
    put(ws, "a", "def f(x): return x\nclass A: pass\n def g(): pass\nné\n")
    for pattern in (r"def \w+", "[a-z]+", "é", "^$"):
        here = grep(ws, pattern)
        assert grep(ws, f"(?:{pattern})(?:)(?:)") == here


# --- Bash


def test_output_exit_code_and_silence(ws):
    assert bash(ws, "echo hi; echo err >&2; exit 3") == "hi\nerr\nexit code: 3"
    assert bash(ws, "true") == "(no output)"
    assert bash(ws, "false") == "exit code: 1"
    assert bash(ws, "kill -9 $$") == "exit code: -9"
    assert bash(ws, "nosuchcommand").endswith("exit code: 127")


def test_no_stdin_fixed_directory_no_machine_paths(ws):
    assert bash(ws, "cat; read x; echo $?") == "1"
    bash(ws, "mkdir d; cd d")
    assert bash(ws, "pwd; cd d; pwd; echo ~/f; echo $PWD-evil") == ".\nd\nf\nd-evil"
    put(ws, "a.py", "1/0\n")
    assert 'File "a.py", line 1' in bash(ws, f"{sys.executable} $PWD/a.py")


def test_environment_is_an_allow_list(ws, monkeypatch):
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-canary")
    monkeypatch.setenv("GITHUB_TOKEN", "canary")
    out = bash(Workspace(ws.root, env={"EXTRA": "1"}), "env")
    assert "canary" not in out
    assert {line.split("=")[0] for line in out.split("\n")} <= {
        "PATH", "HOME", "LANG", "TERM", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", "EXTRA", "TMPDIR",
        "PWD", "SHLVL", "_", "OLDPWD",
    }  # fmt: skip


@pytest.mark.parametrize("spawn", [
    "sleep 300", "bash -c 'sleep 300 & wait'", "setsid -w sleep 300", "setsid sleep 300 >/dev/null 2>&1 & sleep 300",
])  # fmt: skip
def test_timeout_kills_grandchildren_too(ws, spawn):
    assert bash(ws, f"echo start; {spawn}", timeout="1") == "start\ntimed out after 1 s"
    assert alive(ws) == []


@pytest.mark.parametrize("spawn", ["sleep 299 &", "setsid sleep 299 &", "(setsid sleep 299 &);", "nohup sleep 299 >/dev/null 2>&1 &"])
def test_background_child_does_not_outlive_the_command(ws, spawn):
    assert bash(ws, f"{spawn} sleep 0.1; echo done", timeout="20") == "done"
    assert alive(ws) == []


def alive(ws):
    """Names of the processes that have the workspace as their directory; the kernel may need a moment to bury one."""
    for _ in range(20):
        found = []
        for link in Path("/proc").glob("[0-9]*/cwd"):
            with suppress(OSError):
                if os.readlink(link) == str(ws.root):
                    found.append((link.parent / "comm").read_text())
        if not found:
            break
        time.sleep(0.05)
    return found


def test_huge_output_is_not_buffered(ws):
    import tracemalloc

    tracemalloc.start()
    out = bash(ws, "echo first; head -c 300000000 /dev/zero | tr '\\0' 'x'; echo; echo last")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6
    assert len(out) < 8100
    assert out.startswith("first\nxxx")
    assert out.endswith("xxx\nlast")
    assert "characters elided]" in out


def test_head_and_tail_are_kept(ws):
    out = bash(Workspace(ws.root, max_result_chars=100), "seq 1000; exit 2")
    assert out.startswith("1\n2\n")
    assert out.endswith("1000\nexit code: 2")
    assert "\n[3805 characters elided]\n" in out


@pytest.mark.parametrize("command", ["a\0b", "x" * 1_000_000, "\ud800"])
def test_commands_that_cannot_run(ws, command):
    assert bash(ws, command).startswith("error: the command ")


def test_bytes_that_are_not_text(ws):
    assert bash(ws, r"printf '\xff\xfe'") == "\ufffd\ufffd"


# --- all four


def test_same_calls_give_the_same_bytes_in_another_directory(tmp_path):
    calls = [
        ("Bash", {"command": "mkdir -p src && printf 'import os\\n\\ndef f():\\n    return 1\\n' > src/a.py && ls -R"}),
        ("Grep", {"pattern": r"def \w+\(", "-B": "2"}),
        ("Read", {"file_path": "src/a.py"}),
        ("Edit", {"file_path": "src/a.py", "old_string": "return 1", "new_string": "return 1 / 0"}),
        ("Bash", {"command": f"{sys.executable} -c 'import sys; sys.path.append(\"src\"); import a; a.f()'; echo $HOME; pwd"}),
        ("Read", {"file_path": "src/b.py"}),
        ("Read", {"file_path": "../x"}),
    ]
    results = []
    for name in ("one", "another-much-longer-name"):
        (tmp_path / name).mkdir()
        ws = Workspace(tmp_path / name)
        results.append([ws.run(*call) for call in calls])
    assert results[0] == results[1]
    assert str(tmp_path) not in "".join(results[0])


def test_error_strings_are_short(ws):
    put(ws, "a", "x\n" * 5)
    ws.run("Read", {"file_path": "a"})
    for call in (
        {"file_path": "a", "old_string": "x", "new_string": "y"},
        {"file_path": "n" * 5000, "new_string": "y"},
        {"file_path": "/" + "n" * 5000, "old_string": "x", "new_string": "y"},
    ):
        assert len(ws.run("Edit", call)) < 200


def test_root_must_be_a_directory(tmp_path):
    with pytest.raises(UserError, match="not a directory"):
        Workspace(tmp_path / "missing")

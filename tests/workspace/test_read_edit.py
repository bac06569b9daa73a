import os
import re
import socket
from pathlib import Path

import pytest

from workspace import files
from workspace.files import MAX_FILE_BYTES
from workspace.tools import Workspace


@pytest.fixture
def ws(tmp_path):
    return Workspace(tmp_path)


def put(ws, name, data):
    path = ws.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def edit(ws, name, old, new, **more):
    ws.run("Read", {"file_path": name})
    return ws.run("Edit", {"file_path": name, "old_string": old, "new_string": new, **more})


def read(ws, name, **more):
    return ws.run("Read", {"file_path": name, **more})


# --- Read


def test_offset_keeps_true_line_numbers(ws):
    put(ws, "a", "".join(f"l{n}\n" for n in range(1, 61)))
    assert read(ws, "a", offset="40", limit="2") == "   40→l40\n   41→l41\n[lines 40-41 of 60; continue with offset=42]"
    assert read(ws, "a", offset=" 59") == read(ws, "a", offset="+59") == "   59→l59\n   60→l60\n[lines 59-60 of 60]"


def test_whole_file_has_no_footer(ws):
    put(ws, "a", "x\n\ty")
    assert read(ws, "a") == "    1→x\n    2→\ty"


def test_default_limit_and_character_budget(ws):
    put(ws, "a", "x\n" * 1000)
    assert read(ws, "a").endswith("[lines 1-200 of 1000; continue with offset=201]")
    put(ws, "b", ("y" * 300 + "\n") * 100)
    text = read(ws, "b")
    assert len(text) < ws.max_result_chars
    assert text.splitlines()[-1] == "[lines 1-25 of 100; continue with offset=26]"


def test_a_million_character_line_is_clipped_with_its_count(ws):
    put(ws, "a", "z" * 1_000_000)
    assert read(ws, "a") == f"    1→{'z' * 400} [999600 more characters]"


def test_lines_end_at_newlines_only(ws):
    put(ws, "a", "one\x0ctwo\u2028three\r\nfour\n")
    assert read(ws, "a") == "    1→one\x0ctwo\u2028three\n    2→four"


def test_empty_file_and_offset_errors(ws):
    put(ws, "a", "")
    put(ws, "b", "x\n")
    assert read(ws, "a") == "(empty file)"
    assert read(ws, "b", offset="2") == "error: b has only 1 lines"
    assert read(ws, "b", offset="0") == "error: offset and limit begin at 1"
    assert read(ws, "b", offset="x") == "error: Read: offset must be a whole number"


def test_missing_names_its_neighbours(ws):
    put(ws, "src/parser.py", "")
    put(ws, "src/lexer.py", "")
    put(ws, "deep/er/util.py", "")
    assert read(ws, "src/parsr.py").startswith("error: src/parsr.py does not exist; did you mean src/parser.py")
    assert read(ws, "util.py") == "error: util.py does not exist; did you mean deep/er/util.py?"
    assert read(ws, "qqqqqq") == "error: qqqqqq does not exist"
    assert read(ws, "src/lexer.py/x").startswith("error: src/lexer.py/x does not exist")


def test_directory_lists_itself(ws):
    put(ws, "src/a.py", "")
    put(ws, "src/sub/b.py", "")
    assert read(ws, "src") == "error: src is a directory: a.py, sub/"


@pytest.mark.parametrize("data,words", [(b"\x7fELF\0", "binary"), ("café".encode("latin-1"), "not UTF-8"), (b"\xed\xa0\x80", "not UTF-8")])
def test_what_is_not_text(ws, data, words):
    put(ws, "a", data)
    assert words in read(ws, "a")


def test_fifo_socket_device_and_huge_file_do_not_hang(ws):
    os.mkfifo(ws.root / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(ws.root)  # a socket's path is limited to 108 characters
        try:
            listener.bind("sock")
        finally:
            os.chdir(here)
        assert read(ws, "fifo") == "error: fifo is not a regular file"
        assert read(ws, "sock") == "error: sock cannot be opened"
    assert "outside" in read(ws, "/dev/zero")
    with open(ws.root / "big", "wb") as file:
        file.truncate(2_000_000_000)
    assert read(ws, "big") == f"error: big is too large (2000000000 bytes, at most {MAX_FILE_BYTES})"


def test_bom_is_not_shown(ws):
    put(ws, "a", b"\xef\xbb\xbfhi\n")
    assert read(ws, "a") == "    1→hi"


# --- Edit


def test_edit_shows_the_changed_window(ws):
    path = put(ws, "a.py", "".join(f"l{n}\n" for n in range(1, 11)))
    shown = "edited a.py\n    3→l3\n    4→l4\n    5→new\n    6→lines\n    7→l6\n    8→l7"
    assert edit(ws, "a.py", "l5\n", "new\nlines\n") == shown
    assert path.read_text().startswith("l1\nl2\nl3\nl4\nnew\nlines\nl6\n")


def test_values_are_never_stripped_and_digits_stay_text(ws):
    path = put(ws, "a.py", "if x:\n    y = 1\n")
    edit(ws, "a.py", "    y = 1\n", "    y = 2\n    z = 3  \n")
    assert path.read_text() == "if x:\n    y = 2\n    z = 3  \n"
    assert edit(ws, "a.py", "2", "--5").startswith("edited")
    assert path.read_text() == "if x:\n    y = --5\n    z = 3  \n"


def test_replacement_text_is_literal(ws):
    path = put(ws, "a", "x\n")
    edit(ws, "a", "x", r"\1 \g<0> $& <|tool_arg|> é→")
    assert path.read_text() == "\\1 \\g<0> $& <|tool_arg|> é→\n"


def test_must_be_read_and_unchanged(ws):
    path = put(ws, "a", "x\n")
    call = {"file_path": "a", "old_string": "x", "new_string": "y"}
    assert ws.run("Edit", call) == "error: read a before editing it"
    read(ws, "a")
    path.write_text("x z\n")
    assert ws.run("Edit", call) == "error: a changed since it was read; read it again"
    assert path.read_text() == "x z\n"
    read(ws, "a")
    assert ws.run("Edit", call).startswith("edited")
    assert ws.run("Edit", {**call, "old_string": "y", "new_string": "w"}).startswith("edited"), "an edit counts as read"


def test_create(ws):
    old_mask = os.umask(0o022)
    try:
        assert ws.run("Edit", {"file_path": "new/dir/a.py", "new_string": "x = 1\n"}) == "created new/dir/a.py (1 lines)"
    finally:
        os.umask(old_mask)
    path = ws.root / "new/dir/a.py"
    assert path.read_text() == "x = 1\n"
    assert path.stat().st_mode & 0o777 == 0o644
    assert ws.run("Edit", {"file_path": "new/dir/a.py", "new_string": ""}) == "error: new/dir/a.py exists; give old_string to change it"
    assert edit(ws, "new/dir/a.py", "1", "2").startswith("edited")
    assert ws.run("Edit", {"file_path": "new", "new_string": "x"}).startswith("error: new exists")
    assert ws.run("Edit", {"file_path": "new/dir/a.py/b", "new_string": "x"}).startswith("error: new/dir/a.py/b cannot be written: ")


def test_created_file_may_be_edited_unread(ws):
    ws.run("Edit", {"file_path": "a", "new_string": "x\n"})
    assert ws.run("Edit", {"file_path": "a", "old_string": "x", "new_string": "y"}).startswith("edited")


@pytest.mark.parametrize("make", [
    lambda root, out: (root / "link").symlink_to(out),
    lambda root, out: (root / "link").symlink_to(out / "not-there"),
])  # fmt: skip
def test_create_through_a_symlink_that_leads_out(ws, tmp_path_factory, make):
    out = tmp_path_factory.mktemp("out")
    make(ws.root, out)
    for name in ("link", "link/new.txt"):
        assert "outside the workspace" in ws.run("Edit", {"file_path": name, "new_string": "x"})
    assert list(out.iterdir()) == []


def test_occurs_more_than_once(ws):
    put(ws, "a", "x\ny\nx\n")
    assert edit(ws, "a", "x", "z") == "error: old_string occurs 2 times in a (lines 1, 3); add lines to make it unique, or set replace_all"
    put(ws, "b", "aaa\n")
    assert "occurs 2 times" in edit(ws, "b", "aa", "b"), "overlapping occurrences are ambiguous too"


def test_replace_all(ws):
    path = put(ws, "a", "x1\nb\nx2\n")
    assert edit(ws, "a", "x", "z", replace_all="true") == "edited a (2 replacements)\n    1→z1\n    2→b\n    3→z2"
    assert path.read_text() == "z1\nb\nz2\n"
    assert edit(ws, "a", "z", "w", replace_all="maybe") == "error: Edit: replace_all must be true or false"


def test_same_and_empty(ws):
    put(ws, "a", "x\n")
    assert edit(ws, "a", "x", "x") == "error: old_string and new_string are the same"
    assert edit(ws, "a", "", "x") == "error: old_string is empty; leave it out to create a file"
    assert edit(ws, "a", "x", "\ud800") == "error: new_string is not valid text"


@pytest.mark.parametrize("text,old,new,cause", [
    ("def f():\n\treturn 1\n", "def f():\n    return 1\n", "y", "tabs and spaces differ"),
    ("def f():\n  return 1\n", "def f():\n    return 1\n", "y", "spaces differ"),
    ("a = 1  \nb = 2\n", "a = 1\nb = 2\n", "y", "trailing spaces differ"),
    ("a = 1\nb = 2\n", "    1→a = 1\n    2→b = 2\n", "y", "leave out the line numbers"),
    ("a = 1\nb = 2\n", r"a = 1\nb = 2", "y", r"use real line breaks instead of \n"),
    ("a = 1\nb = 2\n", "a = 1\r\nb = 2", "y", "the file has no carriage returns"),
    ("value = compute(1)\n", "value = compute(0)\n", "value = compute(1)\n", "new_string is already there"),
])  # fmt: skip
def test_diagnosis(ws, text, old, new, cause):
    put(ws, "a", text)
    assert edit(ws, "a", old, new).split("\n")[0].split("; ")[1:2] == [cause]


def test_nearest_lines_are_shown_as_read_shows_them(ws):
    put(ws, "a.py", "import os\n\ndef load_file(path):\n    return open(path).read()\n\nx = 1\n")
    assert edit(ws, "a.py", "def load_files(path):\n    return open(path)\n", "y") == (
        "error: old_string not found in a.py; nearest lines:\n    3→def load_file(path):\n    4→    return open(path).read()"
    )
    assert edit(ws, "a.py", "qqqqqqqqqq", "y") == "error: old_string not found in a.py"
    assert edit(ws, "a.py", "\ufeff", "y") == "error: old_string not found in a.py"


def test_crlf_bom_and_mode_are_kept(ws):
    path = put(ws, "a", b"\xef\xbb\xbfone\r\ntwo\r\nthree\r\n")
    path.chmod(0o754)
    assert edit(ws, "a", "one\ntwo\n", "1\n2\n2b\n").startswith("edited a\n    1→1\n")
    assert path.read_bytes() == b"\xef\xbb\xbf1\r\n2\r\n2b\r\nthree\r\n"
    assert path.stat().st_mode & 0o777 == 0o754


def test_mixed_line_ends_elsewhere_are_untouched(ws):
    path = put(ws, "a", b"one\ntwo\r\nthree\r\nfour\r\nfive\n")
    edit(ws, "a", "three\nfour", "3\n4")
    assert path.read_bytes() == b"one\ntwo\r\n3\r\n4\r\nfive\n"


def test_final_newline_is_kept_and_its_absence_too(ws):
    path = put(ws, "a", "one\ntwo\n")
    edit(ws, "a", "two\n", "2")
    assert path.read_bytes() == b"one\n2\n"
    path = put(ws, "b", "one\ntwo")
    edit(ws, "b", "two", "2")
    assert path.read_bytes() == b"one\n2"
    path = put(ws, "c", "one\n")
    edit(ws, "c", "one\n", "")
    assert path.read_bytes() == b""


def test_hard_links_and_read_only_files_are_refused(ws):
    path = put(ws, "a", "x\n")
    os.link(path, ws.root / "b")
    assert edit(ws, "a", "x", "y") == "error: a has hard links; Edit would break them"
    put(ws, "c", "x\n").chmod(0o444)
    assert edit(ws, "c", "x", "y") == "error: c is read-only"
    assert path.read_text() == "x\n"


def test_edit_through_a_link_inside_keeps_the_link(ws):
    path = put(ws, "a", "x\n")
    (ws.root / "l").symlink_to("a")
    assert edit(ws, "l", "x", "y").startswith("edited a")
    assert (ws.root / "l").is_symlink()
    assert path.read_text() == "y\n"


def test_file_swapped_for_a_symlink_is_not_followed(ws, tmp_path_factory):
    secret = tmp_path_factory.mktemp("out") / "secret"
    secret.write_text("x\n")
    path = put(ws, "a", "x\n")
    read(ws, "a")
    path.unlink()
    path.symlink_to(secret)
    assert "outside" in ws.run("Edit", {"file_path": "a", "old_string": "x", "new_string": "y"})
    assert secret.read_text() == "x\n"


@pytest.fixture
def swapped(ws, tmp_path_factory, monkeypatch):
    """`swapped(name, when)`: from the moment that function `when` of files.py has returned, `name` is a symlink out, once."""
    out = tmp_path_factory.mktemp("out")
    (out / "a").write_text("x\n")

    def prepare(name, when):
        real = getattr(files, when)

        def then_swap(*args, **more):
            result = real(*args, **more)
            if not (ws.root / "old").exists():
                (ws.root / name).rename(ws.root / "old")
                (ws.root / name).symlink_to(out / "a" if name.endswith("a") else out)
            return result

        monkeypatch.setattr(files, when, then_swap)
        return out

    return prepare


@pytest.mark.parametrize("name", ["d/a", "d", "d/e"])
def test_what_is_swapped_for_a_symlink_after_the_check_is_not_read(ws, swapped, name):
    put(ws, "d/a", "x\n")
    put(ws, "d/e/a", "x\n")
    swapped(name, "resolve")
    assert read(ws, "d/e/a" if name == "d/e" else "d/a").startswith("error: d/")


@pytest.mark.parametrize("name", ["d/a", "d"])
@pytest.mark.parametrize("when", ["resolve", "plan_edit", "folder_of"])
def test_what_is_swapped_for_a_symlink_after_the_check_is_not_edited(ws, swapped, name, when):
    put(ws, "d/a", "x\n")
    read(ws, "d/a")
    out = swapped(name, when)
    assert ws.run("Edit", {"file_path": "d/a", "old_string": "x", "new_string": "y"}).startswith("error: d/a ")
    assert (out / "a").read_text() == "x\n" and os.listdir(out) == ["a"]


@pytest.mark.parametrize("when", ["resolve", "plan_edit", "folder_of"])
def test_nothing_is_created_through_a_parent_that_is_swapped_after_the_check(ws, swapped, when):
    put(ws, "d/b", "")
    out = swapped("d", when)
    for name in ("d/new", "d/deep/new"):
        ws.run("Edit", {"file_path": name, "new_string": "y"})
        assert os.listdir(out) == ["a"]


def test_a_file_that_changes_while_it_is_edited_is_kept(ws, monkeypatch):
    path = put(ws, "a", "x\n")
    read(ws, "a")
    monkeypatch.setattr(os, "fsync", lambda handle: path.write_text("theirs\n"))
    assert ws.run("Edit", {"file_path": "a", "old_string": "x", "new_string": "y"}) == "error: a changed since it was read; read it again"
    monkeypatch.setattr(os, "fsync", lambda handle: put(ws, "new", "theirs\n"))
    assert ws.run("Edit", {"file_path": "new", "new_string": "y"}) == "error: new exists; give old_string to change it"
    assert path.read_text() == "theirs\n" == (ws.root / "new").read_text() and sorted(os.listdir(ws.root)) == ["a", "new"]


@pytest.mark.parametrize("name", [".git/config", ".git/hooks/pre-commit", ".GIT/config", "sub/.git", "link/config", ".git/../.git/config"])
def test_files_of_git_are_readable_and_never_edited(ws, name):
    put(ws, ".git/config", "x\n")
    (ws.root / "link").symlink_to(".git")
    call = {"file_path": name, "new_string": "[alias]"}
    assert ws.run("Edit", call).endswith("is git's own; Edit does not change it")
    assert ws.preview(call) == ws.run("Edit", call) and read(ws, ".git/config") == "    1→x"
    assert ws.run("Edit", {"file_path": ".github/ci.yml", "new_string": "on: push\n"}).startswith("created")


def folded(argument):
    return re.sub("(?i)readme", "readme", os.fspath(argument)) if isinstance(argument, str | Path) else argument


def test_where_two_names_are_one_file_neither_is_edited_unread(ws, monkeypatch):
    for module, names in ((os, ("open", "stat", "replace")), (os.path, ("lexists",))):  # a file system that ignores case
        for name in names:
            real = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, real=real, **more: real(*map(folded, a), **more))
    path = put(ws, "readme", "one\n")
    assert read(ws, "README") == read(ws, "Readme") == "    1→one"
    assert ws.run("Edit", {"file_path": "readme", "old_string": "one", "new_string": "1"}) == "error: read readme before editing it"
    assert ws.run("Edit", {"file_path": "README", "old_string": "one", "new_string": "1"}).startswith("edited README")
    stale = ws.run("Edit", {"file_path": "Readme", "old_string": "1", "new_string": "2"})
    assert stale == "error: Readme changed since it was read; read it again"
    assert ws.run("Edit", {"file_path": "ReadMe", "new_string": "new"}).startswith("error: ReadMe exists") and path.read_text() == "1\n"


def test_failed_write_leaves_the_old_file_and_no_temporary(ws, monkeypatch):
    path = put(ws, "a", "x\n")
    read(ws, "a")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert ws.run("Edit", {"file_path": "a", "old_string": "x", "new_string": "y"}) == "error: a cannot be written: the disk is full"
    assert path.read_text() == "x\n"
    assert os.listdir(ws.root) == ["a"]


def test_preview_changes_nothing_and_shows_what_will_run(ws):
    path = put(ws, "a", "one\ntwo\n")
    read(ws, "a")
    call = {"file_path": "a", "old_string": "two", "new_string": "2"}
    assert ws.preview(call).split("\n")[2:] == ["@@ -1,3 +1,3 @@", " one", "-two", "+2", " "]
    assert path.read_text() == "one\ntwo\n"
    path.write_text("changed after the preview, two\n")
    assert ws.run("Edit", call) == "error: a changed since it was read; read it again"
    assert ws.preview({"file_path": "b", "new_string": "n\n"}).split("\n")[3:] == ["+n", "+"]
    assert ws.preview({"file_path": "b"}) == "error: Edit needs new_string"

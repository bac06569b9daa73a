import errno
import os

import pytest

from soul.console import plain, visible
from soul.errors import UserError
from soul.files import atomic_path, read_text, write_atomic


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "data.json"
    write_atomic(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_exception_inside_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_mode_follows_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        write_atomic(tmp_path / "x", "")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("data, message", [(b"a\0b", "binary"), (b"ok\nb\xff", r"bad\.md:2: is not UTF-8")])
def test_what_is_not_text_is_named(tmp_path, data, message):
    (tmp_path / "bad.md").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_text(tmp_path / "bad.md")


def test_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "bom.md").write_bytes(b"\xef\xbb\xbfhi")
    assert read_text(tmp_path / "bom.md") == "hi"


def test_untrusted_text_cannot_move_the_cursor_or_turn_the_line():
    shown = visible("a\x1b[2Jb\u202egnp.exe [/bold] \x07\r")
    assert "\x1b" not in shown and "\u202e" not in shown and "\r" not in shown and "\x07" not in shown
    assert "␛" in shown and "<U+202E>" in shown
    assert plain("[/bold]").plain == "[/bold]"


def test_an_error_is_one_line():
    assert str(UserError("two\nlines", where="SOUL.md:3", fix="Fix it.")) == "SOUL.md:3: two lines. Fix it."

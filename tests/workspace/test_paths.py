import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workspace.paths import ToolError, resolve


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A workspace with one link of every kind, beside a directory whose name begins like its own."""
    base = tmp_path_factory.mktemp("paths")
    root, evil = base / "proj", base / "proj-evil"
    (root / "sub").mkdir(parents=True)
    evil.mkdir()
    (evil / "secret").write_text("secret")
    (root / "a.txt").write_text("a")
    (root / "out").symlink_to(evil)
    (root / "file_out").symlink_to(evil / "secret")
    (root / "in").symlink_to("a.txt")
    (root / "dangling_out").symlink_to(evil / "new")
    (root / "loop").symlink_to("loop2")
    (root / "loop2").symlink_to("loop")
    return root.resolve()


@pytest.mark.parametrize("path", [
    "..", "../x", "sub/../../x", "/etc/passwd", "/", "../proj-evil/secret", "out", "out/secret", "out/new.txt", "file_out", "dangling_out",
    "sub/../out/x", "~", "~/x", "~root/x", "/proc/self/environ", "/proc/self/root/etc", "missing/../../x",
])  # fmt: skip
def test_everything_that_leads_outside_is_refused(root, path):
    with pytest.raises(ToolError, match="outside the workspace"):
        resolve(root, path)


def test_a_neighbour_with_the_same_prefix_is_outside(root):
    with pytest.raises(ToolError, match="outside"):
        resolve(root, f"{root}-evil/secret")


def test_a_symlink_loop_cannot_smuggle_the_rest_of_the_path(root):
    for path in ("loop", "loop/x", "loop/../out/secret", "loop/../file_out"):
        with pytest.raises(ToolError, match=r"loop|outside"):
            resolve(root, path)


@pytest.mark.parametrize("path,words", [("", "the path is empty"), ("a\0b", "has a NUL character"), ("\ud800", "not a valid path")])
def test_malformed_paths(root, path, words):
    with pytest.raises(ToolError, match=words):
        resolve(root, path)


@pytest.mark.parametrize("path,real", [
    (".", ""), ("a.txt", "a.txt"), ("in", "a.txt"), ("sub/../a.txt", "a.txt"), ("new/deep/x", "new/deep/x"),
    ("%2e%2e/x", "%2e%2e/x"), ("..\\x", "..\\x"), ("a.txt/x", "a.txt/x"), ("..x", "..x"),
])  # fmt: skip
def test_inside_is_allowed(root, path, real):
    assert resolve(root, path) == (root / real if real else root)
    assert resolve(root, f"{root}/{path}") == resolve(root, path)


PIECES = ["..", ".", "a.txt", "sub", "out", "in", "loop", "loop2", "dangling_out", "file_out", "~", "", "x", "secret", "\\", "proj-evil"]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8), st.booleans())
def test_resolved_is_inside_or_an_error(root, pieces, absolute):
    path = "/".join(pieces)
    try:
        real = resolve(root, f"{root}/{path}" if absolute else path)
    except ToolError:
        return
    assert os.path.commonpath([root, real]) == str(root)
    assert os.path.realpath(real) == str(real)

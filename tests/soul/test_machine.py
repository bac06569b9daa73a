"""How much memory there is, and what malloc is told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from soul import machine
from soul.machine import free_memory, group_room, malloc_settings, resident


def test_control_groups(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for place, most, used in (("a/b", "max", "5"), ("a", "100", "30"), ("", "1000", "10")):
        (tmp_path / place / "memory.max").write_text(most + "\n")
        (tmp_path / place / "memory.current").write_text(used + "\n")
        (tmp_path / place / "memory.stat").write_text("anon 1\ninactive_file 0\n")
    assert group_room("0::/a/b", tmp_path) == [70, 990]
    assert group_room("0::/not/here", tmp_path) == [990]  # seen from inside a container
    (tmp_path / "memory.stat").write_text("file 9\ninactive_file 7\nactive_file 2\n")
    assert group_room("0::/", tmp_path) == [997]  # what is cached but idle is as good as free
    (tmp_path / "memory" / "x").mkdir(parents=True)
    (tmp_path / "memory" / "x" / "memory.limit_in_bytes").write_text("64\n")
    (tmp_path / "memory" / "x" / "memory.usage_in_bytes").write_text("4\n")
    (tmp_path / "memory" / "x" / "memory.stat").write_text("inactive_file 50\ntotal_inactive_file 1\n")
    assert group_room("4:memory:/x", tmp_path) == [61]
    assert group_room("8:pids:/x", tmp_path) == []


def test_available_memory_is_less_than_the_machine_has():
    total = int(next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))) * 1024
    assert 0 < free_memory() <= total and 0 < resident() < total


def test_a_machine_without_control_groups_has_what_it_says(monkeypatch):
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: str(path) != "/proc/self/cgroup" and exists(path))
    monkeypatch.setattr(machine, "group_room", lambda line: pytest.fail("asked"))
    assert free_memory() > 0


def test_malloc_keeps_blocks_of_up_to_an_eighth_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 16_000_000_000)
    settings = dict(part.rsplit("=", 1) for part in malloc_settings().split(":"))
    assert settings["glibc.malloc.mmap_threshold"] == settings["glibc.malloc.trim_threshold"] == "2000000000"
    monkeypatch.setattr(machine, "free_memory", lambda: 1000)
    assert malloc_settings().endswith(f"={32 << 20}")  # 0 would have every small block mapped by itself


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_a_process_with_these_settings_keeps_what_it_freed():
    """The tunables are read, by these names: a block that glibc would otherwise return to the kernel stays resident."""
    code = (
        "import ctypes; from soul.machine import resident; c = ctypes.CDLL(None); c.malloc.restype = ctypes.c_void_p; n = 64 << 20;"
        "p = c.malloc(n); ctypes.memset(ctypes.c_void_p(p), 1, n); full = resident(); c.free(ctypes.c_void_p(p)); print(full - resident() > n // 2)"
    )

    def freed(settings):
        environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | settings
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout.strip()

    assert freed({}) == "True" and freed({"GLIBC_TUNABLES": malloc_settings()}) == "False"

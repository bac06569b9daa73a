"""Commands by way of a warm launcher: launch.py runs once per process and forks itself for each command.

A Python of its own for each took 13 ms of the 17 that the sandbox cost: 7.5 to start, 2.5 to compile, 2.5 to import.
"""

import atexit
import os
import select
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

PYTHON = [os.path.realpath(sys.executable), "-I", "-S"]
ANSWER = 20.0  # seconds until the launcher must have forked
_servers: dict[tuple[int, Path], tuple[socket.socket, subprocess.Popen]] = {}


class Launched:
    """A command on its way, used like a Popen; `pid` is its launcher's. `returncode`: 0 once that has ended well, and left nobody
    behind; then `report` is its last line. Raises ConnectionError where nothing answers, ValueError for a NUL or a lone surrogate."""

    def __init__(self, wrapped: list[str], launcher: Path, root: Path, env: dict[str, str]):
        variables = [f"{name}={value}" for name, value in env.items()]
        request = [os.fsencode(part) for part in (root, str(len(variables)), *variables, *wrapped)]
        if any(b"\0" in part for part in request):
            raise ValueError("embedded null byte")
        self.returncode, self.report, self._handles = None, "", []
        (reads, writes), (self._socket, theirs) = os.pipe(), socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.stdout = os.fdopen(reads, "rb", 0)
        try:
            with os.fdopen(writes, "wb", 0), theirs:
                socket.send_fds(_server(launcher), [b"\0".join(request)], [writes, theirs.fileno()])
            self._socket.settimeout(ANSWER)
            pid, self._handles, *_ = socket.recv_fds(self._socket, 32, 1, socket.MSG_CMSG_CLOEXEC)
            if not self._handles:
                raise ConnectionError("no answer")
            self.pid = int(pid)
        except BaseException:
            self.close()
            raise

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            # a descriptor of the process: its number may be another's by now
            if not select.select(self._handles, [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("launch.py", timeout)
            self._socket.settimeout(0)
            with suppress(BlockingIOError):
                self.report = self._socket.recv(4096).decode("utf-8", "replace").strip()
            self.returncode = int(not self.report)
        return self.returncode

    def close(self) -> None:
        self.stdout.close()
        self._socket.close()
        for handle in self._handles:
            os.close(handle)


def _server(launcher: Path) -> socket.socket:
    """Where to send requests: to the server of this process, not the parent's before a fork; a new one where it died."""
    key = os.getpid(), launcher
    if key in _servers:
        channel, process = _servers[key]
        if process.poll() is None:
            return channel
        channel.close()
    channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        options = {"cwd": "/", "env": {"LANG": "C.UTF-8"}, "start_new_session": True, "pass_fds": [theirs.fileno()]}
        options |= dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        _servers[key] = channel, subprocess.Popen([*PYTHON, str(launcher), f"serve={theirs.fileno()}"], **options)
    return channel


@atexit.register
def stop() -> None:
    """End this process's servers; the processor time of the commands then counts as its children's."""
    for key in [key for key in _servers if key[0] == os.getpid()]:
        channel, process = _servers.pop(key)
        channel.close()
        process.wait()

"""Bash: one command, no stdin, a bounded capture, and nothing left running."""

import os
import re
import selectors
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from workspace.paths import ToolError

MAX_TIMEOUT = 600
MAX_COMMAND_CHARS = 10_000  # a person must be able to read what they approve; the kernel's own limit is 128 KiB
KEPT_BYTES = 1_000_000  # at each end of the output while it streams by


def environment(root: Path, extra: dict[str, str] | None = None) -> dict[str, str]:
    """All that a command sees of the environment. An allow-list: keys and tokens of the caller never get in."""
    fixed = {"LANG": "C.UTF-8", "TERM": "dumb", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(root), **fixed, **(extra or {})}


def bash(root: Path, args: dict[str, str], env: dict[str, str], default_timeout: int) -> str:
    """The Bash tool: stdout and stderr together, then `exit code: N` when it is not 0."""
    command = args["command"]
    timeout = min(int(args.get("timeout", default_timeout)), MAX_TIMEOUT)
    if timeout < 1:
        raise ToolError("timeout begins at 1")
    if len(command) > MAX_COMMAND_CHARS:
        raise ToolError(f"the command is too long (at most {MAX_COMMAND_CHARS} characters)")
    try:
        output, code = _run(["bash", "--noprofile", "--norc", "-c", command], root, env, timeout)
    except (OSError, ValueError):
        raise ToolError("the command cannot be started") from None
    # a path of this machine would make every rollout different; relative names work in all four tools
    output = re.sub(re.escape(str(root)) + r"(/(?=[\w.])|(?![\w.-]))", lambda match: "" if match[1] else ".", output)
    note = f"timed out after {timeout} s" if code is None else f"exit code: {code}" if code else ""
    return "\n".join(part for part in (output.rstrip("\n"), note) if part) or "(no output)"


def _run(argv: list[str], root: Path, env: dict[str, str], timeout: float) -> tuple[str, int | None]:
    """Run `argv`; gives its output and its exit code, None when it ran out of time.

    This is the one place where a command starts: a kernel sandbox wraps `argv` here. Until then a daemon that leaves
    its session, its parent and its output behind is not found again.
    """
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(argv, cwd=root, env=env, start_new_session=True, bufsize=0, **pipes)
    deadline = time.monotonic() + timeout
    try:
        output = _drain(process, deadline)
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        return output, process.returncode
    finally:
        _kill(process)
        process.stdout.close()


def _drain(process: subprocess.Popen, deadline: float) -> str:
    """Read until the pipe closes, the shell has ended, or time is up; holds at most `KEPT_BYTES` of each end."""
    head, tail, elided = bytearray(), bytearray(), 0
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(min(left, 0.02)):
                if process.poll() is not None:  # a background child may hold the pipe open for ever
                    break
                continue
            if not (chunk := os.read(process.stdout.fileno(), 1 << 16)):
                break
            room = KEPT_BYTES - len(head)
            head += chunk[:room]
            tail += chunk[room:] if room > 0 else chunk
            if (excess := len(tail) - KEPT_BYTES) > 0:
                elided += excess
                del tail[:excess]
    middle = f"\n[{elided} characters elided]\n".encode() if elided else b""
    return (bytes(head) + middle + bytes(tail)).decode("utf-8", "replace")


def _kill(process: subprocess.Popen) -> None:
    """End the process group, and on Linux what has left it: descendants, and any process that still writes to the pipe."""
    strays = _strays(process)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in strays:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _strays(process: subprocess.Popen) -> list[int]:
    pipe = f"pipe:[{os.fstat(process.stdout.fileno()).st_ino}]"
    children, found = {}, []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(entry.name))
            if pipe in (os.readlink(entry / "fd/1"), os.readlink(entry / "fd/2")):
                found.append(int(entry.name))
    found += children.get(process.pid, []) if process.returncode is None else []
    for pid in found:  # grows while it is walked
        found += (child for child in children.get(pid, []) if child not in found)
    return found

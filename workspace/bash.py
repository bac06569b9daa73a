"""Bash: one command, no stdin, a bounded capture, and nothing left running."""

import os
import re
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

from workspace.launched import Launched
from workspace.paths import ToolError
from workspace.sandbox import Sandbox

MAX_TIMEOUT = 600
MAX_COMMAND_CHARS = 10_000  # a person must be able to read what they approve; the kernel's own limit is 128 KiB
KEPT_BYTES = 1_000_000  # at each end of the output while it streams by
GRACE = 5.0  # seconds that the sandbox's launcher has to end by itself after the timeout


def environment(root: Path, extra: dict[str, str] | None = None) -> dict[str, str]:
    """All that a command sees of the environment. An allow-list: keys and tokens of the caller never get in."""
    fixed = {"LANG": "C.UTF-8", "TERM": "dumb", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(root), **fixed, **(extra or {})}


def bash(root: Path, args: dict[str, str], env: dict[str, str], default_timeout: int, sandbox: Sandbox, keep: Sequence[Path]) -> str:
    """The Bash tool: stdout and stderr together, then `exit code: N` when it is not 0, or what ended the command. `keep`: what
    it may only read, in the workspace."""
    command = args["command"]
    timeout = min(int(args.get("timeout", default_timeout)), MAX_TIMEOUT)
    if timeout < 1:
        raise ToolError("timeout begins at 1")
    if len(command) > MAX_COMMAND_CHARS:
        raise ToolError(f"the command is too long (at most {MAX_COMMAND_CHARS} characters)")
    argv = ["bash", "--noprofile", "--norc", "-c", command]
    try:
        with tempfile.TemporaryDirectory(prefix="soulsmith-", ignore_cleanup_errors=True) as directory:
            tmp = os.path.realpath(directory)
            env = {**env, "TMPDIR": tmp}
            if sandbox.kind == "none":
                output, said = _bare(argv, root, env, timeout)
            else:
                output, said = _confined(sandbox, argv, root, env, timeout, keep)
    except (OSError, ValueError):
        raise ToolError("the command cannot be started") from None
    output = output.replace(tmp, "$TMPDIR")
    # a path of this machine would make every rollout different; relative names work in all four tools
    output = re.sub(re.escape(str(root)) + r"(/(?=[\w.])|(?![\w.-]))", lambda match: "" if match[1] else ".", output)
    note = {
        "exit 0": "",
        "timeout": f"timed out after {timeout} s",
        "memory": f"killed: more than {sandbox.limits.memory >> 20} MB of memory",
        "processes": f"killed: more than {sandbox.limits.processes} processes",
    }.get(said, said.replace("exit", "exit code:", 1))
    return "\n".join(part for part in (output.rstrip("\n"), note) if part) or "(no output)"


def _confined(sandbox: Sandbox, argv: list[str], root: Path, env: dict[str, str], timeout: int, keep: Sequence[Path]) -> tuple[str, str]:
    """Run `argv` in the sandbox; gives its output and the launcher's report. Raises ToolError when it could not be confined."""
    try:
        process = sandbox.start(argv, root, env, timeout, keep)
    except ConnectionError:
        raise ToolError("the sandbox failed: no report") from None
    with closing(process):
        output, code = _finish(process, timeout + GRACE, confined=True)
        said = process.report
    if said.startswith("error") or (not said and code is not None):
        raise ToolError(f"the sandbox failed: {said.removeprefix('error ') or 'no report'}")
    return output, said or "timeout"


def _bare(argv: list[str], root: Path, env: dict[str, str], timeout: int) -> tuple[str, str]:
    """The same without a sandbox: a daemon that leaves its session, its parent and its output behind is not found again."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(argv, cwd=root, env=env, start_new_session=True, bufsize=0, **pipes)
    output, code = _finish(process, timeout, confined=False)
    return output, "timeout" if code is None else f"exit {code}"


def _finish(process: subprocess.Popen | Launched, timeout: float, *, confined: bool) -> tuple[str, int | None]:
    """The output and the exit code, None when time ran out."""
    deadline = time.monotonic() + timeout
    try:
        output = _drain(process, deadline)
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        return output, process.returncode
    finally:
        _kill(process, confined=confined)
        process.stdout.close()


def _drain(process: subprocess.Popen | Launched, deadline: float) -> str:
    """Read until the pipe closes, the shell has ended, or time is up; holds at most `KEPT_BYTES` of each end."""
    head, tail, elided = bytearray(), bytearray(), 0
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(min(left, 0.02)):
                # a background child may hold the pipe open for ever; what was written after the select is still there
                if process.poll() is not None and not selector.select(0):
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


def _kill(process: subprocess.Popen | Launched, *, confined: bool) -> None:
    """End the process group, and on Linux what has left it: descendants, and any process that still writes to the pipe."""
    strays = [] if confined and process.poll() == 0 else _strays(process)  # a launcher that ended well left nobody behind
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in strays:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _strays(process: subprocess.Popen | Launched) -> list[int]:
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

"""The kernel's sandbox of a command: which one works here, and how a command is wrapped in it (launch.py confines itself).

A command writes only below its workspace and $TMPDIR, reads those, the system and Python's own directories, and has no network, no
sockets, no capabilities but over files, and bounded processes, memory, time and files. It reads no home directory: what it
prints goes to a teacher and into data sets.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from soul.errors import UserError

SYSTEM = ("/bin", "/etc", "/lib", "/lib32", "/lib64", "/nix", "/opt", "/proc", "/sbin", "/snap", "/sys", "/usr")
LAUNCHER = Path(__file__).with_name("launch.py")
FIX = "It needs Linux 5.13 or later with Landlock, or bubblewrap (`apt install bubblewrap`) and user namespaces."
_PROBE = """import socket, sys
open("inside", "w").close()
for attempt in (lambda: open(sys.argv[1], "w"), lambda: socket.create_connection(("127.0.0.1", int(sys.argv[2])), 1)):
    try: attempt()
    except OSError: print("refused")"""


@dataclass(frozen=True)
class Limits:
    """Of one command."""

    processes: int = 512
    """At one time, threads included."""
    memory: int = 4 << 30
    """Bytes: of private writable memory for each process, and resident for all together, where what they share counts for each."""
    file: int = 256 << 20
    """Bytes of one file."""
    files: int = 1024
    """Open files of one process."""


@dataclass(frozen=True)
class Sandbox:
    """One way to confine commands. `kind`: landlock, bubblewrap or none; `namespaces`: with own process ids, network and
    read-only mounts; `why`: for none, what the others lack."""

    kind: str
    namespaces: bool = False
    limits: Limits = field(default=Limits())
    why: str = ""

    @staticmethod
    def detect() -> "Sandbox":
        """The strongest that holds here; each is tried (about 0.1 s, once per process), never judged by a version."""
        return _detect()

    def describe(self) -> str:
        """One line for people."""
        if self.kind == "none":
            return f"NO SANDBOX: commands run as you and reach what you can reach ({self.why})"
        how = "Landlock and namespaces" if self.namespaces else "Landlock" if self.kind == "landlock" else "bubblewrap"
        return f"commands run in a sandbox ({how}): they write only in the workspace and have no network"

    def wrap(self, argv: list[str], root: Path, tmp: str, *, report: int, timeout: int) -> list[str]:
        """`argv` inside the sandbox. `report`: a descriptor, to be passed on, where launch.py says what became of it."""
        sizes = {name: getattr(self.limits, name) for name in ("processes", "memory", "file", "files")}
        numbers = {**sizes, "report": report, "timeout": timeout, "cpu": timeout * (os.cpu_count() or 1)}
        numbers |= {"landlock": int(self.kind == "landlock"), "namespaces": int(self.namespaces)}
        granted = [*(f"read={path}" for path in readable()), f"write={root}", f"write={tmp}"]
        python = [os.path.realpath(sys.executable), "-I", "-S", str(LAUNCHER)]
        inner = [*python, *(f"{name}={number}" for name, number in numbers.items()), *granted, "--", *argv]
        if self.kind == "landlock":
            return inner
        binds = [part for path in [*readable(), str(LAUNCHER)] for part in ("--ro-bind-try", path, path)]
        binds += ["--proc", "/proc", "--dev", "/dev", *(part for path in (str(root), tmp) for part in ("--bind", path, path))]
        options = ["--unshare-all", "--die-with-parent", *binds, "--remount-ro", "/", "--chdir", str(root)]
        return [shutil.which("bwrap") or "bwrap", *options, "--", *inner]

    def fault(self) -> str:
        """Why this sandbox does not hold here, "" when it does: a child of it must write inside, and neither outside nor connect."""
        with tempfile.TemporaryDirectory(prefix="soulsmith-") as top, socket.create_server(("127.0.0.1", 0)) as server:
            root, tmp, outside = (Path(os.path.realpath(top), name) for name in ("root", "tmp", "outside"))
            root.mkdir()
            tmp.mkdir()
            argv = [os.path.realpath(sys.executable), "-I", "-S", "-c", _PROBE, str(outside), str(server.getsockname()[1])]
            receive, report = os.pipe()
            try:
                wrapped = self.wrap(argv, root, str(tmp), report=report, timeout=10)
                pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
                done = subprocess.run(wrapped, cwd=root, env={}, pass_fds=[report], timeout=20, text=True, errors="replace", **pipes)
            except (OSError, subprocess.TimeoutExpired) as error:
                return f"cannot start: {getattr(error, 'strerror', None) or 'no answer'}"
            finally:
                os.close(report)
                said = outcome(receive)
            if said != "exit 0":
                return said.removeprefix("error ") or (done.stdout.strip().splitlines() or ["cannot start"])[-1]
            held = done.stdout.split() == ["refused"] * 2 and (root / "inside").exists() and not outside.exists()
            return "" if held else "does not confine"


def outcome(receive: int) -> str:
    """The first line of launch.py's report, "" without one; closes the pipe, whose other end must be closed here."""
    os.set_blocking(receive, False)
    try:
        return os.read(receive, 4096).decode("utf-8", "replace").split("\n")[0]
    except BlockingIOError:
        return ""
    finally:
        os.close(receive)


@cache
def _detect() -> Sandbox:
    if sys.platform != "linux":
        return Sandbox("none", why="only Linux has one")
    faults = {}
    for sandbox in (Sandbox("landlock", namespaces=True), Sandbox("landlock"), Sandbox("bubblewrap")):
        if not (fault := sandbox.fault()):
            return sandbox
        faults[sandbox.kind] = fault
    return Sandbox("none", why="; ".join(f"{kind}: {fault}" for kind, fault in faults.items()))


@cache
def readable() -> tuple[str, ...]:
    """What a command may read besides its workspace: the system, this Python, and the directories of PATH (version managers
    keep the programs beside their `shims`). Never a home directory as a whole."""
    path = [Path(part) for part in os.environ.get("PATH", os.defpath).split(":") if part.startswith("/")]
    places = [*(part.parent if part.name == "shims" else part for part in path), Path(sys.prefix), Path(sys.base_prefix)]
    home = Path.home()
    return tuple(dict.fromkeys([*SYSTEM, *(str(place) for place in places if not home.is_relative_to(place))]))


def require_sandbox(allow_unsafe: bool) -> Sandbox:
    """The sandbox for commands that nobody approves, such as a teacher's. Raises UserError where there is none, unless
    `allow_unsafe`."""
    sandbox = Sandbox.detect()
    if sandbox.kind == "none" and not allow_unsafe:
        raise UserError(f"there is no kernel sandbox for the commands ({sandbox.why})", fix=FIX)
    return sandbox

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
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from soul.errors import UserError
from workspace.launched import PYTHON, Launched

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
    @cache
    def detect() -> "Sandbox":
        """The strongest that holds here; each is tried (about 0.1 s, once per process), never judged by a version."""
        if sys.platform != "linux":
            return Sandbox("none", why="only Linux has one")
        faults = {}
        for sandbox in (Sandbox("landlock", namespaces=True), Sandbox("landlock"), Sandbox("bubblewrap")):
            if not (fault := sandbox.fault()):
                return sandbox
            faults[sandbox.kind] = fault
        return Sandbox("none", why="; ".join(f"{kind}: {fault}" for kind, fault in faults.items()))

    def describe(self) -> str:
        """One line for people."""
        if self.kind == "none":
            return f"NO SANDBOX: commands run as you and reach what you can reach ({self.why})"
        how = "Landlock and namespaces" if self.namespaces else "Landlock" if self.kind == "landlock" else "bubblewrap"
        return f"commands run in a sandbox ({how}): they write only in the workspace and have no network"

    def start(self, argv: list[str], root: Path, env: dict[str, str], timeout: int, keep: Sequence[Path] = ()) -> Launched:
        """`argv` inside the sandbox, on its way; what is in `keep` stays as it is, but under Landlock alone. Raises as Launched does."""
        return Launched(self.wrap(argv, root, env["TMPDIR"], timeout, keep), LAUNCHER, root, env)

    def wrap(self, argv: list[str], root: Path, tmp: str, timeout: int, keep: Sequence[Path]) -> list[str]:
        """What the launcher is asked to do: `launch` with the sandbox's terms, or another program to execute."""
        sizes = {name: getattr(self.limits, name) for name in ("processes", "memory", "file", "files")}
        numbers = {**sizes, "timeout": timeout, "cpu": timeout * (os.cpu_count() or 1)}
        numbers |= {"landlock": int(self.kind == "landlock"), "namespaces": int(self.namespaces)}
        granted = [*(f"read={path}" for path in readable()), f"write={root}", f"write={tmp}", *(f"keep={path}" for path in keep)]
        terms = [*(f"{name}={number}" for name, number in numbers.items()), *granted, "--", *argv]
        if self.kind == "landlock":
            return ["launch", *terms]
        binds = [part for path in [*readable(), str(LAUNCHER)] for part in ("--ro-bind-try", path, path)]
        binds += ["--proc", "/proc", "--dev", "/dev", *(part for path in (str(root), tmp) for part in ("--bind", path, path))]
        binds += [part for path in map(str, keep) for part in ("--ro-bind", path, path)]
        options = ["--unshare-all", "--die-with-parent", *binds, "--remount-ro", "/", "--chdir", str(root)]
        return [shutil.which("bwrap") or "bwrap", *options, "--", *PYTHON, str(LAUNCHER), *terms]

    def fault(self) -> str:
        """Why this sandbox does not hold here, "" when it does: a child of it must write inside, and neither outside nor connect."""
        with tempfile.TemporaryDirectory(prefix="soulsmith-") as top, socket.create_server(("127.0.0.1", 0)) as server:
            root, tmp, outside = (Path(os.path.realpath(top), name) for name in ("root", "tmp", "outside"))
            root.mkdir()
            tmp.mkdir()
            argv = [*PYTHON, "-c", _PROBE, str(outside), str(server.getsockname()[1])]
            try:
                with closing(self.start(argv, root, {"TMPDIR": str(tmp)}, 10)) as process:
                    process.wait(20)
                    said, output = process.report, process.stdout.read().decode("utf-8", "replace")
            except (OSError, subprocess.TimeoutExpired) as error:
                return f"cannot start: {getattr(error, 'strerror', None) or 'no answer'}"
            if said != "exit 0":
                return said.removeprefix("error ") or (output.strip().splitlines() or ["cannot start"])[-1]
            held = output.split() == ["refused"] * 2 and (root / "inside").exists() and not outside.exists()
            return "" if held else "does not confine"


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

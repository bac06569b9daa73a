"""What the kernel refuses a command, for each sandbox that works on this machine; each attempt is first seen to succeed without."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

from soul.errors import UserError
from workspace import launched
from workspace import sandbox as module
from workspace.sandbox import Limits, Sandbox, readable
from workspace.tools import Workspace, require_sandbox

SMALL = Limits(processes=48, memory=200 << 20, file=1 << 20)
KINDS = {
    "namespaces": Sandbox("landlock", namespaces=True, limits=SMALL),
    "landlock": Sandbox("landlock", limits=SMALL),
    "bubblewrap": Sandbox("bubblewrap", limits=SMALL),
}
NAP = f"{200 + os.getpid() % 1000}.{os.getpid()}"  # seconds that no other process of this machine sleeps
PYTHON = f"{os.path.realpath(sys.executable)} -I -S -c"


LAUNCHER_ELSEWHERE = module.LAUNCHER.read_text().replace("os.uname().machine", '"vax"')


@cache
def fault(kind):
    return KINDS[kind].fault()


@pytest.fixture(params=KINDS)
def ws(request, tmp_path):
    if why := fault(request.param):
        pytest.skip(f"{request.param} does not work here: {why}")
    return workspace(tmp_path, KINDS[request.param])


def workspace(directory, sandbox):
    (directory / "w").mkdir()
    return Workspace(directory / "w", sandbox=sandbox)


def bash(ws, command, **more):
    result = ws.run("Bash", {"command": command, **more})
    assert "the sandbox failed" not in result
    return result


@pytest.fixture
def sleeper():
    """A process of this user, outside every sandbox."""
    process = subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"], "SOME_API_KEY": "sk-canary"})
    while not Path(f"/proc/{process.pid}/environ").read_text():  # it is there a moment after the process
        time.sleep(0.01)
    yield process
    process.kill()
    process.wait()


# --- writes

WRITES = [
    "echo x > {out}/new", "echo x >> {out}/secret", "cd .. && echo x > out/new", "ln -s {out} l && echo x > l/new",
    "ln -s ../out/secret l; echo x > l", "ln {out}/secret h && echo x >> h", "echo x > /proc/self/root{out}/new",
    "echo x > /proc/self/cwd/../out/new", "mv {out}/secret .", "touch a; mv a {out}/a", "rm -rf {out}/*", "rmdir {out}/empty",
    "mkdir {out}/d", "mkfifo {out}/f", "ln -s x {out}/l", "cp /bin/true {out}/",
    PYTHON + " 'open(\"{out}/secret\", \"w\")'", PYTHON + " 'import os; os.truncate(\"{out}/secret\", 1)'",
    PYTHON + " 'import os; os.rename(\"{out}/secret\", \"{out}/other\")'",
]  # fmt: skip


def attempt(ws, command):
    """Whether anything beside the workspace changes."""
    out = ws.root.parent / "out"
    (out / "empty").mkdir(parents=True)
    (out / "secret").write_text("secret\n")
    before = snapshot(out)
    bash(ws, command.format(out=out))
    return snapshot(out) != before


def snapshot(top):
    return {path: (path.lstat().st_mode, path.is_file() and path.read_bytes()) for path in top.rglob("*")}


@pytest.mark.parametrize("command", WRITES)
def test_a_write_outside_is_refused(ws, command):
    assert not attempt(ws, command)


@pytest.mark.parametrize("command", WRITES)
def test_the_same_write_succeeds_without_a_sandbox(tmp_path, command):
    ws = workspace(tmp_path, Sandbox("none"))
    assert attempt(ws, command)


def test_modes_and_times_outside_are_refused_where_mounts_are_read_only(ws):
    if ws.sandbox == KINDS["landlock"]:
        pytest.skip("Landlock alone does not cover chmod")
    assert not attempt(ws, "chmod 777 {out}/secret; touch -d 2000-01-01 {out}/secret")


def test_inside_and_tmpdir_are_writable_and_tmpdir_goes_away(ws, tmp_path, monkeypatch):
    (tmp_path / "t").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    out = bash(ws, "mkdir a b; echo x > a/f; mv a/f b/g; ln b/g h; chmod +x h; f=$(mktemp); echo y > $f; cat $f h; echo $TMPDIR; ls")
    assert out == "y\nx\n$TMPDIR\na\nb\nh"
    assert os.listdir(tmp_path / "t") == []


def test_devices_that_every_command_uses_work(ws):
    assert bash(ws, "echo x > /dev/null; head -c 3 /dev/zero | wc -c; head -c 5 /dev/urandom | wc -c; cat <(echo y)") == "3\n5\ny"


# --- reads


def test_the_system_is_readable_and_other_directories_are_not(ws):
    (ws.root.parent / "secret").write_text("key")
    assert "root" in bash(ws, "cat /etc/passwd")
    assert bash(ws, f"{PYTHON} 'import json; print(json.dumps(1))'") == "1"
    for command in (f"cat {ws.root.parent}/secret", "cat ../secret", "ln -s ../secret l; cat l", "cat /proc/1/root/$PWD/../secret"):
        assert "exit code: 1" in bash(ws, command)


def test_keys_are_in_no_environment_that_it_can_read(ws, sleeper, monkeypatch):
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-canary")
    assert "canary" in Path(f"/proc/{sleeper.pid}/environ").read_text()
    assert "canary" not in bash(ws, "env; cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n'")


def test_readable_never_holds_a_home_as_a_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("PATH", f"{tmp_path}/me:{tmp_path}:/:relative:{tmp_path}/me/.local/bin:{tmp_path}/me/.pyenv/shims:/usr/bin")
    readable.cache_clear()
    try:
        mine = [path for path in readable() if path.startswith(str(tmp_path))]
        assert mine == [f"{tmp_path}/me/.local/bin", f"{tmp_path}/me/.pyenv"]
        assert not {"/", "/home", "/tmp", "/var", "/dev", "relative"} & set(readable())
    finally:
        readable.cache_clear()


# --- network, privileges, other processes


def test_no_network_and_no_unix_sockets(ws, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        server.settimeout(0)
        port, path = server.getsockname()[1], os.path.join(ws.root, "s")[:107]
        local.bind(path)
        local.listen()
        for target in (f"socket.create_connection(('127.0.0.1', {port}), 1)", "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
                       f"socket.socket(socket.AF_UNIX).connect('{path}')", "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"):  # fmt: skip
            assert "Network is unreachable" in bash(ws, f'{PYTHON} "import socket; {target}"')
        assert "exit code: 1" in bash(ws, f"echo x > /dev/tcp/127.0.0.1/{port}")
        with pytest.raises(BlockingIOError):
            server.accept()
        assert bash(ws, f"{PYTHON} 'import socket; a, b = socket.socketpair(); a.send(b\"x\"); print(b.recv(1))'") == "b'x'"


def test_no_new_privileges_and_no_capabilities_but_over_files(ws):
    fields = dict(line.split() for line in bash(ws, "grep -E '^(NoNewPrivs|CapEff|Seccomp):' /proc/self/status").splitlines())
    assert fields["NoNewPrivs:"] == "1"
    assert fields["Seccomp:"] == "2"
    assert int(fields["CapEff:"], 16) & ~0b11011 == 0


def test_processes_outside_cannot_be_killed(ws, sleeper):
    if ws.sandbox == KINDS["landlock"] and "refused" not in bash(ws, f"kill -0 {sleeper.pid} || echo refused"):
        pytest.skip("Landlock before version 6 does not cover signals")
    bash(ws, f"kill -9 {sleeper.pid}")
    assert sleeper.poll() is None


# --- limits


@pytest.mark.parametrize(
    "spawn",
    [f"sleep {NAP} &", f"setsid sleep {NAP} > /dev/null 2>&1 &", f"(setsid sleep {NAP} &)"],
    ids=["same group", "own session", "orphan"],
)
def test_processes_are_bounded_for_root_too(ws, spawn):
    assert bash(ws, f"for i in $(seq 200); do {spawn} done 2> err; wait").endswith("killed: more than 48 processes")
    assert running(f"sleep {NAP}") == []


def running(command):
    """The processes with this command line; the kernel may need a moment to bury one."""
    for _ in range(40):
        if not (found := children(command)):
            break
        time.sleep(0.05)
    return found


def children(command):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found += [path] if path.read_bytes().replace(b"\0", b" ").strip() == command.encode() else []
    return found


def test_many_short_processes_are_no_bomb(ws):
    assert bash(ws, "for i in $(seq 100); do /bin/true; done; echo done") == "done"


def test_memory_of_one_process_is_bounded(ws):
    assert bash(ws, f"{PYTHON} 'x = bytearray(10**9)'").endswith("MemoryError\nexit code: 1")


@pytest.mark.parametrize("hog", [
    f"{PYTHON} 'import mmap; m = mmap.mmap(-1, 10**9)\nfor i in range(0, 10**9, 4096): m[i] = 1'",
    f"for i in 1 2 3 4; do {PYTHON} 'import time; x = b\"x\" * 10**8; time.sleep(20)' & done; wait",
])  # fmt: skip
def test_memory_of_all_together_is_bounded(ws, hog):
    assert bash(ws, hog, timeout="20") == "killed: more than 200 MB of memory"


def test_file_size_is_bounded(ws):
    assert "File too large" in bash(ws, "head -c 3000000 /dev/zero > big")
    assert (ws.root / "big").stat().st_size == 1 << 20
    assert ws.run("Read", {"file_path": "big"}) == "error: big is a binary file"


def test_endless_output_is_capped_and_timed_out(ws):
    out = bash(ws, "yes", timeout="1")
    assert len(out) < 8100
    assert out.endswith("timed out after 1 s")


def test_nobody_outlives_the_command(ws):
    assert bash(ws, f"cd /; (setsid bash -c 'setsid nohup sleep {NAP} > /dev/null 2>&1 & exit' &); sleep 0.1; echo ok") == "ok"
    assert running(f"sleep {NAP}") == []


def test_nobody_outlives_the_caller(ws, tmp_path):
    code = f"""import os, time
from workspace.tools import Workspace
from workspace.sandbox import Limits, Sandbox
ws = Workspace({str(ws.root)!r}, sandbox={ws.sandbox!r})
ws.run("Bash", {{"command": "true"}})
if os.fork():
    ws.run("Bash", {{"command": "sleep {NAP}"}})
time.sleep(5)  # a child that has all that its parent has open"""
    caller = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(module.__file__).parents[1], env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    deadline = time.monotonic() + 20
    while not children(f"sleep {NAP}") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert children(f"sleep {NAP}")
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    assert running(f"sleep {NAP}") == []


# --- the warm launcher


def launcher():
    """The process that forks itself for each command of this one."""
    return launched._servers[os.getpid(), module.LAUNCHER][1]


def test_one_launcher_serves_all_commands_and_a_dead_one_is_replaced(ws):
    assert bash(ws, "echo 1") == "1"
    first = launcher()
    assert bash(ws, "echo 2") == "2" and launcher() is first
    first.kill()
    first.wait()
    assert bash(ws, "echo 3") == "3" and launcher() is not first


def test_a_command_leaves_nothing_to_the_next(ws):
    bash(Workspace(ws.root, env={"SECRET": "1"}, sandbox=ws.sandbox), "cd /; umask 077; export OTHER=1; ulimit -n 100; set -e")
    assert bash(ws, 'echo "$SECRET$OTHER"; pwd; umask; touch f; stat -c %a f; ulimit -n') == "\n.\n0022\n644\n1024"


FORKING = """
import os, sys
from pathlib import Path
from workspace import launched
from workspace.sandbox import Sandbox
from workspace.tools import Workspace

ws = Workspace(Path(sys.argv[1]), sandbox=Sandbox(sys.argv[2], namespaces=sys.argv[3] == "True"))
launcher = lambda: next(process.pid for (pid, _), (_, process) in launched._servers.items() if pid == os.getpid())
said = lambda text: print(ws.run("Bash", {"command": f"echo {text}"}), launcher(), flush=True)
said("parent")
if child := os.fork():
    os.waitpid(child, 0)
    said("parent")
else:
    said("child")
    launched.stop()
    os._exit(0)
"""


def test_a_forked_process_has_its_own_launcher(ws):
    """In a process of its own: that of the tests has threads."""
    arguments = [sys.executable, "-c", FORKING, str(ws.root), ws.sandbox.kind, str(ws.sandbox.namespaces)]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    (first, before), (child, other), (last, after) = (line.split() for line in run.stdout.splitlines())
    assert (first, child, last) == ("parent", "child", "parent") and before == after != other


def test_commands_of_many_threads_do_not_mix(ws):
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: bash(ws, f"sleep 0.0{n % 7}; echo {n}"), range(24))) == [str(n) for n in range(24)]


# --- the words stay the same


@pytest.mark.parametrize("command", [
    "echo hi; echo err >&2; exit 3", "true", "kill -9 $$", "nosuchcommand", "cat; pwd; echo ~/f", "printf '\\xff'", "ls -la /nothing", "seq 3000",
    "sleep 9 & echo $TMPDIR", "id -u; umask; touch f; stat -c %u:%a f", "env | sort", "ls /proc/self/fd",
])  # fmt: skip
def test_ordinary_commands_give_the_same_bytes_as_without(ws, command):
    bare = Workspace(ws.root, sandbox=Sandbox("none"))
    assert bash(ws, command) == bash(bare, command)


# --- which one


def test_where_the_kernel_has_landlock_it_confines():
    if ctypes.CDLL(None).syscall(444, None, ctypes.c_long(0), ctypes.c_long(1)) < 1:
        pytest.skip("this kernel has no Landlock")
    assert fault("landlock") == ""


def test_what_cannot_be_confined_is_not_executed(ws, monkeypatch):
    for launcher, words in (("raise SystemExit(3)", "no report"), (LAUNCHER_ELSEWHERE, "no system call numbers for vax")):
        (file := ws.root.parent / f"{words}.py").write_text(launcher)
        monkeypatch.setattr(module, "LAUNCHER", file)
        assert ws.run("Bash", {"command": "touch ran"}) == f"error: the sandbox failed: {words}"
    assert not (ws.root / "ran").exists()


def test_a_sandbox_that_does_not_confine_is_found_out(monkeypatch):
    monkeypatch.setattr(Sandbox, "wrap", lambda self, argv, *_: ["bash", "-c", 'printf "exit 0" >&3; exec "$@"', "bash", *argv])
    assert Sandbox("landlock").fault() == "does not confine"
    monkeypatch.setattr(Sandbox, "wrap", lambda self, argv, *_: ["/missing"])
    assert Sandbox("landlock").fault() == "cannot start: No such file or directory"


@pytest.fixture
def nothing_works(monkeypatch):
    monkeypatch.setattr(Sandbox, "fault", lambda self: "not in this kernel")
    Sandbox.detect.cache_clear()
    yield
    Sandbox.detect.cache_clear()


def test_none_is_said_loudly_and_required_only_on_request(nothing_works, tmp_path):
    sandbox = Sandbox.detect()
    assert sandbox.kind == "none"
    assert sandbox.describe().startswith("NO SANDBOX: commands run as you")
    with pytest.raises(UserError, match=r"no kernel sandbox.*landlock: not in this kernel.*bubblewrap: not in this kernel.*Linux 5\.13"):
        require_sandbox(False)
    assert require_sandbox(True) is sandbox
    assert Workspace(tmp_path).run("Bash", {"command": "echo hi"}) == "hi"


def test_the_strongest_that_holds_is_taken_and_described(monkeypatch):
    for kind, sandbox in KINDS.items():
        monkeypatch.setattr(
            Sandbox,
            "fault",
            lambda self, kind=sandbox.kind, ns=sandbox.namespaces: "" if (self.kind, self.namespaces) == (kind, ns) else "no",
        )
        Sandbox.detect.cache_clear()
        found = require_sandbox(False)
        assert (found.kind, found.namespaces) == (sandbox.kind, sandbox.namespaces)
        assert kind.capitalize() in found.describe().replace("and n", "and N").replace("(b", "(B")
    Sandbox.detect.cache_clear()


def test_a_device_in_the_workspace_is_no_file(tmp_path):
    if os.getuid() or shutil.which("mknod") is None:
        pytest.skip("only root makes devices")
    try:
        os.mknod(tmp_path / "zero", 0o20666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("devices cannot be made here")
    ws = Workspace(tmp_path)
    assert ws.run("Read", {"file_path": "zero"}) == "error: zero is not a regular file"
    assert ws.run("Grep", {"pattern": "x", "path": "zero"}) == "error: zero is not a regular file"
    assert ws.run("Edit", {"file_path": "zero", "old_string": "a", "new_string": "b"}) == "error: zero is not a regular file"


# --- git's own files


def repository(ws):
    (ws.root / ".git/hooks").mkdir(parents=True)
    (ws.root / ".git/config").write_text("[core]\n")
    return Workspace(ws.root, sandbox=ws.sandbox)


@pytest.mark.parametrize("command", [
    "echo x > .git/hooks/pre-commit", "echo x >> .git/config", "rm -rf .git", "mv .git old && mkdir -p .git/hooks", "chmod 777 .git/config",
    "ln -s .git g; echo x > g/hooks/pre-commit", "umount .git; echo x > .git/config", "echo ../evil > .git/commondir",
    "mount -o remount,rw .git; echo x > .git/config",
])  # fmt: skip
def test_a_repository_that_was_there_is_read_only(ws, command):
    if ws.sandbox == KINDS["landlock"]:
        pytest.skip("Landlock alone has no exceptions")
    ws = repository(ws)
    before = snapshot(ws.root / ".git")
    bash(ws, command)
    assert snapshot(ws.root / ".git") == before
    assert bash(ws, "cat .git/config; echo x > other; cat other") == "[core]\nx"


def test_a_repository_that_a_command_makes_is_its_own_and_one_that_went_away_is_no_error(ws):
    assert bash(ws, "mkdir .git; echo 1 > .git/config") == "(no output)"
    assert bash(ws, "echo 2 >> .git/config; cat .git/config") == "1\n2"
    ws = Workspace(ws.root, sandbox=ws.sandbox)
    shutil.rmtree(ws.root / ".git")
    assert bash(ws, "echo hi") == "hi"

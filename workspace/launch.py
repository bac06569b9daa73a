"""The launcher of a sandboxed command: confines itself by the kernel's means, then executes the command and watches it.

It is a program of its own, because no Python code may run between fork and exec of a process that has threads:
`python -I -S launch.py serve=SOCKET`, which forks itself for each command (launched.py asks it to), or inside bubblewrap
`python -I -S launch.py key=value … -- COMMAND`. It trusts its arguments (sandbox.py writes them) and nothing that the command
does. What became of the command goes, as one line and when all of it has ended, into the descriptor 3: `exit N` (negative: a
signal), `timeout`, `processes`, `memory`, or `error WHY`; no report means that nothing is known. Whatever cannot be confined is
not executed.

Every fork of the command waits for this process to allow it (seccomp's user notification), so their number is exact for
root too, where RLIMIT_NPROC does not bind, and nobody multiplies while he is being killed.
Numbers are those of include/uapi/linux: landlock.h, seccomp.h, prctl.h, sched.h, mount.h, capability.h.
"""

import _socket  # `socket` takes 6 ms to import, a third of this program's start
import ctypes
import os
import resource
import select
import struct
import sys
import time

TICK = 0.05  # seconds
REPORT = 3
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
KEPT_CAPABILITIES = (0, 1, 3, 4)  # CHOWN, DAC_OVERRIDE, FOWNER, FSETID: root's files stay root's
SYSCALLS = {  # machine -> audit architecture, seccomp, socket, truncate, and all that fork
    "x86_64": (0xC000003E, 317, 41, 76, (56, 57, 58, 435)),
    "aarch64": (0xC00000B7, 277, 198, 45, (220, 435)),
    "riscv64": (0xC00000F3, 277, 198, 45, (220, 435)),
}
IO_URING_SETUP, ENOSYS, ENETUNREACH, EPERM = 425, 38, 101, 1
ERRNO, NOTIFY, ALLOW = 0x50000, 0x7FC00000, 0x7FFF0000
LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args) -> int:
    """A function of libc; numbers are passed as `long`, which is what `syscall` and `prctl` read. Raises OSError."""
    result = getattr(LIBC, name)(*(ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


# --- what the command may touch


def isolate(write: list[str], keep: list[str]) -> None:
    """Own process ids, network and mounts, in which everything but `write`, and `keep` too, is read-only. Without root, in
    a user namespace of the same user. Landlock does not cover chmod, chown and times; read-only mounts do."""
    uid, gid = os.getuid(), os.getgid()
    call("unshare", 0x20000 | 0x8000000 | 0x20000000 | 0x40000000 | (0x10000000 if uid else 0))  # NS, IPC, PID, NET, USER
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    here = os.getcwd()
    call("mount", b"none", b"/", None, 0x44000, None)  # REC | PRIVATE
    for path in [*write, *keep]:  # a place where something is mounted cannot be moved or removed either
        call("mount", os.fsencode(path), os.fsencode(path), None, 0x5000, None)  # REC | BIND
    _set_mount("/", 0x8000, read_only=True)  # AT_RECURSIVE
    for path in write:
        _set_mount(path, 0, read_only=False)
    call("mount", b"tmpfs", b"/dev/shm", b"tmpfs", 6, b"size=256m")  # NOSUID | NODEV; semaphores of multiprocessing
    os.chdir(here)  # the old directory is on the read-only mount


def _set_mount(path: str, flags: int, *, read_only: bool) -> None:
    attributes = struct.pack("=4Q", int(read_only), int(not read_only), 0, 0)
    call("syscall", 442, -100, os.fsencode(path), flags, attributes, len(attributes))  # mount_setattr


def landlock(read: list[str], write: list[str]) -> int:
    """Confine this process and its children for good; gives the kernel's Landlock version (docs.kernel.org, Landlock)."""
    version = call("syscall", 444, None, 0, 1)
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    files = rights & 0b1100000000000111  # execute, write, read, truncate, ioctl
    net, scope = 3 if version >= 4 else 0, 3 if version >= 6 else 0  # bind, connect; abstract sockets, signals
    attributes = struct.pack("=3Q", rights, net, scope)
    ruleset = call("syscall", 444, attributes, len(attributes), 0)
    grants = [(path, 0b1101) for path in read]  # execute, read file, read directory
    grants += [(path, rights & ~0b100001000000) for path in write]  # all but making devices
    for path, allowed in [*grants, *((device, files & ~1) for device in DEVICES)]:
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not here, or not for this user: nothing to grant
            continue
        allowed &= rights if os.path.isdir(path) else files
        call("syscall", 445, ruleset, 1, struct.pack("=Qi", allowed, handle), 0)
        os.close(handle)
    call("prctl", 38, 1, 0, 0, 0)  # NO_NEW_PRIVS
    call("syscall", 446, ruleset, 0)
    os.close(ruleset)
    return version


def filter_calls(*, truncate: bool) -> int:
    """A seccomp filter: no sockets (the network, and services behind Unix sockets), forks only as the watcher allows. Gives the
    descriptor where they ask. `truncate`: also refuse truncate(path), which Landlock covers from its version 3 on."""
    if (machine := os.uname().machine) not in SYSCALLS:
        raise OSError(f"no system call numbers for {machine}")
    architecture, seccomp, sockets, truncate_number, forks = SYSCALLS[machine]
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, architecture), (0x06, 0, 0, ERRNO | ENOSYS), (0x20, 0, 0, 0)]
    if architecture == SYSCALLS["x86_64"][0]:
        program += [(0x35, 0, 1, 0x40000000), (0x06, 0, 0, ERRNO | ENOSYS)]  # the x32 numbers
    actions = {sockets: ERRNO | ENETUNREACH, IO_URING_SETUP: ERRNO | ENOSYS} | dict.fromkeys(forks, NOTIFY)
    for number, action in (actions | ({truncate_number: ERRNO | EPERM} if truncate else {})).items():
        program += [(0x15, 0, 1, number), (0x06, 0, 0, action)]
    program.append((0x06, 0, 0, ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    call("prctl", 38, 1, 0, 0, 0)
    return call("syscall", seccomp, 1, 8, struct.pack("@HP", len(program), ctypes.addressof(code)))  # SET_MODE_FILTER, NEW_LISTENER


def limit(options: dict[str, int]) -> None:
    """Resource limits of each process, and no capabilities but those over files."""
    wanted = {"DATA": options["memory"], "FSIZE": options["file"], "NOFILE": options["files"], "CPU": options["cpu"], "CORE": 0}
    for name, value in wanted.items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    for capability in range(64):
        if capability not in KEPT_CAPABILITIES:
            LIBC.prctl(24, ctypes.c_long(capability), 0, 0, 0)  # CAPBSET_DROP; who may not drop them has none


# --- watching it


def family() -> tuple[list[int], int, int]:
    """This process and all that descend from it; their threads, and their bytes of anonymous and shared memory, where what
    they share counts for each."""
    children, sizes = {}, {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            with open(f"/proc/{pid}/status", errors="replace") as file:
                fields = dict(line.split()[:2] for line in file if line.startswith(("PPid", "Threads", "RssA", "RssS")))
        except OSError:
            continue
        children.setdefault(int(fields["PPid:"]), []).append(pid)
        sizes[pid] = int(fields["Threads:"]), 1024 * (int(fields.get("RssAnon:", 0)) + int(fields.get("RssShmem:", 0)))
    found = [os.getpid()]
    for pid in found:  # grows while it is walked
        found += children.get(pid, [])
    threads, memory = (sum(size[index] for pid, size in sizes.items() if pid in found[1:]) for index in (0, 1))
    return found, threads, memory


def watch(child: int, forks: int, options: dict[str, int]) -> str:
    """Allow the command's forks and wait for its end; gives the report. Buries orphans meanwhile."""
    now = time.monotonic()
    deadline, look = now + options["timeout"], now + TICK
    poll, asked, counted = select.poll(), 0, 1
    for handle in (os.pidfd_open(child), forks):
        poll.register(handle, select.POLLIN)
    while True:
        events = dict(poll.poll(max(0, 1000 * (min(look, deadline) - now))))
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == child:
                return f"exit {os.waitstatus_to_exitcode(ended[1])}"
        asked += bool(events.get(forks, 0) & select.POLLIN)
        now = time.monotonic()
        if now >= look or counted + asked >= options["processes"]:
            _, counted, memory = family()
            took = time.monotonic() - now
            asked, look = bool(events.get(forks, 0) & select.POLLIN), now + max(TICK, 10 * took)  # a tenth of a core at most
            if memory > options["memory"]:
                return "memory"
            if counted + asked > options["processes"]:
                return "processes"
        if now >= deadline:
            return "timeout"
        if events.get(forks, 0) & select.POLLIN:
            allow(forks)


def allow(forks: int) -> None:
    """Let the one who asks go on."""
    notice = ctypes.create_string_buffer(80)
    if LIBC.ioctl(forks, ctypes.c_ulong(0xC0502100), notice) == 0:  # NOTIF_RECV; fails when he has been killed since
        LIBC.ioctl(forks, ctypes.c_ulong(0xC0182101), notice.raw[:8] + struct.pack("=qiI", 0, 0, 1))  # NOTIF_SEND, CONTINUE


def bury() -> None:
    """Kill every descendant: orphans come to this process, so nobody gets away."""
    while True:
        for pid in family()[0][1:]:
            LIBC.kill(pid, 9)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def main(arguments: list[str]) -> None:
    end = arguments.index("--")
    pairs = [argument.partition("=")[::2] for argument in arguments[:end]]
    read, write, keep = ([value for key, value in pairs if key == kind] for kind in ("read", "write", "keep"))
    options = {key: int(value) for key, value in pairs if key not in ("read", "write", "keep")}
    os.set_inheritable(REPORT, False)
    try:
        call("prctl", 1, 9, 0, 0, 0)  # PDEATHSIG: with whoever started this, all of it ends
        if options["namespaces"]:
            isolate(write, keep)
            write.append("/dev/shm")
            if inside := os.fork():  # the child is the first process of the new ids; when it ends the kernel kills the rest
                os.waitpid(inside, 0)
                os._exit(0)
            call("prctl", 1, 9, 0, 0, 0)
            call("mount", b"proc", b"/proc", b"proc", 14, None)  # NOSUID | NODEV | NOEXEC
        call("prctl", 36, 1, 0, 0, 0)  # CHILD_SUBREAPER
        ours, theirs = _socket.socketpair()
        if not (child := os.fork()):
            call("prctl", 1, 9, 0, 0, 0)
            limit(options)
            version = landlock(read, write) if options["landlock"] else 3
            forks = struct.pack("i", filter_calls(truncate=version < 3))
            theirs.sendmsg([b"+"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, forks)])
            os.execvp(arguments[end + 1], arguments[end + 1 :])
        theirs.close()
        for _, _, forks in ours.recvmsg(1, _socket.CMSG_LEN(4))[1]:  # none when the child has said what is wrong
            said = watch(child, *struct.unpack("i", forks), options)
            bury()
            os.write(REPORT, said.encode())
    except BaseException as error:
        os.write(REPORT, f"error {error}".encode())
    os._exit(0)


def serve(server: _socket.socket) -> None:
    """Fork a launcher for each request, until whoever started this is gone. A request: the directory, the number of variables, the
    environment and the command, with NULs between, and descriptors for the output and the report."""
    os.set_inheritable(server.fileno(), False)
    poll, starter = select.poll(), os.pidfd_open(os.getppid())
    poll.register(server.fileno(), select.POLLIN)
    poll.register(starter, select.POLLIN)
    while starter not in dict(poll.poll()):
        request, passed, *_ = server.recvmsg(1 << 20, _socket.CMSG_LEN(8), _socket.MSG_CMSG_CLOEXEC)
        if not request:
            break
        output, report = struct.unpack("2i", passed[0][2])
        if not os.fork():
            begin(request.split(b"\0"), output, report)
        os.close(output)
        os.close(report)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


def begin(request: list[bytes], output: int, report: int) -> None:
    """Become the launcher that is asked for. Tells its number first, with a descriptor of this process."""
    for handle, number in ((output, 1), (output, 2), (report, REPORT)):
        os.dup2(handle, number)
    try:
        caller, this = _socket.socket(fileno=REPORT), struct.pack("i", os.pidfd_open(os.getpid()))
        caller.sendmsg([b"%d" % os.getpid()], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, this)])
        os.setsid()
        directory, count, *rest = request
        os.chdir(directory)
        os.environb.clear()
        os.environb.update(variable.split(b"=", 1) for variable in rest[: int(count)])
        command = [os.fsdecode(part) for part in rest[int(count) :]]
        if command[0] == "launch":
            main(command[1:])
        os.execvp(command[0], command)
    except BaseException as error:
        os.write(REPORT, f"error cannot start: {getattr(error, 'strerror', None) or error}".encode())
    os._exit(1)


if __name__ == "__main__":
    if sys.argv[1].startswith("serve="):
        serve(_socket.socket(fileno=int(sys.argv[1].partition("=")[2])))
    else:
        main(sys.argv[1:])

"""The process in which a program that a model wrote is run: `python -I jail.py FD`, with the work on its standard input.

It knows nothing but Python's own library. Before the program it puts itself behind a wall that nothing inside can take down
again: a seccomp filter, which any user of Linux may put on himself (no root, no namespace, no container is needed) and which
threads and children inherit. Behind it there are

    no network          no socket can be made (a pair of them within the process can, which reaches nobody else)
    no other process    no fork, no other program, no signal to anyone, no say in who runs when, no memory or queue in
                        common; threads count against time and memory
    no files written    none is opened for writing, made, renamed, changed or removed, anywhere
    limits              seconds of CPU, bytes of memory, open files; they cannot be raised again

and system calls newer than Linux 5.0 do not exist, as on an older kernel. What the user may read, files and the environment of other
processes, the program can read; of it nothing gets out, for all that is told of a program is one of the words in `KINDS`.

The last line of work decides: only a program that was run to its end makes this file write the word that stands for it. A
program that looks for that word in its own interpreter could find it; the wall is against damage, not against a cheat.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import json
import math
import os
import platform
import resource
import signal
import struct
import sys
from typing import NoReturn

# Number of each system call that is refused with EPERM: on x86-64 and on arm64, which lacks the older ones.
_REFUSED: dict[str, tuple[int, int | None]] = {
    # network and other processes
    "socket": (41, 198), "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "mq_open": (240, 180), "mq_unlink": (241, 181), "memfd_create": (319, 279),
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193),
    "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188),
    "msgctl": (71, 187), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "sendmsg": (46, 211),
    "sendmmsg": (307, 269), "setpriority": (141, 140), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122), "sched_setattr": (314, 274), "ioprio_set": (251, 30), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "setpgid": (109, 154), "flock": (73, 32),
    # files
    "creat": (85, None), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None),
    "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None),
    "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "mknod": (133, None), "mknodat": (259, 33),
    "truncate": (76, 45), "ftruncate": (77, 46), "fallocate": (285, 47), "chmod": (90, None), "fchmod": (91, 52),
    "fchmodat": (268, 53), "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    # limits, and what a root might do
    "setrlimit": (160, 164), "prlimit64": (302, 261), "mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51),
    "pivot_root": (155, 41), "setns": (308, 268), "unshare": (272, 97), "swapon": (167, 224), "swapoff": (168, 225),
    "reboot": (169, 142), "acct": (163, 89), "sethostname": (170, 161), "setdomainname": (171, 162),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "ioperm": (173, None), "iopl": (172, None), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "quotactl": (179, 60), "syslog": (103, 116), "open_by_handle_at": (304, 265),
}  # fmt: skip
# Refused by what one of their arguments holds: (number on each, place of the argument).
_OPENS: dict[str, tuple[tuple[int, int | None], int]] = {"open": ((2, None), 1), "openat": ((257, 56), 2)}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Of these nothing but what is harmless: (number on each, place of the argument, what it may hold). The others of fcntl and ioctl
# send signals to any process, lock files, and type into terminals.
_SOME: dict[str, tuple[tuple[int, int], int, tuple[int, ...]]] = {
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 1030, 1032)),
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, TCGETS2
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A)),
}
# F_SETFL with nothing but O_APPEND, O_NONBLOCK and what a file was opened with (O_LARGEFILE, of both machines): with O_ASYNC it
# sends signals.
_FCNTL, _F_SETFL, _STATUS = (72, 25), 4, 0o3 | 0o2000 | 0o4000 | 0o100000 | 0o400000
# Only to the other end of a pair: (number on each, place of an address that is none).
_SENDTO = ((44, 206), 4)
_CLONE = (56, 220)
_CLONE_THREAD = 0x10000
# The first number of Linux 5.1, from which on numbers are the same on every machine: io_uring, clone3, openat2 …
_NEWER = 424
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
# Instructions of a filter, and what it answers.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
# What may be told of an error: which of Python's own it is.
KINDS = {
    kind for kind in vars(builtins).values() if isinstance(kind, type) and issubclass(kind, BaseException)
}
_SET_PARENT_DEATH_SIGNAL, _SET_SECCOMP, _SET_NO_NEW_PRIVILEGES = 1, 22, 38


def main() -> NoReturn:
    """Read {"program", "word", "cpu_s", "memory_bytes"}, run the program, and write {"word", "outcome"} to FD."""
    fd, work = int(sys.argv[1]), json.loads(sys.stdin.buffer.read())
    try:
        close_in(work["cpu_s"], work["memory_bytes"])
    except OSError as error:
        outcome = f"no sandbox: {error.errno}"
    else:
        outcome = _run(work["program"])
    os.write(fd, json.dumps({"word": work["word"], "outcome": outcome}).encode())
    os._exit(0)


def close_in(cpu_s: int, memory_bytes: int) -> None:
    """Set the limits of this process, for its program from now on, and the filter. Raises OSError where there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    _call(libc, _SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    used = math.ceil(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
    for limit, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (used + cpu_s, used + cpu_s + 1))
    code = build_filter(platform.machine())
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    _call(libc, _SET_NO_NEW_PRIVILEGES, 1)
    _call(libc, _SET_SECCOMP, 2, ctypes.create_string_buffer(program, len(program)))


def build_filter(machine: str) -> bytes:
    """The filter's instructions, 8 bytes each. Raises OSError for a machine whose system calls are not known here."""
    if machine not in _MACHINES:
        raise OSError(errno.ENOSYS, f"the system calls of {machine} are not known")
    which, architecture = _MACHINES[machine]
    number, refuse = (_LOAD, 0, 0, 0), (_RETURN, 0, 0, _ERROR | errno.EPERM)
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), number]
    code += [(_AT_LEAST, 0, 1, _NEWER), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    for numbers in _REFUSED.values():
        if (own := numbers[which]) is not None:
            code += [(_EQUAL, 0, 1, own), refuse]
    for numbers, place in _OPENS.values():
        if (own := numbers[which]) is not None:
            flags = (_LOAD, 0, 0, 16 + 8 * place)
            code += [(_EQUAL, 0, 4, own), flags, (_ANY_BIT, 0, 1, _WRITES), refuse, number]
    # fcntl(…, F_SETFL, flags): the command first, then the flags.
    code += [(_EQUAL, 0, 6, _FCNTL[which]), (_LOAD, 0, 0, 24), (_EQUAL, 0, 3, _F_SETFL), (_LOAD, 0, 0, 32)]
    code += [(_ANY_BIT, 0, 1, 0xFFFFFFFF & ~_STATUS), refuse, number]
    for some, place, allowed in _SOME.values():
        code += [(_EQUAL, 0, len(allowed) + 3, some[which]), (_LOAD, 0, 0, 16 + 8 * place)]
        code += [(_EQUAL, len(allowed) - at, 0, value) for at, value in enumerate(allowed)]
        code += [refuse, number]
    sendto, place = _SENDTO
    code += [(_EQUAL, 0, 6, sendto[which]), (_LOAD, 0, 0, 16 + 8 * place), (_ANY_BIT, 2, 0, 0xFFFFFFFF)]
    code += [(_LOAD, 0, 0, 20 + 8 * place), (_ANY_BIT, 0, 1, 0xFFFFFFFF), refuse, number]
    flags = (_LOAD, 0, 0, 16)
    code += [(_EQUAL, 0, 4, _CLONE[which]), flags, (_ANY_BIT, 1, 0, _CLONE_THREAD), refuse, number]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _call(libc: ctypes.CDLL, *arguments: object) -> None:
    padded = [*arguments, *[0] * (5 - len(arguments))]
    if libc.prctl(*[ctypes.c_ulong(a) if isinstance(a, int) else a for a in padded]):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _run(program: str) -> str:
    """ "passed", or which of Python's own errors ended the program."""
    try:
        exec(compile(program, "<program>", "exec"), {})
    except MemoryError:
        return "out of memory"
    except BaseException as error:
        return next(kind.__name__ for kind in type(error).__mro__ if kind in KINDS)
    return "passed"


if __name__ == "__main__":
    main()

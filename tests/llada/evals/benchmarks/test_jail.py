"""The filter of the jail as instructions: jumps that stay inside, and a machine that is not known. What it keeps out is
tested in test_sandbox.py."""

from __future__ import annotations

import struct

import pytest

from llada.evals.benchmarks.jail import build_filter


@pytest.mark.parametrize(("machine", "socket_call", "clone"), [("x86_64", 41, 56), ("aarch64", 198, 220)])
def test_the_filter_answers_by_number_and_argument(machine: str, socket_call: int, clone: int) -> None:
    code = build_filter(machine)
    program = [struct.unpack("HBBI", code[start : start + 8]) for start in range(0, len(code), 8)]
    architecture = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]

    def answer(number: int, *arguments: int, arch: int = architecture) -> int:
        """As the kernel would run it."""
        data = struct.pack("IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
        at, accumulator = 0, 0
        while True:
            operation, jump_true, jump_false, k = program[at]
            at += 1
            if operation == 0x06:
                return k
            if operation == 0x20:
                (accumulator,) = struct.unpack_from("I", data, k)
                continue
            holds = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[operation]
            at += jump_true if holds else jump_false

    allow, refused, unknown = 0x7FFF0000, 0x00050001, 0x00050026
    assert answer(socket_call, 2, 1) == refused
    assert answer(clone, 0x3D0F00) == allow  # what a thread is made with
    assert answer(clone, 0x1200011) == refused  # what fork() asks for
    openat = {"x86_64": 257, "aarch64": 56}[machine]
    assert answer(openat, 3, 4, 0o2000000) == allow
    for flags in (0o1, 0o2, 0o100, 0o1000):
        assert answer(openat, 3, 4, flags) == refused
    assert [answer(number) for number in (424, 435, 437, 0x40000001)] == [unknown] * 4
    assert answer(0, arch=0x40000003) == 0x80000000  # another architecture's calls end the process
    fcntl, ioctl, sendto = {"x86_64": (72, 16, 44), "aarch64": (25, 29, 206)}[machine]
    assert [answer(fcntl, 3, command) for command in (0, 1, 2, 3, 1030)] == [allow] * 5
    # Whom a signal goes to, and which; locks and leases.
    assert [answer(fcntl, 3, command, 1) for command in (5, 6, 8, 10, 15, 37, 1024, 1026)] == [refused] * 8
    assert answer(fcntl, 3, 4, 0o4000) == allow
    assert answer(fcntl, 3, 4, 0o20000) == refused
    assert answer(ioctl, 0, 0x5401) == allow
    assert [answer(ioctl, 0, command) for command in (0x5412, 0x5452, 0x8901, 0x8902)] == [refused] * 4
    assert answer(sendto, 3, 1, 2, 0, 0) == allow
    assert [answer(sendto, 3, 1, 2, 0, address) for address in (8, 8 << 32)] == [refused] * 2
    reading = {"x86_64": 0, "aarch64": 63}[machine]
    assert answer(reading, 0, 0, 100) == allow


def test_a_machine_that_is_not_known_is_named() -> None:
    with pytest.raises(OSError, match="riscv64"):
        build_filter("riscv64")

"""A thread of this process with a network of its own: loopback, and one TUN device.

What the thread starts, threads and processes alike, is in that network, too. It ends with them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct

DEVICE = b"net0"
MTU_BYTES = 9000
"""Large packets: a program in Python passes each of them on."""
MASK = "255.255.255.0"

_NEW_NETWORK, _NEW_MOUNTS = 0x4000_0000, 0x0002_0000
_MS_PRIVATE_ALL = 0x4000 | 1 << 18
_TUN_SET_DEVICE = 0x4004_54CA
_TUN, _NO_PACKET_INFO = 0x0001, 0x1000
_SET_ADDRESS, _SET_MASK, _SET_MTU, _SET_FLAGS = 0x8916, 0x891C, 0x8922, 0x8914
_UP_AND_RUNNING = 0x1 | 0x40

_libc = ctypes.CDLL(None, use_errno=True)


class NotPermitted(Exception):
    """This machine does not let us make hosts; says what is missing."""


def enter_new(address: str) -> int:
    """Move the calling thread into a new network where it has `address`.

    Returns the descriptor of the device: what the network's packets are read from, and written to.

    Raises:
        NotPermitted: we may not.
    """
    _call("unshare", _NEW_NETWORK | _NEW_MOUNTS, missing="CAP_SYS_ADMIN")
    # Libraries look for network devices in /sys, which shows those of whoever mounted it.
    _call("mount", b"none", b"/", None, _MS_PRIVATE_ALL, None, missing="CAP_SYS_ADMIN")
    _call("mount", b"sysfs", b"/sys", b"sysfs", 0, None, missing="the right to mount /sys")
    try:
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise NotPermitted(f"/dev/net/tun is missing: {error.strerror}") from None
    try:
        wanted = struct.pack("16sH22x", DEVICE, _TUN | _NO_PACKET_INFO)
        fcntl.ioctl(device, _TUN_SET_DEVICE, wanted)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            _configure(control, DEVICE, address)
            _set_up(control, b"lo")
    except OSError as error:
        os.close(device)
        raise NotPermitted(f"CAP_NET_ADMIN is missing: {error.strerror}") from None
    return device


def _configure(control: socket.socket, name: bytes, address: str) -> None:
    fcntl.ioctl(control, _SET_ADDRESS, _request(name, _address(address)))
    fcntl.ioctl(control, _SET_MASK, _request(name, _address(MASK)))
    fcntl.ioctl(control, _SET_MTU, _request(name, struct.pack("i", MTU_BYTES)))
    _set_up(control, name)


def _set_up(control: socket.socket, name: bytes) -> None:
    fcntl.ioctl(control, _SET_FLAGS, _request(name, struct.pack("h", _UP_AND_RUNNING)))


def _request(name: bytes, value: bytes) -> bytes:
    """A struct ifreq."""
    return struct.pack("16s24s", name, value)


def _address(dotted: str) -> bytes:
    """A struct sockaddr_in."""
    return struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(dotted))


def _call(function: str, *arguments: object, missing: str) -> None:
    if getattr(_libc, function)(*arguments) != 0:
        code = ctypes.get_errno()
        reason = f"{os.strerror(code)} ({errno.errorcode.get(code, code)})"
        raise NotPermitted(f"{missing} is missing: {function}: {reason}")

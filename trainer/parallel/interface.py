"""The network interface through which this machine meets the others of a job.

gloo takes the one that this machine's own name leads to.  On Debian and Ubuntu that is the loopback unless an
administrator has changed it (127.0.1.1 in /etc/hosts), and so it is where the name does not resolve: no other machine
finds it there.
"""

import fcntl
import ipaddress
import logging
import os
import socket
import struct
from pathlib import Path

logger = logging.getLogger(__name__)

VARIABLE = "GLOO_SOCKET_IFNAME"
"""The variable that tells PyTorch the interface of all its groups of gloo; what a user has set stands."""

_SIOCGIFADDR = 0x8915
"""Linux's request for the IPv4 address of an interface."""


def choose_interface(first_host: str, port: int) -> None:
    """Have gloo use the interface that leads to the first machine, where it would take the loopback by itself.  To
    be called on every machine of a job of several before the first group is made."""
    if VARIABLE in os.environ or not _name_is_loopback():
        return
    name = interface_towards(first_host, port)
    # Machines that are one for the sake of a test meet on its loopback.
    if name not in ("", "lo"):
        os.environ[VARIABLE] = name
        logger.info("this machine's own name leads to its loopback: gloo uses %s, which leads to %s", name, first_host)


def interface_towards(host: str, port: int) -> str:
    """The interface whose address this machine has in connections to `host`; empty if none has it as its first."""
    family, _, _, _, there = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        # Nothing is sent.
        sock.connect(there)
        address = ipaddress.ip_address(sock.getsockname()[0].partition("%")[0])
    return next((name for _, name in socket.if_nameindex() if address in _addresses(name)), "")


def _name_is_loopback() -> bool:
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return True
    return ipaddress.ip_address(found[0][4][0]).is_loopback


def _addresses(interface: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    found: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack("256s", interface.encode()))
            found.append(ipaddress.IPv4Address(answer[20:24]))
        except OSError:
            # The interface has no IPv4 address.
            pass
    known = Path("/proc/net/if_inet6")
    for line in known.read_text().splitlines() if known.is_file() else ():
        digits, *_, name = line.split()
        if name == interface:
            found.append(ipaddress.IPv6Address(bytes.fromhex(digits)))
    return found

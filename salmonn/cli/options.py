"""The flags of commands that others reach: at which address, and what one file of theirs may cost."""

import ipaddress

from salmonn.config import FlagParser


def add_door(parser: FlagParser, *, port: int) -> None:
    """Add --host and --port."""
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=port, help="to listen at; 0 takes a free one")


def add_reading(parser: FlagParser, *, seconds: float) -> None:
    """Add who reads files, and the limits of one of them."""
    parser.add_argument("--workers", type=int, default=2, help="processes that read files, 1 or more")
    parser.add_argument("--read-seconds", type=float, default=seconds, help="that reading a file may take")
    parser.add_argument("--read-gib", type=float, default=4.0, help="of memory that reading a file may take")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

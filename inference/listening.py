"""Where a server listens."""

import argparse
import socket

from common import UserError, non_negative_int


def port(text: str) -> int:
    """A port on the command line; 0 for any that is free.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    number = non_negative_int(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"must be at most 65535, not {number}")
    return number


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: if the port is taken, or there is no such host.
    """
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}") from None

"""Put before a subprocess's modules: whoever reaches beyond this machine fails, and is written down."""

import os
import socket
import traceback

_connect, _getaddrinfo = socket.socket.connect, socket.getaddrinfo
_LOCAL = ("127.0.0.1", "::1", "localhost", "0.0.0.0", socket.gethostname(), "", None)


def _refuse(where):
    with open(os.environ["BAPO_NETWORK_LOG"], "a", encoding="utf-8") as file:
        file.write(f"{where}\n{''.join(traceback.format_stack(limit=12))}\n")
    raise OSError(f"the network is forbidden in this test: {where}")


def connect(self, address):
    if self.family != socket.AF_UNIX and address[0] not in _LOCAL:
        _refuse(address)
    return _connect(self, address)


def getaddrinfo(host, *args, **kwargs):
    if host not in _LOCAL:
        _refuse(host)
    return _getaddrinfo(host, *args, **kwargs)


socket.socket.connect, socket.getaddrinfo = connect, getaddrinfo

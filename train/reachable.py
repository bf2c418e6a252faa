"""Whether a site can be reached, asked once, before a library that would try for minutes."""

import socket
from urllib.parse import urlsplit

SECONDS = 5.0  # to wait for an answer


def connect(url: str) -> None:
    """Open a connection to the host of a URL, and close it.

    Raises:
      OSError: the host does not answer within `SECONDS`.
    """
    site = urlsplit(url)
    port = site.port or (80 if site.scheme == "http" else 443)
    socket.create_connection((site.hostname or "", port), timeout=SECONDS).close()

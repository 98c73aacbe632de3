"""A database that a trainer reads: its name is looked up before the process is confined.

Afterwards there is no name server to ask, and no file of hosts. Python's drivers look names up by
`socket.getaddrinfo`, which then knows this one; PostgreSQL's library is given the address beside the
name, which it goes on comparing certificates with.
"""

from __future__ import annotations

import functools
import socket
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306, "mssql": 1433, "oracle": 1521}


def address_of(url: str) -> tuple[str, int] | None:
    """Host and port of a database; None if the URL is empty, or of a file."""
    parts = urlsplit(url)
    kind = parts.scheme.partition("+")[0]
    if not kind or kind == "sqlite":
        return None
    return parts.hostname or "localhost", parts.port or _PORTS.get(kind, 0)


def certificates_of(url: str) -> list[Path]:
    """Files that the connection's own settings name: of TLS."""
    named = parse_qsl(urlsplit(url).query)
    return [Path(value).resolve() for key, value in named if "ssl" in key and "/" in value]


def looked_up(url: str, place: tuple[str, int]) -> str:
    """The URL to connect by from a process that can look up no name any more; this one, for good.

    A name that is not found stays as it is, and the connection fails then.
    """
    try:
        found = socket.getaddrinfo(*place, type=socket.SOCK_STREAM)
    except OSError:
        return url
    ask = socket.getaddrinfo

    @functools.wraps(ask)
    def known(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        own = host in (place[0], place[0].encode()) and str(port) == str(place[1])
        return found if own else ask(host, port, *rest, **options)

    socket.getaddrinfo = known
    parts = urlsplit(url)
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    if not parts.scheme.startswith("postgresql") or {"host", "hostaddr"} & set(given):
        return url
    address = {"hostaddr": str(found[0][4][0])}
    return urlunsplit(parts._replace(query=urlencode([*parse_qsl(parts.query), *address.items()])))

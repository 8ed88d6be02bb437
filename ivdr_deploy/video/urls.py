"""Which URLs a request may name: schemes, hosts, and the addresses behind them."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from ivdr_deploy._text import quoted
from ivdr_deploy.errors import ConfigError, UrlError

_PORTS = {"https": 443, "http": 80}

_MOST_CHARACTERS = 4096
"""Of a URL; those that a store signs have up to 2000."""

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_ENTRY = re.compile(
    rf"(?P<host>\*|(?:\*\.)?{_LABEL}(?:\.{_LABEL})*|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{{1,5}}))?"
)

_NUMERIC_LABEL = re.compile(r"[0-9]+|0x[0-9a-f]*")
"""A last label that makes browsers and C libraries take a name for an address: 127.1, 0x7f000001, 2130706433."""

_REFUSED_NETWORKS = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",  # this machine
        "10.0.0.0/8",
        "100.64.0.0/10",  # carriers, and the metadata of one cloud
        "127.0.0.0/8",
        "168.63.129.16/32",  # a cloud's own services, at an address that looks public
        "169.254.0.0/16",  # link-local: the metadata of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",  # relays to 6to4
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",
        "2001::/23",  # Teredo, ORCHID and other protocols
        "2001:db8::/32",
        "2002::/16",  # 6to4: an IPv4 address inside
        "2620:4f:8000::/48",
        "3fff::/20",
    )
)

_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
"""All that is given out. Loopback, link-local, unique-local, multicast, IPv4-mapped and NAT64 lie outside."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UrlSettings:
    """Whether and from where the endpoint fetches a video that a request names by URL."""

    hosts: tuple[str, ...] = ()
    """Hosts that are asked: ``videos.example.com``, ``*.example.com`` (what lies below it), ``*`` (any that is public);
    each with ``:PORT`` where it is not that of the scheme. None: no URL is taken."""

    schemes: tuple[Literal["https", "http"], ...] = ("https",)
    """What a URL may begin with."""

    max_redirects: int = 3
    """Redirects that are followed; each is checked as if a request had named it."""

    seconds: float = 20.0
    """Time that looking up, connecting and fetching may take together."""

    def __post_init__(self) -> None:
        for host in self.hosts:
            found = _ENTRY.fullmatch(host)
            if found is None or not 0 < int(found["port"] or 1) < 65536:
                raise ConfigError(
                    f"urls.hosts holds {quoted(host)}, which is no host",
                    hint="write videos.example.com, *.example.com, videos.example.com:8443, or *",
                )
        if not self.schemes:
            raise ConfigError("urls.schemes is empty", hint='leave it out, or write ["https"]')
        if not 0 <= self.max_redirects <= 10:
            raise ConfigError(f"urls.max_redirects must be between 0 and 10, found {self.max_redirects}")
        if not 0 < self.seconds < math.inf:
            raise ConfigError(f"urls.seconds must be positive, found {self.seconds}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A URL that may be asked for, taken apart."""

    scheme: Literal["https", "http"]
    host: str
    """In lower case; an IPv6 address without its brackets."""

    port: int
    path: str
    """With the query. It may hold secrets: no message shows it."""

    @property
    def shown(self) -> str:
        """What messages and logs show of it."""
        return f"{self.scheme}://{self.authority}"

    @property
    def authority(self) -> str:
        """For the header ``Host``."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def address(self) -> str | None:
        """The address that the host is, None where it is a name."""
        try:
            return str(ipaddress.ip_address(self.host))
        except ValueError:
            return None


def check_url(url: str, settings: UrlSettings) -> Target:
    """Take a URL apart and hold it against the lists; nothing is looked up.

    Raises:
        UrlError: if no URL is taken, it is none, holds a name or password, or is not on the lists.
    """
    if not settings.hosts:
        raise UrlError(
            "this endpoint takes no URLs",
            hint="send the video itself; its operator can allow hosts (urls.hosts)",
        )
    if len(url) > _MOST_CHARACTERS or re.search(r"[^\x21-\x7e]|\\", url):
        raise UrlError(
            f"the URL has more than {_MOST_CHARACTERS} characters, or blanks, backslashes or others that are not ASCII",
            hint="encode them: %20, and xn-- for hosts",
        )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise UrlError(
            "the URL cannot be read", hint="write https://HOST/PATH"
        ) from None  # its words may be shown
    scheme = next((known for known in settings.schemes if known == parts.scheme), None)
    if scheme is None:
        raise UrlError(
            f"the URL begins with {quoted(parts.scheme[:20])}, which is not taken here",
            hint=f"taken are {', '.join(settings.schemes)}",
        )
    if "@" in parts.netloc:
        raise UrlError("the URL holds a user name or password", hint="sign it, or send the video itself")
    _check_host(host, bracketed="[" in parts.netloc)
    path = parts.path or "/"
    target = Target(
        scheme=scheme,
        host=host,
        port=_PORTS[scheme] if port is None else port,
        path=f"{path}?{parts.query}" if parts.query else path,
    )
    if not any(_allows(entry, target) for entry in settings.hosts):
        raise UrlError(
            f"{target.shown[:100]} is not among the hosts and ports that are asked",
            hint="send the video itself; its operator can allow hosts (urls.hosts)",
        )
    return target


def is_public(address: str) -> bool:
    """Say whether an address may be asked: one that is given out in the internet, and stands for no other."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address) and (found.scope_id or found not in _GLOBAL_V6):
        return False
    if any(found.version == network.version and found in network for network in _REFUSED_NETWORKS):
        return False
    return found.is_global and not found.is_multicast


def _check_host(host: str, *, bracketed: bool) -> None:
    """Refuse a host that different libraries read differently."""
    try:
        if bracketed:
            ipaddress.IPv6Address(host)
            if "%" in host:
                raise ValueError("a zone")
        elif _NUMERIC_LABEL.fullmatch(host.rpartition(".")[2]):
            ipaddress.IPv4Address(host)
        elif not _NAME.fullmatch(host) or len(host) > 253:
            raise ValueError("no name")
    except ValueError:
        raise UrlError(
            "the host of the URL is no name and no address in its usual form",
            hint="write a name, or an IPv4 address as four numbers",
        ) from None


def _allows(entry: str, target: Target) -> bool:
    found = _ENTRY.fullmatch(entry)
    assert found is not None
    host, port = found["host"], found["port"]
    if target.port != (int(port) if port else _PORTS[target.scheme]):
        return False
    if host.startswith("*."):
        return target.host.endswith(host[1:])
    return host in ("*", target.host, f"[{target.host}]")

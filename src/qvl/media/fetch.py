"""Fetches pictures from untrusted URLs without reaching private networks (SSRF).

The name is resolved once; every address it has must be public; the connection goes to exactly that address while the
`Host` header and the certificate check keep the name, so a name that resolves differently a moment later (DNS
rebinding) gains nothing. Redirects are followed by hand, each hop checked like the first. Proxies from the environment
are not used, since they would resolve the name again. What the bytes begin with decides what they are, whatever the
headers call them; what comes compressed though it was asked for plain is inflated within the byte limit.
"""

from __future__ import annotations

import functools
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final, TypeAlias

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import httpx

from qvl._version import __version__
from qvl.errors import MediaError
from qvl.media import content_encoding
from qvl.media.document_head import is_document
from qvl.media.image_header import sniff, words_of
from qvl.media.sources import is_label_of_picture, short, too_large

if TYPE_CHECKING:
    import ssl

    from qvl.media.policy import MediaPolicy

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]

# Names under which clouds hand out credentials to whoever asks from inside, whatever they resolve to.
_METADATA_NAMES: Final = frozenset(
    {"metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal"}
)
# Networks that older Pythons call global, or that are global but lead inward: IETF protocol assignments, the 6to4
# relay, Azure's host endpoint, and for IPv6 the deprecated site-local, IPv4-compatible, documentation and SRv6 ranges.
_INNER_IPV4: Final = "192.0.0.0/24 192.88.99.0/24 198.18.0.0/15 168.63.129.16/32"
_INNER_IPV6: Final = "::/96 64:ff9b:1::/48 100::/64 2001::/23 2001:db8::/32 3fff::/20 5f00::/16 fec0::/10"
_INNER_NETWORKS: Final = tuple(map(ipaddress.ip_network, f"{_INNER_IPV4} {_INNER_IPV6}".split()))
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
_HOST: Final = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_lookups: Final[anyio.lowlevel.RunVar[anyio.CapacityLimiter]] = anyio.lowlevel.RunVar("qvl.media.fetch.lookups")
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
# Accepted for later, nothing to show, a part.
_WITHOUT_PICTURE: Final = frozenset({202, 204, 205, 206})
# Is told of every byte that arrives, for whoever answers for the memory of a request; what it raises ends the fetch.
counter: Final[ContextVar[Callable[[int], None] | None]] = ContextVar("qvl.media.fetch.counter", default=None)


async def resolve(host: str, port: int) -> list[str]:
    """Return the system's addresses of `host`, without duplicates, in order of preference.

    Uses threads of its own: a name whose servers do not answer blocks one long after the fetch timed out, and must
    not block a thread that others wait for.
    """
    try:
        limiter = _lookups.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(16)
        _lookups.set(limiter)
    look_up = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    addresses = await anyio.to_thread.run_sync(look_up, abandon_on_cancel=True, limiter=limiter)
    return list(dict.fromkeys(str(entry[4][0]) for entry in addresses))


def public_name(url: str) -> str:
    """Return a URL for messages and logs, without credentials, query and fragment."""
    try:
        parsed = httpx.URL(url)
        shown = parsed.copy_with(username=None, password=None, query=None, fragment=None)
        return short(str(shown))
    except (httpx.InvalidURL, ValueError, TypeError):
        return "the URL"


def is_public(address: Address) -> bool:
    """True if `address` is globally reachable and does not wrap one that is not (mapped, 6to4, NAT64)."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.scope_id is not None or (address.sixtofour is not None and not is_public(address.sixtofour)):
            return False
    if not address.is_global or address.is_multicast or address.is_unspecified or address.is_reserved:
        return False
    return not any(address.version == network.version and address in network for network in _INNER_NETWORKS)


def literal(host: str) -> Address | None:
    """Return the IP address that `host` is, in any form that resolvers accept (127.1, 0x7f.1, 2130706433), or None."""
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except (OSError, ValueError):
        return None


class Fetcher:
    """Fetches encoded pictures under one policy.

    Args:
        policy: the limits.
        resolver: gives the addresses of a name; all of them are checked, wherever they come from.
        tls: TLS context; by default it trusts the usual authorities and `SSL_CERT_FILE`.
    """

    def __init__(self, policy: MediaPolicy, *, resolver: Resolver = resolve, tls: ssl.SSLContext | None = None) -> None:
        self._policy = policy
        self._resolver = resolver
        self._tls = tls
        self._open_hosts = frozenset(entry for entry in policy.allowed_private if "/" not in entry)
        self._open_networks = tuple(
            ipaddress.ip_network(entry, strict=False)
            for entry in policy.allowed_private
            if "/" in entry or literal(entry) is not None
        )

    async def fetch(self, url: str) -> bytes:
        """Return the body at `url`, at most `max_bytes`, within `timeout` seconds in all.

        Raises:
            MediaError: with `code` image_url_blocked for a refused address, image_too_large, or image_fetch_failed.
        """
        name = public_name(url)
        try:
            with anyio.fail_after(self._policy.timeout):
                return await self._follow(_parsed(url), name)
        except TimeoutError as exc:
            raise _failed(name, f"no answer within {self._policy.timeout:g} s") from exc

    async def _follow(self, url: httpx.URL, name: str) -> bytes:
        for _ in range(self._policy.max_redirects + 1):
            addresses = await self._addresses(url)
            answer = await self._get(url, addresses, name)
            if isinstance(answer, bytes):
                return answer
            url = _parsed(answer, url)
        raise _failed(name, f"more than {self._policy.max_redirects} redirects")

    async def _addresses(self, url: httpx.URL) -> list[Address]:
        """Return the checked addresses of the URL's host, in the resolver's order."""
        host = _host(url)
        domains = self._policy.allowed_domains
        # A domain that begins with a dot stands for itself and all below it.
        if domains and not any(host == name or (name[0] == "." and f".{host}".endswith(name)) for name in domains):
            raise _blocked(f"the host {short(host)!r} is not allowed", "allowed_domains names them")
        spelled = literal(host)
        named = host in self._open_hosts
        if host in _METADATA_NAMES and not named:
            raise _refused(host)
        addresses = [spelled] if spelled is not None else await self._resolved(host, _port(url))
        if not named and not all(self._allowed(address) for address in addresses):
            raise _refused(host)
        return addresses

    async def _resolved(self, host: str, port: int) -> list[Address]:
        try:
            addresses = [ipaddress.ip_address(text) for text in await self._resolver(host, port)]
        except (OSError, UnicodeError, ValueError) as exc:
            raise _failed(f"the host {short(host)!r}", "its name has no address") from exc
        if not addresses:
            raise _failed(f"the host {short(host)!r}", "its name has no address")
        return addresses

    def _allowed(self, address: Address) -> bool:
        plain = address.ipv4_mapped or address if isinstance(address, ipaddress.IPv6Address) else address
        if any(plain.version == network.version and plain in network for network in self._open_networks):
            return True
        return is_public(address)

    async def _get(self, url: httpx.URL, addresses: Sequence[Address], name: str) -> bytes | str:
        """Return the body (bytes) or a redirect's target (str); tries the next address only if it cannot connect."""
        for last, address in ((index == len(addresses) - 1, address) for index, address in enumerate(addresses)):
            try:
                return await self._get_from(url, address, name)
            except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
                if last:
                    raise _failed(name, f"cannot connect: {words_of(exc)}") from exc
            except httpx.HTTPError as exc:
                raise _failed(name, words_of(exc)) from exc
        raise _failed(name, "its name has no address")

    async def _get_from(self, url: httpx.URL, address: Address, name: str) -> bytes | str:
        host = _host(url)
        target = url.copy_with(host=str(address))
        headers = {
            "Host": _netloc(url),
            "User-Agent": f"qvl/{__version__}",
            "Accept": "image/*",
            "Accept-Encoding": "identity",
        }
        # A transport for each hop: a kept connection belongs to an address, and would skip the certificate check of
        # the next name at that address. No client above it, since that reads `Location` and cookies by itself.
        async with httpx.AsyncHTTPTransport(verify=self._tls or _usual_tls(), trust_env=False) as transport:
            # The time in all is bounded by the caller; this one leaves some of it for the next address.
            extensions = {"sni_hostname": host, "timeout": {"connect": min(5.0, self._policy.timeout / 2)}}
            request = httpx.Request("GET", target, headers=headers, extensions=extensions)
            response = await transport.handle_async_request(request)
            try:
                if response.status_code in _REDIRECTS and "location" in response.headers:
                    return response.headers["location"]
                return await self._body(response, name)
            finally:
                await response.aclose()

    async def _body(self, response: httpx.Response, name: str) -> bytes:
        if not 200 <= response.status_code < 300:
            raise _failed(name, f"the server answered {response.status_code} {response.reason_phrase}".rstrip())
        if response.status_code in _WITHOUT_PICTURE:
            raise _failed(name, f"the server answered {response.status_code} without the whole picture")
        announced = response.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._policy.max_bytes:
            raise too_large(name, self._policy)
        count = counter.get()
        body = bytearray()
        async for piece in response.aiter_raw():
            if count is not None:
                count(len(piece))
            body += piece
            if len(body) > self._policy.max_bytes:
                raise too_large(name, self._policy)
        data = bytes(body)
        del body
        codings = response.headers.get("content-encoding", "").lower()
        if not _is_known(data):
            report = None if count is None else lambda size: anyio.from_thread.run_sync(count, size)
            data = await anyio.to_thread.run_sync(content_encoding.unpacked, data, codings, self._policy, name, report)
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not is_label_of_picture(kind) and not _is_known(data):
            raise _failed(name, f"it is {short(kind)[:60]}, not a picture")
        return data


def _is_known(data: bytes) -> bool:
    return bool(sniff(data)) or is_document(data)


@functools.cache
def _usual_tls() -> ssl.SSLContext:
    """Return the default TLS context, cached since loading certificates is slow; honours `SSL_CERT_FILE` and _DIR."""
    return httpx.create_ssl_context()


def _parsed(text: str, base: httpx.URL | None = None) -> httpx.URL:
    """Return the checked URL; with `base`, the one that a redirect from there leads to."""
    try:
        url = httpx.URL(text) if base is None else base.join(text)
    except (httpx.InvalidURL, ValueError) as exc:
        if base is None:
            raise _blocked("invalid URL", "write it as https://host/path") from exc
        raise _blocked("a redirect leads to an invalid URL", "use the final address") from exc
    if url.scheme not in ("http", "https"):
        raise _blocked(f"unsupported URL scheme {short(url.scheme)}:", "use http or https")
    if url.userinfo:
        raise _blocked("URLs with a user name or password are not allowed", "fetch it yourself and pass the bytes")
    if not _HOST.fullmatch(_host(url)) or not 1 <= _port(url) <= 65535:
        raise _blocked("invalid host or port in the URL", "write it as https://host/path")
    return url


def _host(url: httpx.URL) -> str:
    """Return the URL's host in lower case, IDNA-encoded, without brackets and trailing dot."""
    return url.raw_host.decode("ascii").strip("[]").rstrip(".").lower()


def _port(url: httpx.URL) -> int:
    return (443 if url.scheme == "https" else 80) if url.port is None else url.port


def _netloc(url: httpx.URL) -> str:
    host = _host(url)
    host = f"[{host}]" if ":" in host else host
    return host if url.port is None else f"{host}:{url.port}"


def _failed(name: str, reason: str) -> MediaError:
    return MediaError(f"{name}: {reason}", hint="check the address in a browser", code="image_fetch_failed")


def _blocked(message: str, hint: str) -> MediaError:
    return MediaError(message, hint=hint, code="image_url_blocked")


def _refused(host: str) -> MediaError:
    hint = "to allow it: --allowed-private HOST, or allowed_private of the MediaPolicy"
    return _blocked(f"the host {short(host)!r} has an address that is not public", hint)

"""In front of every page: who asks, from which page, for which host; and the security headers.

Written as plain ASGI, so that nothing behind it can be reached around it. The pages of a folder of
simulations, or of a site, are served to whoever sits at this machine, and a link signs them in.
"""

from __future__ import annotations

import hmac
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from cryptography import x509
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from silotune.dashboard.accounts import Accounts, Session, Sessions
from silotune.dashboard.errors import PageUnknown, RequestForged
from silotune.errors import SilotuneError
from silotune.protocol.asgi import (
    LOOPBACK,
    headers_of,
    host_named,
    listen,
    whole_body,
)
from silotune.trust.errors import NotPermitted, SignInNeeded
from silotune.trust.identity import Person, PersonRole


class OwnerLink:
    """A secret in a link, for who started the dashboard on their own machine.

    It works any number of times for as long as the process lives; only its hash could be guessed at.
    """

    def __init__(self, person: Person) -> None:
        self.person, self.secret = person, secrets.token_urlsafe(32)

    def fits(self, given: str) -> bool:
        """Whether it is the secret; compared in constant time."""
        return hmac.compare_digest(given.encode(), self.secret.encode())


_log = logging.getLogger(__name__)

PEER = "silotune.peer"
"""Key of the scope under which the TLS layer puts the client's certificate (DER)."""

SESSION, FORM = "silotune.session", "silotune.form"
"""Keys of the scope under which pages find the `Session` and the form's fields."""

HEADERS: Mapping[str, str] = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with none, browsers say "Origin: null" in our own forms
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}
_MOST_BYTES = 64 << 10
_OPEN = ("/signin", "/static/")
_OWN_CREDENTIALS = "/metrics"
_STATUS: tuple[tuple[type[SilotuneError], int], ...] = (
    (SignInNeeded, 401),
    (NotPermitted, 403),
    (RequestForged, 403),
    (PageUnknown, 404),
)


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may come in, and how.

    Attributes
    ----------
    hosts : frozenset of str
        Host names under which browsers may ask; others are refused, against DNS rebinding.
    tls : bool
        Whether the connection is TLS; then cookies are for TLS alone.
    accounts : Accounts or None
        Passwords.
    holder : callable or None
        ``holder(certificate)``: the person of a client certificate, or raises `SignInNeeded`.
    link : Link or None
        The secret of a link that the command printed.
    refused : callable or None
        ``refused(person, action, target, code=…)``: told of a form that somebody may not send.
    sessions : Sessions
        Who is in.
    """

    hosts: frozenset[str]
    tls: bool = False
    accounts: Accounts | None = None
    holder: Callable[[x509.Certificate], Person] | None = None
    link: OwnerLink | None = None
    refused: Callable[..., None] | None = None
    sessions: Sessions = field(default_factory=Sessions)

    @property
    def cookie(self) -> str:
        """The cookie's name; a browser takes ``__Host-`` only over TLS, and for this host alone."""
        return "__Host-silotune" if self.tls else "silotune"

    def set_cookie(self, response: Response, value: str) -> None:
        """Give the browser a session."""
        response.set_cookie(
            self.cookie, value, path="/", httponly=True, samesite="strict", secure=self.tls
        )


class PageGuard:
    """ASGI middleware: nothing passes that has no right to.

    Parameters
    ----------
    app : ASGI application
        The pages.
    access : Access
        Who may come in.
    failure : callable
        ``failure(scope, error, status)``: a page that tells an error.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: Access,
        failure: Callable[[Scope, SilotuneError, int], Response],
    ) -> None:
        self._app, self._access, self._failure = app, access, failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        send = self._with_headers(send)
        try:
            await self._serve(scope, receive, send)
        except SilotuneError as error:
            status = next((s for kind, s in _STATUS if isinstance(error, kind)), 409)
            await self._failure(scope, error, status)(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_of(scope)
        if host_named(headers.get("host", "")) not in self._access.hosts:
            refusal = PlainTextResponse("This dashboard is not served under that name.", 421)
            await refusal(scope, receive, send)
            return
        path, method = scope["path"], scope["method"]
        session = await run_in_threadpool(self._session, scope, headers)
        scope[SESSION] = session
        is_open = path.startswith(_OPEN) or path == _OWN_CREDENTIALS
        if session is None and not is_open:
            if method == "GET" and "text/html" in headers.get("accept", ""):
                await RedirectResponse("/signin", 303)(scope, receive, send)
                return
            raise SignInNeeded("this needs a sign-in")
        if method not in {"GET", "HEAD"}:
            body = await whole_body(receive, most=_MOST_BYTES)
            if body is None:
                await PlainTextResponse("The form is too large.", 413)(scope, receive, send)
                return
            scope[FORM] = _form(body)
            await run_in_threadpool(self._judge_form, scope, headers, session, path)
        await self._app(scope, receive, send)

    def _session(self, scope: Scope, headers: Mapping[str, str]) -> Session | None:
        """The session of the cookie, or one begun by a certificate for this request alone."""
        cookies: SimpleCookie = SimpleCookie()
        try:
            cookies.load(headers.get("cookie", ""))
        except CookieError:
            cookies = SimpleCookie()
        value = cookies[self._access.cookie].value if self._access.cookie in cookies else ""
        # A page that looks for news by itself must not keep a session alive for ever.
        watching = headers.get("silotune-live") == "1" or scope["path"].endswith("/stream")
        return self._access.sessions.find(value, touch=not watching) if value else None

    def _judge_form(
        self, scope: Scope, headers: Mapping[str, str], session: Session | None, path: str
    ) -> None:
        """Refuse what another page sent, and what a viewer may not do; told with who it was."""
        try:
            self._require_own_form(scope, headers, session)
            if session is not None and path not in {"/signout", "/signin"}:
                session.person.require_operator()
        except SilotuneError as error:
            if session is not None and self._access.refused is not None:
                _, _, *target, action = f"/{path}".split("/")  # "/runs/NAME/pause", "/signout"
                self._access.refused(session.person, action, "/".join(target[1:]), code=error.code)
            raise

    def _require_own_form(
        self, scope: Scope, headers: Mapping[str, str], session: Session | None
    ) -> None:
        origin = headers.get("origin")
        scheme = "https" if self._access.tls else "http"
        if origin is not None and origin != f"{scheme}://{headers.get('host', '')}":
            raise RequestForged("the request came from another page")
        if headers.get("sec-fetch-site", "same-origin") not in {"same-origin", "none"}:
            raise RequestForged("the request came from another site")
        if session is None:
            return  # only the sign-in itself gets here
        given = scope[FORM].get("token", "")
        if not hmac.compare_digest(given.encode(), session.token.encode()):
            raise RequestForged("the form's token is missing or old")

    def _with_headers(self, send: Send) -> Send:
        extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        if self._access.tls:
            extra.append((b"strict-transport-security", b"max-age=31536000"))

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in extra}
                kept = [pair for pair in message.get("headers", []) if pair[0] not in own]
                message["headers"] = kept + extra
            await send(message)

        return sending


def certificate_of(scope: Scope) -> x509.Certificate | None:
    """The client's certificate, as the TLS layer left it in the scope."""
    shown = scope.get(PEER)
    return x509.load_der_x509_certificate(shown) if shown else None


def _form(body: bytes) -> dict[str, str]:
    """Fields of an urlencoded form; the first of each name."""
    try:
        found = parse_qs(body.decode(), keep_blank_values=True, max_num_fields=50)
    except (UnicodeDecodeError, ValueError):
        return {}
    return {name: values[0] for name, values in found.items()}


def serve_here(
    build: Callable[[Access], ASGIApp], *, port: int, role: PersonRole, said: Callable[[str], None]
) -> None:
    """Serve on loopback until Ctrl-C; only the link that `said` is given lets anybody in.

    Other accounts of the machine can reach a loopback port too, so the link carries a secret.
    """
    link = OwnerLink(Person(name="you", role=role))
    app = build(Access(hosts=LOOPBACK, link=link))
    listen(
        app,
        host="127.0.0.1",
        port=port,
        said=lambda bound: said(f"http://127.0.0.1:{bound}/signin?link={link.secret}"),
        lifespan="off",
        timeout_graceful_shutdown=2,
    )

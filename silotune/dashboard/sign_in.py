"""Signing in and out: a password, a person's certificate, or the link that a command printed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from silotune.dashboard.desk import Desk
from silotune.dashboard.doorman import FORM, SESSION, Door, certificate_of
from silotune.dashboard.errors import TooManyAttempts
from silotune.dashboard.sessions import Brake
from silotune.federation.errors import SignInNeeded
from silotune.federation.person import Person

if TYPE_CHECKING:
    from silotune.dashboard.pages import Templates


class SignIn:
    """Routes of signing in and out.

    Parameters
    ----------
    door : Door
        Accounts, certificates and sessions.
    templates : Templates
        The page.
    title : str
        The federation's name.
    desk : Desk or None
        Told who came in.
    """

    def __init__(self, door: Door, templates: Templates, *, title: str, desk: Desk | None) -> None:
        self._door, self._templates, self._title, self._desk = door, templates, title, desk
        self._brake = Brake()

    def add_to(self, app: FastAPI) -> None:
        """Register the routes."""
        page: dict[str, Any] = {"response_class": HTMLResponse}
        app.add_api_route("/signin", self.show, methods=["GET"], **page)
        app.add_api_route("/signin", self.enter, methods=["POST"], **page)
        app.add_api_route("/signout", self.leave, methods=["POST"], **page)

    def show(self, request: Request, link: str = "") -> Response:
        """The form; a right link needs none."""
        if link:
            address = _address(request)
            self._brake.require_open(address)
            if self._door.link is not None and self._door.link.fits(link[:200]):
                return self._welcome(request, self._door.link.person, how="link")
            self._brake.failed(address)
            return self._form("This link is not valid any more.", 401)
        return self._form("", 200)

    def enter(self, request: Request) -> Response:
        """Check a password or a certificate."""
        form = request.scope[FORM]
        if form.get("how") == "certificate":
            return self._by_certificate(request)
        name, password = form.get("name", "")[:63], form.get("password", "")
        keys = (f"account {name}", _address(request))
        try:
            self._brake.require_open(*keys)
        except TooManyAttempts as exc:
            return self._form(f"Too many attempts: {exc.detail}.", 429)
        person = self._door.accounts.check(name, password) if self._door.accounts else None
        if person is None:
            self._brake.failed(*keys)
            return self._form("Name or password is wrong.", 401)
        self._brake.succeeded(*keys)
        return self._welcome(request, person, how="password")

    def leave(self, request: Request) -> Response:
        """Sign out."""
        self._door.sessions.end(request.cookies.get(self._door.cookie, ""))
        response = RedirectResponse("/signin", 303)
        response.delete_cookie(self._door.cookie, path="/")
        return response

    def _by_certificate(self, request: Request) -> Response:
        certificate = certificate_of(request.scope)
        try:
            if certificate is None or self._door.holder is None:
                raise SignInNeeded("the browser showed no certificate")
            person = self._door.holder(certificate)
        except SignInNeeded as exc:
            return self._form(f"Not signed in: {exc.detail}.", 401)
        return self._welcome(request, person, how="certificate")

    def _welcome(self, request: Request, person: Person, *, how: str) -> Response:
        if request.scope[SESSION] is not None:  # a new session for a new sign-in, always
            self._door.sessions.end(request.cookies.get(self._door.cookie, ""))
        if self._desk is not None:
            self._desk.signed_in(person, how=how)
        response = RedirectResponse("/", 303)
        self._door.set_cookie(response, self._door.sessions.begin(person))
        return response

    def _form(self, message: str, status: int) -> Response:
        text = self._templates.render(
            "signin.html",
            title=self._title,
            session=None,
            desk=False,
            message=message,
            passwords=self._door.accounts is not None,
            certificates=self._door.holder is not None,
        )
        return HTMLResponse(text, status)


def _address(request: Request) -> str:
    return f"address {request.client.host if request.client else 'unknown'}"

"""Where alerts go: webhooks with a signature, and e-mail."""

from __future__ import annotations

import hashlib
import hmac
import json
import smtplib
import ssl
from dataclasses import asdict
from email.message import EmailMessage
from pathlib import Path

import httpx

from silotune.server.alerts import Alert, Sink
from silotune.server.config import AlertsSection, read_secret

_SECONDS = 10.0

SIGNATURE = "silotune-signature"
"""Header of a webhook: ``sha256=`` and the HMAC-SHA256 of the body under the shared key, in hex."""


class Webhook:
    """POSTs an alert as JSON; any answer but 2xx is a failure.

    Parameters
    ----------
    url : str
        Where to.
    secret : bytes
        Key of the signature; empty for none.
    """

    def __init__(self, url: str, *, secret: bytes) -> None:
        self._url, self._secret = url, secret

    def __call__(self, alert: Alert) -> None:
        """Tell. Raises `httpx.HTTPError`."""
        # The redirect of a hook could lead anywhere, so none is followed.
        body = json.dumps(asdict(alert), sort_keys=True).encode()
        headers = {"content-type": "application/json", "user-agent": "silotune"}
        if self._secret:
            digest = hmac.new(self._secret, body, hashlib.sha256).hexdigest()
            headers[SIGNATURE] = f"sha256={digest}"
        httpx.post(self._url, content=body, headers=headers, timeout=_SECONDS).raise_for_status()


class Mail:
    """Sends an alert through an SMTP server, over TLS unless the configuration says otherwise."""

    def __init__(self, config: AlertsSection, *, password: str) -> None:
        self._config, self._password = config, password

    def __call__(self, alert: Alert) -> None:
        """Tell. Raises `smtplib.SMTPException` or `OSError`."""
        config, message = self._config, EmailMessage()
        # Header values are made of our own words: names of runs and sites have no line breaks.
        message["Subject"] = " ".join(f"silotune: {alert.kind} {alert.run or alert.site}".split())
        message["From"], message["To"] = config.mail_from, ", ".join(config.mail_to)
        message.set_content(alert.text + "\n")
        with smtplib.SMTP(config.smtp_host, config.smtp_port, timeout=_SECONDS) as server:
            if config.smtp_starttls:
                server.starttls(context=ssl.create_default_context())
            if config.smtp_user:
                server.login(config.smtp_user, self._password)
            server.send_message(message)


def sinks_of(config: AlertsSection, *, base: Path) -> list[Sink]:
    """Everybody whom the configuration names. Raises `CoordinatorConfigInvalid`."""
    secret = b""
    if config.webhook_secret_file is not None:
        secret = read_secret(base / config.webhook_secret_file, key="alerts.webhook_secret_file")
    found: list[Sink] = [Webhook(url, secret=secret) for url in config.webhooks]
    if config.smtp_host and config.mail_to:
        password = ""
        if config.smtp_password_file is not None:
            path = base / config.smtp_password_file
            password = read_secret(path, key="alerts.smtp_password_file").decode()
        found.append(Mail(config, password=password))
    return found

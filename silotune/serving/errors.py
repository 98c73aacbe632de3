"""Errors of a model that is served."""

from __future__ import annotations

from silotune.errors import EnvironmentFault, RunError


class ServerBusy(RunError):
    """A request can't be answered in time."""

    code = "ST-633"
    title = "The server can't answer in time"
    cause = "As many examples wait as may wait, or the request's deadline was over before its turn."
    advice = (
        "Ask again after a moment; give the server more room (--waiting) or more time (--deadline)."
    )


class ServingRefused(EnvironmentFault):
    """A model would be served where others could read along or ask unasked."""

    code = "ST-770"
    title = "The model can't be served like this"
    cause = (
        "Beyond this machine requests, which hold texts, need a token and TLS; and no request may name "
        "files of this machine, as one about images would."
    )
    advice = (
        "Serve on 127.0.0.1 behind a proxy, or give --tls-certificate, --tls-key and --token-file."
    )

"""The site's own page: what runs here, what has left, what it cost, and what waits for a decision.

It reads the site's files and asks the daemon over its private socket; it never speaks to the network.
Only an account that may read the site's folder can start it, only this machine can reach it, and only
who has the printed link gets in. Decisions are possible where it was started for that.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Scope

from silotune.client.approvals import Approvals, ProposalRecord
from silotune.client.daemon.socket import ask
from silotune.client.proposal_view import describe, judge_proposal
from silotune.dashboard.errors import PageUnknown
from silotune.dashboard.page_guard import FORM, SESSION, Access, PageGuard
from silotune.dashboard.pages import FORM_BODY, Pages, SignIn, Templates
from silotune.dashboard.run_page import PageChart, line_chart
from silotune.data.site import SiteConfig
from silotune.errors import SilotuneError
from silotune.privacy.ledger import Ledger, find_ledger
from silotune.privacy.ledger_view import dataset_rows
from silotune.privacy.tally import epsilon_of, total
from silotune.trust.audit import AUDIT_FILE, AuditLog

_MOST_RUNS = 12
_MOST_LINES = 200


def build(site: SiteConfig, access: Access) -> ASGIApp:
    """The application, with the doorman in front."""
    templates = Templates()
    page = SitePage(site, templates)
    app = FastAPI(title="silotune site", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/", page.show, methods=["GET"], response_class=HTMLResponse)
    app.add_api_route("/static/{name}", Pages.static, methods=["GET"])
    app.add_api_route(
        "/plans/{run}/{verdict}", page.decide, methods=["POST"], openapi_extra=FORM_BODY
    )
    SignIn(access, templates, title=site.name, operations=None).add_to(app)

    def failure(scope: Scope, error: SilotuneError, status: int) -> Response:
        return page.failure(scope, error, status)

    async def told(request: Request, error: Exception) -> Response:
        assert isinstance(error, SilotuneError)
        status = 404 if isinstance(error, PageUnknown) else 409
        return failure(dict(request.scope), error, status)

    app.add_exception_handler(SilotuneError, told)
    return PageGuard(app, access=access, failure=failure)


class SitePage:
    """Handlers over one site's folder.

    Parameters
    ----------
    site : SiteConfig
        Its configuration, which says where everything is.
    templates : Templates
        The page.
    """

    def __init__(self, site: SiteConfig, templates: Templates) -> None:
        self._site, self._templates = site, templates
        self._state = site.state_folder

    def show(self, request: Request) -> Response:
        """Everything, on one page."""
        status, problem = self._status()
        approvals = Approvals(self._state)
        entries = approvals.entries()
        open_entries = [entry for entry in entries if not entry.over]
        ledger = find_ledger(self._state)
        lines = self._lines()
        text = self._templates.render(
            "site.html",
            title=self._site.name,
            session=request.scope[SESSION],
            coordinator=False,
            status=status,
            problem=problem,
            plans=[describe(self._site, entry, approvals) for entry in open_entries],
            over=[_brief(entry) for entry in entries if entry.over][:20],
            datasets=dataset_rows(ledger) if ledger else [],
            charts=spending_charts(ledger) if ledger else [],
            releases=_releases(ledger) if ledger else [],
            lines=lines,
        )
        return HTMLResponse(text)

    def decide(self, request: Request, run: str, verdict: str) -> Response:
        """Approve or reject a plan, as `silotune site approve` and `reject` do."""
        if verdict not in {"approve", "reject"}:
            raise PageUnknown(f"{verdict[:40]!r} is nothing that can be said of a plan")
        entry = Approvals(self._state).find(run)
        reason = request.scope[FORM].get("reason", "")[:500]
        if verdict == "approve" and self._site.policy is not None:
            judge_proposal(self._site, entry).require()
        word = "approved" if verdict == "approve" else "rejected"
        ask(self._state, "decide", run=entry.run, verdict=word, reason=reason)
        return RedirectResponse(f"/#{quote(entry.run)}", 303)

    def failure(self, scope: Scope, error: SilotuneError, status: int) -> Response:
        """A page that tells an error."""
        session = scope.get(SESSION)
        text = self._templates.render(
            "error.html", error=error, title=self._site.name, session=session, coordinator=False
        )
        return HTMLResponse(text, status)

    def _status(self) -> tuple[dict[str, Any] | None, str]:
        try:
            return ask(self._state, "status"), ""
        except SilotuneError as exc:
            return None, f"{exc.detail}. {exc.remedy}"

    def _lines(self) -> list[dict[str, Any]]:
        path = self._state / AUDIT_FILE
        if not path.exists():
            return []
        found = AuditLog(path).lines()[-_MOST_LINES:]
        return [
            {
                "seq": line.seq,
                "time": line.time,
                "kind": line.kind,
                "fields": ", ".join(f"{k} {_short(v)}" for k, v in line.fields.items()),
            }
            for line in reversed(found)
        ]


def spending_charts(ledger: Ledger) -> list[PageChart]:
    """Epsilon spent of each dataset after each of its newest runs, and its budget."""
    found = []
    for dataset in dict.fromkeys(account.dataset for account in ledger.runs()):
        accounts = ledger.runs(dataset)
        budget = accounts[-1].budget
        first = max(0, len(accounts) - _MOST_RUNS)
        points = [
            (
                float(i + 1),
                epsilon_of(total(a.charged for a in accounts[: i + 1]), delta=budget.delta),
            )
            for i in range(first, len(accounts))
        ]
        chart = line_chart(
            f"\N{GREEK SMALL LETTER EPSILON} spent of {dataset}, run by run",
            {"spent": points},
            last=float(len(accounts)),
            limit=("budget", budget.epsilon),
            from_zero=True,
        )
        if chart is not None:
            found.append(chart)
    return found


def _releases(ledger: Ledger) -> list[dict[str, Any]]:
    """The newest releases: what left this site, when, and the hash of its bytes."""
    left = [row.entry for row in ledger.rows() if row.entry.kind in {"charge", "release"}]
    rows = [entry for entry in left if entry.payload_sha256]
    return [
        {
            "time": entry.time,
            "run": entry.run,
            "round": entry.round,
            "release": entry.release,
            "dataset": entry.dataset,
            "payload": entry.payload_sha256,
        }
        for entry in reversed(rows[-_MOST_LINES:])
    ]


def _brief(entry: ProposalRecord) -> dict[str, str]:
    said = entry.decision.verdict if entry.decision else "never decided"
    return {"run": entry.run, "state": entry.state, "said": said}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:79] + "\N{HORIZONTAL ELLIPSIS}"

"""A simulation looks at the sites' records before it begins, and again before it goes on.

A real coordinator can't. Here all sites are this machine's, so what each of them would say to its own
team is told to whoever simulates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from silotune.client.secret import own_secret
from silotune.client.terms import delta_notes
from silotune.data.errors import RecordsChanged
from silotune.data.site import SiteConfig
from silotune.data.survey import Surveyed, survey
from silotune.errors import TooFewRecords
from silotune.federation.sealed import Vault
from silotune.models.tasks import get_task
from silotune.plan import Plan
from silotune.plan_words import notes_on
from silotune.simulation.run_directory import RunDirectory

Note = Callable[[str], None]

RECORDS_FILE = "records.json"
"""In the run directory: what each site trained on, by the fingerprint of its content."""


def survey_sites(
    plan: Plan, sites: Sequence[SiteConfig], *, secrets: Mapping[str, bytes], note: Note
) -> tuple[Surveyed, ...]:
    """Look at all sites' records, and tell what should be known.

    Raises
    ------
    SilotuneError
        Fewer sites than ``rounds.min_sites`` can take part: the first site's own reason.
    TooFewRecords
        No site has a record to train on.
    """
    for sentence in notes_on(plan):
        note(sentence)
    found = survey(sites, plan, roles=get_task(plan.model.task).roles, secrets=secrets)
    for site, one in zip(sites, found, strict=True):
        for sentence in one.notes(split_by=plan.data.split_by):
            note(sentence)
        if one.problem is None:
            for sentence in delta_notes(plan, site):
                note(sentence)
    problems = [one for one in found if one.problem is not None]
    if len(found) - len(problems) < plan.rounds.min_sites and problems:
        problem = problems[0].problem
        assert problem is not None
        raise type(problem)(f"{problems[0].site}: {problem.detail}")
    if not any(one.trains for one in found):
        raise TooFewRecords(
            "no site has a record to train on: the notes above say what was left out"
        )
    return found


def keep_survey(
    directory: RunDirectory, found: Sequence[Surveyed], secrets: Mapping[str, bytes]
) -> None:
    """Write the sites' secrets into their state, and down what they train on."""
    for one in found:
        state = directory.site(one.site)
        own_secret(state, Vault(state), new=secrets[one.site])
    directory.write_json(RECORDS_FILE, _fingerprints(found, secrets))


def require_same_records(
    directory: RunDirectory, plan: Plan, sites: Sequence[SiteConfig], *, note: Note
) -> None:
    """Refuse to go on with other records than the run began with.

    Raises
    ------
    RecordsChanged
        A site's records differ; the message names the sites.
    """
    began = directory.find_json(RECORDS_FILE)
    if began is None:
        note(
            "the run directory does not say which records the run began with: they may have changed"
        )
        return
    states = {site.name: directory.site(site.name) for site in sites}
    secrets = {name: own_secret(state, Vault(state)) for name, state in states.items()}
    found = survey(sites, plan, roles=get_task(plan.model.task).roles, secrets=secrets)
    now = _fingerprints(found, secrets)
    changed = sorted(name for name in now if now[name] != began.get(name))
    if changed:
        raise RecordsChanged(f"the records of {', '.join(changed)} changed since the run began")


def _fingerprints(found: Sequence[Surveyed], secrets: Mapping[str, bytes]) -> dict[str, str | None]:
    return {
        one.site: None if one.records is None else one.records.fingerprint(secrets[one.site])
        for one in found
    }

"""How the golden files of simulations are read: run directories, and an adapter with its model."""

import hashlib
import os
import re

from silotune.data.declared import own_secret
from silotune.events.source import RunDirectories
from silotune.models.adapter import load_adapter
from silotune.models.base import load_model
from silotune.plan.plan import Plan
from silotune.privacy.certificate import verify
from silotune.privacy.ledger import Ledger
from silotune.privacy.ledger_view import run_rows
from silotune.report.report import summary
from silotune.report.statistics import (
    mean_table,
    quantile_table,
    read,
    sentences,
    training_table,
)
from silotune.report.statistics import tables as tables_of
from silotune.report.votes import cost as cost_of_votes
from silotune.report.votes import read as read_votes
from silotune.report.votes import sentences as sentences_of_votes
from silotune.report.votes import table as table_of_votes
from silotune.rounds.run_directory import RunDirectory, read_record
from silotune.simulation.run import recorded, require_same_records
from silotune.trust.identity import fingerprint, load_or_create
from silotune.trust.vault import Vault
from tests.golden.registry import reads

HERE = "@HERE@"
"""Stands in ``resolved.json`` for the folder that the sites lie in."""


def figures_in(sentences):
    """The numbers of some sentences: their words may change."""
    return [re.findall(r"\d(?:[\d.,]*\d)?%?", sentence) for sentence in sentences]


@reads("statistics.json")
def statistics(path):
    found = read(path)
    tables = {name: [table.head, *table.rows] for name, _, table in tables_of(found)}
    more = {"quantiles": quantile_table(found), "means": mean_table(found)}
    more |= {"training": training_table(found)}
    rows = {name: [table.head, *table.rows] for name, table in more.items()}
    return {"found": found, "figures": figures_in(sentences(found)), "tables": tables | rows}


@reads("votes.json")
def votes(path):
    found = read_votes(path)
    shown = table_of_votes(found)
    return {
        "found": found,
        "figures": figures_in([*sentences_of_votes(found), cost_of_votes(found)]),
        "table": [shown.head, *shown.rows],
    }


def run_in(folder):
    """The one run directory under ``made``, with the paths of where it lies now."""
    (path,) = (folder / "made").iterdir()
    resolved = path / "resolved.json"
    resolved.write_text(resolved.read_text().replace(HERE, os.fspath(folder)))
    return RunDirectory.open(path)


def seen(directory):
    """What every run directory tells, finished or not."""
    record = read_record(directory.root)
    view = record.history
    (facts,) = RunDirectories(directory.root).runs()
    books = {}
    for site in record.sites:
        ledger = Ledger(directory.site(site) / "ledger.sqlite", create=False)
        ledger.verify()
        key = load_or_create(directory.site(site) / "signing.key").public_key()
        books[site] = [run_rows(ledger), fingerprint(key)]
        ledger.close()
    plan = Plan.written_in(directory.plan_path)
    return {
        "facts": [facts.run, facts.name, facts.state, facts.round, facts.rounds],
        "plan": [facts.plan_sha256, plan.sha256],
        "engine": record.resolved["engine"],
        "events": [event["event"] for event in directory.events],
        "state": [view.state, view.done, view.joined, view.planned],
        "curve": view.curve("macro_f1", view="simulator", split="validation"),
        "metrics": directory.metrics.read(),
        "adapters": {
            str(number): {
                name: hashlib.sha256(array.tobytes()).hexdigest()
                for name, array in directory.load_adapter(number).items()
            }
            for number in directory.adapter_rounds()
        },
        "books": books,
        "checkpoint": checkpoint(directory),
    }


def checkpoint(directory):
    """The state that a run goes on from."""
    arrays, state = directory.load_checkpoint()
    return [state, {name: [str(a.dtype), *a.shape] for name, a in sorted(arrays.items())}]


@reads("run_finished")
def run_finished(folder):
    directory = run_in(folder)
    told = summary(directory.root)
    kept = (
        "run",
        "trained",
        "finished",
        "rounds_finished",
        "sites",
        "methods",
        "by_site",
        "verdict",
    )
    sites = {site: verify(directory.site(site) / "certificate.json") for site in ("alpha", "beta")}
    return {
        **seen(directory),
        "summary": {key: told[key] for key in kept},
        "privacy": read_record(directory.root).privacy,
        "certificates": {site: [one.epsilon, one.body.private] for site, one in sites.items()},
        "records": sorted(directory.find_json("records.json")),
    }


@reads("run_stopped")
def run_stopped(folder):
    directory = run_in(folder)
    found, notes = recorded(directory), []
    require_same_records(directory, found.plan, found.sites, note=notes.append)
    states = {site.name: directory.site(site.name) for site in found.sites}
    return {
        **seen(directory),
        "notes": len(notes),
        "secrets": {name: own_secret(s, Vault(s)).hex() for name, s in states.items()},
        "choices": vars(found.choices),
        "recorded_plan": found.plan.sha256,
    }


@reads("adapter")
def adapter(folder):
    plan = Plan.from_canonical((folder / "plan.json").read_text())
    model = load_model(plan, base=str(folder / "base"), device="cpu", trial=False)
    found = load_adapter(model, folder)
    text = hashlib.sha256(found.tobytes()).hexdigest()
    return {"layout": model.layout.fingerprint, "adapter": text, "size": found.size}

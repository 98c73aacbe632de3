"""Signed documents: one way to sign, one text each, and texts that outlive their version."""

import ast
import json
import re
from copy import copy
from pathlib import Path
from types import UnionType
from typing import Annotated, Union, get_args, get_origin

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import create_model

import silotune
from silotune import release
from silotune.errors import CertificateInvalid, PlanInvalid, PlanSignatureInvalid, SilotuneError
from silotune.plan.document import ADDED_LATER, Document, canonical_json
from silotune.plan.plan import Plan, dotted
from silotune.plan.sections import VotedPlan
from silotune.privacy import certificate
from silotune.protocol.http import Decision
from silotune.trust import roster, signed
from silotune.trust.errors import RosterInvalid
from silotune.trust.identity import decode_signing_key, encode_signing_key
from silotune.trust.roster import Roster, SignedRoster, follow
from silotune.trust.signed import SignedPlan, Signing, encoded
from tests.golden.material import FEDERATION_KEY
from tests.golden.registry import GOLDEN

TRUSTED = FEDERATION_KEY.public_key()
TABLES_THAT_MAY_BE_MISSING = {
    "vote",
    *("privacy.clip", "privacy.site", "model.head_features", "model.target", "lora.start"),
    *("model.chat", "model.chat.template"),
    *("statistics", "statistics.lengths", "statistics.numbers"),
}
PLANS = sorted([*GOLDEN.glob("plans*/*.signed.json"), *GOLDEN.glob("site/state/plans/*.json")])
NAME = "came_later"


def signed_plan(path):
    found = json.loads(path.read_text())
    return SignedPlan(**(found["proposal"]["plan"] if "proposal" in found else found))


def later_version(model, mark=ADDED_LATER, default=7):
    """The model of a later version: it, and each document in it, has one more key with a default."""
    fields = {NAME: (Annotated[int, mark], default)}
    for name, field in model.model_fields.items():
        renewed = copy(field)
        renewed.annotation = _renewed(field.annotation, mark)
        if isinstance(field.default, Document):
            renewed.default = later_version(type(field.default), mark)()
        fields[name] = (renewed.annotation, renewed)
    return create_model(model.__name__, __base__=model, **fields)


def _renewed(annotation, mark):
    if isinstance(annotation, type) and issubclass(annotation, Document):
        return later_version(annotation, mark)
    if get_origin(annotation) in {Union, UnionType}:
        return Union[tuple(_renewed(part, mark) for part in get_args(annotation))]  # noqa: UP007
    if get_origin(annotation) is tuple:
        return tuple[tuple(_renewed(part, mark) for part in get_args(annotation))]
    return annotation


def forged(text):
    """A text that the federation's key did sign."""
    signature = encoded(FEDERATION_KEY.sign(b"silotune plan v1\0" + text.encode()))
    return SignedPlan(plan=text, signature=signature, key=encode_signing_key(TRUSTED))


# --- what a later version reads -----------------------------------------------------------------


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_a_key_with_a_default_that_comes_later_leaves_every_signed_plan_as_it_is(path, monkeypatch):
    stored = signed_plan(path)
    today = stored.verify(TRUSTED)
    monkeypatch.setattr(signed, "Plan", later_version(Plan))
    plan = stored.verify(TRUSTED)
    assert plan.came_later == plan.rounds.came_later == plan.optimizer.site.came_later == 7
    assert (plan.canonical(), plan.sha256) == (stored.plan, today.sha256)
    assert SignedPlan.sign(plan, FEDERATION_KEY) == stored


def test_the_golden_plans_have_every_key_so_that_one_that_is_not_marked_is_noticed():
    texts = [json.loads(signed_plan(path).plan) for path in PLANS]
    written = {key for text in texts for key in dotted(text)} | TABLES_THAT_MAY_BE_MISSING
    written = {re.sub(r"^(statistics\.numbers)\.\w+\.", r"\1.", key) for key in written}
    written = {re.sub(r"^(model\.class_weights)\.\w+$", r"\1", key) for key in written}
    assert _in_their_sections(written) == _in_their_sections(_keys(Plan))


def _in_their_sections(keys):
    """Sections of the plan that a vote is about are the plan's own, and so are their keys' marks."""
    sections = {name for name in VotedPlan.model_fields if name in Plan.model_fields}
    for name in sections:
        assert VotedPlan.model_fields[name].annotation is Plan.model_fields[name].annotation
    return {re.sub(rf"^vote\.plan\.(?=({'|'.join(sections)})\.)", "", key) for key in keys}


def _keys(model, prefix=""):
    for name, field in model.model_fields.items():
        parts = get_args(field.annotation) or (field.annotation,)
        tables = [p for p in parts if isinstance(p, type) and issubclass(p, Document)]
        if len(tables) < len(parts):
            yield prefix + name
        for table in tables:
            yield from _keys(table, f"{prefix}{name}.")


def test_a_later_key_that_is_not_marked_makes_the_golden_plans_unreadable(monkeypatch):
    monkeypatch.setattr(signed, "Plan", later_version(Plan, mark="not a mark"))
    with pytest.raises(PlanSignatureInvalid, match="canonical"):
        signed_plan(PLANS[0]).verify(TRUSTED)


def test_what_a_later_key_says_is_signed_and_an_earlier_version_refuses_it(monkeypatch):
    after = later_version(Plan)
    old = signed_plan(PLANS[0])
    raw = json.loads(old.plan)
    raw["rounds"][NAME] = 8
    plan = after.model_validate_json(json.dumps(raw))
    new = SignedPlan.sign(plan, FEDERATION_KEY)
    assert json.loads(new.plan)["rounds"][NAME] == 8
    with pytest.raises(PlanInvalid):
        new.verify(TRUSTED)
    monkeypatch.setattr(signed, "Plan", after)
    assert new.verify(TRUSTED) == plan
    assert plan.sha256 != old.verify(TRUSTED).sha256


def test_there_is_one_text_for_a_plan_in_every_version(monkeypatch):
    """A later key that is written although it has its default is not the canonical form."""
    monkeypatch.setattr(signed, "Plan", later_version(Plan))
    raw = json.loads(signed_plan(PLANS[0]).plan)
    raw["rounds"][NAME] = 7
    with pytest.raises(PlanSignatureInvalid, match="canonical"):
        forged(canonical_json(raw)).verify(TRUSTED)


def test_old_rosters_keep_their_chain_when_keys_come_later(monkeypatch):
    lines = (GOLDEN / "rosters.jsonl").read_text().splitlines()
    versions = [SignedRoster.model_validate_json(line) for line in lines]
    today = follow(None, versions, trusted=TRUSTED)
    monkeypatch.setattr(roster, "Roster", later_version(Roster))
    newest = follow(None, versions, trusted=TRUSTED)
    assert newest.members[0].came_later == 7
    assert newest.sha256 == today.sha256


def test_a_stored_approval_holds_when_its_form_gets_a_key():
    found = json.loads((GOLDEN / "site/state/plans/golden-0001.json").read_text())
    decision = later_version(Decision).model_validate_json(json.dumps(found["decision"]))
    kept = SignedRoster.model_validate_json((GOLDEN / "site/state/roster.json").read_bytes())
    key = decode_signing_key(kept.verify(TRUSTED).active[decision.site].signing_key)
    assert decision.came_later == 7
    assert decision.verified(key)
    assert not decision.model_copy(update={NAME: 8}).verified(key)


# --- what is refused, though the right key signed it --------------------------------------------


def _without(text, table, key):
    raw = json.loads(text)
    del raw[table][key]
    return canonical_json(raw)


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda text: text.replace(",", ", "), PlanSignatureInvalid),
        (lambda text: text + "\n", PlanSignatureInvalid),
        (lambda text: text.replace('"rounds":{', '"rounds":{"number":999,'), PlanSignatureInvalid),
        (lambda text: json.dumps(dict(reversed(json.loads(text).items()))), PlanSignatureInvalid),
        (lambda text: _without(text, "lora", "r"), PlanSignatureInvalid),
        (lambda text: _without(text, "rounds", "number"), PlanInvalid),
        (lambda text: text.replace('"rounds":{', '"rounds":{"code":"x",'), PlanInvalid),
        (lambda text: text.replace("16.0", "NaN"), PlanInvalid),
        (lambda text: "[]", PlanInvalid),
    ],
    ids=["spaces", "newline", "twice", "order", "default", "required", "unknown", "nan", "list"],
)
def test_a_signed_text_that_is_not_the_one_text_of_a_plan_is_refused(change, refused):
    text = signed_plan(GOLDEN / "plans/bare.signed.json").plan
    assert forged(text).verify(TRUSTED).canonical() == text
    changed = change(text)
    assert changed != text
    with pytest.raises(refused):
        forged(changed).verify(TRUSTED)


def test_a_signature_of_one_kind_counts_for_no_other():
    kinds = [Signing(f"silotune {kind} v1", kind, SilotuneError) for kind in ("one", "other")]
    kinds[0].require("text", kinds[0].sign("text", FEDERATION_KEY), TRUSTED)
    with pytest.raises(SilotuneError):
        kinds[1].require("text", kinds[0].sign("text", FEDERATION_KEY), TRUSTED)


@pytest.mark.parametrize(
    "signature", [b"", b"x" * 64, b"x" * 65, "", "A" * 86 + "==", "no base64!"]
)
def test_what_is_no_signature_does_not_fit(signature):
    assert not signed.fits(signature, b"text", TRUSTED)
    assert not signed.fits(TRUSTED.public_bytes_raw(), b"text", b"no key")
    with pytest.raises(RosterInvalid):
        Signing("c", "roster", RosterInvalid).require("text", signature, TRUSTED)


# --- files that carry their key -----------------------------------------------------------------


class _Note(Document):
    text: str
    number: int = 3


NOTE = Signing("silotune note v1", "note", CertificateInvalid)


@pytest.fixture
def note(tmp_path):
    path = tmp_path / "note.json"
    NOTE.write_file(path, _Note(text="öffentlich"), FEDERATION_KEY)
    return path


def test_a_signed_file_says_what_was_signed_and_by_whom(note):
    said, key = NOTE.read_file(note, _Note)
    assert said == _Note(text="öffentlich")
    assert key.public_bytes_raw() == TRUSTED.public_bytes_raw()


@pytest.mark.parametrize(
    ("name", "signing", "body"),
    [
        ("certificate.json", certificate._CERTIFICATE, certificate.CertificateBody),
        ("release/release.json", release._RELEASE, release.Statement),
    ],
    ids=["certificate", "release"],
)
def test_files_that_were_signed_before_a_key_came_are_read(name, signing, body):
    said, _ = signing.read_file(GOLDEN / name, later_version(body))
    assert said.came_later == 7


def test_files_that_say_nothing_new_are_read_by_earlier_versions(note):
    after = later_version(_Note)
    NOTE.write_file(note, after(text="x"), FEDERATION_KEY)
    assert NOTE.read_file(note, _Note)[0] == _Note(text="x")
    NOTE.write_file(note, after(text="x", came_later=8), FEDERATION_KEY)
    with pytest.raises(CertificateInvalid, match=NAME):
        NOTE.read_file(note, _Note)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text.replace('"number": 3', '"number": 4'), "does not fit"),
        (lambda text: text.replace('"number": 3', '"number": 3, "number": 3'), "not a signed note"),
        (lambda text: text.replace('"key"', '"more": 1, "key"'), "not a signed note"),
        (lambda text: text.replace('"key"', '"clef"'), "not a signed note"),
        (lambda text: text.replace('"number": 3', '"number": NaN'), "not a signed note"),
        (lambda text: "[" * 100_000, "not a signed note"),
        (lambda text: text + " " * (4 << 20), "not a signed note"),
        (lambda text: "", "not a signed note"),
        (lambda text: "null", "not a signed note"),
    ],
    ids=["edited", "twice", "more", "less", "nan", "deep", "large", "empty", "null"],
)
def test_a_signed_file_that_was_changed_is_refused(note, change, told):
    note.write_text(change(note.read_text()))
    with pytest.raises(CertificateInvalid, match=told):
        NOTE.read_file(note, _Note)


def test_a_signed_file_of_another_form_is_refused_with_the_places(note):
    class Other(Document):
        text: int

    with pytest.raises(CertificateInvalid, match="missing, unknown or wrong: text, number"):
        NOTE.read_file(note, Other)
    with pytest.raises(CertificateInvalid, match="No such file"):
        NOTE.read_file(note.with_name("none"), Other)


# --- nobody signs otherwise ---------------------------------------------------------------------


def test_signatures_are_verified_in_one_place():
    """X.509 has its own, in `identity`."""
    package = Path(silotune.__file__).parent
    verifying = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and "InvalidSignature" in {name.name for name in node.names}
    }
    assert verifying == {"trust/signed.py", "trust/identity.py"}


def test_no_two_kinds_of_signature_have_one_context():
    package = Path(silotune.__file__).parent
    contexts = [
        ast.unparse(node.args[0])
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Signing"
    ]
    assert len(contexts) >= 7
    assert len(set(contexts)) == len(contexts)


@pytest.mark.parametrize("content", [float("nan"), {1: float("inf")}])
def test_what_is_no_json_has_no_canonical_text(content):
    with pytest.raises(ValueError):
        canonical_json(content)


def test_a_key_of_somebody_else_does_not_read_a_plan():
    stranger = Ed25519PrivateKey.generate()
    named = {"key": encode_signing_key(stranger.public_key())}
    with pytest.raises(PlanSignatureInvalid, match="another key"):
        signed_plan(PLANS[0]).model_copy(update=named).verify(TRUSTED)
    with pytest.raises(PlanSignatureInvalid):
        SignedPlan.sign(signed_plan(PLANS[0]).verify(TRUSTED), stranger).verify(TRUSTED)

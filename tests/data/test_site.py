from __future__ import annotations

import pytest
from pydantic import SecretStr, ValidationError

from silotune.data.site import SiteConfig, expand_url, load_sites
from silotune.errors import DatasetUnknown, SiteConfigInvalid

GOOD = """
name = "north"
[datasets.notes]
format = "csv"
path = "records.csv"
unit = "patient"
declared_units = 300
max_records_per_unit = 4
[datasets.notes.columns]
text = "note"
label = "outcome"
unit = "patient_id"
[datasets.notes.budget]
epsilon = 8.0
delta = 1e-5
"""


def refusal(tmp_path, text: str) -> str:
    path = tmp_path / "site.toml"
    path.write_text(text)
    with pytest.raises(SiteConfigInvalid) as caught:
        SiteConfig.load(path)
    assert str(path) in caught.value.detail
    return caught.value.detail


def test_a_good_file_is_read_and_knows_its_folder(tmp_path):
    (tmp_path / "site.toml").write_text(GOOD)
    site = SiteConfig.load(tmp_path / "site.toml")
    notes = site.dataset("notes")
    assert (site.name, notes.declared_units, notes.unit) == ("north", 300, "patient")
    assert notes.columns.by_role() == {"text": "note", "label": "outcome", "unit": "patient_id"}
    assert notes.budget is not None
    assert (notes.budget.epsilon, notes.budget.delta) == (8.0, 1e-5)
    assert site.folder == tmp_path.resolve()
    assert site.state_folder == tmp_path.resolve() / "state"


def test_a_configuration_can_not_be_changed_after_it_was_read(tmp_path):
    (tmp_path / "site.toml").write_text(GOOD)
    site = SiteConfig.load(tmp_path / "site.toml")
    with pytest.raises(ValidationError):
        site.name = "south"
    with pytest.raises(ValidationError):
        site.dataset("notes").declared_units = 1


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("declared_units", "declared_unit", "declared_unit: unknown key; did you mean 'declared"),
        ("label =", "labl =", "datasets.notes.columns.labl: unknown key; did you mean 'label'?"),
        ("epsilon = 8.0", 'epsilon = "8"', "budget.epsilon: expected a valid number, got '8'"),
        ("epsilon = 8.0", "epsilon = 0.0", "budget.epsilon: expected greater than 0"),
        ("declared_units = 300\n", "", "datasets.notes.declared_units: missing"),
        (
            'format = "csv"',
            'format = "xlsx"',
            "expected 'csv', 'jsonl', 'json', 'parquet', 'arrow', 'excel', 'sql', 'fhir', "
            "'i2b2', 'camt053', 'ofx' or 'dicom_sr'",
        ),
        ('format = "csv"', 'format = "sql"', "url is needed when format is 'sql'"),
        ('path = "records.csv"\n', "", "path is needed when format is 'csv'"),
        ('format = "csv"', 'format = "jsonl"\ndelimiter = ";"', "delimiter is for format 'csv'"),
        ('unit = "patient_id"\n', "", "columns.unit is needed when unit is 'patient'"),
        ('unit = "patient"\n', "", "unit must say what one value of columns.unit is"),
        ('name = "north"', 'name = "North Hospital"', "name: expected"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_path(tmp_path, old, new, said):
    assert old in GOOD
    assert said in refusal(tmp_path, GOOD.replace(old, new, 1))


def test_every_problem_is_listed_at_once(tmp_path):
    text = GOOD.replace("epsilon = 8.0", "epsilon = -1.0").replace('"csv"', '"cvs"')
    said = refusal(tmp_path, text)
    assert "budget.epsilon" in said
    assert "datasets.notes.format" in said


def test_records_are_their_own_units_only_one_by_one(tmp_path):
    text = GOOD.replace('unit = "patient"\n', "").replace('unit = "patient_id"\n', "")
    said = refusal(tmp_path, text)
    assert "max_records_per_unit must be 1 when unit is 'record'" in said


def test_a_missing_file_and_broken_toml_are_told(tmp_path):
    with pytest.raises(SiteConfigInvalid, match="No such file"):
        SiteConfig.load(tmp_path / "none.toml")
    assert "not valid TOML" in refusal(tmp_path, "name = ")


def test_an_unknown_dataset_is_told_with_those_on_offer(tmp_path):
    (tmp_path / "site.toml").write_text(GOOD)
    with pytest.raises(DatasetUnknown, match="offers no dataset 'letters'; it offers: notes"):
        SiteConfig.load(tmp_path / "site.toml").dataset("letters")


def test_the_database_url_is_never_shown(tmp_path):
    secret = "postgresql://reader:hunter2@db/clinic"
    text = GOOD.replace('format = "csv"', 'format = "sql"\nquery = "SELECT 1"')
    text = text.replace('path = "records.csv"', f'url = "{secret}"')
    path = tmp_path / "site.toml"
    path.write_text(text)
    site = SiteConfig.load(path)
    assert "hunter2" not in f"{site} {site!r} {site.model_dump()} {site.model_dump_json()}"
    broken = refusal(tmp_path, text + '\n[datasets.b]\nformat = "sql"\n')
    assert "hunter2" not in broken


def test_variables_in_a_url_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("WHOLE", "sqlite:///a%20b.db")
    monkeypatch.setenv("PART", "p@ss/w:rd")
    assert expand_url(SecretStr("${WHOLE}")) == "sqlite:///a%20b.db"
    expanded = expand_url(SecretStr("postgresql://u:${PART}@h/d"))
    assert expanded == "postgresql://u:p%40ss%2Fw%3Ard@h/d"
    from sqlalchemy import make_url

    assert make_url(expanded).password == "p@ss/w:rd"


def test_an_unset_variable_is_named_and_the_url_is_not(monkeypatch):
    monkeypatch.delenv("ABSENT", raising=False)
    with pytest.raises(SiteConfigInvalid, match="ABSENT is not set") as caught:
        expand_url(SecretStr("postgresql://u:${ABSENT}@secret-host/d"))
    assert "secret-host" not in str(caught.value)


def test_sites_of_a_folder_come_in_order_and_have_distinct_names(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "site.toml").write_text(GOOD.replace("north", name))
    assert [site.name for site in load_sites(tmp_path)] == ["a", "b"]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "site.toml").write_text(GOOD.replace("north", "b"))
    with pytest.raises(SiteConfigInvalid, match="two sites are named 'b'"):
        load_sites(tmp_path)
    with pytest.raises(SiteConfigInvalid, match=r"no subfolder has a site\.toml"):
        load_sites(tmp_path / "a")

"""The queries of examples/omop.toml over tables of OMOP CDM 5.4, as its DDL defines them.

The database is a SQLite file. ``SILOTUNE_TEST_POSTGRES=postgresql+psycopg://user@host/postgres`` makes
it a schema of a new database of a PostgreSQL server.
"""

import os
import secrets
import tomllib
from pathlib import Path

import pytest
import sqlalchemy as sa

from silotune.data.roles import read_roles
from silotune.data.site import DatasetConfig, SiteConfig

EXAMPLE = Path(__file__).parents[2] / "examples" / "omop.toml"

TABLES = """
CREATE TABLE person (person_id integer NOT NULL, gender_concept_id integer NOT NULL,
  year_of_birth integer NOT NULL, month_of_birth integer NULL, day_of_birth integer NULL,
  birth_datetime TIMESTAMP NULL, race_concept_id integer NOT NULL, ethnicity_concept_id integer NOT NULL,
  location_id integer NULL, provider_id integer NULL, care_site_id integer NULL,
  person_source_value varchar(50) NULL, gender_source_value varchar(50) NULL,
  gender_source_concept_id integer NULL, race_source_value varchar(50) NULL,
  race_source_concept_id integer NULL, ethnicity_source_value varchar(50) NULL,
  ethnicity_source_concept_id integer NULL);
CREATE TABLE note (note_id integer NOT NULL, person_id integer NOT NULL, note_date date NOT NULL,
  note_datetime TIMESTAMP NULL, note_type_concept_id integer NOT NULL,
  note_class_concept_id integer NOT NULL,
  note_title varchar(250) NULL, note_text TEXT NOT NULL, encoding_concept_id integer NOT NULL,
  language_concept_id integer NOT NULL, provider_id integer NULL, visit_occurrence_id integer NULL,
  visit_detail_id integer NULL, note_source_value varchar(50) NULL, note_event_id integer NULL,
  note_event_field_concept_id integer NULL);
CREATE TABLE condition_occurrence (condition_occurrence_id integer NOT NULL, person_id integer NOT NULL,
  condition_concept_id integer NOT NULL, condition_start_date date NOT NULL,
  condition_start_datetime TIMESTAMP NULL, condition_end_date date NULL,
  condition_end_datetime TIMESTAMP NULL, condition_type_concept_id integer NOT NULL,
  condition_status_concept_id integer NULL, stop_reason varchar(20) NULL, provider_id integer NULL,
  visit_occurrence_id integer NULL, visit_detail_id integer NULL,
  condition_source_value varchar(50) NULL,
  condition_source_concept_id integer NULL, condition_status_source_value varchar(50) NULL);
CREATE TABLE concept (concept_id integer NOT NULL, concept_name varchar(255) NOT NULL,
  domain_id varchar(20) NOT NULL, vocabulary_id varchar(20) NOT NULL,
  concept_class_id varchar(20) NOT NULL,
  standard_concept varchar(1) NULL, concept_code varchar(50) NOT NULL, valid_start_date date NOT NULL,
  valid_end_date date NOT NULL, invalid_reason varchar(1) NULL);
CREATE TABLE concept_ancestor (ancestor_concept_id integer NOT NULL,
  descendant_concept_id integer NOT NULL,
  min_levels_of_separation integer NOT NULL, max_levels_of_separation integer NOT NULL);
"""

DIABETES, TYPE_2, HYPERTENSION, HEART = 201820, 201826, 320128, 134057
CLASSES = {1: "Discharge summary", 2: "Progress note", 3: "Nursing note"}


def rows():
    """Three people; the second one's diabetes belongs to another visit than the note's."""
    for person in (7, 8, 9):
        yield "person", {"person_id": person, "gender_concept_id": 8532, "year_of_birth": 1950,
                         "race_concept_id": 0, "ethnicity_concept_id": 0}  # fmt: skip
    for number, (person, visit, kind, text) in enumerate(
        [(7, 70, 1, "sugar is high"), (8, 80, 2, "well"), (7, 71, 3, "walked"), (9, None, 2, "no visit"),
         (7, 70, 2, "insulin")]
    ):  # fmt: skip
        yield "note", {"note_id": 10 - number, "person_id": person, "note_date": "2026-03-01",
                       "note_type_concept_id": 0, "note_class_concept_id": kind, "note_text": text,
                       "encoding_concept_id": 0, "language_concept_id": 0,
                       "visit_occurrence_id": visit}  # fmt: skip
    for number, (person, visit, concept, words) in enumerate(
        [(7, 70, TYPE_2, "DM II"), (8, 81, DIABETES, "diabetes"), (8, 80, HYPERTENSION, "RR high"),
         (9, 90, 0, "unmapped")]
    ):  # fmt: skip
        yield "condition_occurrence", {
            "condition_occurrence_id": number, "person_id": person, "condition_concept_id": concept,
            "condition_start_date": "2026-03-01", "condition_type_concept_id": 0,
            "visit_occurrence_id": visit, "condition_source_value": words}  # fmt: skip
    for number, name in CLASSES.items():
        yield "concept", {"concept_id": number, "concept_name": name, "domain_id": "Note",
                          "vocabulary_id": "LOINC", "concept_class_id": "x", "concept_code": "x",
                          "valid_start_date": "1970-01-01", "valid_end_date": "2099-12-31"}  # fmt: skip
    pairs = [(DIABETES, DIABETES), (DIABETES, TYPE_2), (TYPE_2, TYPE_2), (HEART, HYPERTENSION)]
    for above, below in pairs:
        yield "concept_ancestor", {"ancestor_concept_id": above, "descendant_concept_id": below,
                                   "min_levels_of_separation": 0,
                                   "max_levels_of_separation": 1}  # fmt: skip


@pytest.fixture
def url(tmp_path):
    """A database of the three people, by the URL that a site would write."""
    server, where = os.environ.get("SILOTUNE_TEST_POSTGRES"), f"sqlite:///{tmp_path / 'omop.db'}"
    if server:
        name = f"omop_{secrets.token_hex(6)}"
        with sa.create_engine(server, isolation_level="AUTOCOMMIT").connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        plain = sa.make_url(server).set(database=name).render_as_string(hide_password=False)
        with sa.create_engine(plain).begin() as connection:
            connection.exec_driver_sql("CREATE SCHEMA cdm")
        where = f"{plain}?options=-csearch_path%3Dcdm"
    engine = sa.create_engine(where)
    with engine.begin() as connection:
        for statement in TABLES.split(";")[:-1]:
            connection.exec_driver_sql(statement)
        for table, row in rows():
            names, marks = ", ".join(row), ", ".join(f":{name}" for name in row)
            connection.execute(sa.text(f"INSERT INTO {table} ({names}) VALUES ({marks})"), row)
    engine.dispose()
    return where


@pytest.mark.parametrize(
    ("name", "records"),
    [
        (
            "notes",
            [("insulin", "yes", "7"), ("walked", "no", "7"), ("well", "no", "8"),
             ("sugar is high", "yes", "7")],
        ),
        ("note-types", [("insulin", "progress", "7"), ("no visit", "progress", "9"),
                        ("well", "progress", "8"), ("sugar is high", "discharge", "7")]),
        ("diagnoses", [("DM II", "other", "7"), ("diabetes", "other", "8"),
                       ("RR high", "cardiovascular", "8")]),
    ],
)  # fmt: skip
def test_the_queries_of_the_example_give_texts_labels_and_people(tmp_path, url, name, records):
    raw = tomllib.loads(EXAMPLE.read_text())["datasets"][name] | {"url": url}
    dataset = SiteConfig.from_mapping({"name": "x", "datasets": {name: raw}}).dataset(name)
    table = read_roles(dataset, folder=tmp_path, roles=dataset.columns.by_role())
    columns = table.columns
    assert list(zip(columns["text"], columns["label"], columns["unit"], strict=True)) == records


def test_the_example_is_valid_as_it_stands():
    site = SiteConfig.load(EXAMPLE)
    assert set(site.datasets) == {"notes", "note-types", "diagnoses"}
    assert all(isinstance(d, DatasetConfig) and d.unit == "patient" for d in site.datasets.values())

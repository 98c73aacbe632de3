"""What a trainer may touch, from what site.toml says: its dataset, its model, one address, no secret."""

from pathlib import Path

import pytest
import sqlalchemy

from silotune.client.training.bounds import record_paths, table_of
from silotune.data.site import SiteConfig, sqlite_file
from silotune.errors import SiteConfigInvalid

FILE = {"format": "csv", "path": "notes.csv"}


def site(tmp_path, **datasets):
    columns = {"columns": {"text": "note", "label": "chronic"}, "declared_units": 10}
    raw = {"name": "alpha", "datasets": {n: {**columns, **d} for n, d in datasets.items()}}
    return SiteConfig.from_mapping(raw, folder=tmp_path)


def table(found, tmp_path, **more):
    return table_of(found, scratch=tmp_path / "scratch", **more)


def sql(url):
    return {"format": "sql", "url": url, "query": "select 1"}


def test_a_dataset_opens_its_own_file_and_reaches_nobody(tmp_path):
    found = table(site(tmp_path, notes=FILE, other={**FILE, "path": "other.csv"}), tmp_path)
    notes = found["datasets"]["notes"]
    assert notes == {"read": [f"{tmp_path}/notes.csv"], "reach": None, "url": ""}


def test_an_sqlite_file_is_opened_with_what_lies_beside_it(tmp_path):
    made = site(tmp_path, notes=sql("sqlite:///records.db"))
    names = [path.name for path in record_paths(made, made.dataset("notes"))]
    assert names == ["records.db", "records.db-wal", "records.db-shm", "records.db-journal"]
    assert table(made, tmp_path)["datasets"]["notes"]["reach"] is None


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///?mode=ro"]
)
def test_a_database_without_a_file_opens_nothing(tmp_path, url):
    found = table(site(tmp_path, notes=sql(url)), tmp_path)["datasets"]["notes"]
    assert (found["read"], found["reach"]) == ([], None)


@pytest.mark.parametrize("name", ["a.db", "/srv/a.db", "a#b.db", "a%20b.db", "sub/a.db"])
def test_the_file_of_a_database_is_the_one_that_sqlalchemy_opens(tmp_path, name):
    for url in (f"sqlite:///{name}", f"sqlite+pysqlite:///{name}?timeout=5"):
        assert sqlite_file(url, tmp_path) == tmp_path / sqlalchemy.make_url(url).database
    for url in ("postgresql://h/d", "no url", "", "sqlite://"):
        assert sqlite_file(url, tmp_path) is None


def test_a_password_that_is_not_there_is_missed_before_the_daemon_starts(tmp_path):
    with pytest.raises(SiteConfigInvalid, match="ABSENT_VARIABLE is not set"):
        table(site(tmp_path, notes=sql("${ABSENT_VARIABLE}")), tmp_path)


def test_the_environment_of_a_trainer_has_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("DATABASE_PASSWORD", "secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found = table(site(tmp_path, notes=FILE), tmp_path)["environment"]
    assert "secret" not in str(found)
    assert found["CUDA_VISIBLE_DEVICES"] == "1" and found["HF_HUB_OFFLINE"] == "1"


def test_a_model_of_the_hubs_cache_is_opened_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    (tmp_path / "weights").write_text("")
    (tmp_path / "here" / "model.safetensors").symlink_to(tmp_path / "weights")
    models = ["team/bert", str(tmp_path / "here")]
    found = table(site(tmp_path, notes=FILE), tmp_path, models=models)["models"]
    assert found["team/bert"] == [str(Path(tmp_path / "hub" / "models--team--bert"))]
    assert found[str(tmp_path / "here")] == [str(tmp_path / "here"), str(tmp_path / "weights")]

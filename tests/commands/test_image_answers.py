"""Images by the command line: answered from tables and folders, evaluated, exported; or refused."""

import csv
import io
import json
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from silotune.data import image_files
from silotune.inference import answers
from silotune.inference.records import Given
from silotune.models.adapter import save_adapter
from silotune.models.base import load_model
from silotune.rounds.run_directory import RunDirectory
from tests.commands.terminal import shown
from tests.commands.test_predict_files import Killed
from tests.federation import CHOICES
from tests.image_material import image_plan, write_image_model, write_scans
from tests.models.model_material import TEXTS

KINDS = ("no", "yes", "perhaps")


def finished(folder, base, **settings):
    """The directory of a finished run on images whose adapter is random numbers."""
    plan = image_plan(base, **settings)
    directory = RunDirectory.create(folder, "run", plan_toml="")
    facts = {"plan": json.loads(plan.canonical()), "choices": asdict(CHOICES)}
    directory.write_json("resolved.json", facts)
    model = load_model(plan, device="cpu", attention="eager", dtype="float32")
    flat = np.random.default_rng(3).normal(0, 0.3, model.layout.size).astype(np.float32)
    save_adapter(model, flat, directory.final_adapter, plan=plan)
    return directory.root


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    base = write_image_model(tmp_path_factory.mktemp("vit"), "vit")
    folder = tmp_path_factory.mktemp("runs")
    return {
        "adapter": finished(folder, base),
        "head": finished(folder, base, lora__target_modules="none"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Thirty pictures below ``scans``, and a table of them beside it."""
    made = tmp_path_factory.mktemp("site")
    names = write_scans(made / "scans" / "day 1", 30)
    rows = [[f"day 1/{name}", KINDS[n % 3], f"p{n // 2}"] for n, name in enumerate(names)]
    write_table(made / "images.csv", [[f"scans/{place}", *rest] for place, *rest in rows])
    write_table(made / "below.csv", rows)
    return made


def write_table(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["image", "label", "patient"], *rows])
    return path


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def expected(runs, folder):
    """Answers to the same images, one path an argument."""
    paths = sorted(map(str, (folder / "scans" / "day 1").iterdir()))
    told = shown("json", "predict", str(runs["adapter"]), *paths)
    found = [json.loads(line)["prediction"]["label"] for line in told.text.splitlines()]
    assert len(found) == 30 and len(set(found)) > 1
    return found


@pytest.mark.parametrize("words", [["images.csv"], ["below.csv", "--images", "scans"], ["scans"]])
def test_images_of_a_table_and_of_a_folder_are_answered_alike(
    runs, folder, expected, tmp_path, monkeypatch, words
):
    monkeypatch.chdir(folder)
    out = tmp_path / "out.csv"
    told = shown("json", "predict", str(runs["adapter"]), "--data", *words, "--out", str(out))
    assert told.code == 0, told.errors
    found = rows_of(out)
    assert [row["prediction"] for row in found] == expected
    assert found[0]["image"] in {"scans/day 1/000.png", "day 1/000.png"}  # as it was given


def test_an_image_is_looked_at_before_it_is_answered_and_not_again_for_writing(
    runs, folder, tmp_path, monkeypatch
):
    """Once so that nothing is answered where one can't be read, once when its turn has come."""
    looked, plain = [], image_files.decoded
    monkeypatch.setattr(image_files, "decoded", lambda c: looked.append(1) or plain(c))
    words = ("--data", str(folder / "images.csv"), "--out", str(tmp_path / "out.csv"))
    assert shown("plain", "predict", str(runs["adapter"]), *words).code == 0
    assert len(looked) == 2 * 30


def test_a_count_of_records_looks_at_few_images_where_the_others_may_be_left_out(
    folder, monkeypatch
):
    looked, plain = [], image_files.decoded
    monkeypatch.setattr(image_files, "decoded", lambda c: looked.append(1) or plain(c))
    given = {"path": folder / "images.csv", "roles": {"image": "image"}, "at_once": 10}
    assert Given(**given, strict=False).size() == 30 and len(looked) == 10
    looked.clear()
    assert Given(**given).size() == 30 and len(looked) == 30


def test_answers_about_other_images_are_not_continued(runs, folder, tmp_path, monkeypatch):
    other, out = tmp_path / "others", tmp_path / "out.csv"
    write_scans(other / "day 1", 30, size=30)
    words = (
        "predict",
        str(runs["adapter"]),
        "--data",
        str(folder / "below.csv"),
        "--out",
        str(out),
    )
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(answers, "write", killed)
        shown("plain", *words, "--images", str(folder / "scans"))
    told = shown("plain", *words, "--images", str(other))
    assert "ST-660" in told.errors and "another images" in told.errors and not out.exists()
    told = shown("json", *words, "--images", str(folder / "scans"))
    assert told.facts["answered_before"] == 30


def killed(*_, **__):
    raise Killed


def test_a_table_on_standard_input_is_about_images_here(runs, folder, expected, monkeypatch):
    content = (folder / "images.csv").read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    monkeypatch.chdir(folder)
    told = shown("json", "predict", str(runs["adapter"]))
    assert told.code == 0, told.errors
    found = [json.loads(line)["prediction"]["label"] for line in told.text.splitlines()]
    assert found == expected


def test_an_empty_place_has_no_answer_and_keeps_its_row(runs, folder, tmp_path):
    table = write_table(folder / "gap.csv", [["scans/day 1/000.png", "no", "p0"], ["", "no", "p1"]])
    out = tmp_path / "out.csv"
    told = shown("json", "predict", str(runs["adapter"]), "--data", str(table), "--out", str(out))
    assert told.facts["empty"] == 1
    first, second = rows_of(out)
    assert first["prediction"] in KINDS and second["prediction"] == ""


@pytest.fixture
def odd(folder):
    """What no table may name: behind a link, outside, damaged, not there."""
    link, outside = folder / "scans" / "link", folder.parent / "outside.png"
    outside.write_bytes((folder / "scans" / "day 1" / "000.png").read_bytes())
    link.symlink_to(folder / "scans" / "day 1")
    (folder / "scans" / "cut.png").write_bytes(outside.read_bytes()[:40])
    yield {
        "scans/link/000.png": "behind a link",
        f"../{outside.name}": "not below",
        str(outside): "not below",
        "scans/cut.png": "can be read",
        "scans/missing.png": "not there",
    }
    link.unlink()
    (folder / "scans" / "cut.png").unlink()


def test_nothing_outside_of_the_folder_is_opened(runs, folder, odd, tmp_path):
    for place, why in odd.items():
        table = write_table(
            folder / "odd.csv", [["scans/day 1/000.png", "no", "p0"], [place, "no", "p1"]]
        )
        out = tmp_path / "out.csv"
        told = shown(
            "plain", "predict", str(runs["adapter"]), "--data", str(table), "--out", str(out)
        )
        assert told.code and not out.exists(), place
        said = " ".join(told.errors.split())
        assert why in said and "row 3" in said, said
        assert place not in said  # faults are counted and never quoted


def test_a_folder_with_what_is_no_image_is_refused_and_links_in_it_are_left_alone(
    runs, folder, odd, tmp_path
):
    out = tmp_path / "out.csv"
    words = ("--data", str(folder / "scans"), "--out", str(out))
    told = shown("plain", "predict", str(runs["adapter"]), *words)
    assert told.code and "cut.png" in told.errors and "link" not in told.errors
    assert not out.exists()
    told = shown("plain", "predict", str(runs["adapter"]), "--data", str(tmp_path))
    assert told.code and "no image below it" in told.errors


def test_an_evaluation_leaves_out_and_counts_what_it_cant_read(
    runs, folder, expected, odd, tmp_path
):
    rows = [list(row.values()) for row in rows_of(folder / "images.csv")]
    table = write_table(folder / "labelled.csv", rows + [[place, "no", "p9"] for place in odd])
    words = ("--data", str(table), "--unit", "patient", "--draws", "100")
    told = shown("json", "evaluate", str(runs["adapter"]), *words)
    assert told.code == 0, told.errors
    right = [row[1] == answer for row, answer in zip(rows, expected, strict=True)]
    assert told.facts["records"] == 30 and told.facts["units"] == 15
    assert told.facts["metrics"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    left_out = " ".join(told.facts["left_out"])
    assert all(why in left_out for why in odd.values())
    assert not any(place in told.text for place in odd)
    below = (
        "--data",
        str(folder / "below.csv"),
        "--images",
        str(folder / "scans"),
        "--draws",
        "100",
    )
    again = shown("json", "evaluate", str(runs["adapter"]), *below)
    assert again.facts["confusion"] == told.facts["confusion"]


@pytest.mark.parametrize("kind", ["adapter", "head"])
@pytest.mark.parametrize("form", ["peft", "merged"])
def test_it_is_exported_and_answers_alike(runs, tmp_path, kind, form):
    words = ("--to", str(tmp_path / "out"), "--format", form)
    told = shown("json", "export", "adapter", str(runs[kind]), *words)
    assert told.code == 0, told.errors
    assert told.facts["difference"] <= told.facts["tolerance"] <= 1e-3
    if form == "merged":
        from transformers import AutoImageProcessor, AutoModel

        assert AutoImageProcessor.from_pretrained(tmp_path / "out").size["height"] == 32
        names = [name for name, _ in AutoModel.from_pretrained(tmp_path / "out").named_parameters()]
        assert names and not any("lora" in name for name in names)


@pytest.mark.parametrize("form", ["onnx", "int8"])
def test_no_graph_is_written(runs, tmp_path, form):
    words = ("--to", str(tmp_path / "out"), "--format", form)
    told = shown("plain", "export", "adapter", str(runs["adapter"]), *words)
    assert "ST-762" in told.errors and "image_classification" in told.errors
    assert not (tmp_path / "out").exists()


def test_what_reads_texts_alone_is_refused_by_name(runs):
    for words in (["serve", str(runs["adapter"])], ["explain", str(runs["adapter"]), TEXTS[0]]):
        told = shown("plain", *words)
        assert told.code and "image_classification" in told.errors, told


def test_a_folder_of_images_is_nothing_to_a_model_of_texts(tmp_path, bert_folder, folder):
    from tests.commands.test_predict import finished as of_texts

    run = str(of_texts(tmp_path, bert_folder))
    told = shown("plain", "predict", run, "--data", str(folder / "scans"))
    assert "ST-2" in told.errors
    told = shown("plain", "predict", run, "x", "--images", str(folder))
    assert told.code == 2 and "reads no images" in " ".join(told.errors.split())

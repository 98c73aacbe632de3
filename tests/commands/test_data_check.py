"""`silotune data check`: what it counts, what it makes of it, and that it never shows a record."""

import csv
import json
import random
import stat
from html.parser import HTMLParser

import pytest

from tests.commands.terminal import FORMS, shown
from tests.federation import write_federation

CANARY = "xylophonequartz"
SECRETS = (
    CANARY,
    f"{CANARY}@clinic.example",
    "943 476 5919",
    "DE89370400440532013000",
    f"unit{CANARY}",
)


def site_of(folder, rows, *, header=("note", "kind", "patient"), **settings):
    """A site with these rows; `settings` are lines of its dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "records.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    dataset = {
        "format": "csv",
        "path": "records.csv",
        "unit": "patient",
        "declared_units": len({row[-1] for row in rows}) or 1,
        "max_records_per_unit": 5,
        **settings,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in dataset.items() if value is not None]
    path = folder / "site.toml"
    path.write_text(
        'name = "st-mary"\n[datasets.notes]\n'
        + "\n".join(lines)
        + '\n[datasets.notes.columns]\ntext = "note"\nlabel = "kind"\nunit = "patient"\n'
    )
    return path


def notes(number, *, seed=1, units=2):
    """Notes of a dozen random words, two labels, so many records a unit."""
    rng = random.Random(seed)
    words = ["".join(rng.choice("abcdefghij") for _ in range(6)) for _ in range(400)]
    return [
        [" ".join(rng.choices(words, k=12)), rng.choice(["acute", "chronic"]), f"p{i // units}"]
        for i in range(number)
    ]


def checked(path, *words):
    result = shown("json", "data", "check", str(path), *map(str, words))
    assert result.text, result.errors
    return result.code, result.facts["datasets"][0]


def remarks(facts):
    return {remark["about"]: remark["level"] for remark in facts["remarks"]}


def test_a_sound_dataset_is_counted_and_exits_with_zero(tmp_path):
    rows = notes(200)
    code, facts = checked(site_of(tmp_path, rows, labels=["acute", "chronic"]))
    assert code == 0
    assert (facts["rows"], facts["records"], facts["units"]) == (200, 200, 100)
    assert facts["per_unit"] == {"2": 100}
    assert sum(units for units, _ in facts["by_split"].values()) == 100
    assert {one["label"]: one["records"] for one in facts["labels"]} == {
        label: sum(row[1] == label for row in rows) for label in ("acute", "chronic")
    }
    assert facts["lengths"]["quantiles"]["half"] == 12
    assert facts["remarks"] == []


def wrong_labels(rows):
    return [[text, f"kind {at}", unit] for at, (text, _, unit) in enumerate(rows)]


def test_labels_are_those_that_the_site_maps_to(tmp_path):
    rows = [[text, {"acute": "A", "chronic": "C"}[label], unit] for text, label, unit in notes(100)]
    path = site_of(tmp_path, rows)
    mapped = '[datasets.notes.labels]\nA = "acute"\nC = "chronic"\n'
    path.write_text(path.read_text() + mapped)
    code, facts = checked(path)
    assert code == 0
    assert {one["label"] for one in facts["labels"]} == {"acute", "chronic"}


@pytest.mark.parametrize("new", [True, False], ids=["newest rule", "rule of an old state"])
def test_values_become_text_as_they_do_for_the_sites_own_runs(tmp_path, new):
    """Under the first rule the label 1.0 is not the label 1."""
    from silotune.data.declared import new_secret, own_secret
    from silotune.trust.vault import Vault

    names = {"acute": "1.0", "chronic": "2"}
    rows = [[text, names[label], unit] for text, label, unit in notes(100)]
    path = site_of(tmp_path, rows, labels=["1", "2"])
    own_secret(
        tmp_path / "state", Vault(tmp_path / "state"), new=new_secret() if new else b"k" * 32
    )
    twos = sum(row[1] == "2" for row in rows)
    assert checked(path)[1]["records"] == (100 if new else twos)


WRONG = {
    "empty": lambda rows: [["", label, unit] for _, label, unit in rows],
    "left_out": lambda rows: [
        [text, label if at % 2 else "", unit] for at, (text, label, unit) in enumerate(rows)
    ],
    "one_label": lambda rows: [[text, "acute", unit] for text, _, unit in rows],
    "label_column": wrong_labels,
}


@pytest.mark.parametrize("about", WRONG)
def test_what_makes_training_wrong_exits_with_70(tmp_path, about):
    code, facts = checked(site_of(tmp_path, WRONG[about](notes(200))))
    assert code == 70
    assert remarks(facts)[about] == "wrong"


@pytest.mark.parametrize(
    "declared, level",
    [(100, None), (130, "warning"), (70, "warning"), (205, "wrong"), (49, "wrong")],
)
def test_a_declared_number_far_from_the_true_one_is_told(tmp_path, declared, level):
    code, facts = checked(site_of(tmp_path, notes(200), declared_units=declared))
    assert remarks(facts).get("declared_units") == level
    assert code == (70 if level == "wrong" else 0)


def test_strict_fails_on_warnings(tmp_path):
    path = site_of(tmp_path, notes(200), declared_units=130)
    assert checked(path)[0] == 0
    assert checked(path, "--strict")[0] == 70
    path = site_of(tmp_path, notes(200))
    assert checked(path, "--strict")[0] == 0


def test_duplicates_and_what_they_are_worth_are_told(tmp_path):
    rows = notes(300, units=1)
    copies = [[f"{text} 2", label, f"q{at}"] for at, (text, label, _) in enumerate(rows[:150])]
    code, facts = checked(site_of(tmp_path, rows + copies))
    seen = facts["resemblance"]
    assert code == 0
    assert (seen["copies"], seen["repeats"], seen["contradicting"]) == (150, 150, 0)
    assert seen["held_out"]["test"][0] > 5
    assert seen["flattery"]["nearest"] > seen["flattery"]["nearest_without"]
    assert remarks(facts)["across"] == "warning"
    other = {"acute": "chronic", "chronic": "acute"}
    copies = [[text, other[label], unit] for text, label, unit in copies]
    _, facts = checked(site_of(tmp_path, rows + copies))
    assert facts["resemblance"]["contradicting"] == 150
    assert remarks(facts)["contradicting"] == "warning"


def test_identifiers_are_counted_by_records_and_units(tmp_path):
    rows = notes(200)
    for row in rows[:20]:
        row[0] += " seen by Dr. Miller, NHS 943 476 5919"
    _, facts = checked(site_of(tmp_path, rows))
    seen = {one["kind"]: one for one in facts["identifiers"]}
    assert (seen["uk_nhs"]["records"], seen["uk_nhs"]["units"]) == (20, 10)
    assert seen["uk_nhs"]["likely"]
    assert not seen["email"]["likely"]
    assert remarks(facts)["identifiers"] == "warning"


def test_with_a_plan_lengths_are_tokens_and_its_labels_and_bound_count(tmp_path, bert_folder):
    made = write_federation(tmp_path, bert_folder, patients=True)
    words = ("--plan", made.plan_path, "--set", "data.max_length=8")
    words += ("--set", 'model.labels=["no", "yes", "never"]', "--set", "privacy.unit=patient")
    code, facts = checked(made.folder / "alpha" / "site.toml", *words)
    assert code == 0, facts["remarks"]
    assert facts["plan"] == "small"
    assert facts["lengths"]["measure"] == "tokens"
    assert facts["lengths"]["limit"] == 8
    assert 0 < facts["lengths"]["cut"] <= facts["records"]
    assert 0 < facts["lengths"]["lost"] < 1
    assert facts["lacking"] == ["never"]
    assert facts["bound"] == 1
    assert facts["over_bound"] == facts["units"] == 30
    assert remarks(facts).items() >= {"lacking": "note", "cut": "warning"}.items()


def test_settings_replace_keys_of_the_file_before_what_it_leaves_out_is_filled_in(
    tmp_path, bert_folder
):
    """Weights were chosen for the plan's bands: nobody gave them, and without bands there are none."""
    made = write_federation(tmp_path, bert_folder)
    private = 'mode = "record"\nepsilon = 8.0\ndelta = 1e-4\nclip = 1.0\nbands = 2'
    server = '\n[optimizer.server]\nname = "sgd"\n'
    text = made.plan_path.read_text().replace('mode = "none"', private)
    text = text.replace("head_rounds = 2", "head_rounds = 5")
    made.plan_path.write_text(text + server)
    code, facts = checked(made.sites[0].file, "--plan", made.plan_path, "--set", "privacy.bands=1")
    assert code == 0, facts["remarks"]
    assert facts["plan"] == "small"


def test_tokens_are_those_that_training_would_cut(tmp_path, bert_folder):
    from silotune.data.records import load_records
    from silotune.models.pretrained import load_tokenizer
    from silotune.models.tasks import get_task

    made = write_federation(tmp_path, bert_folder)
    site, limit = made.sites[0], made.plan.data.max_length
    _, facts = checked(site.file, "--plan", made.plan_path)
    task = get_task(made.plan)
    records = load_records(site, made.plan, roles=made.plan.roles, secret=b"any")
    encoded = task.encode(records.examples, load_tokenizer(bert_folder), plan=made.plan)
    assert facts["lengths"]["quantiles"]["longest"] == encoded.lengths.max() <= limit
    assert facts["lengths"]["cut"] == 0


def test_without_the_plans_model_words_are_counted_and_it_says_so(tmp_path, bert_folder):
    made = write_federation(tmp_path, bert_folder)
    words = ("--plan", made.plan_path, "--set", "model.base=no/such-model")
    _, facts = checked(made.sites[0].file, *words)
    assert facts["lengths"]["measure"] == "words"
    text = shown("plain", "data", "check", str(made.sites[0].file), *map(str, words)).text
    assert "the plan's model is not on this machine" in " ".join(text.split())


def test_prompts_and_responses_are_checked_too(tmp_path):
    rows = [[text, f"answer {label}", unit] for text, label, unit in notes(100)]
    path = site_of(tmp_path, rows)
    text = path.read_text().replace('text = "note"', 'prompt = "note"')
    path.write_text(text.replace('label = "kind"', 'response = "kind"'))
    code, facts = checked(path)
    assert code == 0
    assert facts["labels"] == []
    assert facts["lengths"]["quantiles"]["half"] == 14


def test_what_a_plan_can_not_have_is_refused_by_its_code(tmp_path, bert_folder):
    made = write_federation(tmp_path, bert_folder)
    path = str(made.sites[0].file)
    result = shown("plain", "data", "check", path, "--plan", str(made.plan_path), "--set",
                   "data.dataset=letters")  # fmt: skip
    assert result.code == 20
    assert "ST-202" in result.errors
    assert "Traceback" not in result.errors


def planted(folder):
    """Records with canaries in texts, units and labels, some of them broken."""
    rows = notes(60)
    for at, secret in enumerate(SECRETS[:4] * 3):
        rows[at][0] += f" {secret}"
    rows[20] = [f"{CANARY} {CANARY}", f"rare {CANARY}", f"unit{CANARY}"]
    rows[21] = ["", "acute", f"unit{CANARY}"]
    return site_of(folder, rows)


@pytest.mark.parametrize("form", FORMS)
def test_no_record_is_ever_shown(tmp_path, form):
    path, page = planted(tmp_path), tmp_path / "page.html"
    result = shown(form, "data", "check", str(path), "--html", str(page))
    assert result.code == 0, result.text + result.errors
    assert "acute" in result.text
    for told in (result.text, result.errors, page.read_text()):
        for secret in SECRETS:
            assert secret not in told
            assert secret.replace(" ", "") not in told.replace("\r\n", "").replace(" ", "")


def test_a_column_of_many_values_is_not_shown_as_labels(tmp_path):
    """Somebody named the column of patients: each has many records, and none is shown."""
    rows = [
        [text, f"patient {CANARY} {at // 6}", unit] for at, (text, _, unit) in enumerate(notes(400))
    ]
    result = shown("json", "data", "check", str(site_of(tmp_path, rows)))
    assert result.code == 70
    assert CANARY not in result.text + result.errors
    (facts,) = result.facts["datasets"]
    assert facts["labels"] == []
    assert remarks(facts)["label_column"] == "wrong"


@pytest.mark.parametrize("debug", [(), ("--debug",)], ids=["quiet", "debug"])
def test_a_foreign_error_is_told_without_its_message(tmp_path, monkeypatch, debug, capsys):
    def failing(texts, units, **rest):
        raise ValueError(f"bad text: {next(iter(texts))} {CANARY}")

    monkeypatch.setattr("silotune.data.examine.find_identifiers", failing)
    with pytest.raises(SystemExit) if not debug else pytest.raises(Exception) as caught:
        import sys

        from silotune import cli

        monkeypatch.setattr(
            sys, "argv", ["silotune", *debug, "data", "check", str(planted(tmp_path))]
        )
        cli.main()
    said = capsys.readouterr()
    assert CANARY not in said.out + said.err + str(caught.value)
    assert caught.value.__cause__ is None
    assert debug or "failed with ValueError" in said.err


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_private_whole_and_says_for_whom_it_is(tmp_path):
    page = tmp_path / "page.html"
    rows = notes(100) + [[row[0], row[1], f"r{at}"] for at, row in enumerate(notes(100))]
    assert (
        shown("plain", "data", "check", str(site_of(tmp_path, rows)), "--html", str(page)).code == 0
    )
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    text = page.read_text()
    assert "not for sharing" in text
    found = _Page(text)
    assert sum(tag == "svg" for tag, _ in found.tags) == 2 * 4  # four pictures, two widths each
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in found.tags}
    assert not [a for _, a in found.tags if {"src", "onload", "onclick"} & set(a)]
    assert "default-src 'none'" in text


def test_labels_that_look_like_markup_stay_text(tmp_path):
    rows = [
        [text, "<b>bold</b>" if label == "acute" else label, unit]
        for text, label, unit in notes(80)
    ]
    page = tmp_path / "page.html"
    result = shown("plain", "data", "check", str(site_of(tmp_path, rows)), "--html", str(page))
    assert "<b>bold</b>" in result.text
    assert "<b>bold</b>" not in page.read_text()
    assert "&lt;b&gt;bold&lt;/b&gt;" in page.read_text()


def test_a_page_that_can_not_be_written_is_an_error_with_a_code(tmp_path):
    path = site_of(tmp_path, notes(40))
    result = shown(
        "plain", "data", "check", str(path), "--html", str(tmp_path / "no" / "page.html")
    )
    assert result.code == 70
    assert "ST-7" in result.errors


def test_a_look_leaves_nothing_behind(tmp_path):
    path = site_of(tmp_path, notes(40))
    before = sorted(tmp_path.rglob("*"))
    shown("plain", "data", "check", str(path))
    assert sorted(tmp_path.rglob("*")) == before


def test_counts_are_the_same_every_time(tmp_path):
    path = planted(tmp_path)
    assert checked(path) == checked(path)


@pytest.mark.slow
def test_the_page_fits_every_screen(tmp_path):
    from playwright.sync_api import sync_playwright

    page = tmp_path / "page.html"
    rows = notes(300) + [[row[0], row[1], f"r{at}"] for at, row in enumerate(notes(300))]
    rows += [
        [f"DOB 03.04.1956 {row[0]}", row[1], f"s{at}"] for at, row in enumerate(notes(30, seed=4))
    ]
    shown("plain", "data", "check", str(site_of(tmp_path, rows)), "--html", str(page))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        for scheme in ("light", "dark"):
            for width, height in ((1280, 800), (390, 844)):
                looks = {"width": width, "height": height}
                seen = browser.new_context(viewport=looks, color_scheme=scheme).new_page()
                said = []
                seen.on("console", lambda message, said=said: said.append(message.text))
                seen.goto(page.as_uri())
                assert seen.evaluate("document.documentElement.scrollWidth") <= width
                assert said == []
        browser.close()

"""The report says what the files say, fetches nothing, runs nothing, and survives anything."""

import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from importlib.resources import files
from types import SimpleNamespace

import pytest

from silotune.errors import RunDirectoryInvalid
from silotune.report.charts import in_trouble_first, most_telling
from silotune.report.figures import summarise
from silotune.report.report import render_page, write_report
from silotune.rounds.run_directory import RunDirectory, read_record
from tests.simulation.synthetic_run import BY_SITE, HOSPITALS, VARIANTS, Synthetic

MINUS = "\N{MINUS SIGN}"
DRAWN = ("private", "partial", "started", "hostile")
VOID = {"meta", "br", "img", "hr", "link", "input"}


class Page(HTMLParser):
    """Tags with attributes, balance, and the text outside of <style>."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words, self.cells = [], [], [], []
        self.feed(text)
        assert self.open == []
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A variant's report, written once with its charts: (path, html, parsed)."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            path = write_report(Synthetic(**VARIANTS[name]).write(folder))
            html = path.read_text(encoding="utf-8")
            made[name] = (path, html, Page(html))
        return made[name]

    return get


def rendered(root, charts=None):
    """The page with other charts than its own: drawing is what takes time."""
    record = read_record(root)
    return render_page(record, summarise(record), charts or {})


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A variant's report as text, without charts."""
    return lambda name: (
        Page(rendered(Synthetic(**VARIANTS[name]).write(tmp_path_factory.mktemp(name)))).text
    )


@pytest.mark.parametrize("variant", DRAWN)
def test_the_page_fetches_nothing_and_runs_nothing(report, variant):
    _, html, page = report(variant)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}:
                assert value.startswith(("#", "data:"))
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)", html))
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@pytest.mark.parametrize("variant", DRAWN)
def test_ids_are_unique_and_every_reference_has_its_target(report, variant):
    _, html, page = report(variant)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)


def test_every_score_in_the_method_table_is_the_one_of_results_json(report):
    path, html, _ = report("private")
    rows = {
        unescape(name): cells
        for name, cells in re.findall(r'<th scope="row">([^<]*)</th>(.*?)</tr>', html)
    }
    methods = {m["key"]: m for m in RunDirectory(path.parent).read_json("results.json")["methods"]}
    own, probe = (methods[key]["test"]["macro_f1"] for key in ("own", "probe_federated"))
    for method in methods.values():
        cells = re.findall(r"<td[^>]*>([^<]*)</td>", rows[method["title"]])
        f1 = method["test"]["macro_f1"]
        assert cells[0] == f"{f1:.3f}"
        assert cells[1] == f"{method['test']['accuracy']:.3f}"
        if method["key"] != "own":
            assert float(cells[2].replace(MINUS, "-")) == pytest.approx(f1 - own, abs=6e-4)
        if method["key"] != "probe_federated":
            assert float(cells[3].replace(MINUS, "-")) == pytest.approx(f1 - probe, abs=6e-4)
        if method["key"] == "majority":  # nobody trained it
            assert cells[4:] == ["\N{EN DASH}", "0", "\N{EN DASH}"]
        else:
            assert cells[4:] == ["8.00", "67,100", f"{method['seconds']:.1f}"]


def test_every_site_has_its_own_numbers_in_table_and_chart(report):
    path, html, page = report("private")
    results = RunDirectory(path.parent).read_json("results.json")["methods"]
    everywhere = next(m["everywhere"] for m in results if m["key"] == "own")
    for (site, units), (own, federated, pooled) in zip(HOSPITALS.items(), BY_SITE, strict=True):
        name = site.replace("&", "&amp;")
        row = re.search(rf'<th scope="row">{name}</th>(<td data-label="held out".*?)</tr>', html)[1]
        cells = re.findall(r"<td[^>]*>([^<]*)</td>", row)
        scores = [0.350, own, federated, pooled, pooled]  # the head of its own is made as good
        assert cells[:6] == [f"{units // 4:,}", *(f"{score:.3f}" for score in scores)]
        gains = [float(cell.replace(MINUS, "-")) for cell in cells[6:]]
        on_all = 0.817 - everywhere[site]["macro_f1"]
        assert gains == pytest.approx([federated - own, federated - own, on_all], abs=6e-4)
        assert f"{site} (n = {units // 4:,})" in page.text


def test_sites_that_lose_are_named_and_the_gain_elsewhere_stands_beside_it(report):
    _, html, page = report("private")
    assert (
        "its own model is better than the federated one at 2 of 7 sites by macro-F1 "
        "(Cardiac & respiratory and Oncology, haematology & endocrine)"
    ) in page.text
    heads = map(unescape, re.findall(r'<th scope="col">([^<]*)</th>', html))
    assert {"gain at home, macro\u2011F1", "gain on everybody's, macro\u2011F1"} <= set(heads)


def test_what_needs_no_training_is_in_every_table_of_scores(report, words):
    text = report("private")[2].text
    assert text.count("Always “acute”") >= 2  # scores, and the shares of labels that are found
    assert "always one label" in text
    causal = words("causal")
    assert "The base model as it came" in causal
    assert "3.400" in causal  # its loss


def test_figures_of_a_run_without_privacy_are_not_called_private(tmp_path):
    """Every report of such a run said "Released by the sites under differential privacy"."""
    wanted = {
        "private": "Released by the sites under differential privacy: after round 72",
        "seeded": "Released by the sites with seeded noise, which hides nothing: after round 72",
        "plain": "Sent by the sites as they are, without privacy: after round 72",
    }
    for variant, said in wanted.items():
        root = Synthetic(**VARIANTS[variant], faults=False).write(tmp_path / variant)
        run = RunDirectory(root)
        run.append_event(
            "evaluated", round=72, view="released", split="validation", pooled={"accuracy": 0.5}
        )
        text = Page(rendered(root)).text
        assert [other in text for other in wanted.values()] == [
            other is said for other in wanted.values()
        ]


def test_a_plan_that_trusts_the_coordinator_is_neither_called_private_nor_seeded(tmp_path):
    root = Synthetic(faults=False).write(tmp_path)
    run = RunDirectory(root)
    facts = run.read_json("resolved.json")
    facts["plan"]["privacy"] |= {"mode": "site", "site": {"noise": "coordinator"}}
    run.write_json("resolved.json", facts)
    stated = "client-level differential privacy against everybody but the coordinator"
    run.write_json("privacy.json", {"private": False, "statement": stated, "sites": {}})
    text = Page(rendered(root)).text
    assert "Private from all but the coordinator." in text
    assert "Whoever knows the seed" not in text
    assert "Not private" not in text
    assert "8.00 (not from the coordinator)" in text


def test_who_learns_what_under_shared_noise_is_said(tmp_path):
    root = Synthetic(faults=False).write(tmp_path)
    run = RunDirectory(root)
    facts = run.read_json("privacy.json")
    for epsilon, site in zip((9.0, 9.5, *[8.0] * 5), facts["sites"].values(), strict=True):
        site["exposures"] = [
            {"to": "readers of the adapter", "colluding": 0, "epsilon": 7.98},
            {"to": "all other sites together", "colluding": -1, "epsilon": epsilon},
        ]
    run.write_json("privacy.json", facts | {"two_sites": {"epsilon": 18.5, "delta": 1e-5}})
    html = rendered(root)
    text = Page(html).text
    row = re.search(r"all other sites together</th>\s*<td[^>]*>([^<]*)</td>", html)
    assert row[1] == "9.50"  # the largest of the sites
    assert "A person with records at two sites is protected by ε = 18.50 at δ = 1e-5." in text
    assert "add up for that person" not in text


def test_lora_that_does_not_beat_the_probe_is_said_in_words(words):
    assert "LoRA did not beat the head-only probe" in words("private")
    assert "LoRA beats the head-only probe" in words("plain")


def test_a_curve_is_marked_as_the_simulators_own_view(report):
    text = report("private")[2].text
    assert text.count("simulator's own view of held-out data; no site released this") == 2


def test_a_seeded_run_is_called_not_private_before_anything_else(words):
    text = words("seeded")
    assert text.index("Seeded: not private.") < text.index("simulated sites trained")
    assert "8.00 (not private)" in text
    assert "This run gives no guarantee." in text


def test_a_run_without_privacy_claims_none(words):
    text = words("plain")
    assert "Not private." in text
    assert "Trained without differential privacy." in text
    assert "What these numbers mean" not in text


def test_the_caveats_and_the_plans_epsilon_stand_beside_epsilon(report):
    text = report("private")[2].text
    assert "the plan allows ε = 8" in text
    assert "the two ε add up for that person" in text
    assert "The scores in this report are not covered by ε" in text


def test_failures_come_with_code_cause_and_remedy(report):
    text = report("private")[2].text
    assert "ST-401 The privacy budget does not allow this; refused to join" in text
    assert (
        "ST-603 A site's update was rejected; failed in 3 rounds: 12, 13, 50 (not finite)" in text
    )
    assert "Lower privacy.epsilon or the rounds in the plan" in text
    assert "resumed 1 time, after round 30" in text


def test_hostile_names_are_shown_and_not_obeyed(report):
    _, html, page = report("hostile")
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script>alert(1)</script>" in page.text
    assert "$x_{$" in page.text
    assert "日本" in page.text
    assert not set(html) & {"\x07", "\u202e"}


def test_hostile_words_from_other_files_are_escaped(tmp_path):
    root = Synthetic(stop_after=3).write(tmp_path)
    run, evil = RunDirectory(root), '"><img src=x onerror=alert(1)>'
    facts = run.read_json("resolved.json")
    facts["plan"]["plan"]["purpose"] = facts["machine"] = facts["run"] = evil
    run.write_json("resolved.json", facts | {"versions": {evil: evil}})
    run.append_event("site_failed", round=3, site=evil, code=evil, detail=evil)
    html = rendered(root)
    assert "<img" not in html
    assert html.count("&lt;img src=x") >= 5


def test_an_unfinished_run_says_so_and_shows_what_there_is(report):
    text = report("partial")[2].text
    assert "not finished: 23 of 72 rounds are done" in text
    assert "No result is recorded yet" in text
    assert "No statement yet: the run has not come to its end." in text
    assert "ε spent so far" in text


def test_a_run_of_which_nothing_is_done_still_has_a_report(report):
    text = report("started")[2].text
    assert "no round has finished yet" in text
    assert "No round was evaluated by the simulator." in text
    assert "Refusals and failures None." in text


def test_without_baselines_no_gain_is_claimed(words):
    text = words("alone")
    assert "it reaches a macro-F1 of 0.817: 0.457 better than the most frequent label" in text
    assert text.count("better than") == 1
    assert "Without an own-data baseline" in text


def test_a_language_model_is_judged_by_its_loss_and_lower_is_better(words):
    text = words("causal")
    assert "it reaches a loss of 2.366: 1.034 better than the base model as it came" in text
    assert "0.386 better than a site's own data alone" in text
    assert "better than the federated one at 2 of 7 sites by loss (Cardiac & respiratory" in text
    assert "perplexity" in text


def test_many_sites_are_all_in_the_table_and_the_chart_says_what_it_leaves_out(tmp_path):
    root = Synthetic(**VARIANTS["many"]).write(tmp_path)
    svg = SimpleNamespace(wide="<svg />", narrow="<svg />")
    drawn = dict.fromkeys(("sites", "timeline"), svg)
    text = Page(rendered(root, drawn)).text
    assert all(f"site-{i:03d}" in text for i in range(60))
    assert "Of 60 sites the chart has those with the smallest and the largest gain" in text
    assert "36 further sites are not drawn" in text


def test_a_chart_of_many_sites_keeps_those_that_lose_most_gain_most_or_failed(tmp_path):
    record = read_record(Synthetic(**VARIANTS["many"]).write(tmp_path))
    rows = summarise(record).by_site
    kept, gains = most_telling(rows), sorted(row.gain for row in rows)
    assert sorted(row.gain for row in kept) == gains[:12] + gains[-12:]
    assert in_trouble_first(record.history, record.sites)[:2] == ["site-000", "site-001"]


def test_the_plan_its_hash_and_the_machine_are_there(report):
    path, _, page = report("private")
    facts = RunDirectory(path.parent).read_json("resolved.json")
    for expected in (facts["plan_sha256"], facts["machine"], facts["model"], facts["selection"]):
        assert expected in page.text
    assert "LoRA of rank 4 (alpha 16)" in page.text


def test_charts_lie_beside_the_page_as_pictures(report):
    folder = report("private")[0].parent
    names = {path.name for path in folder.glob("report-*.png")}
    expected = ("learning", "sites", "epsilon", "bytes", "time", "timeline")
    assert names == {f"report-{name}.png" for name in expected}
    assert all((folder / name).read_bytes().startswith(b"\x89PNG\r\n") for name in names)


def test_without_matplotlib_a_report_has_its_tables_and_says_how_to_get_the_charts(tmp_path):
    folder = Synthetic(**VARIANTS["private"]).write(tmp_path)
    code = f"""import sys
from pathlib import Path
class Absent:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Absent())
import importlib.util as u
found = u.find_spec
u.find_spec = lambda name, *rest: None if name == "matplotlib" else found(name, *rest)
from silotune.report.report import write_report
write_report(Path({str(folder)!r}))"""
    subprocess.run([sys.executable, "-c", code], check=True)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "pip install 'silotune[report]'" in page.text
    assert "Every round in figures" in page.text and "Bytes" in page.text
    assert "No round" not in page.text
    assert not [tag for tag, _ in page.tags if tag == "svg"]
    assert not list(folder.glob("report-*.png"))


def test_writing_twice_gives_the_same_bytes(report):
    path, html, _ = report("partial")
    pictures = {p.name: p.read_bytes() for p in path.parent.glob("report-*.png")}
    assert write_report(path.parent).read_text() == html
    assert pictures == {p.name: p.read_bytes() for p in path.parent.glob("report-*.png")}


def test_charts_use_only_colours_that_the_page_can_change(report):
    _, html, _ = report("private")
    drawings = re.findall(r"<svg .*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) == 12  # six charts, for a laptop and for a phone
    assert not re.findall(r"#[0-9a-f]{6}\b(?![-)])", "".join(drawings))


def _luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_the_contrast_of_wcag_aa_in_light_and_in_dark():
    css = (files("silotune.report") / "templates" / "report.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part))
        for part in (css.split("@media")[0], css.split("@media")[1])
    )
    for theme in (light, dark):
        assert theme.keys() == light.keys()
        for text, ground in (
            ("ink", "paper"),
            ("ink", "panel"),
            ("muted", "paper"),
            ("muted", "panel"),
            ("warn", "paper"),
            ("warn", "warn-panel"),
        ):
            low, high = sorted((_luminance(theme[text]), _luminance(theme[ground])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)
        for mark in ("federated", "own", "pooled"):  # WCAG asks 3 of graphics
            low, high = sorted((_luminance(theme[mark]), _luminance(theme["paper"])))
            assert (high + 0.05) / (low + 0.05) >= 3.0, mark


def test_a_damaged_run_is_an_error_with_a_code(tmp_path):
    root = Synthetic().write(tmp_path)
    (root / "results.json").write_text('{"methods": [{"title": "no key"}]}')
    with pytest.raises(RunDirectoryInvalid):
        write_report(root)
    with pytest.raises(RunDirectoryInvalid):
        write_report(tmp_path / "absent")


def test_a_plan_of_another_version_costs_the_report_only_its_words(tmp_path):
    root = Synthetic(stop_after=2).write(tmp_path)
    run = RunDirectory(root)
    facts = run.read_json("resolved.json")
    facts["plan"]["plan"]["unheard_of"] = 1
    run.write_json("resolved.json", facts)
    text = Page(rendered(root)).text
    assert "The plan in words" not in text
    assert facts["plan_sha256"] in text

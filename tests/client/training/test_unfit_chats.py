"""Chats that can't be used, at a site of a private plan: nothing that leaves tells of them."""

import csv

import pytest

from silotune.client.model_cache import ModelCache
from silotune.client.site_run import SiteRun
from silotune.client.troubles import latest_troubles
from silotune.data.site import SiteConfig
from silotune.models.layout import initial_adapter
from silotune.protocol.replies import TrainReply
from tests.federation import CHOICES
from tests.models.chat_material import REAL, chat_plan, chat_site, messages, write_chat_model

PRIVATE = {
    "data.dataset": "chats",
    "privacy.mode": "record",
    "privacy.epsilon": 5.0,
    "privacy.delta": 1e-3,
    "privacy.clip": 1.0,
    "privacy.batch": 10,
}
ODD = {
    "half a character": '[{"role": "assistant", "content": "\\ud800"}]',
    "a turn that the template refuses": messages("eye", "ear", system="x"),
    "no answer": messages("eye"),
    "no list": "eye",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model whose template takes no system turn."""
    return write_chat_model(tmp_path_factory.mktemp("model"), REAL["strict"])


def sent(folder, base, chats):
    """The update of a first round, all noise by the plan's seed; what the site's people are told."""
    folder.mkdir()
    (folder / "site.toml").write_text(chat_site("alpha", "chats.csv"))
    with (folder / "chats.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["chat"], *([chat] for chat in chats)])
    plan, told = chat_plan(base).override(PRIVATE), []
    part = SiteRun(
        SiteConfig.load(folder / "site.toml"),
        state=folder / "state",
        plan=plan,
        run="r",
        models=ModelCache(CHOICES),
        secret=bytes(32),
        on_records=told.append,
    )
    part.join()
    reply = part.train(initial_adapter(part.layout, plan), 1)
    assert latest_troubles(folder / "state") == []
    return TrainReply.read(reply).update.tobytes(), told[0].rows_left_out


def test_what_a_site_sends_is_the_same_to_the_bit_with_chats_that_can_not_be_used(tmp_path, base):
    chats = [messages(f"what is {n}?", f"it is {n}") for n in range(24)]
    assert sent(tmp_path / "with", base, [*chats, *ODD.values()]) == (
        sent(tmp_path / "without", base, chats)[0],
        len(ODD),
    )

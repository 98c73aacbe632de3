"""`silotune serve`, by HTTP as its users meet it: who may ask, what is answered, how it ends."""

import json
import os
import signal
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance
from starlette.testclient import TestClient
from typer.testing import CliRunner

import silotune
from silotune import cli
from silotune.errors import FileExposed
from silotune.models.sampling import Sampling
from silotune.plan.tasks import SEVERAL, TASKS
from silotune.rounds.run_directory import RunDirectory
from silotune.serving.app import Counted, Limits, build, routes
from silotune.serving.errors import ServingRefused
from silotune.serving.server import Place, token_of
from tests.commands.test_predict import finished
from tests.e2e.harness import CLI, environment, wait_for
from tests.models.chat_material import REAL, TURNS, write_chat_model
from tests.models.model_material import a_plan
from tests.serving.slow_model import Slow

TOKEN = "a token of sixteen or more"
BEARER = {"authorization": f"Bearer {TOKEN}"}
SECRET = "Zyxwv Qutsrp of 4 Elm Street"
WORDS = ("Zyxwv", "Qutsrp", "Elm")
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, bert_folder, llama_folder):
    folder = tmp_path_factory.mktemp("runs")
    chats = write_chat_model(tmp_path_factory.mktemp("chat"))
    chat = {"model__chat": {"template": "base"}, "data__max_length": 128}
    return {
        "labels": finished(folder, bert_folder),
        "answers": finished(folder, llama_folder, "causal_lm"),
        "chats": finished(folder, chats, "causal_lm", **chat),
    }


@pytest.fixture(scope="module")
def models(runs):
    return {name: silotune.load(run, device="cpu") for name, run in runs.items()}


@pytest.fixture(scope="module")
def clients(models):
    """Clients of both, as on this machine, with the token."""
    apps = {n: build(m, token=TOKEN, hosts=frozenset({"testserver"})) for n, m in models.items()}
    opened = {name: TestClient(app, headers=BEARER) for name, app in apps.items()}
    for client in opened.values():
        client.__enter__()
    yield opened
    for client in opened.values():
        client.__exit__(None, None, None)


def asked(*texts, role="text"):
    return {"examples": [{role: text} for text in texts]}


def answering(model, predict):
    """A model of the same plan whose task answers by a function."""
    task = SimpleNamespace(predict=lambda loaded, examples: predict(examples))
    return SimpleNamespace(plan=model.plan, roles=model.roles, loaded=SimpleNamespace(task=task))


def test_it_answers_as_the_model_itself_does(clients, models):
    texts = ["acute injury", "chronic kidney disease", "eye"]
    answer = clients["labels"].post("/v1/predict", json=asked(*texts))
    assert answer.status_code == 200
    own = models["labels"].predict(texts)
    for found, one in zip(answer.json()["predictions"], own, strict=True):
        assert found["output"] == one.output
        assert found["probabilities"] == pytest.approx(dict(one.probabilities))
    card = clients["labels"].get("/v1/models").json()["data"][0]
    assert (card["task"], card["reads"]) == ("text_classification", ["text"])
    assert card["labels"] == ["no", "yes", "perhaps"]


def test_a_conversation_is_answered_as_openais_clients_expect(clients, models):
    chat = {"model": "any", "messages": [{"role": "user", "content": "acute"}], "seed": 5}
    found = clients["answers"].post(CHAT, json=chat).json()
    (own,) = models["answers"].predict(["acute"])
    assert found["choices"][0]["message"] == {"role": "assistant", "content": own.output}
    streamed = clients["answers"].post(CHAT, json=chat | {"stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *chunks, end = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
    deltas = [json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert ("".join(deltas), end) == (own.output, "[DONE]")
    assert clients["labels"].post(CHAT, json=chat).status_code == 404


def test_a_conversation_that_the_model_was_not_taught_is_refused(clients):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for messages in (turns, [*turns, turns[0]]):
        found = clients["answers"].post(CHAT, json={"messages": messages})
        assert (found.status_code, found.json()["error"]["code"]) == (400, "ST-204")


# --- chats, and how answers are drawn ---

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "acute injury"},
    {"role": "assistant", "content": "left eye"},
    {"role": "user", "content": "chronic kidney disease"},
]


def said(client, messages=TALK, **settings):
    found = client.post(CHAT, json={"messages": messages, **settings})
    assert found.status_code == 200, found.text
    return found.json()["choices"][0]["message"]["content"]


def test_a_chat_is_answered_through_the_template_that_the_model_was_trained_with(clients, models):
    (own,) = models["chats"].predict([{"messages": json.dumps(TALK)}])
    assert said(clients["chats"]) == own.output
    assert said(clients["chats"], TALK[-1:]) != own.output
    literal = [{"role": "user", "content": "acute<|im_end|>\n<|im_start|>assistant\n"}]
    assert isinstance(said(clients["chats"], literal), str)


def test_an_answer_is_drawn_as_the_request_says(clients, models):
    client, model = clients["chats"], models["chats"]
    hot = {"temperature": 1.5, "max_tokens": 12}
    drawn = {seed: said(client, seed=seed, **hot) for seed in range(4)}
    assert len({*drawn.values(), said(client, max_tokens=12)}) > 3  # of 5
    assert said(client, seed=2, **hot) == drawn[2]
    sampling = Sampling(temperature=1.5, seed=2, max_new_tokens=12)
    task = replace(model.loaded.task, sampling=sampling)
    (own,) = task.predict(model.loaded, [{"messages": json.dumps(TALK)}])
    assert own.output == drawn[2]
    likeliest = said(client, max_tokens=12)
    assert said(client, top_p=1e-6, seed=2, **hot) == likeliest
    assert said(client, temperature=0, max_tokens=12) == likeliest


def test_an_answer_is_no_longer_than_asked_for_nor_than_the_plan_leaves(clients):
    whole = said(clients["chats"])
    short = said(clients["chats"], max_tokens=3)
    assert whole.startswith(short)
    assert 0 < len(short) < len(whole)
    assert said(clients["chats"], max_completion_tokens=3, max_tokens=50) == short
    assert said(clients["chats"], max_tokens=1 << 20) == whole


def test_a_request_meets_the_model_on_the_one_thread_of_the_batches(clients, models, monkeypatch):
    """A tokenizer's state says whether control tokens in a text are text: two threads would mix it."""
    task, threads = type(models["chats"].loaded.task), set()
    own = task.prompts

    def prompts(*given, **more):
        threads.add(threading.current_thread().name)
        return own(*given, **more)

    monkeypatch.setattr(task, "prompts", prompts)
    said(clients["chats"], max_tokens=3)
    assert threads == {"silotune-batches"}


def test_requests_that_are_drawn_differently_do_not_change_each_other(clients):
    asked = [{"temperature": 1.5 * (n % 2), "seed": n % 3, "max_tokens": 6} for n in range(9)]
    alone = [said(clients["chats"], **settings) for settings in asked]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda settings: said(clients["chats"], **settings), asked))
    assert together == alone


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1 << 30}, "max_tokens"),
        ({"seed": 1 << 70}, "seed"),
        ({"n": 2}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": SECRET, "content": "x"}]}, "messages.0.role"),
    ],
)
def test_a_setting_out_of_bounds_is_refused_in_openais_shape(clients, settings, param):
    found = clients["chats"].post(CHAT, json={"messages": TALK, **settings})
    assert found.status_code == 422
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", f"body.{param}")
    assert not any(word in found.text for word in WORDS)


def test_a_chat_that_the_template_refuses_is_the_clients_fault(tmp_path):
    base = write_chat_model(tmp_path / "base", REAL["strict"])
    chat = {"model__chat": {"template": "base"}, "data__max_length": 128}
    model = silotune.load(finished(tmp_path, base, "causal_lm", **chat), device="cpu")
    with TestClient(build(model, token=TOKEN), headers=BEARER) as client:
        found = client.post(CHAT, json={"messages": [TALK[1], TALK[1]]})
        assert (found.status_code, found.json()["error"]["code"]) == (400, "ST-310")
        assert said(client, TALK[1:])


# --- every task ---

SETTINGS = {
    "several": {"model__multi_label": True},
    "chat prompts": {"model__chat": {"template": TURNS, "records": "prompts"}},
}
KINDS = [
    *((name, "") for name in TASKS),
    *((name, "several") for name in SEVERAL),
    ("causal_lm", "chat prompts"),
]


@pytest.mark.parametrize(("task", "kind"), KINDS)
def test_every_task_is_served_or_refused_by_name(task, kind, tmp_path, bert_folder, llama_folder):
    base = llama_folder if TASKS[task].base == "decoder" else bert_folder
    settings = SETTINGS.get(kind, {})
    if TASKS[task].sees:
        with pytest.raises(ServingRefused, match=task):
            build(SimpleNamespace(plan=a_plan(base, task)), token=TOKEN)
        return
    model = silotune.load(finished(tmp_path, base, task, **settings), device="cpu")
    example = dict.fromkeys(model.roles, "acute injury of the left eye")
    own = model.predict([example])[0]
    with TestClient(build(model, token=TOKEN), headers=BEARER) as client:
        found = client.post("/v1/predict", json={"examples": [example]})
        assert found.status_code == 200, found.text
        assert client.get("/v1/models").json()["data"][0]["reads"] == [*model.roles]
    (prediction,) = found.json()["predictions"]
    output = json.loads(json.dumps(own.output))
    assert prediction["output"] == (pytest.approx(output) if task == "text_regression" else output)
    assert prediction["probabilities"] == pytest.approx(dict(own.probabilities))


def test_images_are_refused_before_the_model_is_loaded(tmp_path):
    plan = a_plan(tmp_path / "nowhere", "image_classification")
    directory = RunDirectory.create(tmp_path, "run", plan_toml="")
    directory.write_json("resolved.json", {"plan": json.loads(plan.canonical()), "choices": {}})
    directory.final_adapter.mkdir(parents=True)
    found = CliRunner().invoke(cli.app, ["serve", str(directory.root)])
    assert isinstance(found.exception, ServingRefused)
    assert "predict RUN --data" in found.exception.remedy


WRONG = [
    None,
    "",
    "Bearer",
    "Bearer wrong",
    f"Basic {TOKEN}",
    f"Bearer {TOKEN}x",
    TOKEN,
    "Bearer \xff",
]


@pytest.mark.parametrize("header", WRONG)
@pytest.mark.parametrize("path", ["/v1/predict", "/metrics", "/openapi.json", "/no"])
def test_nobody_without_the_token_gets_further_than_health(clients, header, path):
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    stranger = TestClient(clients["labels"].app)
    assert stranger.get(path, headers=headers).status_code == 401
    assert stranger.get("/health", headers=headers).json()["status"] == "ok"


def test_another_name_of_this_machine_is_refused(clients):
    """A page elsewhere whose name leads to 127.0.0.1 can't ask, token or not."""
    found = clients["labels"].get("/v1/models", headers={"host": "evil.example"})
    assert found.status_code == 421


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1"])
def test_the_address_that_is_listened_on_is_a_name_of_this_machine(models, host):
    app = build(models["labels"], token=TOKEN, hosts=Place(host=host).names)
    shown = f"[{host}]" if ":" in host else host
    with TestClient(app) as client:
        assert client.get("/health", headers={"host": f"{shown}:8080"}).status_code == 200
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 421


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (asked(), 422),
        (asked("x", role="note"), 422),
        (asked(""), 422),
        (asked(*["x"] * 257), 422),
        (asked("x" * 100_001), 422),
        ({**asked("x"), "more": 1}, 422),
        ({"examples": [{"text": 3}]}, 422),
        ([], 422),
    ],
)
def test_what_is_not_of_the_schema_is_refused(clients, body, status):
    assert clients["labels"].post("/v1/predict", json=body).status_code == status


def test_a_body_is_bounded_whatever_its_header_says(clients):
    def endless():
        for _ in range(6):
            yield b"x" * (1 << 20)

    found = clients["labels"].post("/v1/predict", content=endless())
    assert found.status_code == 413


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"examples": [{SECRET: SECRET}]}),
        json.dumps({"examples": [SECRET]}),
        json.dumps({SECRET: SECRET}),
        f'{{"examples": {SECRET}}}',
        json.dumps({"examples": [{"text": SECRET}, {}]}),
    ],
)
def test_no_text_is_told_in_a_refusal_nor_logged(clients, content, caplog, capfd):
    found = clients["labels"].post("/v1/predict", content=content.encode())
    assert found.status_code == 422
    said = "".join(capfd.readouterr()) + caplog.text + found.text
    assert not any(word in said for word in WORDS)


def test_a_failure_of_the_model_tells_its_kind_and_no_text(models, caplog, capfd):
    def fails(examples):
        raise ValueError(f"can't read {examples}")

    app = build(answering(models["labels"], fails), token=TOKEN)
    with TestClient(app, headers=BEARER) as client:
        found = client.post("/v1/predict", json=asked(SECRET))
    assert (found.status_code, found.json()["error"]["message"]) == (500, "ValueError")
    assert "Elm" not in found.text + caplog.text + "".join(capfd.readouterr())


def test_metrics_are_numbers_by_route_and_status(clients):
    clients["labels"].post("/v1/predict", json=asked("a", "b", "c"))
    TestClient(clients["labels"].app).get("/v1/models")
    clients["labels"].get(f"/{SECRET.replace(' ', '-')}")
    text = clients["labels"].get("/metrics").text
    assert 'silotune_serving_requests_total{route="/v1/predict",status="200"}' in text
    assert 'silotune_serving_requests_total{route="none",status="401"}' in text
    assert "silotune_serving_batch_examples_bucket" in text
    assert "Elm" not in text


def test_a_full_server_says_503_and_when_to_come_again(models):
    slow = Slow()
    limits = Limits(batch=1, waiting=1, seconds=0.3)
    app = build(answering(models["labels"], slow), token=TOKEN, limits=limits)
    with TestClient(app, headers=BEARER) as client:
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda n: client.post("/v1/predict", json=asked("x")), range(6)))
        assert {one.status_code for one in found} == {503}
        assert {one.headers["retry-after"] for one in found} == {"1"}
        assert {one.json()["error"]["code"] for one in found} == {"ST-633"}
        slow.go.set()
        assert client.post("/v1/predict", json=asked("x")).status_code == 200


# --- the document ---

FEW = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
GET, POST = ("/health", "/metrics", "/v1/models"), ("/v1/predict", CHAT)


@pytest.mark.parametrize("path", [*GET, *POST])
def test_every_answer_is_one_that_the_openapi_document_tells(clients, path):
    client = clients["answers"]
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    operation = schema[path]["GET" if path in GET else "POST"]

    @FEW
    @given(operation.as_strategy())
    def ask(case):
        sent = {} if path in GET else {"json": case.body}
        found = client.request(case.method, path, **sent)
        assert found.status_code < 500, found.text
        # Who may ask is looked at above; this client has the token, whatever the case has. And a schema
        # doesn't tell which conversations a model was taught.
        case.validate_response(found, excluded_checks=[ignored_auth, positive_data_acceptance])

    ask()


def test_the_document_says_that_a_token_is_needed(models):
    document = routes(models["labels"], Limits(), Counted()).openapi()
    assert document["paths"]["/v1/predict"]["post"]["security"] == [{"HTTPBearer": []}]
    assert "security" not in document["paths"]["/health"]["get"]


# --- where, with which token, until when ---


@pytest.mark.parametrize(
    ("host", "tls", "own", "allowed"),
    [
        ("127.0.0.1", False, False, True),
        ("::1", False, False, True),
        ("localhost", False, False, True),
        ("127.1.2.3", False, False, True),
        ("0.0.0.0", False, True, False),
        ("0.0.0.0", True, False, False),
        ("model.hospital.example", False, True, False),
        ("0.0.0.0", True, True, True),
    ],
)
def test_beyond_this_machine_it_takes_tls_and_a_token_of_ones_own(
    host, tls, own, allowed, tmp_path
):
    files = {"certificate": tmp_path / "c", "key": tmp_path / "k"} if tls else {}
    place = Place(host=host, **files)
    if allowed:
        place.require_allowed(own_token=own)
        return
    with pytest.raises(ServingRefused):
        place.require_allowed(own_token=own)


def test_a_token_file_is_made_for_its_owner_alone_and_refused_if_others_may_read_it(tmp_path):
    path = tmp_path / "token"
    token, new = token_of(path)
    assert new
    assert path.stat().st_mode & 0o777 == 0o600
    assert token_of(path) == (token, False)
    path.chmod(0o640)
    with pytest.raises(FileExposed):
        token_of(path)
    path.chmod(0o600)
    path.write_text("short\n")
    with pytest.raises(ServingRefused):
        token_of(path)


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_end_and_leaves_nothing(runs, tmp_path):
    log, token_file = tmp_path / "log", tmp_path / "token"
    words = ["serve", str(runs["labels"]), "--port", "0", "--token-file", str(token_file)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*CLI, *words], stdout=file, stderr=file, env=environment(), start_new_session=True
        )
    try:
        wait_for(lambda: "Serving" in log.read_text() or process.poll(), what="the server")
        url = log.read_text().partition(" at ")[2].partition(";")[0].strip()
        token = token_file.read_text().strip()
        bearer = {"authorization": f"Bearer {token}"}
        with httpx.Client(base_url=url, trust_env=False) as client:
            assert client.get("/health").status_code == 200
            found = client.post("/v1/predict", json=asked(SECRET), headers=bearer)
            assert found.json()["predictions"][0]["output"] in {"no", "yes", "perhaps"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in {0, -signal.SIGTERM}
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)
    assert not any(word in log.read_text() for word in (*WORDS, token))
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) != 0

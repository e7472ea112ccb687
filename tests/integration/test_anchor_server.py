"""Base responses from an OpenAI-compatible server: one that misbehaves, and transformers' own."""

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import torch
from helpers import BIN, preparation, write_config
from tiny import make_model, make_rows, make_tokenizer, save_model, write_jsonl

from bapo_plugin import prepare
from bapo_plugin.anchors.plan import usable
from bapo_plugin.answers.engine import Answer, ModelChanged, Request, Sampling
from bapo_plugin.answers.server import ServerEngine, ServerError
from bapo_plugin.answers.transformers import TransformersEngine
from bapo_plugin.blocks import AnchorServerConfig
from bapo_plugin.store import Store

ROWS = 12


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    save_model(tmp_path / "model", "llama")
    rows = [{k: v for k, v in row.items() if k != "base"} for row in make_rows(ROWS)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return tmp_path


def anchored(folder, url=None, **server):
    anchors = {"max_new_tokens": 8}
    if url:
        anchors |= {"engine": "server", "server": {"url": url, "timeout": 20} | server}
    entry = {
        "path": str(folder / "rows.jsonl"),
        "split": "train",
        "type": "chat_template.default",
        "field_messages": "prompt",
    }
    prepared = str(folder / ("prepared-server" if url else "prepared"))
    path = write_config(
        folder, datasets=[entry], bapo={"anchors": anchors}, dataset_prepared_path=prepared
    )
    work = preparation(path)
    made_by = work.made_by()
    (rows,) = work.keyed(work.rendered(keep=True), made_by)["datasets"]
    with Store(work.store_path) as store:
        prepare.LOG.info(str(work.make_missing({"datasets": [rows]}, made_by, store)))
        found = usable(store, dict(zip(rows["key"], rows["limit"], strict=True)))
    return [found[key] for key in rows["key"]]


class Server:
    """Answers /completions with a tiny model; `faults` are used up one a request, `always` on each.

    takes: "ids" (with vLLM's parameters, and token ids in the answer), "text" (with them), or "strict": OpenAI's
    own parameters, where an unknown one is refused.
    """

    def __init__(
        self, model=None, faults=(), always=None, add_bos=False, pause=0.0, takes="strict"
    ):
        self.takes = takes
        self.model = model or make_model(vocab_size=len(make_tokenizer()))
        self.tokenizer = make_tokenizer()
        self.faults, self.always, self.add_bos, self.pause = list(faults), always, add_bos, pause
        self.name = None
        self.requests, self.headers = [], []
        self.now = self.most = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.handle(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def handle(self, request):
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self._lock:
            fault = self.always or (self.faults.pop(0) if self.faults else None)
            self.requests.append(body)
            self.headers.append(dict(request.headers))
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.pause)
        try:
            if fault == "drop":
                self.done()
                request.connection.shutdown(socket.SHUT_RDWR)
            elif fault == "slow":
                time.sleep(3)
                self.done()
            elif fault == "garbage":
                self.reply(request, 200, b"<html>not an API</html>")
            elif fault == "trickle":  # each byte in time, the whole never
                self.done()
                request.send_response(200)
                request.send_header("Content-Length", "1000")
                request.end_headers()
                for _ in range(20):
                    request.wfile.write(b" ")
                    time.sleep(0.2)
            elif fault == "half":
                self.reply(request, 200, b'{"choices": [', {"Content-Length": "1000"})
                request.connection.shutdown(socket.SHUT_RDWR)
            elif isinstance(fault, dict | list):
                self.reply(request, 200, json.dumps(fault).encode())
            elif isinstance(fault, int):
                self.reply(request, fault, b'{"error": "busy"}', {"Retry-After": "0.05"})
            else:
                status, answer = self.complete(body)
                self.reply(request, status, json.dumps(answer).encode())
        except OSError:
            pass  # the client went away

    def complete(self, body):
        if self.takes == "strict" and "stop_token_ids" in body:
            return 400, {"error": "unknown parameter stop_token_ids"}
        if isinstance(body["prompt"], list) and self.takes != "ids":
            return 422, {"error": "prompt must be a string"}
        ids = body["prompt"]
        if isinstance(ids, str):
            ids = self.tokenizer(ids)["input_ids"]
        with self._lock, torch.no_grad():
            out = self.model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=body["max_tokens"],
                do_sample=False,
                pad_token_id=0,
                eos_token_id=body.get("stop_token_ids") or [2],
            )[0, len(ids) :].tolist()
        ended = out[-1] in (body.get("stop_token_ids") or [2])
        text = self.tokenizer.decode(out, skip_special_tokens=True)
        usage = {"prompt_tokens": len(ids) + self.add_bos, "completion_tokens": len(out)}
        choice = {"text": text, "finish_reason": "stop" if ended else "length"}
        if body.get("return_token_ids") and self.takes == "ids":
            choice["token_ids"] = out
        named = {"model": self.name} if self.name else {}
        return 200, {"choices": [choice], "usage": usage, **named}

    def done(self):
        """Before the answer: with it in hand the client may ask again at once."""
        with self._lock:
            self.now -= 1

    def reply(self, request, status, data, headers=None):
        self.done()
        request.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(data)

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def check_texts(found, expected):
    """Answers of a server that shows no token ids: their text, which has one way to be tokenised; bytes that are no
    text take more tokens then, so that a limit may cut them earlier."""
    tokenizer = make_tokenizer()
    for one, other in zip(found, expected, strict=True):
        texts = [tokenizer.decode(a.ids, skip_special_tokens=True) for a in (one, other)]
        assert texts[1].startswith(texts[0]) and (texts[0] or not texts[1])
        assert texts[0] == texts[1] or one.cut


# forms of a request that are tried before the work begins
TRIED = {"ids": 1, "text": 2, "strict": 3}


@pytest.mark.parametrize("takes", TRIED)
def test_server_gives_what_the_model_gives(folder, caplog, takes):
    expected = anchored(folder)
    with Server(pause=0.02, takes=takes) as server:
        found = anchored(folder, server.url, concurrency=3)
    if takes == "ids":
        assert found == expected, "token for token"
    else:
        check_texts(found, expected)
        assert "gives no token ids" in caplog.text
    assert f"{ROWS} generated" in caplog.text
    assert server.most == 3, "requests under way at a time"
    assert len(server.requests) == TRIED[takes] + ROWS + 3 + 3  # the probe's, before and after
    last = server.requests[-1]
    assert last["temperature"] == 0 and last["max_tokens"] == 8
    assert last["presence_penalty"] == last["frequency_penalty"] == 0
    if takes != "strict":
        assert last["stop_token_ids"] == [2] and last["repetition_penalty"] == 1
    assert isinstance(last["prompt"], list) == (takes == "ids")
    assert "Authorization" not in server.headers[0]
    with Server() as server:
        anchored(folder, server.url)  # all there: neither server nor model is asked
        assert not server.requests


def choice(**values):
    return {"choices": [{"text": "arr", "finish_reason": "stop"} | values]}


# replies with HTTP 200 that hold no answer: reply, what is said of it
NO_COMPLETIONS = [
    ({"error": "overloaded"}, r'something that is not a completion: \{"error": "overloaded"'),
    ([], "something that is not a completion"),
    ({"choices": []}, "0 answers to one prompt"),
    ({"choices": choice()["choices"] * 2}, "2 answers to one prompt"),
    ({"choices": [None]}, "something that is not a completion"),
    (choice(text=None), "an answer without text"),
    (choice(text=7), "an answer without text"),
    (choice(finish_reason="abort"), r"an answer that was broken off \(finish_reason: abort\)"),
    (choice(token_ids=[5, 10**6]), "token ids from 5 to 1000000, and the tokenizer has"),
    (choice(token_ids=[-1]), "token ids from -1 to -1"),
]


def test_a_server_that_misbehaves_is_asked_again(folder, monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: 0.05)  # pauses
    expected = anchored(folder)
    faults = [None] * 6  # the forms that are tried, and the probe
    ill = ["drop", 429, 500, "drop", 503, 429, "slow", 500, "garbage", 502, "half", "trickle"]
    ill += [fault for fault, _ in NO_COMPLETIONS]
    with Server(faults=faults + ill) as server:
        found = anchored(folder, server.url, concurrency=4, timeout=1, retries=20)
    check_texts(found, expected)
    # each fault costs one more request; on a busy machine a sound one may run out of time too
    assert not server.faults and len(server.requests) >= ROWS + 6 + len(ill)


def test_a_server_that_is_busy_at_first_still_gets_token_ids(folder):
    with Server(faults=[429, 503], takes="ids") as server:
        anchored(folder, server.url, probe=False)
    assert isinstance(server.requests[-1]["prompt"], list)


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (500, r"failed 3 times, last with HTTP 500: .*busy.*What was answered is kept"),
        ("drop", r"failed 3 times, last with RemoteProtocolError"),
        (
            "garbage",
            r"failed 3 times, last with no JSON .*not an API.*check bapo\.anchors\.server\.url",
        ),
        ("half", r"failed 3 times, last with RemoteProtocolError"),
        *((fault, f"failed 3 times, last with {said}") for fault, said in NO_COMPLETIONS[::3]),
        (401, r"refused a request: HTTP 401.*Set the environment variable OPENAI_API_KEY"),
        (404, r"HTTP 404.*Check bapo\.anchors\.server\.url and the model's name there"),
    ],
)
def test_a_server_that_stays_ill(folder, fault, match):
    with Server(always=fault) as server, pytest.raises(ServerError, match=match):
        anchored(folder, server.url, retries=2, probe=False, concurrency=2)
    assert server.now == 0


def test_an_answer_that_trickles_has_the_time_of_one_request():
    with Server(always="trickle") as server:
        config = AnchorServerConfig(url=server.url, retries=0, timeout=1)
        engine = ServerEngine(make_tokenizer(), config, Sampling(), "model", [2])
        with pytest.raises(ServerError, match="last with ReadTimeout: no whole answer within 1 s"):
            engine._post({"prompt": "sea"})


def test_a_prompt_whose_text_is_not_its_tokens_goes_to_no_server_as_text(folder):
    """As text its words would be a turn; as ids they are what is trained on."""
    rows = [
        {"prompt": f"what is <|im_end|> {i}", "chosen": "the end", "rejected": "a ship"}
        for i in range(2)
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    with (
        Server(takes="strict") as server,
        pytest.raises(ServerError, match="takes text only, and the text of a prompt doesn't give"),
    ):
        anchored(folder, server.url, probe=False)
    with Server(takes="ids") as server:
        assert anchored(folder, server.url)[0].ids


def test_what_was_answered_is_kept(folder):
    with Server(faults=[None] * 8 + [400] * 99) as server, pytest.raises(ServerError, match="400"):
        anchored(folder, server.url, probe=False, concurrency=1)
    with Server() as server:
        anchored(folder, server.url, probe=False)
        assert len(server.requests) == ROWS - 5 + 3


def test_no_server(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(
        ServerError, match=rf"{url}/completions failed 2 times, last with ConnectError"
    ):
        anchored(folder, url, retries=1)


def test_another_model_is_noticed(folder):
    other = make_model(vocab_size=len(make_tokenizer()), seed=5)
    with Server(model=other) as server, pytest.raises(ServerError) as error:
        anchored(folder, server.url)
    assert len(server.requests) == 3 + 1
    for part in ("does not answer as the reference model does", "server:  ", "nats below the best"):
        assert part in str(error.value)


def kept(folder):
    with Store(folder / "prepared-server/bapo-anchors.sqlite") as store:
        rows = store._db.execute("SELECT key, value FROM entries WHERE kind = 'anchor'")
        return {key: json.loads(value)["ids"] for key, value in rows}


def changing(server, after, **changes):
    """The server is another one from its so-many-th request on."""
    complete = server.complete

    def answer(body):
        if len(server.requests) > after:
            for name, value in changes.items():
                setattr(server, name, value)
        return complete(body)

    server.complete = answer
    return server


@pytest.fixture
def short_parts(monkeypatch):
    monkeypatch.setattr(
        ServerEngine, "batches", lambda self, lengths, limits: [4, 4, len(lengths) - 8]
    )


def test_a_model_that_is_changed_midway_is_noticed(folder, short_parts):
    """Under the same name: what was answered since the last comparison isn't kept."""
    other = make_model(vocab_size=len(make_tokenizer()), seed=5)
    # one form is tried; the probe has three; then parts of four, and three after each
    with (
        changing(Server(takes="ids"), after=1 + 3 + 4 + 3, model=other) as server,
        pytest.raises(
            ModelChanged, match=r"(?s)another model answers.*last 4 answers are not kept"
        ),
    ):
        anchored(folder, server.url, concurrency=1)
    found = kept(folder)
    assert len(found) == 4
    with Server(takes="ids") as server:
        anchored(folder, server.url, probe=False)
    assert found.items() < kept(folder).items() and len(kept(folder)) == ROWS


def test_an_answer_that_is_rounded_otherwise_is_no_other_model(folder, monkeypatch):
    with Server(takes="ids") as server:
        engine, reference = engine_of(server)
        requests = [request_of(text) for text in ("tell me about the sea", "why is the sky blue")]
        engine.probe(requests, reference)
        compared = []
        monkeypatch.setattr(engine, "probe", lambda some, model: compared.extend(some))
        engine.confirm()
        assert not compared
        engine._probed["tell me about the sea"] = (requests[0], Answer((5,), True))
        engine.confirm()
        assert compared == [requests[0]], "the reference model has decided"


def test_a_model_that_is_changed_to_another_name_is_noticed(folder):
    with (
        changing(Server(takes="ids"), after=1 + 6, name="new") as server,
        pytest.raises(ServerError, match="answered as old, and now as new: .*is kept; serve"),
    ):
        server.name = "old"
        anchored(folder, server.url, probe=False, concurrency=1)
    assert len(kept(folder)) == 6


def engine_of(server, stop_ids=(2,)):
    tokenizer, model = make_tokenizer(), make_model(vocab_size=len(make_tokenizer()))
    server = AnchorServerConfig(url=server.url, retries=0)
    engine = ServerEngine(tokenizer, server, Sampling(), "model", list(stop_ids))
    return engine, TransformersEngine(lambda: model, list(stop_ids))


def request_of(text, limit=8):
    return Request(text, text, tuple(make_tokenizer()(text)["input_ids"]), limit)


def probed(server, stop_ids=(2,), limit=8):
    """Probe a server that says what it likes."""
    engine, reference = engine_of(server, stop_ids)
    request = request_of("tell me about the sea", limit)
    ((_, best),) = reference.generate([request], lambda n: None)
    engine.probe([request], reference)
    return best


def test_a_server_that_goes_on_behind_the_end_of_a_turn_is_noticed(folder):
    """Text without special tokens never holds a stop string; the probe goes to the end of the answer."""
    model, tokenizer = make_model(vocab_size=len(make_tokenizer())), make_tokenizer()
    ids = tokenizer("tell me about the sea", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    stop = int(out[4])  # the model ends its turn there, and this server doesn't know of it
    assert stop not in out[:4]
    with (
        Server(model=model) as server,
        pytest.raises(
            ServerError, match=r"(?s)does not answer|goes on where the model ends its turn"
        ),
    ):
        probed(server, [stop, 2])
    with Server(model=model, takes="ids") as server:
        assert probed(server, [stop, 2]) == Answer(tuple(out[:5].tolist()), False)


def test_another_tokenizer_is_noticed(folder):
    with (
        Server(add_bos=True) as server,
        pytest.raises(ServerError, match=r"counts \d+ tokens in a prompt that has \d+ here"),
    ):
        anchored(folder, server.url)


def test_the_key_comes_from_the_environment(folder, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Server() as server:
        anchored(folder, server.url, probe=False)
    assert server.headers[0]["Authorization"] == "Bearer secret"
    for file in folder.rglob("*"):
        assert not file.is_file() or b"secret" not in file.read_bytes(), file
    with pytest.raises(ValueError, match=r"api_key: a key doesn't belong into a YAML"):
        anchored(folder, server.url, api_key="secret")


def test_a_template_that_writes_bos_is_not_doubled(chatml):
    tokenizer = make_tokenizer("llama3")
    engine = ServerEngine(
        tokenizer, AnchorServerConfig(url="http://nowhere"), Sampling(), "model", [3]
    )
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "sea"}], tokenize=False, add_generation_prompt=True
    )
    request = Request("0", chat, tuple(tokenizer(chat)["input_ids"][1:]), 5)
    sent = engine._bare(request)
    assert tuple(tokenizer(sent)["input_ids"]) == request.prompt_ids


def test_transformers_serve(folder):
    """A real server on loopback: the same answers as the model here, and another model is noticed."""
    pytest.importorskip("openai", reason="transformers serve needs it; it comes with axolotl 0.21")
    expected = anchored(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [BIN / "transformers", "serve", folder / "model", "--port", str(port)]
    command += ["--device", "cpu", "--dtype", "float32"]
    log = folder / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=file,
            stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        for _ in range(240):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=2)
                break
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        url = f"http://127.0.0.1:{port}/v1"
        found = anchored(folder, url, model=str(folder / "model"), concurrency=2)
        check_texts(found, expected)
        save_model(folder / "model", "llama", seed=9)
        with pytest.raises(ServerError, match="does not answer as the reference model does"):
            anchored(folder, url, model=str(folder / "model"))
    finally:
        process.terminate()
        process.wait(20)

"""Answers from an OpenAI-compatible server's /completions (vLLM, SGLang, llama.cpp, TGI, transformers serve)."""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import httpx
import torch
from axolotl.utils.logging import get_logger

from bapo_plugin.answers.engine import Answer, ModelChanged, Request, Sampling, seed_of, shown
from bapo_plugin.answers.replies import Completion, NotACompletion, read_completion
from bapo_plugin.answers.transformers import TransformersEngine, autocast
from bapo_plugin.blocks import AnchorServerConfig
from bapo_plugin.runs import hide

LOG = get_logger("axolotl." + __name__)

_PROBES = 3
_BUSY = (429, 502, 503, 504)
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)


class ServerError(ValueError):
    """The server can't be used; the text says why and what to do."""


class _Form(NamedTuple):
    """A way to ask; servers differ in what they take.

    Args:
        prompt: "ids"; "text", whole, with the server told to add nothing; "bare" text, without the BOS that
            the server's tokenizer adds.
        extras: more than OpenAI's own parameters.
    """

    prompt: str
    extras: bool


# the most exact first
_FORMS = (_Form("ids", True), _Form("text", True), _Form("bare", True), _Form("bare", False))


class ServerEngine:
    """Answers of a server, several requests at a time.

    Prompts go as token ids where the server takes them, with the ids of all tokens that end an answer
    and with every penalty neutral, whatever the model's generation_config.json says to the server.
    Answers are taken as token ids where the server gives them.

    Args:
        tokenizer: the one that training uses.
        server: where the server is.
        sampling: how answers are drawn.
        model_name: default for the model's name at the server.
        stop_ids: tokens that end an answer.
        end_id: that of them which stands for an end that the server doesn't name.
    """

    streams = True

    def __init__(
        self,
        tokenizer: Any,
        server: AnchorServerConfig,
        sampling: Sampling,
        model_name: str,
        stop_ids: Sequence[int],
        end_id: int | None = None,
    ):
        self._tokenizer = tokenizer
        self._server = server
        self._sampling = sampling
        self._model = server.model or model_name
        self._shown = hide(server.url.rstrip("/"))  # a name and a password may be in it
        self._vocabulary = len(tokenizer)
        self._stop_ids = list(stop_ids)
        self._end_id = end_id if end_id in self._stop_ids else self._stop_ids[0]
        self._stop = [tokenizer.decode([i]) for i in [self._end_id, *stop_ids]]
        self._stop = list(dict.fromkeys(self._stop))
        self._form: _Form | None = None
        self._choosing = threading.Lock()
        key = os.environ.get("OPENAI_API_KEY")
        self._client = httpx.Client(
            timeout=httpx.Timeout(server.timeout, connect=min(10.0, server.timeout)),
            limits=httpx.Limits(max_connections=server.concurrency),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        self._stopping = threading.Event()
        self._said = False
        self._answers_as: str | None = None  # the name that the first reply had
        self._probed: dict[str, tuple[Request, Answer]] = {}
        self._reference: TransformersEngine | None = None

    def batches(self, lengths: Sequence[int], limits: Sequence[int]) -> list[int]:
        """Parts that keep all connections busy and are not too much to lose a claim on."""
        size, total = 16 * self._server.concurrency, len(lengths)
        return [min(size, total - start) for start in range(0, total, size)]

    def generate(
        self, requests: Sequence[Request], on_tokens: Callable[[int], None]
    ) -> Iterator[tuple[Request, Answer]]:
        pool = ThreadPoolExecutor(self._server.concurrency)
        try:
            futures = {pool.submit(self._complete, request): request for request in requests}
            for future in as_completed(futures):
                answer, _ = future.result()
                on_tokens(len(answer.ids))
                yield futures[future], answer
        finally:  # an error or an interruption: requests under way end, the others don't start
            self._stopping.set()
            pool.shutdown(cancel_futures=True)
            self._stopping.clear()

    def probe(self, requests: Sequence[Request], reference: TransformersEngine) -> None:
        """Compare whole greedy answers of the server with those of the reference model on a few prompts.

        Args:
            requests: to take prompts from, sorted by length.
            reference: with the reference model, and greedy.

        Raises:
            ServerError: it counts a prompt's tokens differently (another tokenizer or template, a second
                BOS), goes on where the model ends its turn, or gives an answer that the reference model
                would not give.
        """
        self._reference = reference
        last = len(requests) - 1
        picked = {requests[i * last // max(1, _PROBES - 1)] for i in range(_PROBES)}
        where = f"{self._shown}, model {self._model}"
        for request in sorted(picked, key=lambda r: r.key):
            answer, said = self._complete(request, greedy=True)
            self._probed[request.key] = (request, answer)
            ((_, best),) = reference.generate([request], lambda n: None)
            if answer == best or (said in self._texts(best) and answer.cut == best.cut):
                continue
            gap, place, wanted = _gap(reference.model, request, answer, self._server.tolerance)
            if gap <= self._server.tolerance:
                continue
            if wanted in self._stop_ids:
                raise ServerError(
                    f"the server ({where}) goes on where the model ends its turn, with "
                    f"{self._tokenizer.decode([wanted])!r} after {place} tokens: its answers would hold what nobody said.\n"
                    f"  prompt: {request.prompt!r}\n  server: {said!r}\nServe the model with a "
                    "generation_config.json whose eos_token_id names that token, or with a server that takes stop_token_ids "
                    "(vLLM, SGLang), or set bapo.anchors.engine: transformers"
                )
            raise ServerError(
                f"the server ({where}) does not answer as the reference model does.\n  prompt:    {request.prompt!r}\n"
                f"  server:    {said!r}\n  reference: {self._texts(best)[0]!r}\nToken {place + 1} of its answer is "
                f"{gap:.2f} nats below the best (allowed: bapo.anchors.server.tolerance {self._server.tolerance}). Serve the "
                "same model with the same quantisation (and adapter, if training goes on with one), or set "
                "bapo.anchors.engine: transformers"
            )

    def confirm(self) -> None:
        """Ask again what was asked before the work; where an answer differs, the reference model tells rounding from
        another model.

        Raises:
            ModelChanged: it is another model now.
            ServerError: it doesn't answer.
        """
        for request, before in list(self._probed.values()):
            if self._complete(request, greedy=True)[0] == before:
                continue
            try:
                self.probe([request], self._reference)
            except ServerError as error:
                raise ModelChanged(
                    f"another model answers than at the beginning: {error}"
                ) from error
            finally:
                self._reference.close()

    def _texts(self, answer: Answer) -> tuple[str, str]:
        """An answer as servers show it: with special tokens, or without."""
        ids = shown(answer.ids, self._stop_ids)
        return self._tokenizer.decode(ids), self._tokenizer.decode(ids, skip_special_tokens=True)

    def _complete(self, request: Request, greedy: bool = False) -> tuple[Answer, str]:
        """The answer, and its text as the server gave it."""
        if self._form is None:
            with self._choosing:
                if self._form is None:
                    self._form = self._choose_form(request)
        if not self._gives_its_tokens(request, self._form):
            raise ServerError(
                f"the server ({self._shown}) takes text only, and the text of a prompt doesn't give the prompt's tokens: it holds "
                f"a special token in its words. Prompt: {request.prompt!r}. Take a server that takes token ids, or mend the words "
                "(bapo.special_tokens_in_words: refuse finds them), or set bapo.special_tokens_in_words: tokens"
            )
        reply = self._post(self._body(request, self._form, greedy))
        self._answers_as = self._answers_as or reply.model
        if reply.model not in (None, self._answers_as):
            raise ServerError(
                f"the server ({self._shown}) answered as {self._answers_as}, and now as {reply.model}: its model was changed. "
                "What was answered before is kept; serve the former model and start again"
            )
        if reply.prompt_tokens not in (None, len(request.prompt_ids)):
            raise ServerError(
                f"the server ({self._shown}, model {self._model}) counts {reply.prompt_tokens} tokens in a prompt that has "
                f"{len(request.prompt_ids)} here: it has another tokenizer, or adds a token such as BOS. Prompt: "
                f"{request.prompt!r}. Serve base_model with its own tokenizer"
            )
        return self._answer(request, reply)

    def _choose_form(self, request: Request) -> _Form:
        """The most exact way to ask that the server takes, by a request for one token."""
        short = Request(request.key, request.prompt, request.prompt_ids, 1)
        url = self._server.url.rstrip("/") + "/completions"
        for form in _FORMS[:-1]:
            try:
                for _ in range(3):
                    status, headers, data = self._send(url, self._body(short, form, greedy=True))
                    if status not in _BUSY:
                        break
                    self._stopping.wait(_seconds(headers.get("retry-after")) or 1.0)
                if status in (401, 403, 404):
                    break
                if status == 200:
                    reply = read_completion(data, self._vocabulary)
                    counted = (None, len(request.prompt_ids))
                    if reply.prompt_tokens in counted or not self._gives_its_tokens(request, form):
                        return form
            except httpx.ConnectError:
                break  # no server: the request itself will say so, after its retries
            except (httpx.RequestError, NotACompletion):
                continue
        return _FORMS[-1]

    def _body(self, request: Request, form: _Form, greedy: bool) -> dict[str, Any]:
        sampling = self._sampling
        sampled = sampling.temperature > 0 and not greedy
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": {
                "ids": list(request.prompt_ids),
                "text": request.prompt,
                "bare": self._bare(request),
            }[form.prompt],
            "max_tokens": request.limit,
            "temperature": sampling.temperature if sampled else 0.0,
            "top_p": sampling.top_p if sampled else 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": self._stop[:4],  # OpenAI's limit
        }
        if sampled:
            body["seed"] = seed_of(sampling, request) >> 32  # servers take 31 bits
        if form.extras:
            body |= {
                "stop_token_ids": self._stop_ids,
                "repetition_penalty": 1.0,
                "top_k": -1,
                "min_p": 0.0,
                "skip_special_tokens": False,
                "return_token_ids": True,  # nosec B105 # tokens of text
            }
            if form.prompt == "text":
                body["add_special_tokens"] = False
        return body

    def _gives_its_tokens(self, request: Request, form: _Form) -> bool:
        """Whether what is sent stands for the prompt's tokens: as text, special tokens in words would become real ones."""
        if form.prompt == "ids":
            return True
        wanted, text = list(request.prompt_ids), self._bare(request)
        sent = [request.prompt] if form.prompt == "text" else [text, request.prompt]
        return any(
            self._tokenizer(part, add_special_tokens=adds)["input_ids"] == wanted
            for part in sent
            for adds in (False, True)
        )

    def _bare(self, request: Request) -> str:
        """The text that a server which adds BOS will tokenise to the request's tokens."""
        bos = self._tokenizer.bos_token
        if bos and request.prompt.startswith(bos):
            ids = self._tokenizer(request.prompt)["input_ids"]
            if ids[:2] == [self._tokenizer.bos_token_id] * 2:
                return request.prompt.removeprefix(bos)
        return request.prompt

    def _answer(self, request: Request, reply: Completion) -> tuple[Answer, str]:
        text, ids, ended = reply.text, reply.ids, not reply.cut
        if ids is None:
            if not self._said:
                self._said = True
                LOG.info(
                    f"{self._shown} gives no token ids: answers are tokenised here from their text"
                )
            for stop in self._stop:  # some servers leave it in
                text, found, _ = text.partition(stop)
                ended = ended or bool(found)
            ids = self._ids_of(request, text)
        end = next((i for i, token in enumerate(ids) if token in self._stop_ids), None)
        if end is not None:
            return Answer(tuple(ids[: end + 1]), False), text
        if not ended or len(ids) >= request.limit:
            return Answer(tuple(ids[: request.limit]), True), text
        last = reply.stopped_by if reply.stopped_by in self._stop_ids else self._end_id
        return Answer((*ids, last), False), text

    def _ids_of(self, request: Request, text: str) -> list[int]:
        """The answer's tokens as they follow the prompt."""
        whole = self._tokenizer(request.prompt + text, add_special_tokens=False)["input_ids"]
        n = len(request.prompt_ids)
        if tuple(whole[:n]) == request.prompt_ids:
            return whole[n:]
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _send(self, url: str, body: dict) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body of a reply that comes within the time for one request, however it trickles."""
        ends = time.monotonic() + self._server.timeout
        data = bytearray()
        with self._client.stream("POST", url, json=body) as response:
            for part in response.iter_bytes():
                data += part
                if time.monotonic() > ends:
                    raise httpx.ReadTimeout(f"no whole answer within {self._server.timeout:g} s")
        return response.status_code, response.headers, bytes(data)

    def _post(self, body: dict) -> Completion:
        url = self._server.url.rstrip("/") + "/completions"
        for attempt in range(self._server.retries + 1):
            pause = None
            try:
                status, headers, data = self._send(url, body)
                if status == 200:
                    return read_completion(data, self._vocabulary)
                problem = f"HTTP {status}: {data[:300].decode('utf-8', 'replace')}"
                if status not in _RETRIED:
                    raise ServerError(
                        f"{self._shown}/completions refused a request: {problem}. "
                        + {
                            401: "Set the environment variable OPENAI_API_KEY",
                            404: f"Check bapo.anchors.server.url and the model's name there ({self._model})",
                        }.get(status, "Check bapo.anchors.server")
                    )
                pause = _seconds(headers.get("retry-after"))
            except NotACompletion as error:
                problem = str(error)
            except httpx.RequestError as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt < self._server.retries:
                backoff = min(30.0, 0.5 * 2**attempt) * random.uniform(0.75, 1.25)
                if self._stopping.wait(backoff if pause is None else pause):
                    break
        raise ServerError(
            f"{self._shown}/completions failed {self._server.retries + 1} times, last with {problem}. What was answered is kept; start "
            "again when the server is well, check bapo.anchors.server.url, or raise bapo.anchors.server.retries or timeout"
        )

    def close(self) -> None:
        self._client.close()


def _seconds(retry_after: str | None) -> float | None:
    try:
        return min(120.0, max(0.0, float(retry_after)))
    except (TypeError, ValueError):
        return None


@torch.inference_mode()
def _gap(model: Any, request: Request, answer: Answer, tolerance: float) -> tuple[float, int, int]:
    """How far the first token beyond the tolerance is below the model's best one, in nats, else the worst; its
    place; and the best."""
    prompt = list(request.prompt_ids)
    tokens = torch.tensor([prompt + list(answer.ids)], device=model.device)
    with autocast(model):
        logits = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].float()
    logps = torch.log_softmax(logits, dim=-1)
    taken = logps.gather(1, tokens[0, len(prompt) :, None])[:, 0]
    gaps = logps.max(dim=-1).values - taken
    beyond = (gaps > tolerance).nonzero()
    place = int(beyond[0]) if len(beyond) else int(gaps.argmax())
    return float(gaps[place]), place, int(logps[place].argmax())

"""Base responses from an OpenAI-compatible server (vLLM, transformers serve)."""

import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx
import torch
from axolotl.utils.logging import get_logger

from bapo_plugin.answers.transformers import Answer, Request, TransformersEngine, autocast, seed_of
from bapo_plugin.config import AnchorsConfig

LOG = get_logger("axolotl." + __name__)

_PROBES, _PROBE_TOKENS = 3, 16
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)


class ServerError(ValueError):
    """The server can't be used; the text says why and what to do."""


class ServerEngine:
    """Answers from an OpenAI-compatible server's /completions, several requests at a time.

    Args:
        tokenizer: the one that training uses.
        anchors: settings; `anchors.server` says where.
        model_name: default for the model's name at the server.
        stop_ids: tokens that end an answer.
    """

    def __init__(
        self, tokenizer: Any, anchors: AnchorsConfig, model_name: str, stop_ids: Sequence[int]
    ):
        self._tokenizer = tokenizer
        self._anchors = anchors
        self._server = anchors.server
        self._model = anchors.server.model or model_name
        self._stop = [tokenizer.decode([i]) for i in stop_ids]
        key = os.environ.get("OPENAI_API_KEY")
        self._client = httpx.Client(
            timeout=httpx.Timeout(self._server.timeout, connect=min(10.0, self._server.timeout)),
            limits=httpx.Limits(max_connections=self._server.concurrency),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        self._stopping = threading.Event()

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Parts that keep all connections busy and are not too much to lose a claim on."""
        size = 16 * self._server.concurrency
        ordered = sorted(requests, key=lambda r: (-len(r.prompt_ids), r.key))
        return [ordered[i : i + size] for i in range(0, len(ordered), size)]

    def generate(
        self, requests: Sequence[Request], on_tokens: Callable[[int], None]
    ) -> Iterator[tuple[Request, Answer]]:
        pool = ThreadPoolExecutor(self._server.concurrency)
        try:
            futures = {pool.submit(self._complete, request): request for request in requests}
            for future in as_completed(futures):
                answer, _ = future.result()
                on_tokens(answer.num_tokens)
                yield futures[future], answer
        finally:  # an error or an interruption: requests under way end, the others don't start
            self._stopping.set()
            pool.shutdown(cancel_futures=True)
            self._stopping.clear()

    def probe(self, requests: Sequence[Request], reference: TransformersEngine) -> None:
        """Compare the server with the reference model on a few prompts, greedily.

        Args:
            requests: to take prompts from.
            reference: with the reference model, and greedy.

        Raises:
            ServerError: it counts a prompt's tokens differently (another tokenizer or template, a second
                BOS), or gives an answer that the reference model would not give.
        """
        ordered = sorted(requests, key=lambda r: (len(r.prompt_ids), r.key))
        picked = {ordered[i * (len(ordered) - 1) // max(1, _PROBES - 1)] for i in range(_PROBES)}
        for request in sorted(picked, key=lambda r: r.key):
            request = Request(
                request.key, request.prompt, request.prompt_ids, min(_PROBE_TOKENS, request.limit)
            )
            answer, usage = self._complete(request, greedy=True)
            counted = usage.get("prompt_tokens")
            where = f"{self._server.url}, model {self._model}"
            if counted is not None and counted != len(request.prompt_ids):
                raise ServerError(
                    f"the server ({where}) counts {counted} tokens in a prompt that has {len(request.prompt_ids)} "
                    f"here: it has another tokenizer, or adds a token such as BOS. Prompt: {request.prompt!r}. Serve "
                    "base_model with its own tokenizer"
                )
            ((_, best),) = reference.generate([request], lambda n: None)
            if answer.text == best.text:
                continue
            gap = _gap(reference.model, self._tokenizer, request, answer)
            if gap > self._server.tolerance:
                raise ServerError(
                    f"the server ({where}) does not answer as the reference model does.\n  prompt:    "
                    f"{request.prompt!r}\n  server:    {answer.text!r}\n  reference: {best.text!r}\nOne of its tokens is "
                    f"{gap:.2f} nats below the best (allowed: bapo.anchors.server.tolerance {self._server.tolerance}). "
                    "Serve the same model with the same quantisation (and adapter, if training goes on with "
                    "one), or set bapo.anchors.engine: transformers"
                )

    def _complete(self, request: Request, greedy: bool = False) -> tuple[Answer, dict]:
        anchors = self._anchors
        body = {
            "model": self._model,
            "prompt": self._prompt_text(request),
            "max_tokens": request.limit,
            "temperature": 0.0 if greedy else anchors.temperature,
            "stop": self._stop[:4],  # OpenAI's limit
        }
        if anchors.temperature > 0 and not greedy:
            # servers take 31 bits
            body |= {"top_p": anchors.top_p, "seed": seed_of(anchors, request) >> 32}
        reply = self._post(body)
        try:
            choice = reply["choices"][0]
            text, reason = choice["text"], choice.get("finish_reason")
            usage = reply.get("usage") or {}
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ServerError(
                f"{self._server.url}/completions answered something that is not a completion: "
                f"{str(reply)[:300]}; check bapo.anchors.server.url"
            ) from None
        whole = text
        for stop in self._stop:  # some servers leave it in
            text = text.split(stop, 1)[0]
        tokens = len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        cut = reason == "length" and text == whole and bool(text.strip())
        return Answer(text, tokens, cut), usage

    def _prompt_text(self, request: Request) -> str:
        """The text that the server will tokenise to the request's tokens: without a BOS of its own
        where the tokenizer adds one."""
        bos = self._tokenizer.bos_token
        if bos and request.prompt.startswith(bos):
            ids = self._tokenizer(request.prompt)["input_ids"]
            if ids[:2] == [self._tokenizer.bos_token_id] * 2:
                return request.prompt.removeprefix(bos)
        return request.prompt

    def _post(self, body: dict) -> Any:
        url = self._server.url.rstrip("/") + "/completions"
        for attempt in range(self._server.retries + 1):
            pause = None
            try:
                response = self._client.post(url, json=body)
                if response.status_code == 200:
                    return response.json()
                problem = f"HTTP {response.status_code}: {response.text[:300]}"
                if response.status_code not in _RETRIED:
                    raise ServerError(
                        f"{url} refused a request: {problem}. "
                        + {
                            401: "Set the environment variable OPENAI_API_KEY",
                            404: f"Check bapo.anchors.server.url and the model's name there ({self._model})",
                        }.get(response.status_code, "Check bapo.anchors.server")
                    )
                pause = _seconds(response.headers.get("retry-after"))
            except (httpx.TransportError, ValueError) as error:  # no connection, or no JSON
                if isinstance(error, ServerError):
                    raise
                problem = f"{type(error).__name__}: {error}"
            if attempt < self._server.retries:
                backoff = min(30.0, 0.5 * 2**attempt) * random.uniform(0.75, 1.25)
                if self._stopping.wait(backoff if pause is None else pause):
                    break
        raise ServerError(
            f"{url} failed {self._server.retries + 1} times, last with {problem}. What was answered is kept; start "
            "again when the server is well, or raise bapo.anchors.server.retries or timeout"
        )

    def close(self) -> None:
        self._client.close()


def _seconds(retry_after: str | None) -> float | None:
    try:
        return min(120.0, max(0.0, float(retry_after)))
    except (TypeError, ValueError):
        return None


@torch.inference_mode()
def _gap(model: Any, tokenizer: Any, request: Request, answer: Answer) -> float:
    """How far, at most, the answer's tokens are below the model's best ones, in nats."""
    ids = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
    # the last token may be a part of one that was cut; an empty answer is an end of turn
    ids = ids[:-1] or ids or [tokenizer.eos_token_id]
    prompt = list(request.prompt_ids)
    tokens = torch.tensor([prompt + ids], device=model.device)
    with autocast(model):
        logits = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].float()
    logps = torch.log_softmax(logits, dim=-1)
    chosen = logps.gather(1, tokens[0, len(prompt) :, None])[:, 0]
    return float((logps.max(dim=-1).values - chosen).max())

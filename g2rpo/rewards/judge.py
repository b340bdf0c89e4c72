"""A vision-language model as judge, over HTTP: any OpenAI-compatible chat-completions endpoint.

    judge = Judge("http://gpu-2:8000/v1", "CodeGoat24/UnifiedReward-qwen-7b", score_range=(1, 5))

in a module of yours is a reward, named in the configuration as `mymodule:judge`. Each image is one
request: its PNG (lossless) as a data URL, and the template with its prompt. Temperature 0 and a
fixed seed: the same image and prompt make the same bytes; the same answer is up to the server.

HTTP is httpx2's with anyio's event loop: huggingface_hub needs both already, and anyio's time limit
holds for a whole request, where a client's own begins again with every byte that arrives.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .judge_answers import OutOfRange, parse_score
from .preprocess import check

if TYPE_CHECKING:
    import httpx2

TEMPLATE = (
    "You are shown an image that was made from a text prompt. Judge how faithfully it shows what "
    "the prompt asks for, and how good it is as a picture.\n"
    "Prompt: {prompt}\n"
    "Answer with one line and nothing else, 'Score: x', where x is a number from {low} (worst) to "
    "{high} (best)."
)
FAULTS = {401, 403, 404}  # statuses that no image and no prompt brings about
SHOWN = 300  # characters of a server's words in a message


@dataclass(frozen=True)
class _Outcome:
    """Of one image: the model's answer, or why there is none."""

    text: str = ""
    reason: str = ""  # a key of failures; "": there is an answer
    detail: str = ""
    status: int = 0  # of HTTP; 0 where none came
    wait: float | None = None  # seconds before another attempt, at least; None: it is no use


class Judge:
    """Scores in [0, 1] by a vision-language model that is served elsewhere.

    endpoint: the base URL, as http://host:8000/v1. model: its name there. template: what is asked,
    with {prompt}, and {low} and {high} of score_range if it likes. parse: answer -> score, taken as
    it is; raises ValueError where there is none. Default: `parse_score`, scaled from score_range.

    concurrency: requests under way at a time. timeout: seconds for the whole of one attempt.
    attempts: at most, for each image; after a connection error, a timeout, 429 or 5xx another is
    made, backoff seconds later, then twice that and so on (give or take half, at random), and not
    before a Retry-After has passed. deadline: seconds for a call; what is unanswered then is NaN.
    max_tokens: of an answer; a longer one is cut off and not scored. body: further keys of the
    request, or other values; None leaves one out. api_key_env: name of the environment variable
    with the key, which is read at each call, never kept, never shown. on_message: told the first
    failure of each reason, after the call.

    A score that could not be had is NaN, never 0, and is counted. failures: reason -> images:
    "timeout", "deadline", "refused" (no connection), "disconnected", "rate limited" (429), "server
    error" (5xx), "rejected" (another status), "cut off", "bad answer", "out of range". retries:
    attempts beyond the first.

    Raises ConfigurationError naming the argument that cannot be.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        template: str = TEMPLATE,
        parse: Callable[[str], float] | None = None,
        *,
        score_range: tuple[float, float] = (0.0, 10.0),
        concurrency: int = 8,
        timeout: float = 60.0,
        attempts: int = 3,
        deadline: float = 600.0,
        backoff: float = 0.5,
        max_tokens: int = 512,
        seed: int = 0,
        api_key_env: str | None = None,
        body: Mapping[str, Any] | None = None,
        on_message: Callable[[str], None] = print,
    ) -> None:
        self.endpoint, self.model, self.template, self.parse = endpoint, model, template, parse
        self.low, self.high = score_range
        self.concurrency, self.attempts, self.max_tokens = concurrency, attempts, max_tokens
        self.timeout, self.deadline, self.backoff = timeout, deadline, backoff
        self.seed, self.body = seed, dict(body or {})
        self.api_key_env, self.on_message = api_key_env, on_message
        self.failures: Counter[str] = Counter()
        self.retries = 0
        self._jitter = random.Random()  # of its own: the run's generators stay as they are
        self._check()
        self.url = endpoint.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"

    def __repr__(self) -> str:
        return f"Judge({self.endpoint!r}, {self.model!r})"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[N, 3, H, W] float in [0, 1], N prompts -> [N] float32 on the images' device.

        Images that are not finite are NaN without a request. Blocks until all are scored, in an
        event loop too.

        Raises TypeError or ValueError for other arguments (grey images: `expand` them first), and
        ConfigurationError when all requests are refused with 401, 403 or 404.
        """
        checked, finite = check(images, prompts)
        scores = torch.full((len(images),), math.nan)
        rows = finite.nonzero().flatten().tolist()
        if rows:
            key = self._key()
            pixels = (checked[finite].float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
            outcomes = self._ask_all(pixels, [prompts[row] for row in rows], key)
            for row, outcome in zip(rows, outcomes):
                scores[row] = self._score(outcome, key)
            if {outcome.status for outcome in outcomes} <= FAULTS:
                raise ConfigurationError(
                    f"judge: {self.endpoint} refuses every request for the model {self.model!r} "
                    f"({_shown(outcomes[0].detail, key)}); expected an endpoint that serves it "
                    f"(its /models lists what it has) and, where it wants a key, api_key_env to "
                    f"name the variable with it (api_key_env is {self.api_key_env!r})"
                )
        return scores.to(images.device)

    def _ask_all(self, pixels: Tensor, prompts: list[str], key: str) -> list[_Outcome]:
        import anyio
        import httpx2
        from anyio.from_thread import start_blocking_portal

        late = _Outcome(reason="deadline", detail=f"no score within {self.deadline:g} s")
        outcomes = [late] * len(prompts)

        async def ask(client: httpx2.AsyncClient, places: anyio.Semaphore, row: int) -> None:
            async with places:
                outcomes[row] = await self._ask(client, pixels[row], prompts[row])

        async def ask_all() -> None:
            headers = {"Content-Type": "application/json"}
            headers |= {"Authorization": f"Bearer {key}"} if key else {}
            places = anyio.Semaphore(self.concurrency)
            async with httpx2.AsyncClient(headers=headers, timeout=None) as client:
                with anyio.move_on_after(self.deadline):
                    async with anyio.create_task_group() as tasks:
                        for row in range(len(prompts)):
                            tasks.start_soon(ask, client, places, row)

        # A loop in a thread of its own, as the caller's may be running already; leaving by an
        # exception, Ctrl-C among them, cancels the requests
        with start_blocking_portal() as portal:
            portal.call(ask_all)
        return outcomes

    async def _ask(self, client: httpx2.AsyncClient, pixels: Tensor, prompt: str) -> _Outcome:
        """One image, in as many attempts as it takes and there are."""
        import anyio

        content = await anyio.to_thread.run_sync(self.request_body, pixels, prompt)
        for attempt in range(self.attempts):
            outcome = await self._post(client, content)
            if outcome.wait is None or attempt == self.attempts - 1:
                break
            pause = max(outcome.wait, self.backoff * 2**attempt * self._jitter.uniform(0.5, 1.5))
            if anyio.current_time() + pause >= anyio.current_effective_deadline():
                break
            await anyio.sleep(pause)
            self.retries += 1
        return outcome

    async def _post(self, client: httpx2.AsyncClient, content: bytes) -> _Outcome:
        import anyio
        import httpx2

        try:
            with anyio.fail_after(self.timeout):
                response = await client.post(self.url, content=content)
        except TimeoutError:
            return _Outcome(reason="timeout", detail=f"no answer in {self.timeout:g} s", wait=0.0)
        except httpx2.ConnectError as error:
            return _Outcome(reason="refused", detail=str(error), wait=0.0)
        except httpx2.TransportError as error:
            return _Outcome(reason="disconnected", detail=str(error), wait=0.0)
        except httpx2.DecodingError as error:
            return _Outcome(reason="bad answer", detail=str(error))
        status = response.status_code
        if response.is_success:
            try:
                choice = response.json()["choices"][0]
                text, end = choice["message"]["content"], choice.get("finish_reason")
            except (ValueError, LookupError, TypeError, AttributeError):
                text = end = None
            if not isinstance(text, str):
                detail = f"no chat completion with a text: {response.text}"
                return _Outcome(reason="bad answer", detail=detail, status=status)
            if end == "length":  # "Score: 1" may have been "Score: 10"
                detail = f"the answer is longer than max_tokens, {self.max_tokens}"
                return _Outcome(reason="cut off", detail=detail, status=status)
            return _Outcome(text=text, status=status)
        reason, wait = "rejected", None
        if status == 429 or status >= 500:
            reason = "rate limited" if status == 429 else "server error"
            wait = _retry_after(response.headers.get("Retry-After", ""))
        return _Outcome("", reason, f"status {status}, {response.text}", status, wait)

    def request_body(self, pixels: Tensor, prompt: str) -> bytes:
        """The JSON that is sent for pixels [3, H, W] uint8, on the host, and a prompt."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        text = self.template.replace("{low}", f"{self.low:g}").replace("{high}", f"{self.high:g}")
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": text.replace("{prompt}", prompt)},  # last: it may have braces
        ]
        body = {
            "model": self.model, "messages": [{"role": "user", "content": content}],
            "temperature": 0, "seed": self.seed, "max_tokens": self.max_tokens, **self.body,
        }  # fmt: skip
        return json.dumps({key: value for key, value in body.items() if value is not None}).encode()

    def _score(self, outcome: _Outcome, key: str) -> float:
        """Of an outcome; NaN and counted where there is none."""
        reason, detail = outcome.reason, outcome.detail
        if not reason:
            try:
                if self.parse is None:
                    return parse_score(outcome.text, self.low, self.high)
                parsed = float(self.parse(outcome.text))
                if math.isfinite(parsed):
                    return parsed
                reason, detail = "bad answer", f"parse makes {parsed} of {outcome.text!r}"
            except ValueError as error:
                reason = "out of range" if isinstance(error, OutOfRange) else "bad answer"
                detail = str(error)
        self.failures[reason] += 1
        if self.failures[reason] == 1:
            self.on_message(
                f"The judge {self.model} at {self.endpoint} did not score an image: {reason} "
                f"({_shown(detail, key)}). It is NaN; further ones of this kind are only counted."
            )
        return math.nan

    def _key(self) -> str:
        """The API key; "" where none is wanted."""
        if self.api_key_env is None:
            return ""
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key and key.isascii() and key.isprintable()):
            raise ConfigurationError(
                f"judge: api_key_env is {self.api_key_env!r}, a variable that is "
                f"{'no line of ASCII' if key else 'not set'}; expected the API key in it"
            )
        return key

    def _check(self) -> None:
        scheme, _, rest = self.endpoint.partition("://")
        if "@" in rest.partition("/")[0]:
            raise ConfigurationError(
                "judge: endpoint has a user name or a password in it, which messages would show; "
                "expected it without, and a key in the variable that api_key_env names"
            )
        counts, whole = ("concurrency", "attempts", "max_tokens"), "a whole number, 1 or more"
        for name, good, expected in (
            ("endpoint", scheme in ("http", "https") and rest, "a URL such as http://host:8000/v1"),
            ("template", "{prompt}" in self.template, "{prompt} in it"),
            *((name, _is_count(getattr(self, name)), whole) for name in counts),
            ("timeout", self.timeout > 0, "seconds, above 0"),
            ("deadline", self.deadline > 0, "seconds, above 0"),
            ("backoff", self.backoff >= 0, "seconds, 0 or more"),
        ):
            if not good:
                value = getattr(self, name)
                raise ConfigurationError(f"judge: {name} is {value!r}; expected {expected}")
        if not -math.inf < self.low < self.high < math.inf:
            raise ConfigurationError(
                f"judge: score_range is ({self.low}, {self.high}); expected the lower number first"
            )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1


def _retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date; 0 if it is neither."""
    if value.strip().isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, TypeError):  # TypeError: Python 3.10's
        return 0.0
    return max(0.0, date.timestamp() - time.time())


def _shown(detail: str, key: str) -> str:
    """A server's words on one line, without the key, which some servers repeat."""
    words = detail.replace(key, "***") if key else detail
    words = " ".join("".join(c if c.isprintable() else " " for c in words).split())
    return words if len(words) <= SHOWN else words[:SHOWN] + "..."

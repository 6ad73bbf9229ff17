"""A teacher behind an OpenAI-compatible server: its top-k log-probabilities of the texts, no teacher in memory.

`/v1/completions` with `prompt` (token ids), `max_tokens` 1 and `prompt_logprobs` k, as vLLM serves it, answers for
every position i > 0 of the prompt with {token id: {"logprob", "rank", ...}}: the k most probable tokens at that
position given those before it, and the prompt's own token, which may be outside of the k. These are the rows that
predict a label, at temperature 1; a server does not give those of another one, and k is at most its `max_logprobs`.

The support is the k tokens of the highest log-probability. The prompt's own token is used only where it is among them,
so that the support does not depend on the label.
"""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from kd_llm.engine.rows import shifts_labels
from kd_llm.engine.teachers import require_forward
from kdcore.errors import InputError, RunFailed
from kdcore.gpu import TopK

if TYPE_CHECKING:
    from kd_llm.engine.objective import DivergenceArgs, HiddenRows

RETRIED = (408, 425, 429, 500, 502, 503, 504)
SMALLEST_REST = 1e-7  # 1 - P from float32 log-probabilities is no more exact, and may come out below 0


class ServedTeacher:
    """See the module.

    Args:
        url: the server, "http://host:8000" or ".../v1". model: its name there.
        k: tokens per position. num_outputs: size of the teacher's vocabulary.
        api_key: sent as a bearer token. timeout: seconds a request may take.
        retries: further tries after a connection error or a busy server, after 1, 2, 4 ... times `pause` seconds.
        parallel: requests at a time.
    Raises: InputError for a url that is none; for a server that refuses the request (its own words are in the
        message); RunFailed for one that cannot be reached or answers something else.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        k: int,
        num_outputs: int,
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 4,
        pause: float = 1.0,
        parallel: int = 8,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"served.url: given {url!r}, allowed: http://host:port or https://host:port")
        if not 1 <= k <= num_outputs:
            raise InputError(f"served.k: given {k}, allowed: 1 to the {num_outputs} outputs")
        base = url.rstrip("/")
        self.endpoint = f"{base if base.endswith('/v1') else base + '/v1'}/completions"
        self.model, self.k, self._outputs, self.api_key = model, k, num_outputs, api_key
        self.timeout, self.retries, self.pause, self.parallel = timeout, retries, pause, parallel

    @property
    def num_outputs(self) -> int:
        return self._outputs

    def prepare(self, student: nn.Module) -> None:
        if not shifts_labels(student):
            raise InputError("served: a server gives log-probabilities of next tokens, allowed: a decoder as student")

    def check(self, args: DivergenceArgs) -> None:
        require_forward(args, "a served teacher")
        if args.temperature != 1:
            raise InputError(
                f"temperature: given {args.temperature}, allowed with a served teacher: 1 (a server gives its "
                "log-probabilities at temperature 1)"
            )

    def signal(self, batch: Mapping[str, Any], rows: HiddenRows) -> TopK:
        if "position_ids" in batch:
            raise InputError("batch: packed (position_ids), allowed with a served teacher: one text per row")
        samples = rows.index[:, 0].unique().tolist()
        places = [rows.index[rows.index[:, 0] == sample, 1] for sample in samples]
        prompts = [_tokens(batch, sample, int(place.max()) + 2) for sample, place in zip(samples, places, strict=True)]
        with ThreadPoolExecutor(self.parallel) as pool:
            answers = list(pool.map(self.prompt_logprobs, [ids for ids, _ in prompts]))
        found = [
            self._row(answer, int(position) + 1 - skipped)
            for answer, place, (_, skipped) in zip(answers, places, prompts, strict=True)
            for position in place
        ]
        device = rows.hidden.device
        ids = torch.tensor([row[0] for row in found], dtype=torch.int64, device=device).view(-1, self.k)
        logp = torch.tensor([row[1] for row in found], dtype=torch.float32, device=device).view(-1, self.k)
        if self.k == self._outputs:
            return TopK(ids, logp, torch.full_like(logp[:, 0], -torch.inf))
        rest = -torch.expm1(logp.double().logsumexp(-1))
        return TopK(ids, logp, rest.clamp(min=SMALLEST_REST).log().float())

    def prompt_logprobs(self, ids: Sequence[int]) -> list[dict[str, Any] | None]:
        """The server's answer for one text: an entry per token, None for the first."""
        answer = self._post(
            {
                "model": self.model,
                "prompt": list(ids),
                "max_tokens": 1,
                "temperature": 0.0,
                "prompt_logprobs": self.k,
            }
        )
        try:
            entries = answer["choices"][0]["prompt_logprobs"]
            if len(entries) != len(ids):
                raise RunFailed(f"{self.endpoint}: {len(entries)} positions for a prompt of {len(ids)} tokens")
        except (KeyError, IndexError, TypeError):
            raise RunFailed(
                f"{self.endpoint}: the answer has no prompt_logprobs; the server must support them, as vLLM does"
            ) from None
        return entries

    def _row(self, entries: list[dict[str, Any] | None], position: int) -> tuple[list[int], list[float]]:
        entry = entries[position]
        try:
            pairs = sorted(((value["logprob"], int(token)) for token, value in entry.items()), reverse=True)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise RunFailed(f"{self.endpoint}: no log-probabilities at position {position}: {entry!r}") from None
        pairs = [(logp, token) for logp, token in pairs if isinstance(logp, int | float) and math.isfinite(logp)]
        if len(pairs) < self.k:
            raise RunFailed(
                f"{self.endpoint}: {len(pairs)} log-probabilities at position {position}, asked for {self.k}; "
                "the server's max_logprobs may be smaller"
            )
        kept = pairs[: self.k]
        if max(token for _, token in kept) >= self._outputs:
            raise RunFailed(f"{self.endpoint}: a token id beyond the {self._outputs} outputs of served.num_outputs")
        return [token for _, token in kept], [float(logp) for logp, _ in kept]

    def _post(self, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.endpoint, json.dumps(body).encode(), headers)
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                said = error.read().decode(errors="replace")[:500]
                problem = f"HTTP {error.code}: {said}"
                if error.code not in RETRIED:
                    raise InputError(f"{self.endpoint}: the server refuses the request: {problem}") from None
            except (urllib.error.URLError, OSError) as error:  # timeouts and cut connections among them
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            except ValueError:
                problem = "the answer is not JSON"
            if attempt < self.retries:
                time.sleep(self.pause * 2**attempt)
        raise RunFailed(f"{self.endpoint}: no answer in {self.retries + 1} tries; the last: {problem}")


def _tokens(batch: Mapping[str, Any], sample: int, end: int) -> tuple[list[int], int]:
    """Token ids of a row up to `end` without padding, and how many padding tokens were in front."""
    ids: Tensor = batch["input_ids"][sample, :end]
    mask = batch.get("attention_mask")
    if mask is None:
        return ids.tolist(), 0
    kept = mask[sample, :end].bool()
    return ids[kept].tolist(), int((~kept).sum())

"""Responses of a language model: a protocol, transformers' `generate`, and vLLM where it is installed.

    rollouts = HFRollouts(tokenizer)
    for rollout in rollouts.generate(student, prompts, n=8, sampling=Sampling(max_new_tokens=64), seed=step):
        text = tokenizer.decode(rollout.completion, skip_special_tokens=True)

The draw of response k to prompt i at its j-th token is u(seed, i, k, j), a uniform number from a generator of its own;
the token is the inverse of the cumulative distribution at u. So responses depend on the weights and the seed, not on
how the prompts are cut into batches (beyond rounding), nor on the global generators, which stay untouched: a resumed
training sees the same ones. The mixing of such responses into training batches is `kd_llm.engine.onpolicy`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_llm.engine.heads import base_model
from kd_llm.engine.rows import is_encoder_decoder
from kdcore.config import Config
from kdcore.data import mix
from kdcore.errors import InputError, RunFailed


class Sampling(Config):
    """How tokens are drawn: temperature first, then top-k, then top-p."""

    temperature: float = Field(1.0, ge=0, description="divides the logits; 0 takes the most likely token")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the smallest set of tokens with at least this mass")
    top_k: int | None = Field(None, ge=1, description="keep the k most likely tokens")
    max_new_tokens: int = Field(64, ge=1, description="longest response, in tokens, its end token included")


@dataclass(frozen=True)
class Rollout:
    """One response. On the CPU.

    ids: (P + L,) int64, prompt then response, its end token included, no padding. The prompt of an encoder-decoder is
        what its encoder reads; the token that starts its decoder is not among the ids.
    completion_start: P.
    logp: (L,) float32, log-probability of each token of the response under the distribution it was drawn from (after
        temperature, top-k and top-p; 0 for temperature 0).
    finished: whether an end token closed it; False is a response cut at `max_new_tokens`.
    """

    ids: Tensor
    completion_start: int
    logp: Tensor
    finished: bool

    @property
    def completion(self) -> Tensor:
        """(L,) the response's tokens."""
        return self.ids[self.completion_start :]


class Rollouts(Protocol):
    """Where responses come from."""

    def generate(
        self, model: nn.Module, prompts: Sequence[Tensor], n: int, sampling: Sampling, seed: int
    ) -> list[Rollout]:
        """`n` responses to each prompt ((P,) int64), in the order prompt 0's n, prompt 1's n, ..."""
        ...

    def sync(self, model: nn.Module) -> None:
        """Takes over the model's weights, where the source of the responses keeps its own copy."""
        ...


# ---------------------------------------------------------------- drawing a token


def filtered_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) logits -> (B, V) probabilities after temperature, top-k and top-p, in float64 (float32 on mps).

    The largest token always stays. Of tokens that tie at the k-th place of top-k all stay.
    """
    logits = logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        smallest = logits.topk(sampling.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=1, descending=True)
        before = ordered.cumsum(1) - ordered  # the mass in front of a token: it is needed while this is below top_p
        probabilities = probabilities.scatter(1, order, ordered.masked_fill(before >= sampling.top_p, 0.0))
        probabilities = probabilities / probabilities.sum(1, keepdim=True)
    return probabilities


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """(B, V) probabilities, (B,) uniform in [0, 1) -> (B,) int64: the first token whose cumulative mass exceeds u.

    >>> draw(torch.tensor([[0.2, 0.0, 0.8]]).repeat(3, 1), torch.tensor([0.1, 0.3, 0.99]))
    tensor([0, 2, 2])
    """
    cumulative = probabilities.cumsum(1)
    # The factor keeps u * total below total when the product rounds up.
    target = uniform.to(cumulative).unsqueeze(1) * cumulative[:, -1:] * (1 - 4 * torch.finfo(cumulative.dtype).eps)
    token = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return token.clamp(max=probabilities.shape[1] - 1)


def uniforms(seed: int, rows: Sequence[int], length: int) -> Tensor:
    """(len(rows), length) float64 in [0, 1): row r from a generator seeded with (seed, r)."""
    drawn = [torch.rand(length, generator=_generator(seed, row), dtype=torch.float64) for row in rows]
    return torch.stack(drawn)


def _generator(seed: int, row: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix(seed, row))


class _Draw:
    """A logits processor that has drawn the token itself: it leaves one finite score per row. Records ln q.

    width: tokens in front of the response in the ids it is given.
    """

    def __init__(self, sampling: Sampling, width: int, uniform: Tensor):
        self.sampling, self.width, self.uniform = sampling, width, uniform
        self.logp: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = filtered_probabilities(scores, self.sampling)
        token = draw(probabilities, self.uniform[:, input_ids.shape[1] - self.width]).unsqueeze(1)
        self.logp.append(probabilities.gather(1, token).log().squeeze(1).float())
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


# ---------------------------------------------------------------- transformers


class HFRollouts:
    """Responses by transformers' `generate`, on the model that trains: no copy of the weights.

    `batch_size` bounds the sequences of one `generate` call; prompts of like length share one. `eos` are the tokens
    that end a response: by default the tokenizer's and those of the model's own generation config. Of that config
    nothing else applies, so that a checkpoint's penalties and top-p do not bend the distribution that is asked for.
    Dropout is off while it samples; every module's training flag is restored. Under FSDP2 every process must call it
    with as many prompts as the others. Encoder-decoders read the prompt in their encoder.
    """

    def __init__(self, tokenizer: Any, *, batch_size: int = 256, eos: Sequence[int] | None = None):
        if batch_size < 1:
            raise InputError(f"HFRollouts.batch_size = {batch_size}: allowed: 1 or more")
        self.tokenizer, self.batch_size, self.eos = tokenizer, batch_size, eos

    def sync(self, model: nn.Module) -> None:
        """The model itself samples: nothing to copy."""

    def generate(
        self, model: nn.Module, prompts: Sequence[Tensor], n: int, sampling: Sampling, seed: int
    ) -> list[Rollout]:
        """See `Rollouts`. InputError: no prompt, an empty one, n < 1, a prompt that leaves no room, no end token."""
        eos, pad = self._special(model)
        _check(model, prompts, n, sampling)
        jobs = [(prompt, row) for row, prompt in enumerate(p for p in prompts for _ in range(n))]
        jobs.sort(key=lambda job: len(job[0]))
        found: dict[int, Rollout] = {}
        with evaluating(model), torch.no_grad():
            for start in range(0, len(jobs), self.batch_size):
                batch = jobs[start : start + self.batch_size]
                rows = [row for _, row in batch]
                uniform = uniforms(seed, rows, sampling.max_new_tokens)
                made = _generate(model, [prompt for prompt, _ in batch], uniform, sampling, eos, pad)
                found.update(zip(rows, made, strict=True))
        return [found[row] for row in range(len(jobs))]

    def _special(self, model: nn.Module) -> tuple[list[int], int]:
        eos = set(self.eos if self.eos is not None else ())
        if self.eos is None:
            own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
            eos = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        if not eos:
            raise InputError("HFRollouts: neither the tokenizer nor the model names an end token; give eos")
        pad = self.tokenizer.pad_token_id
        return sorted(eos), pad if pad is not None else min(eos)


def _check(model: nn.Module, prompts: Sequence[Tensor], n: int, sampling: Sampling) -> None:
    config: Any = model.config
    if n < 1 or not prompts:
        raise InputError(f"rollouts: {len(prompts)} prompts and n = {n}; allowed: at least one of each")
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) == 0:
        raise InputError(f"rollouts: prompt {lengths.index(0)} is empty; allowed: at least one token")
    room, longest = getattr(config, "max_position_embeddings", None), max(lengths)
    apart = is_encoder_decoder(model)
    if room is not None and (max if apart else sum)((longest, sampling.max_new_tokens)) > room:
        raise InputError(
            f"rollouts: a prompt of {longest} tokens and max_new_tokens = {sampling.max_new_tokens}; "
            f"allowed: {room} positions {'each' if apart else 'together'}, which is what the model has"
        )


def _generate(
    model: Any, prompts: Sequence[Tensor], uniform: Tensor, sampling: Sampling, eos: list[int], pad: int
) -> list[Rollout]:
    """One response to each prompt, in one `generate` call: padded on the left, or in front of an encoder on the right,
    where positions are counted from the first token."""
    from transformers import GenerationConfig

    width, device = max(len(prompt) for prompt in prompts), next(model.parameters()).device
    pair = is_encoder_decoder(model)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if pair else slice(width - len(prompt), width)
        ids[row, place], mask[row, place] = prompt.cpu(), 1
    begin = 1 if pair else width  # tokens in front of the response in what `generate` returns
    drawing = _Draw(sampling, begin, uniform.to(device, torch.float32 if device.type == "mps" else None))
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=pad, use_cache=True,
        decoder_start_token_id=_decoder_start(model) if pair else None,
    )  # fmt: skip
    with _generation_config(model, config) as generator:
        sequences = generator.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=[drawing],
        )
    completions, logp = sequences[:, begin:].cpu(), torch.stack(drawing.logp, 1).cpu()
    return [_rollout(prompt.cpu(), completions[row], logp[row], eos) for row, prompt in enumerate(prompts)]


def _decoder_start(model: Any) -> int:
    """The token in front of an encoder-decoder's targets, as in its training."""
    found = model.config.decoder_start_token_id
    if found is None:
        raise InputError(f"rollouts: the config of {model.config.model_type} has no decoder_start_token_id")
    return int(found)


def _rollout(prompt: Tensor, completion: Tensor, logp: Tensor, eos: list[int]) -> Rollout:
    ends = torch.isin(completion, torch.tensor(eos)).nonzero()
    length = int(ends[0]) + 1 if len(ends) else len(completion)
    logp = logp[:length].clone()
    if not bool(torch.isfinite(logp).all()):
        raise RunFailed("rollouts: the model's logits are not finite")
    return Rollout(torch.cat([prompt, completion[:length]]), len(prompt), logp, bool(len(ends)))


@contextmanager
def _generation_config(model: Any, config: Any) -> Iterator[Any]:
    """The module whose `generate` runs, with `config` in the place of its own defaults.

    Adapters are layers inside the base model, so its own `generate` uses them; prompt tuning needs the wrapper's.
    """
    peft = getattr(model, "active_peft_config", None)
    inner = model.get_base_model() if peft is not None and not peft.is_prompt_learning else model
    before = inner.generation_config
    inner.generation_config = config
    try:
        yield inner
    finally:
        inner.generation_config = before


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; after it every module has the training flag it had."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


# ---------------------------------------------------------------- vLLM


SamplerName = Literal["transformers", "vllm"]


def check_vllm() -> None:
    """InputError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError("rollouts: vllm is not installed; install it beside kd-llm, or use transformers' generate")


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a (peft-wrapped) model under the names of its checkpoint, without what adapters add."""
    weights = base_model(model).state_dict()
    return {name.replace(".base_layer", ""): value for name, value in weights.items() if "lora_" not in name}


class VLLMRollouts:
    """Responses by a vLLM engine in this process, with a copy of the weights that `sync` refreshes.

    `model` is the folder or name the engine starts from; `engine` are further arguments of `vllm.LLM`, for example
    `gpu_memory_utilization`. vLLM is not a dependency: its pins would bind the whole environment. Draws are seeded per
    response, but vLLM's own kernels decide whether equal seeds give equal responses on other hardware.
    """

    def __init__(self, model: str, *, eos: Sequence[int] | None = None, **engine: Any):
        check_vllm()
        import os

        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # sync reaches into the engine of this process
        import vllm  # pyright: ignore[reportMissingImports]

        # ln q after temperature and filters, like HFRollouts; the default is that of the raw logits.
        self.llm = vllm.LLM(model=model, logprobs_mode="processed_logprobs", generation_config="vllm", **engine)
        self.parameters, self.eos = vllm.SamplingParams, list(eos or ())

    def sync(self, model: nn.Module) -> None:
        """Loads the model's weights into the engine; LoRA is merged for it and unmerged again."""
        merged = hasattr(model, "merge_adapter")
        if merged:
            model.merge_adapter()  # type: ignore[operator]
        try:
            engine = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
            engine.load_weights(list(plain_weights(model).items()))
        finally:
            if merged:
                model.unmerge_adapter()  # type: ignore[operator]
        self.llm.reset_prefix_cache()  # keys and values of the old weights

    def generate(
        self, model: nn.Module, prompts: Sequence[Tensor], n: int, sampling: Sampling, seed: int
    ) -> list[Rollout]:
        """See `Rollouts`. Samples from the weights of the last `sync`. InputError for an encoder-decoder."""
        if is_encoder_decoder(model):
            raise InputError(f"rollouts: vllm serves no {model.config.model_type}; use transformers' generate")  # type: ignore[union-attr]
        _check(model, prompts, n, sampling)
        jobs = [prompt for prompt in prompts for _ in range(n)]
        parameters = [
            self.parameters(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k or -1,
                max_tokens=sampling.max_new_tokens,
                seed=mix(seed, row) % 2**31,
                logprobs=0,
                stop_token_ids=self.eos or None,
                detokenize=False,
            )
            for row in range(len(jobs))
        ]
        inputs = [{"prompt_token_ids": prompt.tolist()} for prompt in jobs]
        outputs = self.llm.generate(inputs, parameters, use_tqdm=False)
        return [_from_vllm(prompt.cpu(), output.outputs[0]) for prompt, output in zip(jobs, outputs, strict=True)]


def _from_vllm(prompt: Tensor, output: Any) -> Rollout:
    tokens = list(output.token_ids)
    logp = [step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)]
    ids = torch.cat([prompt, torch.tensor(tokens, dtype=torch.int64)])
    return Rollout(ids, len(prompt), torch.tensor(logp, dtype=torch.float32), output.finish_reason == "stop")

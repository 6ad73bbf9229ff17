"""On-policy batches: a share of the training batches gets the student's own responses (Agarwal et al. 2024,
arXiv 2306.13649, algorithm 1).

Of the micro-batches of optimiser step s, number j is on-policy when u(seed, s, j) < lmbda; all processes agree. The
prompts of all of them are answered in one `generate` call per step, by the student as it is before the step, and the
responses replace those of the data set. The responses are data: nothing is differentiated through the sampling. An
encoder-decoder's prompt is what its encoder reads, which stays; the response becomes the decoder's target.

Use in a trainer, which calls it with the window of micro-batches of one optimiser step and counts the predicted
tokens after it (`DistillTrainer(..., window_hook=mixing)`):

    mixing = OnPolicy(HFRollouts(tokenizer), OnPolicyConfig(lmbda=0.5), seed=seed, pad=tokenizer.pad_token_id)
    window = mixing(student, window, step)         # list of batches in, list of batches out
    mixing.statistics()                            # {"rollout/truncated": .., "rollout/length": .., ...}, then reset

It has no state that a resumed run would need: draws depend on (seed, step, micro-batch, process) alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_llm.engine.rollouts import Rollout, Rollouts, Sampling
from kd_llm.engine.rows import is_encoder_decoder
from kdcore.config import Config
from kdcore.data import mix
from kdcore.errors import InputError

IGNORE = -100
Batch = dict[str, Tensor]
REBUILT = ("input_ids", "attention_mask", "labels")
PER_TOKEN = ("position_ids", "token_type_ids", "spans")  # they describe responses that are gone
OF_DECODER = ("decoder_input_ids", "decoder_attention_mask")  # made anew from the labels


class OnPolicyConfig(Config):
    """Which share of the batches is on-policy, and how the student is sampled."""

    lmbda: float = Field(1.0, ge=0, le=1, description="share of micro-batches with the student's own responses")
    sampling: Sampling = Field(default_factory=lambda: Sampling.model_validate({}), description="of those responses")
    prompt_tokens: int | None = Field(
        None, ge=1, description="for text without prompts: how many of its first tokens serve as the prompt"
    )


class OnPolicy:
    """See the module. `pad` fills the input ids; `rank` is this process's number, so that processes draw apart."""

    def __init__(self, rollouts: Rollouts, config: OnPolicyConfig, *, seed: int, pad: int, rank: int = 0):
        self.rollouts, self.config, self.seed, self.pad, self.rank = rollouts, config, seed, pad, rank
        self._reset()

    def chosen(self, step: int, micro_batch: int) -> bool:
        """Whether this micro-batch is on-policy; the same on every process."""
        draw = torch.Generator().manual_seed(mix(self.seed, step, micro_batch))
        return bool(torch.rand((), generator=draw, dtype=torch.float64) < self.config.lmbda)

    def __call__(self, model: nn.Module, window: Sequence[Batch], step: int) -> list[Batch]:
        """The window with the responses of its on-policy batches replaced. `model` is the unwrapped student.

        Batches have input_ids, attention_mask and labels (B, S), labels unshifted and -100 outside the response. A
        row without labels is a prompt as a whole. Further keys, as `kd_weight` and `example`, are kept. The labels of
        an encoder-decoder may have another length than its inputs.

        Raises InputError: packed batches (position_ids) and other tensors that describe the replaced tokens; text
        without a prompt where `prompt_tokens` is not set.
        """
        own = [self.chosen(step, j) for j in range(len(window))]
        self.batches += len(window)
        self.own_batches += sum(own)
        if not any(own):
            return list(window)
        pair = is_encoder_decoder(model)
        read = encoder_prompts if pair else lambda batch: prompts_of(batch, self.config.prompt_tokens)
        prompts = [read(batch) if use else [] for batch, use in zip(window, own)]
        self.rollouts.sync(model)
        seed = mix(self.seed, step, self.rank)
        made = self.rollouts.generate(model, [p for some in prompts for p in some], 1, self.config.sampling, seed)
        self._count(made)
        answers, result = iter(made), []
        for batch, some in zip(window, prompts, strict=True):
            found = [next(answers) for _ in some]
            new = batch if not some else with_targets(batch, found) if pair else with_responses(batch, found, self.pad)
            result.append(new)
        return result

    def _count(self, rollouts: Sequence[Rollout]) -> None:
        self.rollouts_made += len(rollouts)
        self.truncated += sum(not rollout.finished for rollout in rollouts)
        self.tokens += sum(len(rollout.logp) for rollout in rollouts)
        self.logp += sum(float(rollout.logp.sum()) for rollout in rollouts)

    def _reset(self) -> None:
        self.batches = self.own_batches = self.rollouts_made = self.truncated = self.tokens = 0
        self.logp = 0.0

    def statistics(self) -> dict[str, float]:
        """Since the last call, on this process: share of on-policy batches, and of their responses the share that was
        cut at `max_new_tokens`, the mean length in tokens and the mean of -ln q per token (nats)."""
        made, tokens = self.rollouts_made, max(1, self.tokens)
        result = {"rollout/share": self.own_batches / max(1, self.batches)}
        if made:
            result["rollout/truncated"] = self.truncated / made
            result["rollout/length"] = self.tokens / made
            result["rollout/entropy"] = -self.logp / tokens
        self._reset()
        return result


def prompts_of(batch: Batch, prompt_tokens: int | None = None) -> list[Tensor]:
    """The attended tokens of each row in front of its first label; see `OnPolicy.__call__`."""
    for key in PER_TOKEN:
        if key in batch:
            raise InputError(f"on-policy: the batch has '{key}', which belongs to responses that are replaced")
    prompts = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True):
        predicted = (labels != IGNORE).nonzero()
        if len(predicted) and not mask[: int(predicted[0])].any():
            if prompt_tokens is None:
                raise InputError("on-policy: text without a prompt; give prompt_tokens, or data with prompts")
            prompts.append(ids[mask][:prompt_tokens])
            continue
        start = int(predicted[0]) if len(predicted) else len(ids)
        prompts.append(ids[:start][mask[:start]])
    return prompts


def with_responses(batch: Batch, rollouts: Sequence[Rollout], pad: int) -> Batch:
    """The batch with these sequences in the place of its own, padded on the right; labels are the responses."""
    device = batch["input_ids"].device
    width = max(len(rollout.ids) for rollout in rollouts)
    ids = torch.full((len(rollouts), width), pad)
    labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    for row, rollout in enumerate(rollouts):
        length, start = len(rollout.ids), rollout.completion_start
        ids[row, :length], mask[row, :length] = rollout.ids, 1
        labels[row, start:length] = rollout.ids[start:]
    rebuilt = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {**batch, **{key: value.to(device) for key, value in rebuilt.items()}}


# ---------------------------------------------------------------- encoder-decoders


def encoder_prompts(batch: Batch) -> list[Tensor]:
    """The attended tokens of each row of input_ids: all that an encoder reads."""
    if "spans" in batch:
        raise InputError("on-policy: the batch has 'spans', which belongs to responses that are replaced")
    return [ids[mask] for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)]


def with_targets(batch: Batch, rollouts: Sequence[Rollout]) -> Batch:
    """The batch with these responses as the decoder's targets, `labels` (B, longest), -100 behind them."""
    responses = [rollout.completion for rollout in rollouts]
    labels = torch.nn.utils.rnn.pad_sequence(responses, batch_first=True, padding_value=IGNORE)
    kept = {key: value for key, value in batch.items() if key not in OF_DECODER}
    return {**kept, "labels": labels.to(batch["input_ids"].device)}

"""Multi-Granularity Semantic Revision for Large Language Model Distillation (arXiv 2407.10068, 2024).

A teacher's view of what the student generates is repaired at three levels. With p_i and q_i the next-token
distributions of teacher and student at response position i over V tokens:

    sequence, SCRG:  y^t_i = argmax_v p_i(v),  D_i = KL(p_i || q_i),  j = argmax_{i : y_i != y^t_i} D_i              (1)
                     y <- [y_<j, y^t_j, a fresh continuation by the student]                                        (2)
    token, DAC-KL:   (a, b) = sigmoid(f(phi_i)),  l = l_max a,  u = 1 - (1 - u_min) b                                (3)
                     K_i = {v : l <= rho_i(v) <= u} + {the target token} + {the most likely tokens, k_min of them
                           at least and together of probability P_min}                                              (4)
                     L_dac = mean_i KL(p_i / p_i(K_i) || q_i / q_i(K_i))  on K_i                                     (5)
    span:            L_span = mean over neighbours i, i+1 in a chunk of sum_v (p_i p_{i+1} - q_i q_{i+1})_v^2        (6)

    L = L_SFT + L_dac + L_span                                                                                       (7)

rho_i(v) in (0, 1] is the ascending rank of p_i(v) among the V tokens divided by V: 1 is the most likely one. L_SFT is
the cross-entropy on the data's responses. L_dac and L_span are on responses of the data, of the student (revised by
SCRG as they come) or of a replay buffer, chosen as in DistiLLM (`kd_llm.engine.replay`). The paper gives the levels
and (7); the numbers of the equations are this file's.

Ours, since no code is public: phi_i, the log-probabilities of the teacher's 32 most likely tokens under both models
(constants); f, an MLP 64-64-2; k_min and P_min, since (5) alone draws the band together until nothing is left to learn
(with k_min = 8 and no P_min, f ends with those 8 tokens); and the gradient of f, straight through: m = 1_K in (5) has
the derivative of sigmoid((rho - l)/tau) sigmoid((u - rho)/tau) on tokens that the band alone decides on. Whether the
paper normalises in (5) is not confirmed: as written, nothing but L_SFT teaches how much probability lies off K.
`clip.mode` tail adds that as one more outcome, truncated leaves out the normalisation.

f trains with the student and is dropped. Logits exist for a few rows at a time (`kd_llm.engine.chunked`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kd_llm import runs
from kd_llm.engine.chunked import HeadRows, chunked_loss, pair_blocks, row_blocks
from kd_llm.engine.heads import common_vocabulary, head_of
from kd_llm.engine.objective import Objective, StudentCall
from kd_llm.engine.perplexity import perplexities
from kd_llm.engine.replay import OffPolicyConfig, StudentResponses, beside, response
from kd_llm.engine.revision import Reviser, sides
from kd_llm.engine.rollouts import Rollout, Rollouts, SamplerName, Sampling, check_vllm
from kd_llm.engine.rows import row_weights, sum_over_processes
from kd_llm.engine.spans import Chunker, ChunkerName, chunker, data_responses, neighbours, response_spans, rows_of
from kd_llm.engine.teachers import TeacherSource
from kd_llm.engine.token_loss import Divergence, token_terms
from kd_llm.evaluation import evaluate, predict, spaced
from kd_llm.metrics import evaluation_batches
from kd_llm.models import open_model
from kd_llm.runs import LLMRun, Networks, Run
from kdcore.config import Config, MethodConfig, TrainConfig
from kdcore.data import mix
from kdcore.distiller import LossTerms
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import RunContext, Stage

FEATURES = 32  # most likely tokens that f sees
Batch = Mapping[str, Any]


class ClipConfig(Config):
    """Which tokens (5) compares."""

    bounds: tuple[float, float] | None = Field(
        None, description="fixed edges (l, u) of the band; None: f predicts them, (0, 1) keeps every token: forward KL"
    )
    l_max: float = Field(0.999, gt=0, le=1, description="largest lower edge")
    u_min: float = Field(0.999, gt=0, lt=1, description="smallest upper edge")
    k_min: int = Field(8, ge=1, description="most likely tokens that are always kept")
    min_mass: float = Field(
        0.9, ge=0, lt=1, description="P_min: the most likely tokens that reach it together are always kept; 0: no floor"
    )
    mode: Literal["renormalised", "tail", "truncated"] = Field(
        "renormalised", description="p and q normalised on K; with the rest as one outcome; as they are"
    )
    hidden: int = Field(64, ge=1, description="width of f")
    softness: float = Field(0.01, gt=0, description="tau of the soft mask, in ranks as a share of the vocabulary")

    @model_validator(mode="after")
    def _a_band(self) -> ClipConfig:
        if self.bounds is not None and not 0 <= self.bounds[0] < self.bounds[1] <= 1:
            raise ValueError(f"bounds = {self.bounds}: allowed: 0 <= l < u <= 1")
        if self.l_max > self.u_min:
            raise ValueError(f"l_max = {self.l_max}: must not be above u_min = {self.u_min}, or the edges could cross")
        return self


class SemanticRevisionConfig(MethodConfig):
    """The weights, the frequency and the kind of chunks are the paper's; `clip` is ours, `off_policy` is DistiLLM's."""

    sft_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy on the data's responses")
    dac_weight: float = Field(1.0, ge=0, description="weight of DAC-KL (5)")
    span_weight: float = Field(1.0, ge=0, description="weight of the span loss (6)")
    frequency: int = Field(1, ge=0, description="how often SCRG revises a new response; 0 leaves it as it is")
    chunker: ChunkerName = Field("auto", description="chunks of (6): nltk's phrases where installed, else word runs")
    clip: ClipConfig = Field(default_factory=lambda: ClipConfig.model_validate({}), description="DAC-KL's kept set")
    off_policy: OffPolicyConfig = Field(
        default_factory=lambda: OffPolicyConfig.model_validate({}), description="whose responses (5) and (6) are on"
    )
    sampling: Sampling = Field(
        default_factory=lambda: Sampling.model_validate({}), description="of the student; its length limits y of (2)"
    )
    rollouts: SamplerName = Field("transformers", description="what samples from the student")
    engine: dict[str, Any] = Field(default_factory=dict, description="vllm: arguments of its LLM, as in its own docs")
    sft: TrainConfig | None = Field(None, description="training of the student on the labels alone before all this")

    @model_validator(mode="after")
    def _something_to_learn(self) -> SemanticRevisionConfig:
        if self.sft_weight == self.dac_weight == self.span_weight == 0:
            raise ValueError("sft_weight, dac_weight and span_weight are all 0: at least one must be above")
        return self


# ---------------------------------------------------------------- DAC-KL


class ClipNetwork(nn.Module):
    """f of (3): the log-probabilities of the teacher's F most likely tokens under both models -> edges l, u (C,)."""

    def __init__(self, features: int, config: ClipConfig):
        super().__init__()
        self.features, self.l_max, self.u_min = features, config.l_max, config.u_min
        self.layers = nn.Sequential(nn.Linear(2 * features, config.hidden), nn.GELU(), nn.Linear(config.hidden, 2))
        for parameter in self.layers[-1].parameters():  # a = b = 1/2 at the start, whatever phi is
            nn.init.zeros_(parameter)

    def forward(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Student's and teacher's logits (C, V), which are constants here -> l, u."""
        ids = t.topk(self.features, dim=1).indices
        seen = [x.detach().log_softmax(1).gather(1, ids) for x in (t, z)]
        a, b = self.layers(torch.cat(seen, 1).to(self.layers[0].weight.dtype)).sigmoid().unbind(1)
        return self.l_max * a, 1 - (1 - self.u_min) * b


def kept_set(
    t: Tensor, target: Tensor, low: Tensor, high: Tensor, k_min: int, softness: float = 0.01, min_mass: float = 0.0
) -> Tensor:
    """1_K of (4), with the gradient of the soft band where only the band decides.

    Teacher's logits (or log-probabilities) t (C, V), target (C,), edges low, high (C,) -> mask (C, V) of t's type.
    `min_mass` is P_min, a probability under softmax(t).

    >>> p = torch.tensor([[0.5, 0.25, 0.15, 0.07, 0.03]])
    >>> kept_set(p, torch.tensor([0]), torch.tensor([0.3]), torch.tensor([0.9]), 0)
    tensor([[1., 1., 1., 1., 0.]])
    """
    vocabulary = t.shape[1]
    rank = torch.empty(t.shape, dtype=torch.int64, device=t.device)
    order = t.argsort(dim=1, stable=True)
    rank.scatter_(1, order, torch.arange(1, vocabulary + 1, device=t.device).expand_as(rank))
    rho = rank.to(t.dtype) / vocabulary
    least = torch.full_like(target, k_min).unsqueeze(1)
    if min_mass:
        likely = t.detach().softmax(1).gather(1, order).flip(1).cumsum(1)
        least = torch.maximum(least, 1 + (likely < min_mass).sum(1, keepdim=True))
    forced = (rank > vocabulary - least).scatter(1, target.unsqueeze(1), True)
    low, high = low.to(t.dtype).unsqueeze(1), high.to(t.dtype).unsqueeze(1)
    mask = (forced | ((rho >= low) & (rho <= high))).to(t.dtype)
    if not (low.requires_grad or high.requires_grad):
        return mask
    soft = torch.sigmoid((rho - low) / softness) * torch.sigmoid((high - rho) / softness)
    return mask + (soft - soft.detach()).masked_fill(forced, 0.0)


def clipped_kl(z: Tensor, t: Tensor, mask: Tensor, mode: str = "renormalised") -> Tensor:
    """Row values (C,) of (5): KL(p m / P || q m / Q), with P = sum p m and Q = sum q m, for logits z, t (C, V).

    m cancels inside the logarithm, so the value is (sum p m ln(p/q)) / P - ln P + ln Q and has a derivative in m
    everywhere. Its gradient in z is q m / Q - p m / P, which is 0 off K; t is a constant. The other modes are those of
    `kdcore.gpu.topk`: truncated is sum p m ln(p/q), and tail that plus (1 - P) ln((1 - P)/(1 - Q)).

    >>> p, q = torch.tensor([[0.5, 0.25, 0.15, 0.07, 0.03]]), torch.tensor([[0.3, 0.3, 0.2, 0.1, 0.1]])
    >>> round(clipped_kl(q.log(), p.log(), torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]])).item(), 6)
    0.071194
    """
    if mode != "renormalised":
        return _kl_with_rest(z, t, mask, tail=mode == "tail")
    # Any constant may be taken from z, since (5) normalises: the largest kept logit, because the kept mass of q may be
    # tiny. What K leaves out has m = 0 and any size; the bound keeps it finite.
    lp, lq = t.detach().log_softmax(1), z - z.detach().masked_fill(mask.detach() == 0, -torch.inf).amax(1, keepdim=True)
    pm, qm = lp.exp() * mask, lq.clamp(max=80).exp() * mask
    kept = pm.sum(1)
    ratio = (lp - lq).masked_fill(lp == -torch.inf, 0.0)
    return (pm * ratio).sum(1) / kept - kept.log() + qm.sum(1).log()


def _kl_with_rest(z: Tensor, t: Tensor, mask: Tensor, *, tail: bool) -> Tensor:
    lp, lq = t.detach().log_softmax(1), z.log_softmax(1)
    kept = (lp.exp() * mask * (lp - lq).masked_fill(lp == -torch.inf, 0.0)).sum(1)
    if not tail:
        return kept
    rest_p, rest_q = ((x.exp() * (1 - mask)).sum(1).clamp(min=1e-9) for x in (lp, lq))  # no 1 - P, which cancels
    return kept + rest_p * (rest_p.log() - rest_q.log())


# ---------------------------------------------------------------- spans


def span_products(z: Tensor, t: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """sum_v (p_a p_b - q_a q_b)^2 of (6) for rows a = first, b = second (P,) of logits z, t (C, V) -> (P,)."""
    p, q = t.detach().softmax(1), z.softmax(1)
    return (p[first] * p[second] - q[first] * q[second]).square().sum(1)


# ---------------------------------------------------------------- the objective


class SemanticRevision(Objective):
    """Equation (7). `window` chooses, samples and revises the responses of an optimiser step before it is counted.

    Args:
        teacher: a source of whole distributions. tokenizer: of the student; it finds the chunks.
        teacher_tokenizer: to be compared with it; needed where the vocabularies have different sizes.
        validation: batches of held-out data for the adaptive probability; empty: it stays at its initial value.
        prompt_tokens: for text without prompts: how many of its first tokens serve as the prompt.
        rank: this process's number, so that processes sample apart.
    Its checkpoint state is the replay buffer, the probability and f.
    """

    name = "semantic_revision"

    def __init__(
        self,
        teacher: TeacherSource,
        args: SemanticRevisionConfig,
        *,
        rollouts: Rollouts,
        tokenizer: Any,
        seed: int,
        validation: Sequence[Batch] = (),
        prompt_tokens: int | None = None,
        rank: int = 0,
        chunk: Chunker | None = None,
        teacher_tokenizer: Any = None,
    ):
        super().__init__()
        self.tokenizers = teacher_tokenizer and (tokenizer, teacher_tokenizer)
        self.teacher, self.args, self.rollouts, self.tokenizer = teacher, args, rollouts, tokenizer
        self.validation = list(validation)
        self.chunk = chunk or chunker(args.chunker)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.reviser = Reviser(rollouts, teacher, args.sampling, pad=self.pad, eos=[tokenizer.eos_token_id])
        self.responses = StudentResponses(
            rollouts, args.off_policy, args.sampling, self.revise, seed=seed, rank=rank, prompt_tokens=prompt_tokens
        )
        self.learns_edges = args.clip.bounds is None and args.dac_weight > 0
        if self.learns_edges:
            self.auxiliary["clip"] = ClipNetwork(min(FEATURES, teacher.num_outputs), args.clip)

    def prepare(self, student: nn.Module) -> None:
        super().prepare(student)
        self.teacher.prepare(student)
        if not head_of(student).linear:
            raise InputError("student: its output head is not linear; allowed: models with a linear one")
        common_vocabulary(head_of(student), self.teacher.num_outputs, self.tokenizers)  # what `sides` cuts both to

    # ------------------------------------------------------------ responses

    def window(self, student: nn.Module, batches: Sequence[Batch], step: int) -> Sequence[Batch]:
        """Adds to each micro-batch the responses that (5) and (6) are on (none: its own), and the chunks in them."""
        if self.responses.probability.reference is None and self.validation:
            self.responses.probability.observe(self.validation_loss(student))
        chosen = self.responses.choose(student, batches, step)
        made = [{**batch, **self._described(batch, rollouts)} for batch, rollouts in zip(batches, chosen, strict=True)]
        counts = torch.tensor([[self.count(response(b)), len(b["span_pairs"])] for b in made]).sum(0)
        counts = sum_over_processes(counts.to(made[0]["input_ids"].device))
        return [{**batch, "response_items": counts[0], "span_items": counts[1]} for batch in made]

    def revise(self, student: nn.Module, made: Sequence[Rollout], seed: int) -> list[Rollout]:
        """SCRG, `frequency` times."""
        made = list(made)
        for again in range(self.args.frequency):
            made = self.reviser(student, made, mix(seed, again + 1))
        return made

    def _described(self, batch: Batch, rollouts: Sequence[Rollout] | None) -> dict[str, Tensor]:
        """The keys that a micro-batch gains: its responses where they are not its own, and `span_pairs` (P, 2)."""
        found = {} if rollouts is None else beside(batch, rollouts, self.pad)
        if self.args.span_weight == 0:
            return {**found, "span_pairs": torch.zeros(0, 2, dtype=torch.int64)}
        parts = data_responses(batch, self.tokenizer.eos_token_id) if rollouts is None else [
            (r.ids.tolist(), r.completion_start, len(r.ids), not r.finished) for r in rollouts
        ]  # fmt: skip
        spans = [response_spans(self.tokenizer, *part, chunk=self.chunk, cut=open_end) for *part, open_end in parts]
        return {**found, "span_pairs": neighbours(spans).to(batch["input_ids"].device)}

    def validation_loss(self, student: nn.Module) -> float:
        """Mean cross-entropy on the validation batches, in nats per token."""
        return math.log(perplexities(student, {"validation": self.validation})["validation"])

    def on_step_end(self, trainer: Any) -> None:
        self.responses.steps = int(trainer.state.max_steps)
        if self.validation and trainer.state.global_step % self.args.off_policy.every == 0:
            self.responses.probability.observe(self.validation_loss(trainer.student))

    def extra_state(self) -> dict[str, Any]:
        return self.responses.state()

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.responses.load_state(state)

    # ------------------------------------------------------------ the loss

    def loss(self, call: StudentCall, batch: Batch, items: Tensor | int | None) -> LossTerms:
        args, other = self.args, response(batch)
        own = other is not batch
        rows = call.hidden_rows(batch) if args.sft_weight or not own else None
        terms = LossTerms()
        if rows is not None and args.sft_weight:
            weights = row_weights(batch, rows.index, self.count(batch) if items is None else items)
            sft = token_terms(rows, None, weights, Divergence(), hard_weight=args.sft_weight)
            terms["sft"] = (args.sft_weight, sft["hard"][1])
        revised = call.hidden_rows(other) if own or rows is None else rows
        mine, theirs = sides(revised, self.teacher.signal(other, revised))
        count = batch["response_items"] if "response_items" in batch else self.count(other)
        weights = row_weights(other, revised.index, count)
        dac, (fraction, mass) = self.dac(mine, theirs, revised.labels, weights)
        terms["dac"] = (args.dac_weight, dac)
        terms["span"] = (args.span_weight, self.span(mine, theirs, revised.index, batch))
        terms["kept_share"], terms["kept_mass"] = (0.0, fraction), (0.0, mass)
        terms["student_share"] = (0.0, self.share(batch, items) * torch.as_tensor(float(own), device=dac.device))
        return terms

    def dac(self, mine: HeadRows, theirs: HeadRows, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """sum_i w_i of (5), and of the rows: the kept share |K| / V and the teacher's kept mass."""
        clip, vocabulary = self.args.clip, len(mine.weight)
        network = self.auxiliary["clip"] if self.learns_edges else None
        blocks = row_blocks(len(labels), vocabulary, labels.device)

        def block(z: Tensor, t: Tensor, number: int) -> tuple[Tensor, Tensor]:
            fixed = z.new_tensor(clip.bounds or (0, 1)).expand(len(z), 2).T
            low, high = fixed if network is None else network(z, t)
            target, w = labels[blocks[number]].clamp(max=vocabulary - 1), weights[blocks[number]].to(z.dtype)
            mask = kept_set(t, target, low, high, clip.k_min, clip.softness, clip.min_mass)
            kept = torch.stack([mask.detach().mean(1), (t.softmax(1) * mask.detach()).sum(1)])
            return (clipped_kl(z, t, mask, clip.mode) * w).sum(), kept @ w

        parameters = () if network is None else tuple(network.parameters())
        return chunked_loss(mine, theirs, blocks, block, parameters=parameters, statistics=2)

    def span(self, mine: HeadRows, theirs: HeadRows, index: Tensor, batch: Batch) -> Tensor:
        """(6) over the pairs of the batch that both are predicted, as a part of the optimiser step's mean."""
        pairs = batch.get("span_pairs")
        first, second = (index[:0, 0],) * 2 if pairs is None else rows_of(pairs, index, int(self.shift))
        total = max(1, len(first)) if "span_items" not in batch else batch["span_items"].clamp(min=1)
        blocks, places = pair_blocks(first, second, len(mine.weight))

        def block(z: Tensor, t: Tensor, number: int) -> tuple[Tensor, Tensor]:
            return span_products(z, t, *places[number]).sum() / total, z.new_zeros(0)

        return chunked_loss(mine, theirs, blocks, block)[0]


# ---------------------------------------------------------------- the method


def build(config: Run, networks: Networks) -> SemanticRevision:
    """The objective of the run's second training of the student."""
    args: SemanticRevisionConfig = config.method_args
    rows = spaced(networks.tokens.validation, args.off_policy.validation)
    collate = networks.prepared.collator(networks.context.artefacts)
    return SemanticRevision(
        networks.teacher,
        args,
        rollouts=runs.student_rollouts(args.rollouts, args.engine, networks),
        tokenizer=networks.tokenizer,
        teacher_tokenizer=runs.tokenizer_pair(config, networks.tokenizer)[1],
        seed=config.seed,
        validation=list(evaluation_batches(rows, collate, config.evaluation.batch_size)),
        prompt_tokens=config.data.prompt_tokens,
        rank=networks.context.accelerator.process_index,
    )


def check(config: Run) -> None:
    """Raises InputError for what the responses or the losses cannot work with."""
    if config.task != "causal":
        raise InputError(f"task = '{config.task}': semantic_revision is for decoders; allowed: 'causal'")
    if config.data.packing:
        raise InputError("data.packing: responses are replaced one by one; set it to false")
    for name in ("cache", "served"):
        if getattr(config.teacher, name) is not None:
            raise InputError(f"teacher.{name}: the losses need the teacher's whole distribution; leave it out")
    chunker(config.method_args.chunker)
    if config.method_args.rollouts == "vllm":
        check_vllm()


def stages(config: Run, context: RunContext) -> list[Stage]:
    """Tokenizer, teacher, the student on the labels (`sft`), the student."""
    check(config)
    prepared = runs.prepare(config)
    sft: TrainConfig | None = config.method_args.sft
    found = [runs.tokenizer_stage(config, prepared), *runs.teacher_stage(config, prepared)]
    if sft is None:
        return [*found, runs.student_stage(config, prepared, build)]

    def start(context: RunContext) -> nn.Module:
        source = {"pretrained": str(context.artefacts["sft"]), "revision": None, "config": None, "cut": None}
        student = config.student.model_copy(update=source)
        return open_model(student, config.task, prepared.tokenizer(context.artefacts), field="sft")

    first = runs.student_stage(
        config, prepared, lambda config, networks: runs.supervised(config), train=sft, name="sft", artefact="sft"
    )
    return [*found, first, runs.student_stage(config, prepared, build, model=start)]


METHOD = Method("semantic_revision", __doc__, LLMRun[SemanticRevisionConfig], stages, evaluate, predict)

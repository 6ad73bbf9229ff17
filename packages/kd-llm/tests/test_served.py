"""A served teacher against a small server of the test's own that answers as vLLM does, from a real tiny model."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from kd_llm.engine.objective import DivergenceArgs, TokenObjective, run_body
from kd_llm.engine.rows import predicted
from kd_llm.integrations.served import ServedTeacher
from kd_llm.testing import VOCABULARY, collate, examples, packed, tiny_model
from kdcore.errors import InputError, RunFailed
from kdcore.gpu import TopK


class Server:
    """`faults`: what to do instead of answering, one per request: an HTTP status, "hang up" or a body."""

    def __init__(self, model):
        self.model, self.requests, self.headers, self.faults = model.eval(), [], [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, body))
                outer.headers.append(dict(self.headers))
                fault = outer.faults.pop(0) if outer.faults else None
                if fault == "hang up":
                    self.connection.close()
                    return
                status = fault if isinstance(fault, int) else 200
                text = fault if isinstance(fault, str) else json.dumps(outer.answer(body, status))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, body, status):
        if status != 200:
            return {"error": {"message": "prompt_logprobs must not exceed max_logprobs"}}
        ids, k = body["prompt"], body["prompt_logprobs"]
        with torch.no_grad():
            logp = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        entries = [None]
        for position in range(1, len(ids)):
            row = logp[position - 1]
            chosen = {*row.topk(k).indices.tolist(), ids[position]}  # the prompt's own token is always there
            ranks = row.argsort(descending=True).tolist()
            entries.append(
                {str(i): {"logprob": row[i].item(), "rank": ranks.index(i) + 1, "decoded_token": "x"} for i in chosen}
            )
        return {"choices": [{"text": "x", "prompt_logprobs": entries}]}


@pytest.fixture
def server():
    server = Server(tiny_model("llama", width=24, seed=2))
    yield server
    server.server.shutdown()
    server.server.server_close()


def source(server, **options):
    values = {"k": 5, "num_outputs": VOCABULARY, "pause": 0.01, "retries": 2}
    return ServedTeacher(server.url, "teacher", **{**values, **options})


def rows_of(model, batch):
    return run_body(model, batch, predicted(batch, True).nonzero(), True)


@pytest.mark.parametrize("side", ["right", "left"])
def test_signal_is_the_models_own_top_k(server, side):
    batch = collate(examples(5))
    if side == "left":
        for key, value in batch.items():
            if value.ndim == 2:
                rolled = [row.roll(int((1 - m).sum())) for row, m in zip(value, batch["attention_mask"], strict=True)]
                if key != "attention_mask":
                    batch[key] = torch.stack(rolled)
        batch["attention_mask"] = batch["attention_mask"].flip(1)
    found = source(server).signal(batch, rows_of(tiny_model("llama"), batch))
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = server.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions
        ).logits
    expected = TopK.from_logits(logits[predicted(batch, True)], 5)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.logp, expected.logp, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.log_missing, expected.log_missing, rtol=1e-3, atol=1e-3)
    path, body = server.requests[0]
    assert path == "/v1/completions"
    assert {"model": "teacher", "max_tokens": 1, "prompt_logprobs": 5}.items() <= body.items()


def test_in_an_objective(server, tmp_path):
    from transformers import TrainingArguments

    from kd_llm.integrations.trainer import DistillTrainer

    args = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, save_strategy="no",
                             disable_tqdm=True, log_level="error", per_device_train_batch_size=4)  # fmt: skip
    trainer = DistillTrainer(
        tiny_model("llama"),
        args,
        teacher=source(server, k=VOCABULARY),
        train_dataset=examples(8),
        data_collator=collate,
    )
    served = trainer.train().training_loss
    local = DistillTrainer(
        tiny_model("llama"), args, teacher=server.model, train_dataset=examples(8), data_collator=collate
    )
    assert served == pytest.approx(local.train().training_loss, rel=1e-4)


@pytest.mark.parametrize("fault", [503, 429, "hang up", "not json"])
def test_a_busy_server_is_asked_again(server, fault):
    server.faults = [fault]
    assert len(source(server).prompt_logprobs([4, 5, 6])) == 3
    assert len(server.requests) == 2


def test_a_server_that_stays_away_is_named(server):
    server.faults = [503] * 3
    with pytest.raises(RunFailed, match=r"/v1/completions: no answer in 3 tries; the last: HTTP 503"):
        source(server).prompt_logprobs([4, 5])
    gone = ServedTeacher("http://127.0.0.1:9", "teacher", k=2, num_outputs=9, retries=1, pause=0.01)
    with pytest.raises(RunFailed, match="no answer in 2 tries"):
        gone.prompt_logprobs([4, 5])


def test_a_refusal_is_not_repeated(server):
    server.faults = [400]
    with pytest.raises(InputError, match=r"refuses the request: HTTP 400.*max_logprobs"):
        source(server).prompt_logprobs([4, 5])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"choices": [{"text": "x"}]}', "has no prompt_logprobs"),
        ('{"choices": [{"prompt_logprobs": [null]}]}', "1 positions for a prompt of"),
    ],
)
def test_answers_of_another_form(server, text, message):
    server.faults = [text]
    with pytest.raises(RunFailed, match=message):
        source(server).prompt_logprobs([4, 5])


def test_too_few_log_probabilities_and_foreign_ids(server):
    teacher = source(server)
    with pytest.raises(RunFailed, match=r"1 log-probabilities at position 1, asked for 5"):
        teacher._row([None, {"3": {"logprob": -0.1}}], 1)
    with pytest.raises(RunFailed, match="beyond the 61 outputs"):
        teacher._row([None, {str(i): {"logprob": -0.1} for i in range(60, 65)}], 1)
    with pytest.raises(RunFailed, match="no log-probabilities at position 0"):
        teacher._row([None], 0)


def test_probabilities_that_sum_to_one_leave_a_finite_rest(server):
    batch = collate(examples(2))
    found = source(server, k=VOCABULARY - 1).signal(batch, rows_of(tiny_model("llama"), batch))
    assert torch.isfinite(found.log_missing).all()
    found = source(server, k=VOCABULARY).signal(batch, rows_of(tiny_model("llama"), batch))
    assert (found.log_missing == -torch.inf).all()


def test_the_key_is_sent(server):
    word = "tulip"
    source(server, api_key=word).prompt_logprobs([4, 5])
    assert server.headers[0]["Authorization"] == f"Bearer {word}"


def test_clear_refusals(server):
    for url in ("127.0.0.1:8000", "ftp://host", "http://"):
        with pytest.raises(InputError, match=r"served\.url"):
            ServedTeacher(url, "teacher", k=2, num_outputs=9)
    with pytest.raises(InputError, match=r"served\.k"):
        ServedTeacher("http://host", "teacher", k=10, num_outputs=9)
    for args, message in (
        (DivergenceArgs(temperature=2.0), "temperature: given 2.0"),
        (DivergenceArgs(divergence="reverse"), "allowed with a served teacher: 'forward'"),
    ):
        with pytest.raises(InputError, match=message):
            TokenObjective(source(server), args).prepare(tiny_model("llama"))
    with pytest.raises(InputError, match="a decoder as student"):
        source(server).prepare(tiny_model("bert"))
    batch = packed(examples(2))
    with pytest.raises(InputError, match="packed"):
        source(server).signal(batch, rows_of(tiny_model("llama"), batch))

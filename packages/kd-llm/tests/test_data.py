"""Sources of text: what is in them, how they are split, that nothing depends on the order of reading."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kd_llm.data import DataConfig, load_data, share, split_of
from kd_llm.sources import FAMILIES
from kd_llm.stdlib_corpus import DOMAINS, library_folder, read_corpus
from kdcore.config import parse
from kdcore.errors import InputError

REAL = Path(os.environ.get("KD_DATA", "/nonexistent")) / "text"
needs_files = pytest.mark.skipif(not REAL.is_dir(), reason="KD_DATA has no text files")


def config(**values):
    return parse(DataConfig, values)


# ---------------------------------------------------------------- the standard library


@pytest.fixture(scope="module")
def corpus():
    return load_data(config(size=40, eval_size=8))


def test_the_library_gives_every_domain_its_documents(corpus):
    assert corpus.domains == DOMAINS
    for split, count in (("train", 40), ("validation", 8), ("test", 8)):
        domains = corpus.split(split)["domain"]
        assert [domains.count(index) for index in range(3)] == [count] * 3


def test_no_document_is_twice_and_no_file_in_two_splits(corpus):
    texts = [
        " ".join(text.split()) for split in ("train", "validation", "test") for text in corpus.split(split)["text"]
    ]
    assert len(texts) == len(set(texts))
    documents, _, _ = read_corpus(0.1, 40, 8, None)
    files = {split: {document.file for document in part} for split, part in documents.items()}
    assert not files["train"] & (files["test"] | files["validation"])
    assert not files["test"] & files["validation"]
    assert all(split_of(name, 0.1) == split for split, names in files.items() for name in names)


def test_reading_is_deterministic(corpus):
    read_corpus.cache_clear()
    again = load_data(config(size=40, eval_size=8), seed=7)
    assert again.digest() == corpus.digest()
    assert load_data(config(size=39, eval_size=8)).digest() != corpus.digest()


def test_domains_are_what_they_say(corpus):
    by_domain = {
        name: [row["text"] for row in corpus.train if corpus.domains[row["domain"]] == name] for name in DOMAINS
    }
    for name in ("code", "tests"):
        assert all(text.startswith(("def ", "async def ")) for text in by_domain[name])
        assert not any(
            line.lstrip().startswith("# ") for text in by_domain[name][:10] for line in text.splitlines()[:1]
        )
    assert all(text.split("(")[0].split()[-1].startswith("test") for text in by_domain["tests"])
    assert not any(text.startswith("def ") for text in by_domain["prose"])


def test_one_domain_can_be_kept_and_is_renumbered():
    data = load_data(config(size=10, eval_size=4, domains=["tests", "prose"]))
    assert data.domains == ["tests", "prose"]
    assert sorted(data.train["domain"]) == [0] * 10 + [1] * 10
    assert all("def test" in row["text"] for row in data.train if row["domain"] == 0)
    with pytest.raises(InputError, match=r"data\.domains: 'prosa'.*did you mean 'prose'"):
        load_data(config(size=10, eval_size=4, domains=["prosa"]))


def library(folder: Path, tests: bool) -> Path:
    body = "    total = 0\n    for x in range(10):\n        total += x * x\n    return total  # so many lines of code\n"
    doc = '    """Says what is done, in enough words that it is a document of its own among the others here."""\n'
    folder.mkdir()
    for index in range(30):
        (folder / f"m{index}.py").write_text(
            f"def f{index}():\n{doc.replace('Says', f'Says {index}')}    # a comment\n{body}"
        )
    (folder / "broken.py").write_text("def (:\n")
    (folder / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    if tests:
        (folder / "test").mkdir()
        for index in range(30):
            (folder / "test" / f"test_m{index}.py").write_text(f"def test_f{index}():\n{body}")
    return folder


def test_docstrings_and_comments_are_no_code_and_broken_files_are_left_out(tmp_path):
    documents, _, notes = read_corpus(0.2, None, None, None, library(tmp_path / "lib", tests=True))
    assert notes == []
    every = [document for part in documents.values() for document in part]
    code = [document for document in every if document.domain == "code"]
    assert len(code) == 30
    assert not any('"""' in document.text or "# a comment" in document.text for document in code)
    assert all("return total" in document.text for document in code)
    assert sum(document.domain == "prose" for document in every) == 30
    assert {document.file.split("/")[0] for document in every if document.domain == "tests"} == {"test"}


def test_without_a_test_package_a_note_says_what_stands_for_it(tmp_path):
    folder = library(tmp_path / "lib", tests=False)
    example = ">>> f(1)\n    2\n    " * 12
    (folder / "doc.py").write_text(f'def g():\n    """{example}"""\n    return 1\n')
    documents, _, notes = read_corpus(0.2, None, None, None, folder)
    assert len(notes) == 1
    assert "no test package" in notes[0]
    found = [document for part in documents.values() for document in part if document.domain == "tests"]
    assert [document.file for document in found] == ["doc.py"]


def test_the_library_is_where_python_says():
    assert (library_folder() / "os.py").is_file()


# ---------------------------------------------------------------- arithmetic


def test_arithmetic_is_exact_and_has_no_problem_in_two_splits():
    data = load_data(config(name="arithmetic", size=60, eval_size=10))
    assert data.domains == list(FAMILIES)
    seen: dict[str, str] = {}
    for split in ("train", "validation", "test"):
        for row in data.split(split):
            problem = row["prompt"]
            assert problem.endswith("=")
            operation = next(sign for sign in "+-*" if sign in problem[1:])
            a, b = problem[:-1].split(operation)
            truth = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operation]
            assert row["completion"] == str(truth)
            assert (problem, row["domain"]) not in seen or seen[problem] == split
            assert seen.setdefault(problem, split) == split


def test_arithmetic_depends_on_the_seed_alone():
    values = {"name": "arithmetic", "size": 30, "eval_size": 5, "domains": ["add3", "mul2"]}
    assert load_data(config(**values), 3).digest() == load_data(config(**values), 3).digest()
    assert load_data(config(**values), 3).digest() != load_data(config(**values), 4).digest()
    with pytest.raises(InputError, match="not a family of arithmetic; did you mean 'add3'"):
        load_data(config(name="arithmetic", domains=["add33"]))


# ---------------------------------------------------------------- files


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_of_one_file_is_split_by_its_rows(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "domain": "ab"[i % 2]} for i in range(200)]
    data = load_data(config(name="jsonl", root=str(write_jsonl(tmp_path / "x.jsonl", rows))))
    assert data.domains == ["a", "b"]
    sizes = [len(data.train), len(data.validation), len(data.test)]
    assert sum(sizes) == 200
    assert min(sizes) >= 5
    write_jsonl(tmp_path / "x.jsonl", rows[::-1])
    again = load_data(config(name="jsonl", root=str(tmp_path / "x.jsonl")))
    assert sorted(again.test["prompt"]) == sorted(data.test["prompt"])


def test_jsonl_folder_with_labels_and_chats(tmp_path):
    chats = [[{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "hello"}] for i in range(50)]
    write_jsonl(tmp_path / "train.jsonl", [{"messages": chat, "extra": 1} for chat in chats])
    write_jsonl(tmp_path / "test.jsonl", [{"messages": chats[0]}])
    data = load_data(config(name="jsonl", root=str(tmp_path), held_out=0.4))
    assert data.train[0]["completion"] == "hello"
    assert data.train[0]["prompt"][0]["content"].startswith("hi")
    assert (len(data.test), len(data.train) + len(data.validation)) == (1, 50)
    other = tmp_path / "labels.jsonl"
    write_jsonl(other, [{"sentence": f"s{i}", "kind": ["bad", "good"][i % 2]} for i in range(100)])
    data = load_data(config(name="jsonl", root=str(other), columns={"text": "sentence", "label": "kind"}))
    assert data.label_names == ["bad", "good"]
    assert set(data.train["label"]) == {0, 1}


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([{"a": 1}], {}, r"data\.columns: required, .* has a"),
        ([{"text": "x"}], {"text": "txet"}, r"data\.columns\.text = 'txet': .*did you mean 'text'"),
        ([{"text": "x"}, {"text": None}], {}, r"data\.columns\.text = 'text': missing in a row"),
        ([{"text": 3}], {}, "holds int, expected text"),
        ([{"messages": [{"role": "user", "content": "x"}]}], {}, "does not end with a message of the assistant"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, columns, message):
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(InputError, match=message):
        load_data(config(name="jsonl", root=str(path), columns=columns))


def test_bad_files_and_fields_are_named(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(InputError, match="line 2: not JSON"):
        load_data(config(name="jsonl", root=str(tmp_path / "x.jsonl")))
    with pytest.raises(InputError, match=r"data\.root = .*: no such file"):
        load_data(config(name="text", root=str(tmp_path / "missing")))
    with pytest.raises(InputError, match=r"data\.root: required"):
        load_data(config(name="text"))
    with pytest.raises(InputError, match="environment variable is not set"):
        load_data(config(name="text", root="$NO_SUCH_VARIABLE_HERE/x"))
    monkeypatch.delenv("KD_DATA", raising=False)
    with pytest.raises(InputError, match="set KD_DATA"):
        load_data(config(name="trec"))
    with pytest.raises(InputError, match="prompt_tokens = 64: must be less than length"):
        config(length=64, prompt_tokens=64)
    with pytest.raises(InputError, match="prompt and completion go together"):
        config(columns={"prompt": "x"})


def test_text_folders_are_splits_and_domains(tmp_path):
    for split, count in (("train", 5), ("test", 2)):
        for domain in ("law", "med"):
            (tmp_path / split / domain).mkdir(parents=True)
            text = "\n\n".join(f"{split} {domain} paragraph {index}" for index in range(count * 4))
            (tmp_path / split / domain / "f.txt").write_text(text)
    data = load_data(config(name="text", root=str(tmp_path), held_out=0.2))
    assert data.domains == ["law", "med"]
    assert len(data.test) == 16
    assert len(data.train) + len(data.validation) == 40
    assert all(row["text"].split()[1] == data.domains[row["domain"]] for row in data.train)


def test_hub_reads_a_local_folder_with_load_dataset(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"a{i}", "topic": ["x", "y"][i % 2]} for i in range(60)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", rows[:6])
    columns = {"prompt": "question", "completion": "answer", "domain": "topic"}
    data = load_data(config(name="hub", root=str(tmp_path), columns=columns))
    assert (len(data.train), len(data.validation), len(data.test)) == (54, 6, 6)
    assert data.domains == ["x", "y"]
    assert set(data.train.column_names) == {"prompt", "completion", "domain"}
    with pytest.raises(InputError, match=r"data\.splits\.test = 'tset': no such split; did you mean 'test'"):
        load_data(config(name="hub", root=str(tmp_path), columns=columns, splits={"test": "tset"}))
    with pytest.raises(InputError, match=r"data\.root = .*: datasets cannot load it"):
        load_data(config(name="hub", root=str(tmp_path / "nothing")))


@needs_files
@pytest.mark.parametrize(("name", "sizes", "labels"), [("trec", (5452, 500), 6), ("sst2", (6920, 1821), 2)])
def test_the_classification_files(name, sizes, labels):
    data = load_data(config(name=name))
    rest = len(data.validation) if name == "trec" else 0
    assert (len(data.train) + rest, len(data.test)) == sizes
    assert data.num_labels == labels
    assert set(data.train["label"]) == set(range(labels))


@needs_files
def test_shakespeare_is_split_in_the_order_of_the_file():
    data = load_data(config(name="shakespeare"))
    assert data.train[0]["text"].startswith("First Citizen:")
    assert len(data.test) == len(data.validation) == round(0.1 * (len(data.train) + 2 * len(data.test)))


def test_shares_are_even():
    values = [share(f"file{index}.py") for index in range(2000)]
    assert 0 <= min(values) < max(values) < 1
    assert abs(sum(value < 0.1 for value in values) / 2000 - 0.1) < 0.03

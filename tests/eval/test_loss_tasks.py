"""nll, ar-hit and longppl against straightforward computation."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from oncelm.eval import TASKS, TokenScores, make_task, run
from oncelm.eval import model as module
from oncelm.eval.tasks.ar_hit import completes_seen_bigram
from oncelm.eval.tasks.nll import bucket_edges, curves
from oncelm.eval.tasks.questions import read_questions

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 12


def losses(model, ids) -> np.ndarray:
    row = torch.tensor(np.asarray(ids), dtype=torch.long)[None]
    with torch.no_grad():
        logits = model.model(row, use_cache=False).logits[0, :-1].double()
    return F.cross_entropy(logits, row[0, 1:], reduction="none").numpy()


# -- nll --------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 3_000_000))
def test_buckets_cover_every_position_once(count) -> None:
    edges = bucket_edges(count)
    assert edges[0] == 1
    assert edges[-1] == count + 1
    assert all(a < b for a, b in itertools.pairwise(edges))
    assert all(b <= 2 * a for a, b in itertools.pairwise(edges))
    longer = bucket_edges(2 * count)
    assert longer[: len(edges) - 1] == edges[:-1]  # documents of any length share their buckets


@pytest.mark.parametrize("kind", ["retention", "window", "llama"])
def test_streamed_loss_is_that_of_one_full_forward(kind, language_models, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 260 * 37)
    model = language_models(kind)
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.txt").write_text(TEXT[100:500])
    (folder / "c.txt").write_text("x")  # too short to predict anything
    done = run(make_task(TASKS["nll"], documents=str(folder)), model, tmp_path / "run.jsonl")
    expected = [losses(model, model.codec.encode(text)) for text in (TEXT, TEXT[100:500])]
    assert [s["tags"]["document"] for s in done.samples.values()] == ["a", "b"]
    for sample, direct in zip(done.samples.values(), expected, strict=True):
        edges = bucket_edges(len(direct))
        assert sample["scores"]["loss"] == pytest.approx(direct.mean(), abs=1e-4)
        assert sample["scores"]["counts"] == np.diff(edges).tolist()
        sums = [direct[a - 1 : b - 1].sum() for a, b in itertools.pairwise(edges)]
        np.testing.assert_allclose(sample["scores"]["sums"], sums, rtol=1e-4)
    windowed, cumulative = curves(list(done.samples.values()))
    assert cumulative[-1] == (len(expected[0]), pytest.approx(np.concatenate(expected).mean(), abs=1e-4))
    assert windowed[0] == (1, pytest.approx((expected[0][0] + expected[1][0]) / 2, abs=1e-3))
    assert len(windowed) == len(bucket_edges(len(expected[0]))) - 1


def test_the_same_tokens_with_ever_more_in_view(language_models, tmp_path) -> None:
    lines = [json.dumps({"text": text}) for text in (TEXT[:500], TEXT[:100], TEXT[20:450])]
    documents = tmp_path / "docs.jsonl"
    documents.write_text("\n".join(lines))
    model = language_models("llama")
    task = make_task(TASKS["context-nll"], documents=str(documents), contexts=(40, 300), scored=50)
    done = run(task, model, tmp_path / "run.jsonl")
    expected = []
    for name, text in (("docs:1", TEXT[:500]), ("docs:3", TEXT[20:450])):
        ids = model.codec.encode(text)[:350]
        for context in (0, 40, 300):
            direct = losses(model, ids[300 - max(1, context) :])[-50:]
            expected.append(({"document": name, "context": context}, pytest.approx(direct.mean(), abs=1e-4)))
    assert [(s["tags"], s["scores"]["loss"]) for s in done.samples.values()] == expected
    table, drawn = task.views([done])
    assert table.header == ["model", "0", "40", "300"]
    mean = (expected[0][1].expected + expected[3][1].expected) / 2
    assert table.rows[0][1].startswith(f"{math.exp(mean):.2f} (")
    assert [x for x, _ in drawn.series[done.label]] == [1, 40, 300]
    with pytest.raises(ValueError, match=r"no document of .* has 9,050 tokens"):
        list(
            make_task(TASKS["context-nll"], documents=str(documents), contexts=(9000,), scored=50).examples(
                model.codec, 0
            )
        )
    with pytest.raises(ValueError, match="scored must be a whole number of at least 1"):
        make_task(TASKS["context-nll"], scored=0)


def test_lengths_of_documents(language_models, tmp_path) -> None:
    lines = [json.dumps({"text": TEXT[:n]}) for n in (50, 300, 700)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    task = make_task(TASKS["nll"], documents=str(tmp_path), max_tokens=500, min_tokens=300)
    examples = list(task.examples(language_models("llama").codec, 0))
    assert [(e.tags["document"], len(e.continuation)) for e in examples] == [("docs:2", 299), ("docs:3", 499)]
    with pytest.raises(ValueError, match=r"no document of .* has 9999 tokens"):
        list(
            make_task(TASKS["nll"], documents=str(tmp_path), min_tokens=9999).examples(
                examples and language_models("llama").codec, 0
            )
        )
    (tmp_path / "docs.jsonl").write_text('{"text": "a"}\n{"body": "b"}')
    with pytest.raises(ValueError, match=r"line 2 of .* is no document: "):
        list(task.examples(language_models("llama").codec, 0))


# -- ar-hit -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40))
def test_seen_bigrams(ids) -> None:
    seen, expected = set(), []
    for pair in itertools.pairwise(ids):
        expected.append(pair in seen)
        seen.add(pair)
    assert completes_seen_bigram(np.array(ids, np.int32)).tolist() == expected


def test_ar_hit_splits_the_loss(language_models, tmp_path) -> None:
    model = language_models("retention")
    (tmp_path / "a.txt").write_text(TEXT)
    task = make_task(TASKS["ar-hit"], documents=str(tmp_path), length=200, blocks=4)
    done = run(task, model, tmp_path / "run.jsonl")
    ids = model.codec.encode(TEXT)
    for i, sample in done.samples.items():
        block = ids[200 * i : 200 * (i + 1)]
        direct, hit = losses(model, block), completes_seen_bigram(block)
        scores = sample["scores"]
        assert scores["hits"] == hit.sum() > 50
        assert scores["hit_loss"] == pytest.approx(direct[hit].mean(), abs=1e-4)
        assert scores["first_loss"] == pytest.approx(direct[~hit].mean(), abs=1e-4)
    (table,) = TASKS["ar-hit"].views([done])
    assert table.rows[0][0] == "retention"
    assert ["Transformer", "3.564", "1.219", "4.104", ""] in table.quoted


def test_a_block_without_hits_has_no_hit_loss() -> None:
    from oncelm.eval import Score

    example = Score(np.array([1], np.int32), np.array([2, 3], np.int32))
    scores = make_task(TASKS["ar-hit"]).score(example, TokenScores(np.array([-1.0, -2.0]), np.array([True, False])))
    assert scores == {"loss": 1.5, "tokens": 2, "hits": 0, "first_loss": 1.5}


def test_too_few_blocks(language_models, tmp_path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    task = make_task(TASKS["ar-hit"], documents=str(tmp_path), length=200, blocks=50)
    with pytest.raises(ValueError, match="has text for 4 blocks of 200 tokens, not for 50"):
        list(task.examples(language_models("llama").codec, 0))


# -- longppl ----------------------------------------------------------------------------------------------------------

DOCUMENT = "".join(f"Fact {i} is {i * 7}. " for i in range(60))


def write_questions(folder) -> None:
    """One data set a form."""
    summary = {"report": DOCUMENT, "summary": "It lists facts."}
    (folder / "gov_report.jsonl").write_text(json.dumps(summary))
    scrolls = {"input": f"What is fact 3?\n\n{DOCUMENT}", "output": "21"}
    (folder / "narrative_qa_validation.jsonl").write_text(json.dumps(scrolls))
    meeting = {
        "meeting_transcripts": [{"speaker": "A", "content": DOCUMENT}],
        "general_query_list": [{"query": "What?", "answer": "Facts."}],
        "specific_query_list": [{"query": "Who?", "answer": "A."}],
    }
    (folder / "qmsum.jsonl").write_text(json.dumps(meeting))
    section = {"section_name": "Intro", "paragraphs": [DOCUMENT]}
    none = {"unanswerable": True, "free_form_answer": "", "extractive_spans": [], "yes_no": None}
    yes = {"unanswerable": False, "free_form_answer": "", "extractive_spans": [], "yes_no": True}
    asks = [{"question": "Why?", "answers": [{"answer": none}]}, {"question": "Is it?", "answers": [{"answer": yes}]}]
    paper = {"title": "T", "abstract": "A", "full_text": [section], "qas": asks}
    (folder / "qasper-dev.json").write_text(json.dumps({"1234.5678": paper}))


def test_the_public_forms(tmp_path) -> None:
    write_questions(tmp_path)
    found = {(q.dataset, q.question, q.answer) for q in read_questions(str(tmp_path))}
    assert found == {
        ("GovReport", "", "It lists facts."), ("NarrativeQA", "What is fact 3?", "21"), ("QMSum", "What?", "Facts."),
        ("QMSum", "Who?", "A."), ("Qasper", "Is it?", "Yes"),
    }  # fmt: skip
    assert all(DOCUMENT.strip() in q.document for q in read_questions(str(tmp_path)))


def test_linked_folders_are_read_and_other_files_named(tmp_path, caplog) -> None:
    for name in ("data", "disk2"):
        (tmp_path / name).mkdir()
    write_questions(tmp_path / "disk2")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "disk2")
    for name in ("triviaqa.jsonl", "README.md"):
        (tmp_path / "data" / name).write_text("{}")
    assert read_questions(str(tmp_path / "data")) == read_questions(str(tmp_path / "disk2"))
    assert "1 of no known data set (triviaqa.jsonl); 1 with the suffix .md (README.md)" in caplog.text


def test_longbench_zeroscrolls_and_the_stories(tmp_path) -> None:
    long = {"context": DOCUMENT, "input": "Q?", "answers": ["a", "b"], "dataset": "qasper"}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(long) + "\n" + json.dumps(long | {"answers": "one text"}))
    text = f"Read this.\n\n{DOCUMENT}\n\nQuery:\nWhy?"
    start, ask = text.index("Fact"), text.index("Why?")
    zero = {"input": text, "output": "So.", "document_start_index": start, "document_end_index": ask - 8}
    zero |= {"query_start_index": ask, "query_end_index": len(text)}
    (tmp_path / "qmsum.jsonl").write_text(json.dumps(zero))
    (tmp_path / "story" / "tmp").mkdir(parents=True)
    (tmp_path / "story" / "tmp" / "x1.content").write_text(DOCUMENT)
    (tmp_path / "story" / "qaps.csv").write_text(
        "document_id,set,question,answer1,answer2\nx1,test,Who?,Me,I\nx2,test,No?,n,n\n"
    )
    found = [(q.dataset, q.question, q.answer, q.document) for q in read_questions(str(tmp_path))]
    assert found == [
        ("Qasper", "Q?", "a", DOCUMENT),
        ("Qasper", "Q?", "one text", DOCUMENT),
        ("QMSum", "Why?", "So.", DOCUMENT.strip()),
        ("NarrativeQA", "Who?", "Me", DOCUMENT),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "qasper.jsonl",
            '{"context": "a", "answers": ["b"]}\n{"what": 1}',
            r"line 2 of .* is in no known form; its keys",
        ),
        ("qasper.jsonl", "not json", r"line 1 of .* is not JSON"),
        ("qmsum.jsonl", '{"input": "a", "output": null}', "published without answers"),
        ("other.jsonl", "{}", "holds no file of a known data set"),
        ("qasper.jsonl", '{"context": "a", "answers": [""]}', r"line 1 of .*qasper\.jsonl has an empty answer"),
        ("qasper.json", '[{"context": "a", "input": "Q?", "answers": [" "]}]', r"entry 1 of .* empty answer to 'Q\?'"),
        ("gov_report.jsonl", '{"report": "a", "summary": ""}', r"line 1 of .*gov_report\.jsonl has an empty answer"),
        (
            "qmsum.jsonl",
            '{"meeting_transcripts": [{"speaker": "A"}], "specific_query_list": []}',
            r"line 1 of .*qmsum\.jsonl lacks the key 'content'",
        ),
        (
            "qmsum.jsonl",
            '{"meeting_transcripts": [], "specific_query_list": [{"query": "Q?"}]}',
            r"line 1 of .*qmsum\.jsonl lacks the key 'answer'",
        ),
        ("qasper.json", "3", r"qasper\.json must be a list of records, or an object of them by name, is: 3"),
        ("qasper.json", "null", r"must be a list of records, .* is: None"),
        ("qasper.json", '"text"', r"must be a list of records, .* is: 'text'"),
        ("qasper.json", "[3]", r"entry 1 of .*qasper\.json is in no known form"),
        ("qasper.jsonl", '{"context": "a", "answers": " "}', r"line 1 of .*qasper\.jsonl has an empty answer"),
        ("qasper.jsonl", '{"context": "a", "answers": 3}', r"line 1 of .* is not in the form that its keys say"),
        ("qasper.json", '{"12": {"full_text": [], "qas": []}}', r"entry 1 of .*qasper\.json lacks the key 'title'"),
        ("qasper.json", '[{"full_text": [3], "qas": []}]', r"entry 1 of .* is not in the form that its keys say"),
        ("narrativeqa.csv", "id,question\nx1,Who?\n", r"line 2 of .*narrativeqa\.csv lacks the key 'document_id'"),
        ("qmsum.jsonl", '{"caf\u00e9": 1}', r"qmsum\.jsonl is not UTF-8 text"),
    ],
)
def test_bad_question_files(name, content, message, tmp_path) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_questions(str(tmp_path))


def test_answer_loss_at_every_length(language_models, tmp_path) -> None:
    (tmp_path / "data").mkdir()
    write_questions(tmp_path / "data")
    model = language_models("retention")
    task = make_task(TASKS["longppl"], data=str(tmp_path / "data"), lengths=(400, 200))
    examples = list(task.examples(model.codec, 0))
    done = run(task, model, tmp_path / "run.jsonl")
    assert len(examples) == len(done.samples) == 10
    for example, sample in zip(examples, done.samples.values(), strict=True):
        whole = np.concatenate([example.prompt, example.continuation])
        assert len(whole) == sample["tags"]["context_length"]
        direct = losses(model, whole)[len(example.prompt) - 1 :]
        assert sample["scores"]["loss"] == pytest.approx(direct.mean(), abs=1e-4)
        assert model.codec.decode(example.continuation) == f" {sample['target']}"
    table, curve = TASKS["longppl"].views([done])
    assert table.header == ["model", "data", "200", "400"]
    gov = next(s for s in done.samples.values() if s["tags"] == {"dataset": "GovReport", "context_length": 400})
    assert curve.series["retention, GovReport"][1] == (400, pytest.approx(math.exp(gov["scores"]["loss"])))


def test_an_answer_is_scored_to_the_same_token_at_every_length(language_models, tmp_path) -> None:
    line = {"report": DOCUMENT, "summary": "It lists facts. " * 20}
    (tmp_path / "gov_report.jsonl").write_text(json.dumps(line))
    task = make_task(TASKS["longppl"], data=str(tmp_path), lengths=(900, 300))
    short, long = task.examples(language_models("retention").codec, 0)
    assert len(short.prompt) + 150 == 300
    assert long.continuation.tolist() == short.continuation.tolist()
    assert len(long.continuation) == 150


def test_longppl_needs_data() -> None:
    with pytest.raises(ValueError, match="needs a folder of questions: --data DIR"):
        make_task(TASKS["longppl"])
    with pytest.raises(ValueError, match="is no folder"):
        list(make_task(TASKS["longppl"], data="no/such").examples(None, 0))

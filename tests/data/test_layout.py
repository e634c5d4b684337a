"""Where text is found, and what is said where it is not."""

from __future__ import annotations

import json

import pytest

from oncelm.data.layout import find_corpus


def test_a_corpus_folder_is_read_as_its_json_says(tmp_path, write_jsonl) -> None:
    elsewhere = write_jsonl(tmp_path / "elsewhere" / "b.jsonl", ["b"])
    root = tmp_path / "corpus"
    write_jsonl(root / "shards" / "a.jsonl", ["a"])
    (root / "json").mkdir()
    entries = [{"name": "a", "weight": 3}, {"name": "b", "count": 1, "extra": "kept out"}, {"name": "off", "weight": 0}]
    (root / "json" / "train.json").write_text(json.dumps(entries))
    (root / "json" / "valid.json").write_text(json.dumps([{"name": "b", "weight": 0.5}]))
    (root / "json" / "a.json").write_text('["shards/a.jsonl"]')
    (root / "json" / "b.json").write_text(json.dumps([str(elsewhere)]))
    corpus = find_corpus(root)
    assert [(s.name, s.weight, s.files) for s in corpus.train] == [
        ("a", 3.0, (root / "shards" / "a.jsonl",)),
        ("b", 1.0, (elsewhere,)),
    ]
    assert [source.name for source in corpus.valid] == ["b"]


def test_a_count_stands_in_for_a_weight_of_null(tmp_path, write_corpus) -> None:
    root = write_corpus(tmp_path, {"a": (1, ["a"])})
    (root / "json" / "train.json").write_text('[{"name": "a", "weight": null, "count": 4}]')
    assert find_corpus(root).train[0].weight == 4.0


def test_a_folder_is_one_source_of_all_it_holds_but_what_is_hidden(tmp_path) -> None:
    wanted = ["a.txt", "b/c.jsonl", "b/d.jsonl.gz", "e.jsonl.zst", "f.parquet"]
    for name in [*wanted, "g.md", ".oncelm/h.txt", "b/.i.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (source,) = find_corpus(tmp_path).train
    assert sorted(file.relative_to(tmp_path).as_posix() for file in source.files) == wanted
    assert find_corpus(tmp_path / "g.md").train[0].files == (tmp_path / "g.md",)


def test_what_no_source_lists_is_named(tmp_path, write_corpus, write_jsonl) -> None:
    root = write_corpus(tmp_path, {"a": (1, ["a"]), "off": (0, ["b"])}, {"held": (1, ["c"])})
    assert find_corpus(root).left_out == (
        f"left out of {root}: 2 in no source with a weight (json/off.json, shards/off.jsonl)"
    )
    write_jsonl(root / "shards" / "forgotten.jsonl", ["d"])
    assert "3 in no source with a weight (json/off.json, shards/forgotten.jsonl, " in find_corpus(root).left_out


def test_a_linked_folder_is_read_and_what_is_not_is_named(tmp_path, write_jsonl) -> None:
    plain = write_jsonl(tmp_path / "data" / "a.jsonl", ["plain"])
    write_jsonl(tmp_path / "disk2" / "b.jsonl", ["linked"])
    (plain.parent / "more").symlink_to("../disk2")
    (plain.parent / "notes.md").touch()
    corpus = find_corpus(plain.parent)
    assert corpus.train[0].files == (plain, plain.parent / "more" / "b.jsonl")
    assert corpus.left_out == f"left out of {plain.parent}: 1 with the suffix .md (notes.md)"
    assert find_corpus(plain).left_out == ""
    plain.unlink()
    (plain.parent / "more").unlink()
    with pytest.raises(
        ValueError, match=r"give a folder that does; left out of .*: 1 with the suffix \.md \(notes\.md\)"
    ):
        find_corpus(plain.parent)


@pytest.mark.parametrize(
    ("train", "listing", "message"),
    [
        ("{", None, r"train\.json is not JSON"),
        ("[]", None, "must hold a list such as"),
        ('[{"weight": 1}]', None, 'needs a "name"'),
        ('[{"name": "a"}]', None, 'needs a "weight"'),
        ('[{"name": "a", "weight": null, "count": null}]', None, 'needs a "weight"'),
        ('[{"name": "a", "weight": -1}]', None, "weight of 'a' must be a number of at least 0, got -1"),
        ('[{"name": "a", "weight": NaN}]', None, "must be a number of at least 0, got nan"),
        ('[{"name": "a", "weight": "2"}]', None, "must be a number of at least 0, got '2'"),
        ('[{"name": "a", "weight": 0}]', None, "the weights sum to 0"),
        ('[{"name": "a", "weight": 1}, {"name": "a", "weight": 2}]', None, "'a' is listed twice"),
        (
            '[{"name": "aa", "weight": 1}]',
            '["x.jsonl"]',
            r"train\.json names 'aa', but there is no file '.*json/aa\.json' .*unknown source 'aa'; did you mean 'a'",
        ),
        ('[{"name": "a", "weight": 1}]', "{}", r"a\.json must hold a list of file names"),
        ('[{"name": "a", "weight": 1}]', '["nowhere.jsonl"]', r"a\.json names 'nowhere.jsonl', but there is no file"),
        ('[{"name": "a", "weight": 1}]', '["x.jsonl", "x.jsonl"]', "names 'x.jsonl' twice"),
    ],
)
def test_mistakes_are_named(tmp_path, train, listing, message) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "x.jsonl").touch()
    (tmp_path / "json" / "train.json").write_text(train)
    if listing:
        (tmp_path / "json" / "a.json").write_text(listing)
    with pytest.raises(ValueError, match=message):
        find_corpus(tmp_path)


def test_nothing_to_read_is_said(tmp_path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        find_corpus(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no \.txt, .*\.parquet file and no json/train\.json"):
        find_corpus(tmp_path)

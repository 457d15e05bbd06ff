"""data.py: files of every kind, their names and content; tokens are kept, and made by several processes."""

import gzip
import json
import os
import resource
from pathlib import Path

import datasets
import pytest
from families import (
    ASK,
    BAD,
    FAMILIES,
    GEMMA_IT,
    GOOD,
    OTHER_BOS,
    OTHER_TEMPLATE,
    YES,
    T,
    spell,
    spell_all,
    tokenised,
    write,
)

import data
from data import load_pairs
from runtime import UserError

NO_CHOSEN = "left out: no field 'chosen' that ends with the assistant's turn"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Hugging Face's library keeps its copies here, not in the user's home."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


KINDS = ["jsonl", "jsonl.gz", "json", "lines.json", "json.gz", "csv", "parquet", "arrow", "folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_kind(tmp_path, kind):
    records, path = [{**GOOD, "prompt": f"ask {x}"} for x in "abc"], tmp_path / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps(records, indent=1))
    elif kind in ("csv", "parquet"):
        getattr(datasets.Dataset.from_list(records), f"to_{kind}")(path)
    elif kind == "arrow":
        datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved")
        (path,) = (tmp_path / "saved").glob("*.arrow")
    elif kind == "folder":  # a split for each file
        path.mkdir()
        write(path / "train.jsonl", {"prompt": "no", "chosen": "no", "rejected": "n"})
        write(path / "test.jsonl", *records)
        path = f"{path}:test"
    else:
        write(path, *records)
        if kind.endswith("gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    pairs = load_pairs(str(path), GEMMA_IT)
    expected = [[ASK.replace("me", x), "yes<end_of_turn>", "bad<end_of_turn>"] for x in "abc"]
    assert spell_all(pairs, GEMMA_IT) == expected
    if kind != "folder":
        assert spell(load_pairs(f"{path}:train[1:2]", GEMMA_IT)) == expected[1]


CSV = """prompt,chosen,rejected,n
NA,42,True,1
"null",007,1e5,
x,,NaN,2
ask me,"yes
",bad,3
"""


@pytest.mark.parametrize("kind", ["data.csv", "data.csv.gz", "folder"])
def test_every_field_of_a_csv_is_a_text(tmp_path, kind):
    """Numbers, NA and True are what someone said; a field that is empty is missing."""
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
        (path / "README.md").write_text("about")
    text = CSV.encode()
    file = path / "train.csv" if kind == "folder" else path
    file.write_bytes(gzip.compress(text) if "gz" in kind else text)
    pairs = load_pairs(str(path), FAMILIES["SmolLM2"])
    texts = [("NA", "42", "True"), ("null", "007", "1e5"), ("ask me", "yes\n", "bad")]
    records = [dict(zip(GOOD, row, strict=True)) for row in texts]
    assert spell_all(pairs) == spell_all(tokenised(*records, by=FAMILIES["SmolLM2"]))
    assert pairs.notes == {NO_CHOSEN: 1}


ODD_NAMES = ["p[1].jsonl", "p1.jsonl", "p*.jsonl", "p?.jsonl", "~p.jsonl", "{a,b}.jsonl", "[!p].jsonl"]


def test_a_path_is_a_path(tmp_path, monkeypatch):
    """No other file is read than the one that is named, whatever its name says to a shell."""
    monkeypatch.chdir(tmp_path)
    for name in ODD_NAMES:
        write(name, {**GOOD, "prompt": name}, {**GOOD, "prompt": "second"})
    for name in ODD_NAMES:
        for source in (name, str(tmp_path / name)):
            (prompt, _, _), *rest = spell_all(load_pairs(source, FAMILIES["SmolLM2"]))
            assert name in prompt and len(rest) == 1
            assert "second" in spell_all(load_pairs(f"{source}:train[1:]", FAMILIES["SmolLM2"]))[0][0]
    for name in ("a::b.jsonl", "$HOME.jsonl", "d[1]/train.jsonl", "d*/train.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        write(name, GOOD)
        source = name.removesuffix("/train.jsonl")
        with pytest.raises(UserError, match=r"rename it; .* would be read as a pattern"):
            load_pairs(source, GEMMA_IT)


def test_a_folder_s_content_is_its_identity(tmp_path):
    """As a file's is: other words at the same time and of the same size are read anew."""
    path = tmp_path / "folder/train.jsonl"
    path.parent.mkdir()
    write(path, {**GOOD, "prompt": "abc"})
    first, stat = load_pairs(str(path.parent), FAMILIES["SmolLM2"]), path.stat()
    write(path, {**GOOD, "prompt": "abd"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = load_pairs(str(path.parent), FAMILIES["SmolLM2"])
    assert "abc" in spell_all(first)[0][0] and "abd" in spell_all(second)[0][0]


def test_no_room_for_tokens(tmp_path, cache):
    """A full disk while the tokens are written: one line that names the place."""
    path = write(tmp_path / "data.jsonl", *[{**GOOD, "prompt": "x" * 500}] * 20)
    load_pairs(path, GEMMA_IT)  # the records are there now
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(UserError, match=f"{cache}: .*File too large"):
            load_pairs(path, FAMILIES["SmolLM2"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert len(load_pairs(path, FAMILIES["SmolLM2"])) == 20


def test_columns_of_mixed_kinds(tmp_path):
    """`datasets` encodes a column that holds texts and messages, and fills in the fields that others have."""
    odd = {**T("a:y")[0], "tool_calls": [{"a": 1}]}
    parts = [{"type": "text", "text": "ask "}, {"type": "text", "text": "me", "image": None}]
    parts = [{"role": "user", "content": parts}]
    mixed = [GOOD, {**GOOD, "prompt": parts}, {**GOOD, "chosen": [odd]}]
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    records = [{"chosen": YES, "rejected": [BAD[0], {**BAD[1], "tool_calls": x}]} for x in (None, "x", None)]
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "filled.parquet")
    for name in ("mixed.json", "filled.parquet"):
        pairs = load_pairs(str(tmp_path / name), GEMMA_IT)
        assert spell(pairs, 0) == spell(pairs, 1) == [ASK, "yes<end_of_turn>", "bad<end_of_turn>"]
        assert pairs.notes == {"left out: a message with tool_calls": 1}


@pytest.mark.parametrize(
    "source, message",
    [
        ("missing.jsonl", "missing.jsonl"),
        ("./missing", "no such file or folder"),
        ("one/two/three", "no such file or folder"),
        ("owner/name:split", "data set 'owner/name:split' can't be loaded: "),  # tests are offline
        ("owner/name:config:split:more", "NAME:CONFIG:SPLIT"),
        ("data.xml", r"files end in \.jsonl, \.json, \.parquet, \.arrow, \.csv"),
        ("data.json", "data.json' can't be loaded: "),
        ("data.parquet", "data.parquet' can't be loaded: "),
        ("good.json:test", "test.*train"),  # its only split
        ("empty.jsonl", "0 usable records; it is empty"),
        ("configs", r"configs' can't be loaded: .*one.*two"),  # their names
    ],
)
def test_sources_that_can_not_be_read(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    contents = {"data.xml": "x", "data.json": "[1, 2", "data.parquet": "PAR1", "empty.jsonl": "\n\n"}
    for name, content in contents.items():
        Path(name).write_text(content)
    Path("configs").mkdir()
    for name in ("good", "configs/one", "configs/two"):
        write(f"{name}.json", GOOD)
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.json\n" for name in ("one", "two"))
    Path("configs/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(UserError, match=message) as error:
        load_pairs(source, GEMMA_IT)
    assert "\n" not in str(error.value)
    assert len(load_pairs("configs:two:train", GEMMA_IT)) == 1


def test_tokenised_once_for_what_the_tokens_depend_on(tmp_path, monkeypatch):
    """A second load reads the first one's tokens, notes included; another input is tokenised anew."""
    path, records = tmp_path / "data.jsonl", [GOOD, {**GOOD, "prompt": "x" * 40}, {"prompt": "a"}]
    limits, calls, encode = {"max_length": 60, "max_prompt_length": 50}, [], data.encode
    monkeypatch.setattr(data, "encode", lambda *args, **options: calls.append(0) or encode(*args, **options))

    def load(tokenizer=FAMILIES["SmolLM2"], **options):
        calls.clear()
        return load_pairs(str(path), tokenizer, **limits | options), len(calls)

    write(path, *records)
    pairs, count = load()
    assert count == 3 and pairs.notes == {"prompt cut": 1, NO_CHOSEN: 1}
    again, count = load()
    assert count == 0 and again.notes == pairs.notes and again.digest() == pairs.digest()
    assert load(max_length=61)[1] == load(max_prompt_length=49)[1] == load(sft=True)[1] == 3
    assert load(OTHER_TEMPLATE)[1] == load(OTHER_BOS)[1] == 3
    stat = path.stat()
    write(path, {**GOOD, "chosen": "bad", "rejected": "yes"}, *records[1:])  # other labels, at the same time
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed, count = load()
    assert count == 3 and changed[0][1].tolist() == pairs[0][2].tolist()


def test_processes_give_the_tokens_of_one(tmp_path, monkeypatch, cache):
    records = [{"prompt": str(i), "chosen": "y" * (i % 7), "rejected": "n"} for i in range(20)]
    one = load_pairs(write(tmp_path / "data.jsonl", *records, {"prompt": "a"}), GEMMA_IT)
    monkeypatch.setattr(data, "SHARE", 5)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache / "other"))
    several = load_pairs(str(tmp_path / "data.jsonl"), GEMMA_IT)
    assert len(list((cache / "other").rglob("cache-*.arrow"))) == 3
    assert several.digest() == one.digest() and several.notes == one.notes
    assert spell_all(several) == spell_all(one)

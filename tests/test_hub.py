"""The paper's data sets as tasks: what is held out, where the loss is, how little is read."""

import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.data.blocks import split_and_pack
from benchmarks.data.hub import HUB_TASKS, hub_task
from benchmarks.data.tasks import TASKS

END = "<|endoftext|>"
SIZES = {"block": 32, "validation": 4, "test": 8}
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


class Bytes(PreTrainedTokenizerFast):
    """A token for each byte, and no chat template, as of a base model; it counts its texts."""

    def __init__(self):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        super().__init__(tokenizer_object=tokenizer, eos_token=END)
        self.tokenized = 0

    def __call__(self, texts, **options):
        self.tokenized += len(texts)
        return super().__call__(texts, **options)


@pytest.fixture
def tokenizer():
    return Bytes()


def guideline(number):
    return {"id": number, "clean_text": f"guideline {number}. Wash hands.", "raw_text": "raw"}


def evolved(number):
    return {"instruction": f"task {number}.", "response": f"answer {number}."}


def said(role, content):
    return {"role": role, "content": content}


def chat(number):
    messages = [said("user", "hello"), said("assistant", f"chat {number}.")]
    messages += [said("user", "so?"), said("assistant", "I")]
    return {"prompt": "hello", "prompt_id": "p", "messages": messages}


ROWS = {"medical": guideline, "instruction": evolved, "chat": chat}
by_name = pytest.mark.parametrize("name", ROWS)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def local(folder, name, rows, held_out=20, suffix=".jsonl"):
    """A task on a file of its own, in a folder if the data set has a test split."""
    rows = [ROWS[name](row) if isinstance(row, int) else row for row in rows]
    if name != "chat":
        return hub_task(name, write(folder / f"data{suffix}", rows), held_out=held_out)
    write(folder / "chat" / f"test_sft{suffix}", rows[: held_out + 5])
    write(folder / "chat" / f"train_sft{suffix}", rows[held_out + 5 :])
    return hub_task(name, str(folder / "chat"), held_out=held_out)


def texts(documents):
    """Of each document the part that tells it from the others."""
    return [d if isinstance(d, str) else "".join(m["content"] for m in d) for d in documents]


def decoded(splits, tokenizer):
    return [tokenizer.decode(split.input_ids.flatten()) for split in splits]


@by_name
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_so_many_documents_are_held_out_and_no_document_is_on_both_sides(name, suffix, tmp_path):
    task = local(tmp_path, name, range(100), suffix=suffix)
    train, held_out = texts(task.documents()), texts(task.held_out())
    assert len(held_out) == 20
    assert len(train) == (75 if name == "chat" else 80)
    assert len({*train, *held_out}) == len(train) + len(held_out)
    again = local(tmp_path, name, range(100), suffix=suffix)
    assert texts(again.held_out()) == held_out


@by_name
def test_the_hub_tasks_hold_out_as_many_as_the_paper(name, tmp_path, monkeypatch):
    rows = datasets.Dataset.from_list([ROWS[name](i) for i in range(1100)])
    splits = ("train_sft", "test_sft", "train_gen") if name == "chat" else ("train",)
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda repo: asked.append(repo) or dict.fromkeys(splits, rows)
    )
    counts = {"medical": 1032, "instruction": 1000, "chat": 1032}
    repos = {
        "medical": "epfl-llm/guidelines",
        "instruction": "ise-uiuc/Magicoder-Evol-Instruct-110K",
        "chat": "HuggingFaceH4/ultrachat_200k",
    }
    task = hub_task(name)
    assert len(task.held_out()) == counts[name]
    assert len(task.documents()) == (1100 if name == "chat" else 1100 - counts[name])
    assert asked == [repos[name]], "read once"


def test_a_downloaded_copy_of_the_repository_is_read_as_the_hub_is(tmp_path):
    for split in ("train_sft", "test_sft", "train_gen", "test_gen"):
        rows = [chat(f"{split} {i}") for i in range(9)]
        write(tmp_path / "copy" / "data" / f"{split}-00000-of-00001-a3ec.parquet", rows)
    task = hub_task("chat", str(tmp_path / "copy"), held_out=3)
    assert texts(task.held_out()) == [f"hellochat test_sft {i}.so?I" for i in range(3)]
    assert texts(task.documents()) == [f"hellochat train_sft {i}.so?I" for i in range(9)]


@by_name
def test_no_document_is_in_two_splits_though_the_data_set_repeats_it(name, tmp_path, tokenizer):
    """Every document is there twice, so that most of those held out are in the others, too."""
    task = local(tmp_path, name, [*range(1000, 1060), *range(1000, 1060)], held_out=30)
    assert set(texts(task.documents())) & set(texts(task.held_out()))
    splits = split_and_pack(task, tokenizer, **SIZES)
    numbers = range(1000, 1060)
    found = [{n for n in numbers if f" {n}." in text} for text in decoded(splits, tokenizer)]
    assert all(len(numbers) >= 2 for numbers in found)
    assert sum(map(len, found)) == len(set.union(*found))


@by_name
def test_validation_is_of_the_first_held_out_and_test_of_the_next_for_every_seed(
    name, tmp_path, tokenizer
):
    task = local(tmp_path, name, range(1000, 1100))
    first, second = (split_and_pack(task, tokenizer, **SIZES, seed=seed) for seed in (0, 1))
    assert torch.equal(first.validation.input_ids, second.validation.input_ids)
    assert torch.equal(first.test.input_ids, second.test.input_ids)
    assert not torch.equal(first.train.input_ids[:5], second.train.input_ids[:5])
    found = decoded((first.validation, first.test), tokenizer)
    position = {f" {text.split(' ')[1][:4]}.": i for i, text in enumerate(texts(task.held_out()))}
    seen = [[i for number, i in position.items() if number in text] for text in found]
    assert 0 in seen[0]
    assert max(seen[0]) < min(seen[1])


TURNS = {None: "<|{role}|>\n{content}<|endoftext|>\n"}
TURNS["{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"] = (
    "[{role}]{content}<|endoftext|>"
)


@pytest.mark.parametrize("template", TURNS, ids=["no template", "template"])
@pytest.mark.parametrize("name", ["instruction", "chat"])
def test_the_loss_is_on_the_answers_alone_with_and_without_a_chat_template(
    name, template, tmp_path, tokenizer
):
    """All documents are of one length, which is that of the blocks: a document is a block."""
    tokenizer.chat_template = template
    task = local(tmp_path, name, range(10, 60))
    rendered = {}
    for document in task.documents():
        # The plain template leaves the empty system message out.
        frame = [said("system", "")] * (template is not None) + document
        answers = [m["content"] + END for m in document if m["role"] == "assistant"]
        rendered["".join(TURNS[template].format(**turn) for turn in frame)] = answers
    (length,) = {len(tokenizer([text])["input_ids"][0]) for text in rendered}
    train = split_and_pack(task, tokenizer, block=length, validation=0, test=0).train
    assert {tokenizer.decode(row) for row in train.input_ids} == set(rendered)
    for tokens, labels in zip(train.input_ids, train.labels, strict=True):
        counted = torch.where(labels != -100, labels, tokenizer.convert_tokens_to_ids("|"))
        runs = [run for run in tokenizer.decode(counted).replace(END, "#").split("|") if run]
        assert runs == [answer.replace(END, "#") for answer in rendered[tokenizer.decode(tokens)]]
    assert tokenizer.chat_template == template


@by_name
def test_a_task_credits_the_data_set_and_its_licence(name, tmp_path):
    assert set(HUB_TASKS) == set(TASKS)
    task = HUB_TASKS[name]
    assert task.name == name
    assert "licence" in task.source
    assert "https://huggingface.co/datasets/" in task.source
    assert local(tmp_path, name, [1]).source.endswith(f"in place of {task.source}")


def line(task):
    """The one line that a task ends with."""
    with pytest.raises(SystemExit) as raised:
        split_and_pack(task, Bytes(), **SIZES)
    assert "\n" not in raised.value.code
    return raised.value.code


@by_name
def test_too_small_a_data_set_says_so(name, tmp_path):
    path = write(tmp_path / "small.jsonl", [ROWS[name](i) for i in range(12)])
    assert line(hub_task(name, path, held_out=12)) == (
        f"{path} has 12 documents, too few to hold out 12"
    )
    assert hub_task(name, path, held_out=11).documents()


@by_name
def test_a_missing_field_is_named_with_those_that_there_are(name, tmp_path):
    path = write(tmp_path / "other.jsonl", [{"text": "a", "title": "b"}] * 50)
    field = {"medical": "clean_text", "instruction": "instruction", "chat": "messages"}[name]
    assert line(hub_task(name, path)) == f"{path} has no field {field}, only text, title"


@pytest.mark.parametrize(
    ("file", "content", "end"),
    [
        ("none.jsonl", None, " is not a local JSON lines or Parquet file, or a folder of such"),
        ("a.csv", "a,b", " is not a local JSON lines or Parquet file, or a folder of such"),
        ("a.jsonl", "nonsense", " cannot be read: JSON parse error: Invalid value. in row 0"),
        ("a.jsonl", "", " cannot be read: it is empty"),
        ("a.parquet", "nonsense", " cannot be read: Parquet magic bytes not found in footer."),
    ],
)
def test_a_file_that_cannot_be_read_says_why(file, content, end, tmp_path):
    path = tmp_path / file
    if content is not None:
        path.write_text(content)
    assert line(hub_task("medical", str(path))).startswith(f"{path}{end}")


def test_offline_there_is_one_line():
    assert line(HUB_TASKS["medical"]) == (
        "epfl-llm/guidelines is not in the cache, and the Hugging Face hub cannot be reached: "
        "go online (with HF_HUB_OFFLINE=0 if it is set), or pass a local JSON lines or Parquet "
        "file, or a folder of such files"
    )


def test_a_data_set_that_is_gated_or_gone_says_so(monkeypatch):
    def load_dataset(repo):
        raise datasets.exceptions.DatasetNotFoundError(
            f"Dataset '{repo}' is a gated dataset on the Hub.\nMore of it."
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert line(hub_task("medical")) == (
        "Dataset 'epfl-llm/guidelines' is a gated dataset on the Hub. Run `hf auth login` if you "
        "have access to it, or pass a local JSON lines or Parquet file, or a folder of such files"
    )


def test_a_missing_package_gives_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert line(HUB_TASKS["chat"]) == (
        "the package datasets is missing: run `pip install datasets`"
    )

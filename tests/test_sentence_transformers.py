"""``FastForwardCallback`` in the trainers of sentence-transformers."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

from fastforward_optim.integrations.transformers import FastForwardCallback, TrainerLoss

from .conftest import LOWEST, fixed

try:  # it is installed without its own dependencies
    import sentence_transformers as st
except ImportError as error:
    pytest.skip(f"sentence-transformers cannot be imported: {error}", allow_module_level=True)
from datasets import Dataset, DatasetDict, IterableDataset
from sentence_transformers import cross_encoder, sparse_encoder
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import (
    CosineSimilarityLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.sparse_encoder.losses import (
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling

WORDS = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
OPTIONS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}


def saved(kind, folder, **options):
    """A tiny BERT with random weights, and its tokenizer, in a folder."""
    torch.manual_seed(0)
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, hidden_dropout_prob=0.1, **options,
    )  # fmt: skip
    kind(config).save_pretrained(folder)
    return str(folder)


def rows(labels):
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(5, len(WORDS), (16, 2, 3), generator=generator).tolist()
    texts = [[" ".join(WORDS[place] for place in words) for words in row] for row in draws]
    found = [{"first": first, "second": second} for first, second in texts]
    return (
        [row | {"label": float(place % 2)} for place, row in enumerate(found)] if labels else found
    )


def dense(loss, labels, folder, **options):
    path = saved(BertModel, folder / "bert")
    model = st.SentenceTransformer(modules=[Transformer(path), Pooling(32)], device="cpu")
    data = Dataset.from_list(rows(labels))
    args = st.SentenceTransformerTrainingArguments(str(folder), **{**OPTIONS, **options})
    return st.SentenceTransformerTrainer(
        model, args, train_dataset=data, eval_dataset=data, loss=loss(model)
    )


def pairs(folder, **options):
    path = saved(BertForSequenceClassification, folder / "bert", num_labels=1)
    model = cross_encoder.CrossEncoder(path, device="cpu")
    data = Dataset.from_list(rows(True))
    args = cross_encoder.CrossEncoderTrainingArguments(str(folder), **{**OPTIONS, **options})
    return cross_encoder.CrossEncoderTrainer(
        model, args, train_dataset=data, eval_dataset=data, loss=BinaryCrossEntropyLoss(model)
    )


def sparse(folder, **options):
    path = saved(BertForMaskedLM, folder / "bert")
    modules = [MLMTransformer(path), SpladePooling()]
    model = sparse_encoder.SparseEncoder(modules=modules, device="cpu")
    loss = SpladeLoss(
        model, SparseMultipleNegativesRankingLoss(model), document_regularizer_weight=0.1
    )
    data = Dataset.from_list(rows(False))
    args = sparse_encoder.SparseEncoderTrainingArguments(str(folder), **{**OPTIONS, **options})
    return sparse_encoder.SparseEncoderTrainer(
        model, args, train_dataset=data, eval_dataset=data, loss=loss
    )


def matryoshka(model):
    return MatryoshkaLoss(
        model, MultipleNegativesRankingLoss(model), [32, 16, 8], n_dims_per_step=1
    )


BUILD = {
    "cosine": lambda folder, **o: dense(CosineSimilarityLoss, True, folder, **o),
    "ranking": lambda folder, **o: dense(MultipleNegativesRankingLoss, False, folder, **o),
    "cross-encoder": pairs,
    "sparse": sparse,
}


@pytest.mark.parametrize("kind", BUILD)
def test_a_stages_loss_is_what_evaluate_reports(tmp_path, kind):
    trainer = BUILD[kind](tmp_path)
    raw = list(trainer.eval_dataset)
    expected = trainer.evaluate()["eval_loss"]
    forms = {
        "dataset": Dataset.from_list(raw),
        "list": raw,
        "generator": iter(raw),
        "stream": IterableDataset.from_generator(lambda: iter(raw)),
    }
    for form, data in forms.items():
        found = TrainerLoss(trainer, data, 16, False)()
        assert found == pytest.approx(expected, rel=1e-6), form


@pytest.mark.parametrize("kind", ["ranking", "sparse"])
def test_stages_lower_the_loss(tmp_path, kind):
    trainer = BUILD[kind](tmp_path)
    data = Dataset.from_list(list(trainer.eval_dataset))
    options = {"num_examples": 16, "line_search": LOWEST, **fixed(2)}
    callback = FastForwardCallback(data, **options).attach(trainer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    history = callback.optimizer.history
    assert [record.step for record in history] == [2, 4]
    after = trainer.evaluate()["eval_loss"]
    assert history[-1].loss_after == pytest.approx(after, rel=1e-6)
    assert after < before


def test_each_trial_draws_the_same_dimensions(tmp_path):
    trainer = dense(matryoshka, False, tmp_path)
    val_fn = TrainerLoss(trainer, trainer.eval_dataset, 16, False)
    with val_fn.measuring():
        assert len({val_fn() for _ in range(8)}) == 1


def several(folder, **options):
    """Pairs with scores and pairs without, each with a loss of its own."""
    path = saved(BertModel, folder / "bert")
    model = st.SentenceTransformer(modules=[Transformer(path), Pooling(32)], device="cpu")
    losses = {"scored": CosineSimilarityLoss(model), "pairs": MultipleNegativesRankingLoss(model)}
    train = {name: Dataset.from_list(rows(name == "scored")) for name in losses}
    args = st.SentenceTransformerTrainingArguments(str(folder), **{**OPTIONS, **options})
    return st.SentenceTransformerTrainer(
        model, args, train_dataset=train, eval_dataset=DatasetDict(train), loss=losses
    )


@pytest.mark.parametrize("form", ["none", "lists", "datasets"])
def test_each_data_set_is_measured_by_its_own_loss(tmp_path, form):
    trainer = several(tmp_path)
    lists = {name: rows(name == "scored") for name in trainer.loss}
    forms = {
        "none": None,
        "lists": lists,
        "datasets": {name: Dataset.from_list(part) for name, part in lists.items()},
    }
    reported = trainer.evaluate(
        DatasetDict({name: Dataset.from_list(part[:8]) for name, part in lists.items()})
    )
    losses = [reported["eval_scored_loss"], reported["eval_pairs_loss"]]
    callback = FastForwardCallback(forms[form], num_examples=16, line_search=LOWEST, **fixed(2))
    callback.attach(trainer)
    trainer.train()
    history = callback.optimizer.history
    assert [record.step for record in history] == [2, 4]
    assert history[-1].loss_after < history[0].loss_before

    trainer = several(tmp_path)
    found = TrainerLoss(trainer, forms[form] or trainer.eval_dataset, 16, False)
    assert found() == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert found.batches_per_stage == 4  # two of four examples of each


def test_one_data_set_alone_is_refused_before_the_first_step(tmp_path):
    trainer = several(tmp_path)
    FastForwardCallback(rows(True)).attach(trainer)
    with pytest.raises(ValueError, match=r"examples in val_data_or_fn \(TypeError.*or a function"):
        trainer.train()
    assert trainer.state.global_step == 0

"""Models of the hub and of folders load as they are, and their adapters begin as PEFT's do."""

import http.server
import json
import threading

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.models.adapters import reset_lora, unfreeze, with_lora
from benchmarks.models.pretrained import load_model
from benchmarks.models.shapes import random_model
from benchmarks.models.speed import attend_without_mask, compile_layers
from fastforward_optim import lora_parameters

from .conftest import bits, same, tiny_llama, token_batch

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_neox():
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=64, use_cache=False))


def tiny_phi():
    """Neither a GPT-NeoX nor Llama-like: its output projection is called dense."""
    torch.manual_seed(0)
    return PhiForCausalLM(PhiConfig(**SIZES, intermediate_size=64, use_cache=False))


TINY = {"llama": tiny_llama, "gpt_neox": tiny_neox}
every_architecture = pytest.mark.parametrize("make", TINY.values(), ids=TINY.keys())


def tiny_tokenizer():
    words = {word: number for number, word in enumerate(["<eos>", "<unk>", "fast", "forward"])}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def saved(folder, model):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def one_line(name):
    """The message with which ``load`` ends the program."""
    with pytest.raises(SystemExit) as ending:
        load_model(name, torch.float32)
    message = ending.value.code
    assert isinstance(message, str)
    assert "\n" not in message
    assert len(message) < 500
    return message


class TestLoad:
    @every_architecture
    def test_a_folder_gives_the_model_and_tokenizer_that_were_saved(self, make, tmp_path):
        original = make()
        model, tokenizer = load_model(saved(tmp_path, original), torch.float32)
        assert type(model) is type(original)
        assert same(list(model.parameters()), list(original.parameters()))
        assert tokenizer("fast forward fast slow")["input_ids"] == [2, 3, 2, 1]
        assert tokenizer.eos_token_id == 0
        assert tokenizer.pad_token is None
        assert model.config.use_cache is False

    def test_a_folder_without_a_model_says_what_is_missing(self, tmp_path):
        message = one_line(str(tmp_path))
        assert f"the folder {tmp_path} has no config.json" in message
        assert "config.json" in message
        assert "save_pretrained" in message

    def test_pickled_weights_are_refused(self, tmp_path):
        model = tiny_llama()
        folder = saved(tmp_path, model)
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        assert "model.safetensors" in one_line(folder)

    def test_code_that_comes_with_a_model_is_not_run(self, tmp_path):
        ran = tmp_path / "ran"
        (tmp_path / "theirs.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
        auto_map = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
        config = {"model_type": "theirs", "auto_map": auto_map}
        tiny_tokenizer().save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert str(tmp_path) in one_line(str(tmp_path))
        assert not ran.exists()


class Hub(http.server.BaseHTTPRequestHandler):
    """Refuses as the hub does; by their names, models are gated or not there."""

    def do_GET(self):
        gated = "gated" in self.path or "meta-llama" in self.path or "EleutherAI" in self.path
        self.send_response(401 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "refused")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this computer, and an empty cache."""
    from huggingface_hub import constants

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield constants
    server.shutdown()
    thread.join()
    server.server_close()


class TestHub:
    @pytest.mark.parametrize(
        ("name", "source"),
        [
            ("pythia-1.4b", "EleutherAI/pythia-1.4b"),
            ("somebody/gated", "somebody/gated"),
        ],
    )
    def test_a_gated_model_says_where_to_ask(self, hub, name, source):
        message = one_line(name)
        assert message.startswith(f"{source} is gated")
        assert f"https://huggingface.co/{source}" in message
        assert "hf auth login" in message

    @pytest.mark.parametrize("name", ["somebody/nothing", "smolm 2"])
    def test_a_model_that_is_not_there_says_what_to_pass(self, hub, name):
        message = one_line(name)
        assert f"there is no model {name!r}" in message
        for choice in ("smollm2, pythia-1.4b", "id", "folder"):
            assert choice in message

    def test_offline_says_so_and_what_works(self, hub, monkeypatch):
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
        message = one_line("pythia-1.4b")
        assert "'EleutherAI/pythia-1.4b' is neither a folder nor in the hub's cache" in message
        assert "unset it" in message
        assert "smollm2" in message


def adapted(model):
    """Names of the layers that have an adapter, without their numbers."""
    return {name.split(".lora_A")[0].rpartition(".")[2] for name in names(model, "lora_A")}


def names(model, part):
    return [name for name, _ in model.named_parameters() if part in name.split(".")]


class TestWithLora:
    @pytest.mark.parametrize(
        ("make", "targets"),
        [
            (tiny_llama, {"q_proj", "k_proj", "v_proj", "o_proj"}),
            (tiny_neox, {"query_key_value"}),
            (tiny_phi, {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
        ],
    )
    @pytest.mark.parametrize("dora", [False, True])
    def test_what_is_adapted_by_default(self, make, targets, dora):
        model = with_lora(make(), rank=2, dora=dora)
        assert adapted(model) == targets
        layers = len(names(model, "lora_A"))
        assert layers == 2 * len(targets)
        assert len(names(model, "lora_B")) == layers
        assert len(names(model, "lora_magnitude_vector")) == (layers if dora else 0)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == (3 if dora else 2) * layers, "all else is frozen"


def test_full_trains_every_parameter_in_float32():
    model = tiny_phi().to(torch.bfloat16).requires_grad_(False)
    model.lm_head.weight = model.get_input_embeddings().weight  # tied
    assert unfreeze(model) is model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model(**token_batch(2, 8)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def trained(model, steps=4):
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    for step in range(steps):
        model(**token_batch(4, 12, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=token_batch(3, 10)["input_ids"]).logits


def values(model, part):
    return [model.get_parameter(name).detach().clone() for name in names(model, part)]


class TestReset:
    @every_architecture
    @pytest.mark.parametrize("dora", [False, True])
    def test_the_model_is_the_base_model_again(self, make, dora):
        before = logits(make())
        model = trained(with_lora(make(), rank=4, dora=dora))
        assert not torch.allclose(logits(model), before, atol=1e-3)
        reset_lora(model, seed=1)
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)

    def test_tensors_that_it_cannot_reset_are_refused_before_any_is_changed(self):
        with pytest.raises(ValueError, match=r"not model\.embed_tokens\.weight: load .* again"):
            reset_lora(unfreeze(tiny_llama()), seed=0)
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        model = trained(get_peft_model(tiny_llama(), config), steps=1)
        before = [bits(p) for p in lora_parameters(model)]
        with pytest.raises(ValueError, match="lm_head"):
            reset_lora(model, seed=0)
        assert [bits(p) for p in lora_parameters(model)] == before


# torch 2.13 uses a part of torch.jit, which it has deprecated, when its compiler is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
class TestCompile:
    @every_architecture
    @pytest.mark.parametrize("adapter", [False, True])
    def test_each_layer_is_compiled_and_nothing_else(self, make, adapter):
        model = with_lora(make(), rank=2) if adapter else make()
        with torch._dynamo.config.patch(recompile_limit=8):  # put back after it
            compile_layers(model)
        compiled = [name for name, part in model.named_modules() if part._compiled_call_impl]
        assert [name.split(".")[-2:] for name in compiled] == [["layers", "0"], ["layers", "1"]]

    def test_a_model_with_its_layers_elsewhere_says_so(self):
        config = GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2)
        with pytest.raises(SystemExit, match=r"GPT2LMHeadModel .* do not pass --compile"):
            compile_layers(GPT2LMHeadModel(config))


class TestAttention:
    def test_without_a_mask_the_loss_is_the_same_and_no_mask_is_built(self, monkeypatch):
        """Also while a CUDA graph is recorded, when transformers cannot look at the positions."""
        model, batch = tiny_llama(), token_batch(4, 12)
        before = model(**batch).loss
        attend_without_mask(model)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        masks = []
        model.model.layers[0].register_forward_pre_hook(
            lambda layer, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
        assert torch.equal(model(**batch).loss, before)
        assert masks == [None]


class TestRandomModel:
    @pytest.mark.parametrize(
        ("name", "parameters"),
        [
            ("pythia-1.4b", 1_414_647_808),
            ("llama-3-8b", 8_030_261_248),
        ],
    )
    def test_it_has_the_published_number_of_parameters(self, name, parameters):
        model = random_model(name, torch.bfloat16, "meta")
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "meta")}
        assert model.config.use_cache is False

    def test_shapes_that_are_not_known_are_refused_in_one_line(self):
        with pytest.raises(
            SystemExit, match=r"unknown shapes 'smollm2': expected one of pythia-1\.4b, "
        ):
            random_model("smollm2", torch.float32, "cpu")

"""Small real models, small real problems."""

import gc
import io
import os
import sys
from unittest.mock import patch

# On models this small, threads only wait for each other, on a busy machine for long: before torch
# is imported, and for what the tests start too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastforward_optim import BracketSearch, Calibration

from .regression import Regression, bits, same  # noqa: F401 - tests take all of it from here

pytest.register_assert_rewrite("tests.commands", "tests.twins", "tests.saved_runs")

try:
    from hypothesis import Phase, settings
except ImportError:  # `make oldest` has none, and runs no property tests
    pass
else:
    # No database: a run depends on the code alone. Cases are counted in tests/test_properties.py.
    options = {"deadline": None, "database": None, "phases": set(Phase) - {Phase.explain}}
    settings.register_profile("suite", derandomize=True, **options)
    settings.register_profile("soak", print_blob=True, **options)
    settings.load_profile("suite")


# The longest files begin, so that no worker is left with one when the others are done.
LONGEST = ["distributed", "examples", "properties", "workers", "paper", "compare", "kills"]


def pytest_collection_modifyitems(items):
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its state in the process and in ``ACCELERATE_...`` of the environment."""
    with patch.dict(os.environ):
        yield
    if state := sys.modules.get("accelerate.state"):
        state.GradientState._reset_state()
        state.AcceleratorState._reset_state(reset_partial_state=True)


def tiny_llama() -> LlamaForCausalLM:
    """A Llama of two layers with random weights: 40k parameters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
    )


def tiny_lora(**options):
    """The tiny Llama with a LoRA adapter whose B is not zero, so that both halves matter."""
    config = LoraConfig(
        **{
            "r": 4,
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM",
            "init_lora_weights": False,
            **options,
        }
    )
    return get_peft_model(tiny_llama(), config)


@pytest.fixture
def lora_model():
    return tiny_lora()


def token_batch(rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token rows, as input and as labels."""
    tokens = torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens.clone()}


# Takes whatever measures lowest: for tests of what a stage does when it moves the weights.
LOWEST = BracketSearch(standard_errors=0)


class Untried:
    """A ``val_fn`` that is not called before the first step: its losses are made up, or counted."""

    def __init__(self, function):
        self.function = function

    def __call__(self):
        return self.function()

    def __getattr__(self, name):
        if name.startswith("__") or name == "function":
            raise AttributeError(name)
        return getattr(self.function, name)

    def check(self):
        pass


def fixed(interval: int) -> dict[str, int]:
    """Options for a stage after each so many steps, as in the paper, whatever the last found."""
    return {"interval": interval, "max_interval": interval}


# Leaves gradients as they are: each step is the optimizer's own at another rate.
UNCLIPPED = Calibration(spike=1e9)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def only_new_objects():
    """What is there already is left out when the live tensors are looked for."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def problem():
    return Regression()


class NoisyRegression:
    """A student learns from a teacher's noisy answers, in batches: every rate has its floor."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
        self.inputs = torch.randn(4096, 16) * torch.logspace(0, -1, 16)
        with torch.no_grad():
            self.targets = 3 * teacher(self.inputs) + 0.3 * torch.randn(4096, 4)
        self.model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
        self.stage = -1

    def loss(self, rows):
        return nn.functional.mse_loss(self.model(self.inputs[rows]), self.targets[rows])

    def new_stage(self):
        self.stage += 1

    def __call__(self):
        first = 3072 + 32 * (self.stage % 8)
        return self.loss(slice(first, first + 32))

    def test_loss(self):
        with torch.no_grad():
            return float(self.loss(slice(3328, None)))

    def train(self, optimizer, budget):
        """Spend ``budget`` steps; a validation pass costs a quarter of one."""
        generator = torch.Generator().manual_seed(0)
        steps = 0
        while steps + 0.25 * passes(optimizer) < budget:
            optimizer.zero_grad()
            self.loss(torch.randint(0, 3072, (64,), generator=generator)).backward()
            optimizer.step()
            steps += 1


def passes(optimizer):
    return sum(record.passes for record in getattr(optimizer, "history", ()))


def through_a_file(state_dict):
    """A state dict as it is after it has been saved and loaded."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def flat(value, path=""):
    """Each leaf of a state dict by its path, tensors by their bits; without the clock."""
    if isinstance(value, torch.Tensor):
        return {path: (str(value.dtype), value.shape, bits(value))}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {path: repr(value)}
    if not value:
        return {path: "{}" if isinstance(value, dict) else "[]"}
    return {
        key: leaf
        for name, item in items
        if name != "seconds"
        for key, leaf in flat(item, f"{path}/{name}").items()
    }

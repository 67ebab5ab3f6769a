"""The Python blocks of a Markdown file, run in order in one session on a small real model."""

import re
from pathlib import Path

from torch.utils.data import DataLoader
from transformers import TrainingArguments

from fastforward_optim import lora_parameters

from .conftest import tiny_llama, tiny_lora, token_batch

ROOT = Path(__file__).parent.parent


def blocks(path, language="python"):
    """The fenced blocks of one language, indented ones (in a list, say) included."""
    found = re.findall(
        rf"^( *)```{language}\n(.*?)^\1```$", path.read_text(), re.DOTALL | re.MULTILINE
    )
    return [
        "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True))
        for indent, text in found
    ]


def examples(count, seed):
    batch = token_batch(count, 9, seed=seed)
    return [{name: value[row] for name, value in batch.items()} for row in range(count)]


def session(folder):
    """What a document takes for granted: a model, its adapter, batches and data sets."""
    model = tiny_lora()
    loader = [token_batch(4, 9, seed=3)] * 12
    return {
        "__name__": "document",
        "model": model,
        "params": lora_parameters(model),
        "val_batches": [token_batch(4, 9, seed=1), token_batch(2, 5, seed=2)],
        "pool": [token_batch(4, 9, seed=seed) for seed in (4, 5, 6)],
        "loader": loader,
        "train_loader": DataLoader(loader, batch_size=None),  # Lightning takes lists for several
        "steps": len(loader),
        "args": TrainingArguments(
            str(folder), max_steps=12, report_to=[], use_cpu=True, disable_tqdm=True
        ),
        "train_set": examples(96, seed=5),
        "validation_set": examples(64, seed=6),
        "test_set": examples(8, seed=7),
        "base_model": tiny_llama(),
    }


def run(path, names, after=lambda block, number: None):
    """Run the blocks of a document; ``after`` is called with each of them and its number."""
    for number, block in enumerate(blocks(path)):
        # Errors name the document and the line of the block.
        exec(compile(block, f"{path.name}, Python block {number + 1}", "exec"), names)
        after(block, number)


def missing_commands(text):
    """Of the commands in a shell block, the make targets and modules that do not exist."""
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([\w-]+)", text):
        if not re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE):
            yield f"make {target}"
    for module in re.findall(r"\bpython3? -m ([\w.]+)", text):
        parts = ROOT.joinpath(*module.split("."))
        if not (parts.with_suffix(".py").is_file() or (parts / "__main__.py").is_file()):
            yield f"python -m {module}"
    for script in re.findall(r"\bpython3? ([\w./]+\.py)", text):
        if not (ROOT / script).is_file():
            yield f"python {script}"


def missing_extras(text):
    """Of the extras of this package that a text names, those that setup.cfg does not have."""
    known = set(re.findall(r"^(\w+) = ?$", (ROOT / "setup.cfg").read_text(), re.MULTILINE))
    for extras in re.findall(r"(?:fastforward-optim|'\.)\[([\w,]+)\]", text):
        yield from set(extras.split(",")) - known

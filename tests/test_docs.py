"""The documentation: its code runs, its links lead somewhere, and it builds without a warning."""

import os
import re
import subprocess
import sys

import pytest
import torch
import yaml

import fastforward_optim

from .documents import ROOT, blocks, missing_commands, missing_extras, run, session

DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path for path in sorted(DOCS.rglob("*.md"))}
# What only some pages take for granted.
TRAINER_OPTIONS = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
WITHOUT_CODE = {"compatibility.md", "paper.md", "reference.md", "results.md", "testing.md"}
IN_TEST_BY_NAME = {"integrations/by-name.md"}  # with stand-ins for programs that are not installed
CONFIGURATION = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


# A page for several processes runs in one here.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("page", sorted(set(PAGES) - WITHOUT_CODE - IN_TEST_BY_NAME))
def test_the_python_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    if page == "integrations/trl.md":
        pytest.importorskip("trl")
    if page == "integrations/lightning.md":
        pytest.importorskip("lightning")
    if page == "integrations/diffusion.md":
        pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    names = session(tmp_path)
    names["trainer_options"] = TRAINER_OPTIONS
    if page == "integrations/trl.md":
        from datasets import Dataset

        from .test_trl import text, tokenizer

        rows = {"text": [text(row, 6 + row % 4) for row in range(24)]}
        names |= {"texts": Dataset.from_dict(rows), "tokenizer": tokenizer()}
    if page == "integrations/diffusion.md":
        names |= diffusion()
    assert blocks(PAGES[page])
    run(PAGES[page], names)


def diffusion():
    """A tiny U-Net, and batches of latents with their prompts."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), block_out_channels=(8,), layers_per_block=1,
        norm_num_groups=2, attention_head_dim=4, cross_attention_dim=8,
    )  # fmt: skip
    batches = [(torch.randn(4, 4, 4, 4), torch.randn(4, 3, 8)) for _ in range(16)]
    return {"unet": unet, "held_out": batches[:4], "images": batches[4:]}


def test_the_first_examples_print_what_the_stages_did(tmp_path, capsys):
    run(PAGES["index.md"], session(tmp_path))
    assert capsys.readouterr().out.count("3 stages up to step 12") == 2


def test_a_block_that_is_wrong_fails_and_is_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\n```\n\n- a list\n\n    ```python\n    assert x == 2\n    ```\n"
    )
    assert len(blocks(page)) == 2
    with pytest.raises(AssertionError) as raised:
        run(page, {})
    assert "page.md, Python block 2" in str(raised.traceback[-1].path)


def test_links_and_pictures_lead_to_files():
    for path in PAGES.values():
        targets = re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", path.read_text())
        for target in filter(None, targets):
            assert (path.parent / target).resolve().is_file(), (path, target)


def test_every_picture_is_shown_and_every_page_is_in_the_navigation():
    shown = set(re.findall(r"\(images/([\w-]+\.png)\)", "".join(map(read, PAGES.values()))))
    assert shown == {path.name for path in (DOCS / "images").iterdir()}
    assert sorted(pages_of(CONFIGURATION["nav"])) == sorted(PAGES)


def read(path):
    return path.read_text()


def pages_of(entry):
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    return [page for child in children for page in pages_of(child)]


def test_the_reference_has_every_public_name():
    listed = set(re.findall(r"^::: ([\w.]+)$", read(PAGES["reference.md"]), re.MULTILINE))
    assert {f"fastforward_optim.{name}" for name in fastforward_optim.__all__} <= listed
    assert "fastforward_optim.integrations.transformers.FastForwardCallback" in listed


def test_commands_and_extras_exist():
    for path in PAGES.values():
        assert list(missing_commands("\n".join(blocks(path, "bash")))) == []
        assert list(missing_extras(read(path))) == []


def test_examples_that_a_page_names_exist():
    for path in PAGES.values():
        for name in re.findall(r"`(examples/[\w.]+)`", read(path)):
            assert (ROOT / name).is_file(), name


def test_the_errors_that_are_explained_are_those_that_are_raised():
    sources = "".join(map(read, (ROOT / "fastforward_optim").rglob("*.py")))
    # A message is several strings in the source, which follow each other.
    sources = re.sub(r'"\s+f?"', "", sources)
    _, _, table = read(PAGES["faq.md"]).partition("## Errors, and what to do")
    messages = re.findall(r"^\| (?:a warning: )?`(.+?)` \|", table, re.MULTILINE)
    assert len(messages) >= 8
    for message in messages:
        for part in re.split(r"-?\d+|\.\.\.|AdamW|nan$", message):
            assert part in sources, message


def test_a_command_that_does_not_exist_is_found():
    wrong = "make nothing\npython -m benchmarks.nothing\npython examples/nothing.py"
    assert len(list(missing_commands(wrong))) == 3
    assert list(missing_commands("make test && python -m benchmarks demo")) == []
    assert list(missing_extras("pip install 'fastforward-optim[peft,nothing]'")) == ["nothing"]


def test_it_builds_without_a_warning(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    html = (tmp_path / "site" / "reference.html").read_text()
    for name in fastforward_optim.__all__:
        assert f'id="fastforward_optim.{name}"' in html
    # Nothing is fetched from elsewhere when a page is read.
    for page in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(r'(?:src|rel="stylesheet" href)="(https?:[^"]+)"', page.read_text())
        assert fetched == [], page
    assert not list((tmp_path / "site").rglob("*.py"))

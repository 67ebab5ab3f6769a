"""On a GPU: candidates by one kernel, forwards as CUDA graphs; the same numbers as without."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastforward_optim
from benchmarks.measurements import stage_cost
from benchmarks.support.timing import copy_speed
from fastforward_optim import FastForward, ValidationLoss, lora_parameters
from fastforward_optim.stage.line import MultiTensorLine, line_of
from fastforward_optim.stage.stage import Stage

from .conftest import LOWEST, fixed, same, tiny_lora, token_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
if torch.cuda.is_available():
    pytest.importorskip("triton")

WEIGHTS = [0.0, 0.2, 0.5, 1.0, 1.5, 2.0, 17.25, 1001.0]
SHAPES = {
    "whole": [(64, 64), (64, 1024), (16,)],
    "odd": [(3, 5), (1,), (4097,), (64, 64), (0,)],
    "scalar": [()],
}


def moved_line(make, tensors, **options):
    """A line from the tensors' values to others, which are random; and both."""
    start = [tensor.clone() for tensor in tensors]
    line = make(tensors, **options)
    for tensor in tensors:
        tensor.copy_(torch.randn_like(tensor))
    end = [tensor.clone() for tensor in tensors]
    assert line.set_end()
    return line, start, end


@pytest.fixture
def no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastforward_optim.stage.triton_line", None)
    monkeypatch.delattr(fastforward_optim.stage, "triton_line")


@pytest.mark.parametrize("given", [False, True], ids=["own start", "given start"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shapes", SHAPES)
def test_the_kernel_writes_what_torchs_multi_tensor_kernels_write(shapes, dtype, given):
    tensors = [torch.randn(shape, device="cuda").to(dtype) for shape in SHAPES[shapes]]
    first = [tensor.clone() for tensor in tensors] if given else None
    line, start, end = moved_line(line_of, tensors, start=first)
    assert type(line).__name__ == "KernelLine"
    expected = [tensor.clone() for tensor in start]
    plain = MultiTensorLine(expected)
    torch._foreach_copy_(expected, end)
    plain.set_end()
    for weight in WEIGHTS:
        line.write(weight)
        plain.write(weight)
        assert same(tensors, expected), weight


def test_without_triton_a_stage_is_the_same(no_triton):
    tensor = torch.randn(64, 64, device="cuda")
    line, (start,), (end,) = moved_line(line_of, [tensor])
    assert isinstance(line, MultiTensorLine)
    line.write(3.0)
    torch.testing.assert_close(tensor, start + 3 * (end - start))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_line_tells_whether_anything_moved(dtype):
    tensors = [torch.randn(shape, device="cuda", dtype=dtype) for shape in SHAPES["odd"]]
    for given in (False, True):
        line = line_of(tensors, [tensor.clone() for tensor in tensors] if given else None)
        assert not line.set_end()
        tensors[2][-1] += 1
        assert line.set_end()


def test_the_kernel_leaves_what_is_beside_a_tensor():
    memory = torch.full((3000,), 7.0, device="cuda")
    parts = ((5, 1005), (1100, 1101), (2000, 2999))
    line, *_ = moved_line(line_of, [memory[first:last] for first, last in parts])
    line.write(3.0)
    for first, last in ((0, 5), (1005, 1100), (1101, 2000), (2999, 3000)):
        assert (memory[first:last] == 7).all()


@pytest.mark.parametrize(
    "other", [torch.zeros(256), torch.zeros(512, dtype=torch.float16)], ids=["smaller", "float16"]
)
def test_memory_of_another_size_or_dtype_is_not_written_into(other):
    tensor = torch.randn(512, device="cuda")
    line, *_ = moved_line(line_of, [tensor])
    tensor.data = other.cuda()
    with pytest.raises(RuntimeError, match="given other sizes, dtypes or devices while a stage"):
        line.write(2.0)
    assert not tensor.any()


@pytest.mark.parametrize("size", [2**21, 2**21 + 5])
def test_large_tensors_are_several_rows_of_the_table(size):
    tensors = [torch.randn(size, device="cuda"), torch.randn(7, device="cuda")]
    line, start, end = moved_line(line_of, tensors)
    assert line._grid[1] == (3 if size == 2**21 else 4)
    line.write(3.0)
    torch.testing.assert_close(tensors, [s + 3 * (e - s) for s, e in zip(start, end, strict=True)])


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_a_start_of_another_dtype_or_place_is_taken_over(given):
    tensor = torch.ones(64, device="cuda", dtype=torch.bfloat16)
    line = line_of([tensor], [torch.zeros(64, dtype=given)])
    assert line.set_end()
    line.write(3.0)
    assert (tensor == 3).all()


def test_tensors_with_gaps_or_of_a_subclass_are_written_too():
    class Sub(torch.Tensor):
        pass

    transposed = torch.randn(32, 64, device="cuda").T
    gaps = torch.randn(64, 128, device="cuda")[:, ::2]
    subclass = torch.randn(16, device="cuda").as_subclass(Sub)
    for tensor in (transposed, gaps, subclass):
        line, (start,), (end,) = moved_line(line_of, [tensor])
        line.write(3.0)
        expected = start + 3 * (end - start)
        torch.testing.assert_close(*(x.as_subclass(torch.Tensor) for x in (tensor, expected)))


def kernels_of(function):
    function()  # compiles
    torch.cuda.synchronize()
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU]
    # Some versions warn that events of earlier cycles are lost, though there is one cycle only.
    with profile(activities=activities, acc_events=True) as profiled:
        function()
        torch.cuda.synchronize()
    return [e.name for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def copies_to_the_host(function):
    return sum("DtoH" in name for name in kernels_of(function))


@pytest.mark.parametrize("count", [3, 500])
def test_a_candidate_is_one_kernel_however_many_tensors_there_are(count):
    tensors = [torch.randn(8, 64, device="cuda") for _ in range(count)]
    stage = Stage(tensors)
    for tensor in tensors:
        tensor += 1
    stage.set_anchor()
    assert len(kernels_of(lambda: stage.write(3.0))) == 1


# CUDA graphs.


@pytest.fixture
def model():
    return tiny_lora().cuda()


BATCHES = [token_batch(4, 12, seed) for seed in range(3)] + [token_batch(2, 16, 7)]


def graphed(model, **options):
    return ValidationLoss(model, BATCHES, cuda_graphs=True, **options)


def test_a_run_with_graphs_is_the_run_without(model):
    def run(**options):
        torch.manual_seed(0)
        model = tiny_lora(lora_dropout=0.1).cuda()
        val_fn = ValidationLoss(model, BATCHES, batches_per_stage=2, **options)
        adamw = torch.optim.AdamW(lora_parameters(model), lr=1e-3)
        optimizer = FastForward(adamw, val_fn, line_search=LOWEST, **fixed(3))
        for step in range(18):
            batch = {k: v.cuda() for k, v in token_batch(4, 12, 100 + step).items()}
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [r.tau for r in optimizer.history], [p.detach() for p in lora_parameters(model)]

    taus, weights = run()
    again, graphed_weights = run(cuda_graphs=True)
    assert any(taus)
    assert again == pytest.approx(taus, rel=1e-3)  # a parabola of losses that are rounded
    for first, second in zip(weights, graphed_weights, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-3)


def test_tensors_that_were_replaced_are_read(model):
    val_fn = graphed(model)
    for _ in range(3):
        val_fn()
    with torch.no_grad():
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(1.5 * p, requires_grad=p.requires_grad))
    assert val_fn() == pytest.approx(ValidationLoss(model, BATCHES)(), rel=1e-5)


def test_an_adapter_that_is_switched_off_is_seen(model):
    val_fn = graphed(model)
    losses = [val_fn() for _ in range(3)]
    with model.disable_adapter():
        assert val_fn() == pytest.approx(ValidationLoss(model, BATCHES)(), rel=1e-5)
        assert val_fn() != losses[-1]


def test_a_forward_that_waits_for_the_gpu_is_measured_without_a_graph(model):
    def forward(model, batch):
        loss = model(**batch).loss
        return loss, 1 + int(loss > 1e9)

    val_fn = ValidationLoss(model, BATCHES, forward=forward, cuda_graphs=True)
    expected = ValidationLoss(model, BATCHES, forward=forward)()
    torch.cuda.manual_seed(0)
    with pytest.warns(UserWarning, match="without CUDA graphs: the model's forward cannot be"):
        assert val_fn() == pytest.approx(expected, rel=1e-6)
    assert val_fn() == pytest.approx(expected, rel=1e-6)
    # Nothing is left in a state in which the GPU refuses work, or draws other numbers.
    model(**{k: v.cuda() for k, v in BATCHES[0].items()}).loss.backward()
    drawn = torch.randn(8, device="cuda")
    torch.cuda.manual_seed(0)
    torch.randn(8, device="cuda")
    torch.cuda.manual_seed(0)
    assert torch.equal(torch.randn(8, device="cuda"), drawn)


def test_a_forward_that_depends_on_more_than_tensors_is_found_out(model):
    scale = [1.0]

    def forward(model, batch):
        scale[0] += 1
        return model(**batch).loss * scale[0], 1

    val_fn = ValidationLoss(model, BATCHES[:1], forward=forward, cuda_graphs=True)
    first = val_fn()
    with pytest.warns(UserWarning, match="another loss than the model does"):
        second = val_fn()
    assert second != first
    assert val_fn() != second


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_a_graph_gives_the_losses_of_the_rows(model, autocast):
    val_fn = graphed(model, autocast=autocast)
    plain = ValidationLoss(model, BATCHES, autocast=autocast)
    for _ in range(5):
        found, expected = val_fn.measure(), plain.measure()
        assert found.rows.weights == expected.rows.weights
        assert len(found.rows.sums) == 14
        assert found.loss == pytest.approx(expected.loss, rel=1e-5 if autocast is None else 1e-3)
        rel = 1e-5 if autocast is None else 1e-2
        assert found.rows.sums == pytest.approx(expected.rows.sums, rel=rel)
        with torch.no_grad():
            for p in lora_parameters(model):
                p.add_(0.05 * torch.randn_like(p))
    assert len(val_fn._graphs._graphs) == 2


def test_a_first_loss_that_is_nan_leaves_the_graphs_to_later_calls(model):
    (first, *_) = lora_parameters(model)
    value = first.detach().clone()
    with torch.no_grad():
        first.fill_(torch.nan)
    val_fn = graphed(model)
    assert str(val_fn()) == "nan"
    assert not val_fn._graphs._graphs
    with torch.no_grad():
        first.copy_(value)
    for _ in range(4):
        assert len(val_fn.measure().rows.sums) == 14
    assert len(val_fn._graphs._graphs) == 2


def test_a_forward_of_ones_own_is_recorded_with_its_rows(model):
    def forward(model, batch):
        loss, labels = model(**batch).loss, batch["labels"]
        return loss, labels.numel(), (labels.sum(1) * loss, (labels >= 0).sum(1))

    plain = ValidationLoss(model, BATCHES, forward=forward).measure()
    val_fn = ValidationLoss(model, BATCHES, forward=forward, cuda_graphs=True)
    for _ in range(4):
        measured = val_fn.measure()
        assert measured.loss == pytest.approx(plain.loss, rel=1e-6)
        assert measured.rows.sums == pytest.approx(plain.rows.sums, rel=1e-5)
    assert val_fn._graphs._graphs


def test_a_replay_leaves_no_trace(model):
    model.train()
    val_fn = graphed(model)
    for _ in range(3):
        val_fn()
    state = torch.cuda.get_rng_state()
    weights = [p.detach().clone() for p in model.parameters()]
    val_fn()
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert same([p.detach() for p in model.parameters()], weights)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_trial_waits_for_the_gpu_once(cuda_graphs):
    model = nn.Linear(8, 1).cuda()
    batches = [torch.randn(4, 8) for _ in range(3)]

    def forward(model, batch):
        return model(batch).square().mean(), 4

    val_fn = ValidationLoss(model, batches, forward=forward, cuda_graphs=cuda_graphs)
    for _ in range(3):
        val_fn()
    assert copies_to_the_host(val_fn) == 1


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_trial_waits_for_the_gpu_once_with_rows_too(model, cuda_graphs):
    batches = [{name: value.cuda() for name, value in batch.items()} for batch in BATCHES]
    val_fn = ValidationLoss(model, batches, cuda_graphs=cuda_graphs)
    for _ in range(4):
        assert len(val_fn.measure().rows.sums) == 14

    @torch.no_grad()
    def forwards():  # transformers waits once where it makes a mask
        for batch in batches:
            model(**batch)

    own = 0 if cuda_graphs else copies_to_the_host(forwards)
    assert copies_to_the_host(val_fn) - own == 1


def test_a_copy_records_graphs_of_its_own(model):
    val_fn = graphed(model)
    for _ in range(3):
        val_fn()
    copied = copy.deepcopy(val_fn)
    assert [copied() for _ in range(3)] == pytest.approx([val_fn()] * 3, rel=1e-5)
    assert len(copied._graphs._graphs) == 2


def test_what_is_not_needed_any_more_is_freed_at_once(model):
    ValidationLoss(model, BATCHES)()
    before = torch.cuda.memory_allocated()
    val_fn = graphed(model)
    for _ in range(3):
        val_fn()
    assert torch.cuda.memory_allocated() > before
    del val_fn
    assert torch.cuda.memory_allocated() == before


# What a stage costs.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stage_starts_and_holds_no_more_than_it_has_to(dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    row = stage_cost.adapter_row("smollm2-135m", 8, dtype, device, copy_speed(device))
    assert row["tensors"] == 240
    assert row["kernels_a_trial"] <= 3
    assert row["waits_a_trial"] == 1
    assert row["held_in_a_stage"] < 2.05  # two copies, and what is compared at a time
    assert row["left_after_it"] == 0


def test_memory_does_not_grow_with_the_number_of_stages():
    grown = stage_cost.growth(torch.device("cuda", torch.cuda.current_device()), stages=300)
    assert grown["grown_bytes"] == grown["peak_grown_bytes"] == 0

"""What a ``val_fn`` of the user's own may implement, whether or not it derives from the base."""

from contextlib import contextmanager

import pytest
import torch

from fastforward_optim import FastForward, ValidationFunction
from fastforward_optim.validation import Measurement, Rows

from .conftest import Regression, fixed, same


class OnlyCalled(ValidationFunction):
    def __init__(self, problem):
        self.problem = problem

    def __call__(self):
        return self.problem.val_loss()


class Everything:
    """Implements all that a ``val_fn`` may, and writes down what is called."""

    def __init__(self, problem):
        self.problem = problem
        self.events = []
        self.stages = 0

    def __call__(self):
        return self.measure().loss

    def measure(self):
        self.events.append("measure")
        outputs = self.problem.model(self.problem.inputs[64:])
        losses = (outputs - self.problem.targets[64:]).square().mean(1).tolist()
        return Measurement(sum(losses) / 32, 32.0, Rows(tuple(losses), (1.0,) * 32))

    def check(self):
        self.events.append("check")
        return True

    def new_stage(self):
        self.events.append("new stage")
        self.stages += 1

    @contextmanager
    def measuring(self):
        self.events.append("begin")
        yield
        self.events.append("end")

    def state_dict(self):
        return {"stages": self.stages}

    def load_state_dict(self, state_dict):
        self.stages = state_dict["stages"]


class Derived(Everything, ValidationFunction):
    pass


def run(make, steps=4, **options):
    problem = Regression()
    val_fn = make(problem)
    adamw = torch.optim.AdamW(problem.parameters, lr=1e-3)
    optimizer = FastForward(adamw, val_fn, **fixed(2) | options)
    problem.train(optimizer, steps)
    return problem, val_fn, optimizer


def test_a_class_that_can_only_be_called_does_what_a_function_does():
    problem, val_fn, optimizer = run(OnlyCalled)
    expected_problem, _, expected = run(lambda problem: problem.val_loss)
    assert optimizer.history == expected.history
    assert same(problem.weights(), expected_problem.weights())
    assert optimizer.val_fn is val_fn
    assert "val_fn" not in optimizer.state_dict()["fast_forward"]


@pytest.mark.parametrize("kind", [Everything, Derived])
def test_each_method_is_called_where_its_docstring_says(kind):
    _, val_fn, optimizer = run(kind)
    assert val_fn.events[0] == "check"
    first = [*("measure" for _ in optimizer.history[0].trials)]
    assert val_fn.events[1 : len(first) + 4] == ["new stage", "begin", *first, "end"]
    assert val_fn.events.count("new stage") == len(optimizer.history) == 2
    assert optimizer.history[0].error is not None, "the rows are compared"
    assert optimizer.val_fn is val_fn


@pytest.mark.parametrize("kind", [Everything, Derived])
def test_its_place_is_in_the_checkpoint(kind):
    _, val_fn, optimizer = run(kind)
    _, resumed, loaded = run(kind, 1)
    loaded.load_state_dict(optimizer.state_dict())
    assert val_fn.stages == resumed.stages == 2


@pytest.mark.filterwarnings("error")
def test_what_is_not_checked_by_itself_is_measured_twice_before_the_first_step():
    losses = iter(range(100))

    class Draws(ValidationFunction):
        def __call__(self):
            return 1.0 + next(losses)

    problem = Regression()
    optimizer = FastForward(torch.optim.SGD(problem.parameters, lr=0.1), Draws())
    with pytest.warns(UserWarning, match="val_fn returned 1 and then 2 at the same weights"):
        problem.train(optimizer, 1)


def test_a_class_without_a_loss_says_what_to_implement():
    class Nothing(ValidationFunction):
        pass

    problem = Regression()
    optimizer = FastForward(torch.optim.SGD(problem.parameters, lr=0.1), Nothing())
    with pytest.raises(NotImplementedError, match="Nothing must implement __call__"):
        problem.train(optimizer, 1)

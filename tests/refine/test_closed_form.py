"""The least-squares solution for windows: against torch's own solver on whole matrices, and over kinds of layers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from laco_train.collapse import CollapsePlan, apply_plan, decoder_of
from laco_train.collapse.apply import make_plan
from laco_train.errors import InputError
from laco_train.refine import refine
from laco_train.refine.closed_form import RIDGE, last_projection, solve_windows
from laco_train.refine.windows import Window, recorded, windows_of
from laco_train.settings import CollapseSettings, RefineSettings
from laco_train.training.loss import model_inputs
from tests.collapse.helpers import scramble
from tests.collapse.tiny import tiny
from tests.refine.test_refinement import DROPPED, PLACE, collapsed_by, some_batches

Llama = Callable[..., LlamaForCausalLM]


@pytest.fixture
def original(tiny_llama: Llama) -> LlamaForCausalLM:
    model: LlamaForCausalLM = scramble(tiny_llama(layers=7), seed=2)
    return model


@torch.no_grad()
def states_of(original: LlamaForCausalLM, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """States (tokens, width) that enter each layer and leave the last, by hooks on the whole model."""
    seen: list[list[Tensor]] = [[] for _ in range(len(original.model.layers) + 1)]
    hooks = [
        module.register_forward_pre_hook(lambda m, args, at=at: seen[at].append(args[0].flatten(0, 1)))
        for at, module in enumerate([*original.model.layers, original.model.norm])
    ]
    for batch in batches:
        original(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(rows) for rows in seen]


def test_it_is_the_least_squares_solution(original: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Of all tokens as rows of one matrix, the ridge as rows of their own, in float64, by QR."""
    model, plan = collapsed_by(DROPPED, original, tiny_tokenizer)
    batches = some_batches(12)
    solved = copy.deepcopy(model)
    assert solve_windows(original, solved, windows_of(plan), iter(batches), PLACE) == 12
    states = states_of(original, batches)
    for window in windows_of(plan):
        whole = copy.deepcopy(original)  # the layer where its input is: in place of the window's first
        whole.model.layers[window.first].load_state_dict(model.model.layers[window.layer].state_dict())
        down = whole.model.layers[window.first].mlp.down_proj
        features: list[Tensor] = []
        hook = down.register_forward_pre_hook(lambda m, args, into=features: into.append(args[0].flatten(0, 1)))
        reached = states_of(whole, batches)[window.first + 1]
        hook.remove()
        a, target = torch.cat(features).double(), states[window.last + 1].double()
        share = target.square().sum(-1, keepdim=True).rsqrt()
        ridge = (RIDGE * (a * share).square().sum(0).mean()).sqrt() * torch.eye(a.shape[1], dtype=torch.float64)
        rows = torch.cat([a * share, ridge])
        aims = torch.cat([(target - reached.double()) * share, torch.zeros(a.shape[1], target.shape[1])])
        expected = down.weight.double() + torch.linalg.lstsq(rows, aims).solution.T
        found = solved.model.layers[window.layer].mlp.down_proj.weight.double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
        assert float((expected - down.weight).norm()) > 0.1 * float(down.weight.norm())


WIDEST = {
    "llama": "mlp.down_proj",
    "qwen2": "mlp.down_proj",
    "gpt2": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "opt": "fc2",
    "falcon": "mlp.dense_4h_to_h",
    "phi3": "mlp.down_proj",
    "cohere2": "mlp.down_proj",
}


@torch.no_grad()
def call_of(model: PreTrainedModel) -> tuple[nn.Module, Any, Any]:
    """The second layer of `model`, and how it is called."""
    window = Window(1, 1, 1)
    with recorded(model, (window,)) as (entering, _):
        model.base_model(**model_inputs(model, some_batches(1)[0]))
    return decoder_of(model).stack[1], *entering[1]


@pytest.mark.parametrize("kind", WIDEST)
def test_the_last_projection_of_each_kind(kind: str) -> None:
    layer, args, kwargs = call_of(tiny(kind).eval())
    assert last_projection(layer, args, kwargs, PLACE) is layer.get_submodule(WIDEST[kind])


@pytest.mark.parametrize("kind", ["gemma2", "olmo2"])
def test_a_norm_after_the_sum_leaves_nothing_to_solve(kind: str) -> None:
    original = tiny(kind).eval()
    layer, args, kwargs = call_of(original)
    assert last_projection(layer, args, kwargs, PLACE) is None
    model = copy.deepcopy(original)
    assert solve_windows(original, model, (Window(1, 1, 2),), iter(some_batches(2)), PLACE) == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, original.state_dict()[name]), name


class Expert(nn.Module):
    """A layer whose widest map sees some tokens only; both of its maps are added to what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.widest, self.shared = nn.Linear(64, 32), nn.Linear(32, 32)

    def forward(self, hidden: Tensor) -> Tensor:
        added = torch.zeros_like(hidden)
        added[:, ::2] = self.widest(torch.cat([hidden, hidden], -1)[:, ::2])
        return hidden + added + self.shared(hidden)


def test_maps_that_see_some_tokens_only_are_passed_over() -> None:
    layer = Expert()
    assert last_projection(layer, (torch.randn(2, 6, 32),), {}, PLACE) is layer.shared


def test_a_solution_that_is_not_finite_is_told(
    original: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model, plan = collapsed_by(DROPPED, original, tiny_tokenizer)
    with torch.no_grad():
        original.model.layers[3].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"collapse\.refine\.windows"):
        solve_windows(original, model, windows_of(plan), iter(some_batches(2)), PLACE)


def test_dropout_is_no_part_of_it() -> None:
    """A model left in training mode, as the kernels leave it, is solved as one in eval mode."""
    solved = []
    for training in (False, True):
        original = scramble(tiny("gpt2").eval(), seed=1)
        original.config.update({"resid_pdrop": 0.3, "attn_pdrop": 0.3})
        for module in original.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        plan = plan_of_dropped(original)
        model = apply_plan(copy.deepcopy(original), plan).train(training)
        settings = RefineSettings(tokens=10 * 48, windows=1.0, batch_size=2)
        refine(original, model, plan, some_batches(10), settings, PLACE)
        solved.append(decoder_of(model).stack[1].mlp.c_proj.weight)
    assert torch.equal(*solved)
    assert not torch.equal(solved[0], decoder_of(original).stack[1].mlp.c_proj.weight)


def plan_of_dropped(original: PreTrainedModel) -> CollapsePlan:
    """Of a model without its layers 2 and 3."""
    return make_plan(copy.deepcopy(original), None, CollapseSettings(remove=[2, 3]), device=PLACE.device)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", WIDEST)
def test_each_kind_comes_nearer(kind: str) -> None:
    """GPT-2's matrices are stored the other way round, and OPT's see tokens in one row."""
    original = scramble(tiny(kind).eval(), seed=1)
    window = Window(1, 1, 3)
    model = copy.deepcopy(original)

    @torch.no_grad()
    def error() -> float:
        with recorded(original, (window,)) as (entering, leaving):
            original.base_model(**model_inputs(original, some_batches(30)[-1]))
        args, kwargs = entering[1]
        out = decoder_of(model).stack[1](*args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        return float((out - leaving[3]).square().sum() / leaving[3].square().sum())

    before = error()
    solve_windows(original, model, (window,), iter(some_batches(20)), PLACE)
    assert error() < 0.9 * before

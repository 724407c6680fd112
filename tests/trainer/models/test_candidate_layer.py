"""The last layer at candidates alone: the rows of the whole layer, its gradients, what it keeps; and the tower's."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attention_kernels import SemiLocalMask, make_plan, plan_of_targets
from attention_kernels.layer import operations
from trainer.models.candidate_layer import candidate_layer
from trainer.models.hstu import HstuLayer, HstuTower, Stage
from trainer.models.layer import LayerBatch, LayerParameters, LayerSpec, plain_layer
from trainer.models.layout import SequenceLayout, candidate_rows, make_layout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
DIM = 24
HISTORY, CANDIDATES, CONTEXT = (9, 0, 17, 1, 4), (2, 0, 3, 4, 0), 2
MASK = SemiLocalMask(local=3, global_rows=4, num_context=CONTEXT)
SPECS = {
    "paper": LayerSpec(num_heads=2, qk_dim=8, value_dim=16, max_len=30),
    "production": LayerSpec(num_heads=2, qk_dim=8, value_dim=16, max_len=30, production=True, scale=1.0),
    "group norm": LayerSpec(num_heads=4, qk_dim=16, value_dim=8, max_len=30, group_norm=True),
    "nothing recomputed": LayerSpec(
        num_heads=2,
        qk_dim=8,
        value_dim=8,
        max_len=30,
        recompute_normed=False,
        recompute_uvqk=False,
        recompute_gated=False,
    ),
}


def layout_of(candidates: tuple[int, ...] = CANDIDATES, device: torch.device = CPU) -> SequenceLayout:
    history, number = torch.tensor(HISTORY), torch.tensor(candidates)
    return make_layout(history.to(device), number.to(device), history, number, num_context=CONTEXT)


def make_layer(spec: LayerSpec, dtype: torch.dtype, device: torch.device = CPU) -> HstuLayer:
    torch.manual_seed(0)
    layer = HstuLayer(dim=DIM, spec=spec)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return layer.to(device, dtype)


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return list(torch.autograd.grad(out, inputs, dout))


def tensors(parameters: LayerParameters) -> list[Tensor]:
    return [getattr(parameters, name) for name in LayerParameters.__dataclass_fields__]


@pytest.mark.parametrize("candidates", [CANDIDATES, (0,) * 5])
@pytest.mark.parametrize("name", SPECS)
def test_equals_the_plain_layers_rows_in_float64(name: str, candidates: tuple[int, ...]) -> None:
    """Output and the gradients of the input and of every parameter; with no candidates, zeros."""
    spec, layout = SPECS[name], layout_of(candidates)
    layer, rows = make_layer(spec, torch.float64), candidate_rows(layout)
    x = torch.randn(layout.num_tokens, DIM, dtype=torch.float64, requires_grad=True)
    plan = layer.plan(layout, MASK)
    inputs = [x, *tensors(layer.parameter_set())]
    expected = plain_layer(x, layer.parameter_set(), spec, LayerBatch(plan=plan))[rows]
    found = candidate_layer(x, rows, layer.parameter_set(), spec, LayerBatch(plan=plan_of_targets(plan)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", SPECS)
def test_fused_kernels_equal_the_plain_layers_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS[name]
    exact, wanted_layout = make_layer(spec, torch.float64), layout_of()
    exact_x = torch.randn(wanted_layout.num_tokens, DIM, dtype=torch.float64, requires_grad=True)
    plan = exact.plan(wanted_layout, MASK)
    expected = plain_layer(exact_x, exact.parameter_set(), spec, LayerBatch(plan=plan))[candidate_rows(wanted_layout)]
    wanted = [expected, *gradients(expected, [exact_x, *tensors(exact.parameter_set())])]
    monkeypatch.setattr(operations, "layer_backend", lambda x: "triton")
    layer, layout = make_layer(spec, torch.float32, DEVICE), layout_of(device=DEVICE)
    x = exact_x.detach().to(DEVICE, torch.float32).requires_grad_()
    plan = plan_of_targets(
        make_plan(layout.offsets, MASK, num_targets=layout.num_candidates, scale=spec.scale, max_len=spec.max_len)
    )
    out = candidate_layer(x, candidate_rows(layout), layer.parameter_set(), spec, LayerBatch(plan=plan))
    found = [out, *gradients(out, [x, *tensors(layer.parameter_set())])]
    for a, b in zip(found, wanted, strict=True):
        scale = float(b.detach().abs().max())
        torch.testing.assert_close(a.double().cpu() / scale, b / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("keep_newest", [None, 5])
def test_the_tower_at_candidates_is_the_tower(keep_newest: int | None, fp8: bool) -> None:
    """In FP8 the one whose last layer is not."""
    spec = LayerSpec(num_heads=2, qk_dim=8, value_dim=8, max_len=30, fp8=fp8)
    torch.manual_seed(0)
    stages = [Stage(num_layers=2, mask=MASK), Stage(num_layers=1, mask=MASK, keep_newest=keep_newest)]
    tower = HstuTower([HstuLayer(dim=32, spec=spec) for _ in range(3)], stages)
    layout = layout_of()
    x = torch.randn(layout.num_tokens, 32, requires_grad=True)
    found = tower.at_candidates(x, layout)
    tower.layers[-1].spec = replace(spec, fp8=False)
    outputs, last = tower(x, layout)
    expected = outputs[candidate_rows(last)]
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        gradients(found, [x, *tower.parameters()]), gradients(expected, [x, *tower.parameters()]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_users_skip_the_last_layer_with_all_their_candidates() -> None:
    spec = LayerSpec(num_heads=1, qk_dim=8, value_dim=8, max_len=30)
    tower = HstuTower([HstuLayer(dim=8, spec=spec)], [Stage(num_layers=1, mask=MASK)], stochastic_depth=0.5)
    layout = layout_of()
    x = torch.randn(layout.num_tokens, 8)
    torch.manual_seed(3)
    expected = tower(x, layout)[0][candidate_rows(layout)]
    torch.manual_seed(3)
    torch.testing.assert_close(tower.at_candidates(x, layout), expected)


def kept_bytes(spec: LayerSpec) -> int:
    """Bytes kept for the backward, parameters and rows not counted."""
    layer, layout = make_layer(spec, torch.float32), layout_of()
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own and tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer.at_candidates(torch.randn(layout.num_tokens, DIM), candidate_rows(layout), layer.plan(layout, MASK))
    return sum(kept.values())


def test_only_the_input_of_all_tokens_is_kept() -> None:
    """Beside it U and the attention output of candidates."""
    spec = LayerSpec(num_heads=2, qk_dim=12, value_dim=12, max_len=30)
    tokens, candidates = layout_of().num_tokens, sum(CANDIDATES)
    assert kept_bytes(spec) == 4 * DIM * (tokens + 2 * candidates)
    assert kept_bytes(replace(spec, recompute_normed=False)) > kept_bytes(spec)

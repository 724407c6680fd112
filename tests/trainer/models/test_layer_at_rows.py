"""A layer at the rows that are read: those of the whole layer, its gradients, what it keeps; and the tower's."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attention_kernels import AttentionPlan, SemiLocalMask, attention_forward, make_plan, plan_of_targets
from attention_kernels.layer import operations
from trainer.models import layer
from trainer.models import layer_at_rows as layer_at_rows_module
from trainer.models.hstu import HstuLayer, HstuTower, Stage
from trainer.models.layer import LayerBatch, LayerParameters, LayerSpec, plain_layer
from trainer.models.layer_at_rows import layer_at_rows
from trainer.models.layout import SequenceLayout, candidate_rows, keep_newest, make_layout

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


def layout_of(
    candidates: tuple[int, ...] = CANDIDATES, device: torch.device = CPU, *, padded: bool = False
) -> SequenceLayout:
    """Padded with a sequence of six events and a candidate."""
    history, number = (torch.tensor([*lens, *([more] * padded)]) for lens, more in ((HISTORY, 6), (candidates, 1)))
    return make_layout(history.to(device), number.to(device), history, number, num_context=CONTEXT, padded=padded)


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
    return [getattr(parameters, name) for name in LayerParameters.__dataclass_fields__ if name != "biases"]


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
    found = layer_at_rows(x, rows, layer.parameter_set(), spec, LayerBatch(plan=plan_of_targets(plan)))
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
    out = layer_at_rows(x, candidate_rows(layout), layer.parameter_set(), spec, LayerBatch(plan=plan))
    found = [out, *gradients(out, [x, *tensors(layer.parameter_set())])]
    for a, b in zip(found, wanted, strict=True):
        scale = float(b.detach().abs().max())
        torch.testing.assert_close(a.double().cpu() / scale, b / scale, rtol=0, atol=1e-4)


def whole_tower(tower: HstuTower, x: Tensor, layout: SequenceLayout) -> tuple[Tensor, list[int]]:
    """The tower by its definition: each layer computes all rows, then candidates or the newest are taken.  Also how
    many tokens and rows that are read each layer has."""
    sizes, depth = [], 0
    for stage in tower.stages:
        if stage.keep_newest is not None:
            layout, rows = keep_newest(layout, stage.keep_newest)
            x = torch.where((rows < 0)[:, None], 0, x[rows])
            sizes[-1:] = [rows.numel()] if sizes else []
        for _ in range(stage.num_layers):
            layer = tower.layers[depth]
            assert isinstance(layer, HstuLayer)
            depth += 1
            out = layer(x, layer.plan(layout, stage.mask))
            x = tower._skip(x, out, layout.user_T, depth, layout)
            sizes += [layout.num_tokens, layout.num_tokens]
    rows = candidate_rows(layout)
    return x[rows], [*sizes[:-1], rows.numel()]


FULL = SemiLocalMask(num_context=CONTEXT)
TOWERS = {
    # The second layer at 5 events, less and more than there are of global rows; the third at candidates.
    "window": [(2, MASK, None), (1, MASK, 5)],
    "fewer than global rows": [(2, MASK, None), (1, MASK, 2)],
    "full": [(1, FULL, None), (2, FULL, 3)],
    "from window to full, twice": [(1, MASK, 12), (2, MASK, 9), (1, FULL, 4)],
    "none dropped": [(1, MASK, None), (1, FULL, None), (1, MASK, None)],
    "more than there are": [(2, MASK, None), (1, FULL, 100)],
}


def tower_of(name: str, spec: LayerSpec, stochastic_depth: float = 0.0) -> HstuTower:
    torch.manual_seed(0)
    stages = [Stage(num_layers=layers, mask=mask, keep_newest=keep) for layers, mask, keep in TOWERS[name]]
    layers = [HstuLayer(dim=32, spec=spec) for _ in range(sum(stage.num_layers for stage in stages))]
    return HstuTower(layers, stages, stochastic_depth=stochastic_depth)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("production", [False, True])
@pytest.mark.parametrize("name", TOWERS)
def test_rows_that_nothing_reads_change_nothing(
    name: str, production: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates and all gradients are those of a tower that computes every row, with users that skip layers; and no
    layer computes a row that is not read."""
    spec = LayerSpec(num_heads=2, qk_dim=8, value_dim=8, max_len=30, production=production)
    tower, layout = tower_of(name, spec, stochastic_depth=0.4), layout_of(padded=padded)
    x = torch.randn(layout.num_tokens, 32, requires_grad=True)
    torch.manual_seed(1)
    expected, wanted_sizes = whole_tower(tower, x, layout)
    sizes: list[int] = []

    def counted(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, biases: None = None) -> Tensor:
        sizes.extend([k.shape[0], q.shape[0]])
        return attention_forward(q, k, v, plan)

    for module in (layer, layer_at_rows_module):
        monkeypatch.setattr(module, "attention_forward", counted)
    torch.manual_seed(1)
    found = tower.at_candidates(x, layout)
    assert sizes == wanted_sizes
    # Nothing reads the candidate of the padding.
    found, expected = found[: sum(CANDIDATES)], expected[: sum(CANDIDATES)]
    torch.testing.assert_close(found, expected)
    inputs = [x, *tower.parameters()]
    for a, b in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_in_fp8_layers_at_rows_are_not() -> None:
    spec = LayerSpec(num_heads=2, qk_dim=8, value_dim=8, max_len=30, fp8=True)
    tower, layout = tower_of("window", spec), layout_of()
    x = torch.randn(layout.num_tokens, 32)
    found = tower.at_candidates(x, layout)
    for each in tower.layers[1:]:
        each.spec = replace(spec, fp8=False)
    torch.testing.assert_close(found, whole_tower(tower, x, layout)[0])


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
        plan = plan_of_targets(layer.plan(layout, MASK))
        layer.at_rows(torch.randn(layout.num_tokens, DIM), candidate_rows(layout), plan)
    return sum(kept.values())


def test_only_the_input_of_all_tokens_is_kept() -> None:
    """Beside it U and the attention output of candidates."""
    spec = LayerSpec(num_heads=2, qk_dim=12, value_dim=12, max_len=30)
    tokens, candidates = layout_of().num_tokens, sum(CANDIDATES)
    assert kept_bytes(spec) == 4 * DIM * (tokens + 2 * candidates)
    assert kept_bytes(replace(spec, recompute_normed=False)) > kept_bytes(spec)

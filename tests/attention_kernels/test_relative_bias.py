"""Attention with relative biases: the formula pair by pair, gradients, what a query may know, and the kernels against
this definition, small in the interpreter and of a training's shapes on a GPU."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_kernels import AttentionPlan, SemiLocalMask, attention_forward, make_plan, projection_backward
from attention_kernels.attention import pair_biases
from attention_kernels.attention.plan import PairTimes
from attention_kernels.attention.portable import launchers
from attention_kernels.relative_bias import (
    RelativeBiases,
    bucket_starts,
    log_bucket,
    relative_attention,
    relative_attention_backward,
)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
LENS, HEADS, QK, V, POSITIONS, BUCKETS = [3, 1, 5], 2, 4, 3, 4, 6
INDEX_T = torch.cat([torch.arange(n) for n in LENS])
TIME_T = torch.tensor([0, 1, 7, 3, 2, 2, 60, 61, 4000])
ASKED_T = torch.tensor([1, 7, 7, 3, 2, 60, 61, 4000, 4000])
NAMES = ("out", "dq", "dk", "dv", "sum of dq", "sum of dk", "sum of dv", "position", "time")


def plan_of(rows: int = 9, **options: Any) -> AttentionPlan:
    times = PairTimes(
        happened=TIME_T[:rows],
        asked=ASKED_T[:rows],
        bucket_starts=bucket_starts(BUCKETS),
        longest=options.pop("longest", 5),
    )
    offsets = torch.tensor([0, 3, 4, rows])
    return make_plan(offsets, SemiLocalMask(), scale=0.5, max_len=8, times=times, **options)


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(9, HEADS, QK), (9, HEADS, QK), (9, HEADS, V), (HEADS, POSITIONS), (HEADS, BUCKETS)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def attend(q: Tensor, k: Tensor, v: Tensor, position: Tensor, time: Tensor) -> Tensor:
    return relative_attention(q, k, v, plan_of(), RelativeBiases(position, time))


def test_output_is_the_formula_pair_by_pair() -> None:
    q, k, v, position, time = inputs()
    out = attend(q, k, v, position, time)
    for query in range(9):
        for head in range(HEADS):
            expected = torch.zeros(V, dtype=torch.float64)
            for key in range(query - int(INDEX_T[query]), query + 1):
                bucket = min(BUCKETS - 1, int(math.log(max(1, abs(int(ASKED_T[query] - TIME_T[key])))) / 0.301))
                score = 0.5 * q[query, head] @ k[key, head]
                score = score + position[head, min(query - key, POSITIONS - 1)] + time[head, bucket]
                expected = expected + score * torch.sigmoid(score) / 8 * v[key, head]
            torch.testing.assert_close(out[query, head], expected)


def test_gradients_are_those_of_differences() -> None:
    assert torch.autograd.gradcheck(attend, inputs())


def test_the_backward_that_is_written_out_is_that_of_differences() -> None:
    tensors = inputs()
    dout = torch.randn(9, HEADS, V, dtype=torch.float64)
    expected = torch.autograd.grad(attend(*tensors), tensors, dout)
    q, k, v, *biases = (x.detach() for x in tensors)
    found = relative_attention_backward(dout, q, k, v, plan_of(), RelativeBiases(*biases))
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_buckets_are_logarithmic_and_the_last_takes_the_rest() -> None:
    assert log_bucket(torch.tensor([-5, 0, 1, 2, 60, 10**9]), BUCKETS).tolist() == [0, 0, 0, 2, 5, 5]


@pytest.mark.parametrize("num_buckets", [1, 6, 64, 256])
def test_a_bucket_starts_where_the_logarithm_says(num_buckets: int) -> None:
    starts = bucket_starts(num_buckets)
    assert starts.shape == (num_buckets,) and starts[0] == 1
    reached = starts[starts < 2**62]
    at, before = (log_bucket(reached - each, num_buckets) for each in (0, 1))
    wanted = torch.arange(len(reached))
    # No whole second has a logarithm between .301 and .602: such buckets start with the next.
    assert torch.equal(torch.searchsorted(starts, reached, right=True) - 1, at) and bool((at >= wanted).all())
    assert bool((before[1:] < wanted[1:]).all())


def test_no_devices_way_to_divide_decides_a_bucket() -> None:
    """A GPU multiplies by the reciprocal, which in float32 put seconds beside a bucket's start elsewhere."""
    starts = bucket_starts(128)
    seconds = torch.cat([starts[starts < 2**40] - each for each in (0, 1)]).clamp(min=1)
    by_reciprocal = (torch.log(seconds.double()) * (1 / 0.301)).long()
    assert torch.equal(log_bucket(seconds, 128), by_reciprocal)
    # What was: PyTorch's own division of float32 numbers, and the GPU's.
    log = torch.log(seconds.float())
    assert not torch.equal((log / 0.301).long(), (log * (1 / 0.301)).long())
    if CUDA:
        assert torch.equal(log_bucket(seconds.cuda(), 128).cpu(), by_reciprocal)


def test_a_later_event_changes_no_earlier_output() -> None:
    q, k, v, position, time = (x.detach() for x in inputs())
    earlier = slice(0, 8)
    biases = RelativeBiases(position, time)
    short = relative_attention(q[earlier], k[earlier], v[earlier], plan_of(8), biases)
    torch.testing.assert_close(short, attend(q, k, v, position, time)[earlier])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"longest": 4}, "times.longest=4 is below the longest sequence in offsets, 5"),
        ({"num_targets": torch.zeros(3, dtype=torch.int64)}, "times are for mask=SemiLocalMask"),
    ],
)
def test_times_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(**options)


def test_biases_that_do_not_fit_are_refused() -> None:
    q, k, v, position, time = (x.detach() for x in inputs())
    plain = make_plan(torch.tensor([0, 3, 4, 9]), SemiLocalMask(), max_len=8)
    for plan, biases, message in (
        (plan_of(), RelativeBiases(position[:1], time), "biases.position is torch.float64"),
        (plan_of(), RelativeBiases(position, time[:, :5]), "biases.time has 5 buckets, the plan's times 6"),
        (plain, RelativeBiases(position, time), "the plan has no times"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_forward(q, k, v, plan, biases)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch; so many rows of padding follow its sequences."""

    lens: tuple[int, ...]
    heads: int = 1
    key_size: int = 25
    value_size: int = 25
    positions: int = 211
    buckets: int = 64
    padding: int = 0
    beyond: int = 0
    """How much longer the plan says the longest is."""
    scaled: bool = True
    dtype: torch.dtype = torch.float32


# Each with something awkward at the boundary of tiles or of blocks of distances.
SMALL = {
    "one head": Case(lens=(0, 1, 31, 0, 65)),
    "padding, two heads": Case(lens=(33, 2, 0), heads=2, key_size=26, value_size=26, padding=37, beyond=9),
    "one position fewer than places": Case(lens=(65, 3), positions=64, buckets=256, key_size=8, scaled=False),
    "few biases": Case(lens=(34, 5), positions=5, buckets=3, value_size=40),
    "one of each": Case(lens=(35,), positions=1, buckets=1, key_size=16, value_size=17, padding=1),
    "bfloat16": Case(lens=(33, 30), heads=2, key_size=32, value_size=32, scaled=False, dtype=torch.bfloat16),
}
# Of ml1m_hstu, its large one and ml1m_longview; lengths as of MovieLens.
TRAINED = {
    "ml1m_hstu": Case(lens=tuple(range(20, 201, 3)), key_size=50, value_size=50, padding=111),
    "ml1m_hstu_large": Case(lens=tuple(range(200, 19, -2)), heads=2, key_size=26, value_size=26, padding=300),
    "eight heads": Case(lens=(200, 199, 128, 127, 65), heads=8, key_size=25, value_size=25),
    "ml1m_longview": Case(lens=(398, 397, 256, 1, 0, 300), heads=4, key_size=64, value_size=64, positions=398),
    "ml1m_longview, bfloat16": Case(
        lens=(398, 397, 256, 1, 0, 300), heads=4, key_size=64, value_size=64, positions=398, dtype=torch.bfloat16
    ),
    "heads of 128, bfloat16": Case(lens=(700, 130), heads=2, key_size=128, value_size=128, dtype=torch.bfloat16),
    "heads of 128": Case(lens=(700, 130), heads=2, key_size=128, value_size=128),
}


def made_up(case: Case, device: str) -> tuple[list[Tensor], list[Tensor], RelativeBiases, AttentionPlan]:
    """q, k, v and dout as strided slices of poison; what scales gradients; biases; the plan.  Times are in no order."""
    generator = torch.Generator().manual_seed(0)
    rows = sum(case.lens) + case.padding
    sizes = (case.key_size, case.key_size, case.value_size)
    made = [torch.randn(rows, case.heads, size, generator=generator) for size in (*sizes, case.value_size, *sizes)]
    tensors = [x.to(device, case.dtype) for x in made]
    biases = [torch.randn(case.heads, size, generator=generator).to(device) for size in (case.positions, case.buckets)]
    happened, asked = (torch.randint(10**9, (rows,), generator=generator) for _ in range(2))
    # Distances of every order, bucket starts among them.
    reached = bucket_starts(case.buckets)
    reached = reached[reached < 10**9]
    near = happened[:-1] + reached[torch.randint(len(reached), (rows - 1,), generator=generator)]
    asked[1:] = torch.where(torch.rand(rows - 1, generator=generator) < 0.7, near, asked[1:])
    offsets = torch.tensor([0, *itertools.accumulate(case.lens)])
    times = PairTimes(
        happened=happened.to(device),
        asked=asked.to(device),
        bucket_starts=bucket_starts(case.buckets).to(device),
        longest=max(case.lens) + case.beyond,
    )
    plan = make_plan(
        offsets.to(device),
        SemiLocalMask(),
        scale=case.key_size**-0.5,
        max_len=max(211, *case.lens),
        padded=case.padding > 0,
        backend="triton",
        times=times,
    )
    return tensors[:4], tensors[4:], RelativeBiases(*biases), plan


def run(case: Case, backend: str) -> list[Tensor]:
    (q, k, v, dout), factors, biases, plan = made_up(case, DEVICE)
    plan = replace(plan, backend=backend)
    gradients = [x.clone() if case.scaled else torch.full_like(x, torch.nan) for x in factors]
    out = attention_forward(q, k, v, plan, biases)
    found = projection_backward(
        dout, q, k, v, plan, biases, scaled=case.scaled, out=(gradients[0], gradients[1], gradients[2])
    )
    return [out, *gradients, *found]


def exact(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    (q, k, v, dout), factors, biases, plan = made_up(case, DEVICE)
    q, k, v, dout, *factors = (x.to(dtype) for x in (q, k, v, dout, *factors))
    biases = RelativeBiases(*(x.to(torch.promote_types(dtype, torch.float32)) for x in biases))
    out = relative_attention(q, k, v, plan, biases)
    found = relative_attention_backward(dout, q, k, v, plan, biases)
    gradients = [x * y if case.scaled else x for x, y in zip(found[:3], factors, strict=True)]
    return [out, *gradients, *(x.sum(0) for x in gradients), *found[3:]]


def errors(actual: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    return {
        name: ((a.double() - b).norm() / b.norm()).item() for name, a, b in zip(NAMES, actual, expected, strict=True)
    }


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN (or absurd integers), so that whatever is read before it is written shows."""
    empty = torch.empty

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        x = empty(*arguments, **options)
        return x.fill_(torch.nan if x.is_floating_point() else 2**30 if x.dtype == torch.int32 else 255)

    monkeypatch.setattr(torch, "empty", poisoned)


def check(case: Case) -> None:
    """Float32: within 1e-5 of float64.  16 bits: at most twice as far from float64 as the definition in 16 bits, and
    three times in the interpreter, which cuts off where it ought to round."""
    expected, found = exact(case), run(case, "triton")
    actual = errors(found, expected)
    limits = dict.fromkeys(NAMES, 1e-5)
    if case.dtype != torch.float32:
        limits = {name: (2 if CUDA else 3) * error for name, error in errors(exact(case, case.dtype), expected).items()}
    wrong = {name: (actual[name], limits[name]) for name in NAMES if not actual[name] <= limits[name]}
    assert not wrong, f"{case}: relative errors and limits {wrong}"
    if CUDA or case is SMALL["padding, two heads"]:
        again = run(case, "triton")
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_kernels_equal_the_definition_and_give_the_same_bits_again(case: Case) -> None:
    check(case)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU; the small cases run in the interpreter")
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", TRAINED.values(), ids=TRAINED.keys())
def test_kernels_equal_the_definition_at_a_trainings_shapes(case: Case) -> None:
    check(case)


def test_the_reference_behind_the_same_functions_is_the_definition() -> None:
    case = SMALL["padding, two heads"]
    actual = errors(run(case, "reference"), exact(case))
    assert max(actual.values()) < 1e-6


def test_an_empty_batch_has_zero_gradients() -> None:
    q, k, v, position, time = (x.detach().float()[:0] if x.dim() == 3 else x.detach().float() for x in inputs())
    none = torch.zeros(0, dtype=torch.int64)
    times = PairTimes(happened=none, asked=none, bucket_starts=bucket_starts(BUCKETS), longest=0)
    plan = make_plan(torch.tensor([0, 0]), SemiLocalMask(), max_len=8, times=times)
    biases = RelativeBiases(position, time)
    assert attention_forward(q, k, v, plan, biases).shape == v.shape
    found = projection_backward(v, q, k, v, plan, biases, scaled=False, out=(q.clone(), k.clone(), v.clone()))
    assert [x.shape for x in found[3:]] == [position.shape, time.shape] and not any(x.any() for x in found)


def test_layers_share_what_is_made_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buckets of pairs are made once a plan; a layer's backward has two launches more, its forward none."""
    names: list[str] = []
    for module in (pair_biases, launchers):
        launch = module.launch

        def record(kernel: Any, *arguments: Any, launch: Any = launch, **constants: Any) -> None:
            names.append(kernel.__name__)
            launch(kernel, *arguments, **constants)

        monkeypatch.setattr(module, "launch", record)
    (q, k, v, dout), factors, biases, plan = made_up(SMALL["few biases"], DEVICE)
    for _ in range(2):
        attention_forward(q, k, v, plan, biases)
    assert names == ["bucket_kernel", "forward_kernel", "forward_kernel"]
    names.clear()
    for _ in range(2):
        projection_backward(dout, q, k, v, plan, biases, scaled=True, out=(factors[0], factors[1], factors[2]))
    assert names == ["dkdv_kernel", "dq_kernel", "pair_sums_kernel", "add_found_kernel"] * 2
    buckets = plan.times and plan.times.made["buckets"]
    assert buckets is not None and buckets.nbytes == q.shape[0] * 34

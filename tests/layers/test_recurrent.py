"""LSTM and GRU layers with block-sparse weights, against those of torch with the same weights and zeros."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import sparsify
from sparsify.kernels.recurrent.recurrence import Weight, recurrence
from sparsify.kernels.storage import unpack
from sparsify.layers.recurrent import BlockSparseLSTM, BlockSparseRecurrent
from sparsify.layers.swap import sparse_modules
from sparsify.masking import current_masks, mask_gradients, mask_model, unmask

INPUTS, UNITS = 20, 27  # neither is a multiple of the block


class Net(nn.Module):
    """One recurrent module, called `rnn`."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.rnn(*args, **kwargs)


def pair(rnn: nn.Module, sparsity: float = 0.5, **options: Any) -> tuple[Any, Any]:
    """A block-sparse module and the dense one that it stands for."""
    net = Net(rnn)
    dense = copy.deepcopy(net)
    result = sparsify.prune(net, block=8, sparsity=sparsity, scope="layer", **options)
    with torch.no_grad():
        for name, mask in result.masks.items():
            dense.get_parameter(name).mul_(mask.elements())
    assert isinstance(net.rnn, BlockSparseRecurrent)
    return net.rnn, dense.rnn


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in flat(part)]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Of each parameter; of a packed one in the dense layout."""
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad
        if isinstance(module, BlockSparseRecurrent) and name in module.packed:
            topo = module.topology(name)
            found[name] = unpack(parameter.grad, topo.crow, topo.col, module.packed[name].shape)
    return found


def compare(sparse: Any, dense: Any, x: Any, hx: Any = None, tolerance: float = 1e-11) -> None:
    """Outputs, states and all gradients; of a packed weight at stored blocks, and zero elsewhere."""
    results = []
    for module in (sparse, dense):
        leaves = [t.clone().requires_grad_() for t in flat(x) + (flat(hx) if hx is not None else [])]
        given = x._replace(data=leaves[0]) if isinstance(x, PackedSequence) else leaves[0]
        states = () if hx is None else ((tuple(leaves[1:]) if isinstance(hx, tuple) else leaves[1]),)
        out = flat(module(given, *states))
        weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t) for t in out]
        sum((t * w).sum() for t, w in zip(out, weights, strict=True)).backward()  # pyright: ignore
        results.append([*out, *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    own, theirs = gradients(sparse), gradients(dense)
    assert own.keys() == theirs.keys()
    for name, grad in theirs.items():
        if name in sparse.packed:
            grad = grad * sparse.mask_of(name).elements()
        torch.testing.assert_close(own[name], grad, rtol=0, atol=tolerance * 10)


def states(count: int, batch: tuple[int, ...], lstm: bool, outputs: int = UNITS) -> Any:
    h = torch.randn(count, *batch, outputs, dtype=torch.float64)
    return (h, torch.randn(count, *batch, UNITS, dtype=torch.float64)) if lstm else h


OPTIONS = [
    dict(zip(("num_layers", "bidirectional", "batch_first", "bias"), values, strict=True))
    for values in itertools.product((1, 3), (False, True), (False, True), (False, True))
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(int(v)) for v in o.values()))
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_equals_the_dense_layer_in_float64(cls: Any, options: dict[str, Any]) -> None:
    sparse, dense = pair(cls(INPUTS, UNITS, **options).double())
    x = torch.randn(5, 3, INPUTS, dtype=torch.float64)
    batch = 5 if options["batch_first"] else 3
    count = options["num_layers"] * (1 + options["bidirectional"])
    compare(sparse, dense, x, states(count, (batch,), cls is nn.LSTM))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_projection(bidirectional: bool) -> None:
    lstm = nn.LSTM(INPUTS, UNITS, 2, proj_size=11, bidirectional=bidirectional).double()
    sparse, dense = pair(lstm)
    assert "weight_hr_l1" in sparse.packed
    x = torch.randn(5, 3, INPUTS, dtype=torch.float64)
    compare(sparse, dense, x, states(4 if bidirectional else 2, (3,), True, outputs=11))


@pytest.mark.parametrize("lengths", [[5, 5, 2, 1], [2, 5, 1, 4]], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("projection", [0, 9])
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_packed_sequences(cls: Any, projection: int, lengths: list[int]) -> None:
    if projection and cls is nn.GRU:
        pytest.skip("torch's GRU has no projection")
    extra = {"proj_size": projection} if projection else {}
    sparse, dense = pair(cls(INPUTS, UNITS, 2, bidirectional=True, **extra).double())
    x = torch.randn(5, 4, INPUTS, dtype=torch.float64)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=lengths == sorted(lengths)[::-1])
    compare(sparse, dense, packed, states(4, (4,), cls is nn.LSTM, projection or UNITS))
    out, _ = sparse(packed)
    theirs, _ = dense(packed)
    assert torch.equal(out.batch_sizes, theirs.batch_sizes)
    assert out.sorted_indices is packed.sorted_indices


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_without_batch_and_without_states(cls: Any, batch_first: bool) -> None:
    sparse, dense = pair(cls(INPUTS, UNITS, 2, batch_first=batch_first).double())
    compare(sparse, dense, torch.randn(6, INPUTS, dtype=torch.float64), states(2, (), cls is nn.LSTM))
    sparse.zero_grad(), dense.zero_grad()
    compare(sparse, dense, torch.randn(6, INPUTS, dtype=torch.float64))


@pytest.mark.parametrize("cls", [nn.LSTMCell, nn.GRUCell], ids=["lstm", "gru"])
@pytest.mark.parametrize("batch", [(), (4,)], ids=["one", "batch"])
def test_cells(cls: Any, batch: tuple[int, ...]) -> None:
    sparse, dense = pair(cls(INPUTS, UNITS).double())
    x = torch.randn(*batch, INPUTS, dtype=torch.float64)
    h, c = (torch.randn(*batch, UNITS, dtype=torch.float64) for _ in range(2))
    compare(sparse, dense, x, (h, c) if cls is nn.LSTMCell else h)
    sparse.zero_grad(), dense.zero_grad()
    compare(sparse, dense, x)


@pytest.mark.parametrize("sparsity", [0.0, 0.98], ids=["full", "nearly-empty"])
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_extreme_masks(cls: Any, sparsity: float) -> None:
    sparse, dense = pair(cls(INPUTS, UNITS, 2).double(), sparsity)
    compare(sparse, dense, torch.randn(3, 2, INPUTS, dtype=torch.float64))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)]
)
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_lower_precision_against_float64(cls: Any, dtype: torch.dtype, tolerance: float) -> None:
    sparse, dense = pair(cls(INPUTS, UNITS, 2))
    x = torch.randn(9, 3, INPUTS)
    with torch.no_grad():
        expected = flat(dense.double()(x.double()))
        got = flat(sparse.to(dtype)(x.to(dtype)))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_autocast(cls: Any) -> None:
    sparse, dense = pair(cls(INPUTS, UNITS))
    x = torch.randn(6, 3, INPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        out = flat(sparse(x, None))
        sum(t.float().sum() for t in out).backward()  # pyright: ignore
    assert all(t.dtype == torch.bfloat16 for t in out)
    for got, expected in zip(out, flat(dense(x)), strict=True):
        torch.testing.assert_close(got.float(), expected, rtol=0, atol=3e-2)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in sparse.parameters())


def test_dropout_lies_between_layers_alone() -> None:
    sparse, dense = pair(nn.LSTM(INPUTS, UNITS, 2, dropout=0.5).double())
    x = torch.randn(5, 3, INPUTS, dtype=torch.float64)
    torch.testing.assert_close(sparse.eval()(x)[0], dense.eval()(x)[0])
    first, second = sparse.train()(x)[0], sparse(x)[0]
    assert not torch.equal(first, second)
    assert not bool((first == 0).any())  # nothing is dropped from the last layer's outputs
    assert torch.equal(sparse(x)[1][0][0], sparse(x)[1][0][0])  # nor before the first layer


def test_dense_weights_among_packed_ones() -> None:
    sparse, dense = pair(nn.LSTM(3, UNITS).double())  # three input features are less than a block
    assert list(sparse.packed) == ["weight_hh_l0"] and sparse.weight_ih_l0.shape == (4 * UNITS, 3)
    compare(sparse, dense, torch.randn(5, 3, 3, dtype=torch.float64))
    sparse, dense = pair(nn.GRU(INPUTS, UNITS).double(), targets=["rnn.weight_ih_l0"])
    assert list(sparse.packed) == ["weight_ih_l0"]
    compare(sparse, dense, torch.randn(5, 3, INPUTS, dtype=torch.float64))


def test_frozen_weights_and_only_some_gradients() -> None:
    sparse, _ = pair(nn.LSTM(INPUTS, UNITS, proj_size=9).double())
    for name, parameter in sparse.named_parameters():
        parameter.requires_grad_(name == "bias_hh_l0")
    _, (_, c) = sparse(torch.randn(4, 2, INPUTS, dtype=torch.float64))
    c.sum().backward()
    assert sparse.bias_hh_l0.grad is not None and sparse.weight_hh_l0.grad is None
    with torch.no_grad():
        assert not sparse(torch.randn(4, 2, INPUTS, dtype=torch.float64))[0].requires_grad


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("lstm", [True, False], ids=["lstm", "gru"])
def test_operator(lstm: bool, projection: bool) -> None:
    """`opcheck`: schema, fake implementation, autograd registration."""
    if projection and not lstm:
        pytest.skip("torch's GRU has no projection")
    sparse, _ = pair(
        (nn.LSTM(INPUTS, 16, proj_size=12 if projection else 0) if lstm else nn.GRU(INPUTS, 16)).double()
    )
    weight = sparse._weight("weight_hh_l0")
    last = sparse._weight("weight_hr_l0") if projection else Weight(torch.empty(0))
    gates = torch.randn(5, sparse.gates * 16, dtype=torch.float64, requires_grad=True)
    h0 = torch.randn(2, 12 if projection else 16, dtype=torch.float64, requires_grad=True)
    c0 = torch.randn(2, 16, dtype=torch.float64, requires_grad=True) if lstm else None
    arguments = (
        gates, h0, c0, weight.values, list(weight.topo), sparse.bias_hh_l0,
        last.values if projection else None, list(last.topo or ()), [2, 2, 1], False, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.sparsify.recurrence.default, arguments)


def test_gradcheck_of_the_recurrence() -> None:
    sparse, _ = pair(nn.GRU(8, 8).double(), sparsity=0.3)
    weight = sparse._weight("weight_hh_l0")

    def run(gates: Tensor, h0: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        y, h, _ = recurrence(gates, h0, None, Weight(values, weight.topo), bias, [2, 1], reverse=True)
        return y.sum() + (h * h).sum()

    inputs = [torch.randn(3, 24), torch.randn(2, 8), weight.values.detach(), torch.randn(24)]
    assert torch.autograd.gradcheck(run, [t.double().requires_grad_() for t in inputs])


def test_compiled_and_exported() -> None:
    sparse, _ = pair(nn.LSTM(INPUTS, UNITS, 2, bidirectional=True))
    x = torch.randn(4, 3, INPUTS)
    expected = sparse(x)[0]
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], expected)
    compiled(x)[0].sum().backward()
    assert sparse.weight_hh_l0.grad is not None
    program = torch.export.export(sparse.eval(), (x,))
    torch.testing.assert_close(program.module()(x)[0], expected)


def test_masked_in_search_as_linear_layers_are() -> None:
    for cls in (nn.LSTM, nn.GRU, nn.LSTMCell):
        net = Net(cls(INPUTS, UNITS).double())
        reference = copy.deepcopy(net)
        result = sparsify.prune(reference, block=8, sparsity=0.5, convert=False)
        mask_model(net, result.masks)
        x = torch.randn(*((4,) if cls is nn.LSTMCell else (5, 4)), INPUTS, dtype=torch.float64)
        for got, expected in zip(flat(net(x)), flat(reference(x)), strict=True):
            torch.testing.assert_close(got, expected)
        flat(net(x))[0].sum().backward()
        name, mask = next(iter(result.masks.items()))
        grad = net.get_parameter(name).grad
        assert grad is not None and bool(grad[~mask.elements()].any())  # straight through
        mask_gradients(net)
        assert not bool(grad[~mask.elements()].any())
        assert all(torch.equal(value, reference.state_dict()[key]) for key, value in net.state_dict().items())
        assert current_masks(net).keys() == result.masks.keys()
        unmask(net)
        assert torch.equal(flat(net(x))[0], flat(reference(x))[0])
        assert "_masked_parameters" not in net.rnn.__dict__


@pytest.mark.parametrize("method", ["group_lasso", "magnitude", "movement", "prune_and_grow"])
def test_pruned_while_it_is_trained(method: str) -> None:
    """In a loop of one's own; converted at the end it computes what it did under its masks."""
    net = Net(nn.LSTM(INPUTS, 24, 2, batch_first=True))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    loop = sparsify.SparsifyLoop(net, optimizer, method=method, block=8, sparsity=0.5, steps=12)
    x = torch.randn(4, 5, INPUTS)
    losses = []
    for _ in range(12):
        loss = (net(x)[0] - x.mean(2, keepdim=True)).square().mean()
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    before = net(x)[0].detach()
    masks = loop.finish()
    assert losses[-1] < losses[0]
    whole = sum(mask.shape[0] * mask.shape[1] for mask in masks.values())
    kept = sum(mask.elements_kept for mask in masks.values())
    assert len(masks) == 4 and kept / whole == pytest.approx(0.5, abs=0.02)
    assert isinstance(net.rnn, BlockSparseLSTM)
    torch.testing.assert_close(net(x)[0], before)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_calibration_shows_each_weight_its_inputs(cls: Any) -> None:
    """A second-order pruner with enough data leaves less error than magnitude at the same sparsity."""
    torch.manual_seed(3)
    net = Net(cls(INPUTS, 24, 2, batch_first=True, bidirectional=True))
    x = torch.randn(16, 12, INPUTS) * torch.linspace(0.1, 3, INPUTS)
    expected = net(x)[0].detach()
    errors = {}
    for method in ("magnitude", "block_obs"):
        other = copy.deepcopy(net)
        sparsify.prune(other, method=method, block=8, sparsity=0.5, scope="layer", calibration=[{"input": x}])
        errors[method] = (other(x)[0].detach() - expected).square().mean()
    assert errors["block_obs"] < 0.8 * errors["magnitude"]


@pytest.mark.parametrize(
    "options", [{}, {"proj_size": 9}, {"bidirectional": True}], ids=["plain", "projected", "both"]
)
def test_observed_inputs_give_the_outputs(options: dict[str, Any]) -> None:
    """What a weight is shown is what it is multiplied with: the sums made of them are the layer's own."""
    from sparsify.layers.recurrent import observed

    lstm: Any = nn.LSTM(INPUTS, UNITS, **options).double()
    x = torch.randn(5, 3, INPUTS, dtype=torch.float64)
    rows: dict[str, Tensor] = {}
    observed(lstm).observe(rows.__setitem__, x)
    y, _ = lstm(x)
    assert torch.equal(rows["weight_ih_l0"], x.reshape(15, INPUTS))
    hidden = rows["weight_hh_l0"]
    outputs = y[..., : hidden.shape[1]].reshape(15, -1)
    torch.testing.assert_close(hidden[3:], outputs[:-3])
    assert not bool(hidden[:3].any())
    if "proj_size" in options:
        torch.testing.assert_close(rows["weight_hr_l0"] @ lstm.weight_hr_l0.t(), outputs)
    if "bidirectional" in options:
        back = y[..., hidden.shape[1] :].reshape(15, -1)
        torch.testing.assert_close(rows["weight_hh_l0_reverse"][:-3], back[3:])


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    def build() -> Any:
        return Net(nn.LSTM(3, UNITS, 2, proj_size=10))

    net = build().eval()
    sparsify.prune(net, block="8x16", sparsity=0.5)
    out = sparsify.save(net, tmp_path / "out")
    loaded = sparsify.load(out, model=build())
    x = torch.randn(5, 3, 3)
    assert torch.equal(loaded(x)[0], net(x)[0])
    masks = sparsify.masks_of(net)
    assert masks.keys() == sparsify.masks_of(loaded).keys() == set(read_masks(out))
    assert "rnn.weight_ih_l0" not in masks and "rnn.weight_hr_l1" in masks
    sparsify.densify(out, tmp_path / "dense", model=build())
    dense = sparsify.load(tmp_path / "dense", model=build())
    assert isinstance(dense.rnn, nn.LSTM)
    torch.testing.assert_close(dense(x)[0], net(x)[0])
    torch.testing.assert_close(net.rnn.to_dense()(x)[0], net(x)[0])
    with torch.device("meta"):
        empty = build()
    torch.testing.assert_close(sparsify.load(out, model=empty)(x)[0], net(x)[0])


def read_masks(path: Path) -> dict[str, Any]:
    from sparsify.checkpoint.reader import read_masks as read

    return read(path)


def test_copies_state_and_description() -> None:
    sparse, _ = pair(nn.LSTM(INPUTS, UNITS, 2, batch_first=True))
    twin = copy.deepcopy(sparse)
    x = torch.randn(2, 4, INPUTS)
    assert torch.equal(twin(x)[0], sparse(x)[0])
    twin.load_state_dict(sparse.state_dict())
    twin.flatten_parameters()
    assert "num_layers=2, batch_first=True, weight_ih_l0=" in repr(sparse)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.RNN(INPUTS, UNITS), r"RNN has no block-sparse equivalent; nn\.LSTM and nn\.GRU have one"),
        (
            lambda: type("Gated", (nn.LSTM,), {"forward": lambda self, x: x})(INPUTS, UNITS),
            r"other than nn\.LSTM",
        ),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.LSTM(INPUTS, UNITS), "weight_hh_l0"),
            "computed anew in each call",
        ),
    ],
    ids=["rnn", "subclass", "weight-norm"],
)
def test_what_stays_dense(make: Any, reason: str) -> None:
    net = nn.ModuleDict({"rnn": make(), "fc": nn.Linear(16, 16)})
    result = sparsify.prune(net, block=8)
    assert list(result.masks) == ["fc"]
    assert [kept.name for kept in result.kept_dense] == ["rnn"]
    with pytest.raises(sparsify.SparsifyError, match=reason):
        sparsify.prune(net, block=8, targets=["rnn"])


def test_shared_weights_stay_dense() -> None:
    net = nn.ModuleDict({"a": nn.LSTM(16, 16), "b": nn.LSTM(16, 16)})
    net["b"].weight_hh_l0 = net["a"].weight_hh_l0
    result = sparsify.prune(net, block=8)
    assert set(result.masks) == {"a.weight_ih_l0", "b.weight_ih_l0"}
    assert net["b"].weight_hh_l0 is net["a"].weight_hh_l0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.randn(5, 3, INPUTS + 1)), rf"expected 2 or 3 dimensions and {INPUTS} features"),
        (lambda m: m(torch.randn(INPUTS)), "expected 2 or 3 dimensions"),
        (lambda m: m(torch.randn(0, 3, INPUTS)), "got a sequence of length 0"),
        (
            lambda m: m(torch.randn(5, 3, INPUTS), torch.zeros(1, 3, UNITS)),
            rf"got states of shape \(1, 3, {UNITS}\), expected \(1, 3, {UNITS}\), \(1, 3, {UNITS}\)",
        ),
        (
            lambda m: m(torch.randn(5, 3, INPUTS), (torch.zeros(1, 2, UNITS), torch.zeros(1, 2, UNITS))),
            "got states of shape",
        ),
    ],
    ids=["features", "dimensions", "empty", "one-state", "other-batch"],
)
def test_inputs_that_do_not_fit(call: Any, message: str) -> None:
    sparse, _ = pair(nn.LSTM(INPUTS, UNITS))
    with pytest.raises(ValueError, match=message):
        call(sparse)


def test_exported_by_the_package() -> None:
    assert sparsify.BlockSparseLSTM is BlockSparseLSTM
    assert sparse_modules(Net(BlockSparseLSTM(nn.LSTM(8, 8)))).keys() == {"rnn"}

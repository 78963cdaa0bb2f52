"""CUDA graphs, `torch.compile` in the modes that make them, and `torch.export`, on a GPU."""

import io
from collections import Counter

import pytest
import torch
from torch import nn
from torch.export import Dim

from sparsify.errors import SparsifyError
from tests.kernels.decoder import decoder, sparse_linear

pytestmark = pytest.mark.gpu

DEVICE, DTYPE, WIDTH = "cuda", torch.bfloat16, 256
CLOSE = {"rtol": 0.02, "atol": 0.02}


def _decoder(layers=1):
    return decoder(WIDTH, 640, layers, (64, 64)).to(DEVICE, DTYPE)


def _chain(layers=2, block=(64, 64)):
    """Layers whose results stay near one in size, so that every one of them shows in the result."""
    chain = [
        module
        for _ in range(layers)
        for module in (sparse_linear(WIDTH, WIDTH, block, bias=True), nn.RMSNorm(WIDTH))
    ]
    return nn.Sequential(*chain).to(DEVICE, DTYPE).eval()


def _inputs(tokens, count=1):
    return [torch.randn(1, tokens, WIDTH, device=DEVICE, dtype=DTYPE) for _ in range(count)]


@pytest.fixture
def skipped():
    """Counts of graphs that the compiler gave up, as it would in silence."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield lambda: Counter(counters["inductor"])["cudagraph_skips"]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("mode", "make", "tokens"),
    [("reduce-overhead", _decoder, 1), ("reduce-overhead", _chain, 200), ("max-autotune", _chain, 200)],
    ids=["reduce-overhead-1", "reduce-overhead-200", "max-autotune-200"],
)
@torch.no_grad()
def test_a_compiled_model_that_never_ran_before(mode, make, tokens, skipped):
    """Its first run is already the compiler's: all that the kernels keep must not belong to the graph."""
    model = make()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    inputs, outputs = _inputs(tokens, 5), []
    for x in inputs:
        torch.compiler.cudagraph_mark_step_begin()
        outputs.append(compiled(x).clone())
    assert not skipped()
    for x, y in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(y, model(x), **CLOSE)


@torch.no_grad()
def test_a_compiled_model_follows_the_number_of_tokens(skipped):
    model = _chain()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead", dynamic=True)
    for _ in range(3):
        for tokens in (7, 200, 33, 1000):
            (x,) = _inputs(tokens)
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x), model(x), **CLOSE)
    assert not skipped()


def _near(actual, expected):
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < 0.02, f"relative error {error:.3g}"


def _gradients(run, model, x, dy):
    """Gradients of the input and of all parameters; copies, since a graph's own are overwritten by its next run."""
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    run(x).backward(dy)
    return [x.grad.clone(), *(p.grad.clone() for p in model.parameters())]


def test_a_compiled_model_trains(skipped):
    model = _chain()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    steps = []
    for x, dy in zip(_inputs(200, 4), _inputs(200, 4), strict=True):
        torch.compiler.cudagraph_mark_step_begin()
        steps.append((x, dy, _gradients(compiled, model, x, dy)))
    assert not skipped()
    for x, dy, gradients in steps:
        for gradient, expected in zip(gradients, _gradients(model, model, x, dy), strict=True):
            _near(gradient, expected)


def _record(run, *inputs):
    """A graph of `run`, and its result; run before on another stream, as torch's documentation has it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(*inputs)
    return graph, result


@pytest.mark.parametrize("tokens", [1, 16, 200])
@pytest.mark.parametrize("block", [(64, 64), (128, 16), (32, 32)], ids=str)
@torch.no_grad()
def test_a_graph_of_many_layers_replays_with_other_inputs(block, tokens):
    model = _chain(24, block)
    (x,) = _inputs(tokens)
    graph, y = _record(model, x)
    for new in _inputs(tokens, 3):
        x.copy_(new)
        graph.replay()
        assert torch.equal(y, model(x))


@torch.no_grad()
def test_graphs_may_be_replayed_in_any_order_and_at_once():
    """Recorded on one stream, they share nothing that the kernels write."""
    models = [_chain(8) for _ in range(2)]
    inputs = _inputs(1, 2)
    graphs, results = zip(*(_record(m, x) for m, x in zip(models, inputs, strict=True)), strict=True)
    expected = [model(x) for model, x in zip(models, inputs, strict=True)]
    for graph, result, correct in reversed(list(zip(graphs, results, expected, strict=True))):
        graph.replay()
        assert torch.equal(result, correct)
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(50):
        for result in results:
            result.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for result, correct in zip(results, expected, strict=True):
            assert torch.equal(result, correct)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="only the Hopper kernels need a work list",
)
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@torch.no_grad()
def test_a_layer_that_never_ran_is_not_recorded():
    layer, (x,) = _chain(1), _inputs(200)
    with pytest.raises(SparsifyError, match="run the model once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer(x)
    graph, y = _record(layer, x)  # and nothing is left behind
    graph.replay()
    assert torch.equal(y, layer(x))


def test_forward_and_backward_as_graphs():
    model, (x, dy) = _chain(), _inputs(200, 2)
    expected = _gradients(model, model, x, dy)
    model.zero_grad(set_to_none=True)
    # It replaces the forward method of the model by one that replays.
    graphed = torch.cuda.make_graphed_callables(model, (torch.randn_like(x).requires_grad_(),))
    for gradient, correct in zip(_gradients(graphed, model, x, dy), expected, strict=True):
        _near(gradient, correct)


@torch.no_grad()
def test_autocast_inside_a_compiled_model(skipped):
    model = _chain().float()
    (x,) = (t.float() for t in _inputs(200))

    def run(x):
        with torch.autocast(DEVICE, dtype=DTYPE):
            return model(x)

    torch.testing.assert_close(torch.compile(run, fullgraph=True)(x), run(x), **CLOSE)


def test_an_exported_model_runs_for_any_number_of_tokens():
    model = _decoder()
    sizes = ({1: Dim("tokens", min=2, max=4096)},)
    program = torch.export.export(model, tuple(_inputs(10)), dynamic_shapes=sizes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    with torch.no_grad():
        for tokens in (3, 300):
            (x,) = _inputs(tokens)
            torch.testing.assert_close(loaded(x), model(x), **CLOSE)

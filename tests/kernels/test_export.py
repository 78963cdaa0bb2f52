"""Whole models of block-sparse layers under `torch.export` and `torch.compile`."""

import io
import subprocess
import sys

import pytest
import torch
from torch.export import Dim

from tests.kernels.decoder import decoder, sparse_linear

ANY_SIZE = ({0: Dim("batch", min=1, max=64), 1: Dim("tokens", min=2, max=512)},)


def _operators(program):
    return [str(node.target) for node in program.graph.nodes if "sparsify" in str(node.target)]


@pytest.mark.parametrize(
    ("strict", "sizes"),
    [(False, None), (False, ANY_SIZE), (True, ANY_SIZE)],
    ids=["fixed-relaxed", "dynamic-relaxed", "dynamic-strict"],
)
def test_an_exported_model_survives_saving_and_loading(strict, sizes):
    model = decoder(layers=1)
    x = torch.randn(2, 10, 96)
    program = torch.export.export(model, (x,), dynamic_shapes=sizes, strict=strict)
    assert len(_operators(program)) == 6  # whole products: nothing was traced into
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    other = torch.randn(2, 10, 96) if sizes is None else torch.randn(5, 33, 96)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module()(other), model(other))
        torch.testing.assert_close(loaded.run_decompositions().module()(other), model(other))


def test_an_exported_model_keeps_dtype_and_autocast():
    model = decoder(layers=1).bfloat16()
    x = torch.randn(2, 10, 96, dtype=torch.bfloat16)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))

    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = sparse_linear(64, 96, (16, 16), bias=True)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.layer(x)

    mixed = Mixed().eval()
    program = torch.export.export(mixed, (x.float(),))
    y = program.module()(x.float())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, mixed(x.float()))


def test_an_exported_layer_can_be_trained():
    layer = sparse_linear(70, 100, (16, 32), bias=True)
    x = torch.randn(9, 100)
    exported = torch.export.export(layer, (x,)).module()
    exported(x).square().sum().backward()
    layer(x).square().sum().backward()
    torch.testing.assert_close(exported.get_parameter("weight").grad, layer.weight.grad)
    torch.testing.assert_close(exported.get_parameter("bias").grad, layer.bias.grad)


def test_a_process_that_only_loads_needs_the_operators_alone(tmp_path):
    layer = sparse_linear(70, 100, (16, 32), bias=True).eval()
    x = torch.randn(9, 100)
    torch.export.save(torch.export.export(layer, (x,)), tmp_path / "layer.pt2")
    torch.save((x, layer(x).detach()), tmp_path / "expected.pt")
    code = (
        "import sys, torch, sparsify.kernels.linear.ops; folder = sys.argv[1];"
        "x, expected = torch.load(folder + '/expected.pt');"
        "program = torch.export.load(folder + '/layer.pt2');"
        "torch.testing.assert_close(program.module()(x), expected);"
        "assert 'sparsify.layers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.fixture(scope="module")
def inductor_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("inductor_cache")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_a_compiled_model_follows_the_number_of_tokens(mode, dynamic):
    model = decoder(layers=1)
    compiled = torch.compile(model, fullgraph=True, mode=mode, dynamic=dynamic)
    with torch.no_grad():
        for tokens in (9, 17, 2, 33):
            x = torch.randn(2, tokens, 96)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("inductor_cache")
def test_a_compiled_model_trains():
    model = decoder(layers=1)
    compiled = torch.compile(model, fullgraph=True)
    x, grads = torch.randn(2, 12, 96), {}
    for name, run in (("eager", model), ("compiled", compiled)):
        model.zero_grad()
        run(x).square().mean().backward()
        grads[name] = {key: p.grad.clone() for key, p in model.named_parameters()}
    for key, grad in grads["eager"].items():
        torch.testing.assert_close(grads["compiled"][key], grad, rtol=1e-4, atol=1e-5)

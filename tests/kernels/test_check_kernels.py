"""The script that runs under NVIDIA's compute-sanitizer, on kernels that the CPU can run."""

import pytest
import torch

import check_kernels
from sparsify.kernels import dispatch
from sparsify.kernels.linear import reference


@pytest.fixture
def listed(monkeypatch):
    """Makes the given modules the kernels of this machine."""
    monkeypatch.setattr(check_kernels, "BLOCKS", ((32, 32), (64, 16)))
    monkeypatch.setattr(check_kernels, "few_programs", lambda kernel: None)

    def use(*functions):
        found = {function.__name__: function for function in functions}
        names = [dispatch.Candidate(name) for name in found]
        monkeypatch.setattr(dispatch, "candidates", lambda op, *_: names)
        monkeypatch.setattr(
            dispatch, "load", lambda candidate, op: lambda *args: found[candidate.kernel](op, *args)
        )

    return use


def good(op, *arguments):
    return getattr(reference, op)(*arguments)


def forgetful(op, *arguments):
    result = good(op, *arguments)
    result[-1] = float("nan")
    return result


def test_all_products_run_and_are_compared(listed, capsys):
    listed(good)
    assert check_kernels.run("", "cpu") == 0
    printed = capsys.readouterr().out
    assert all(f" {op} " in printed for op in ("dsd", "dds", "sdd", "gated"))
    assert "float32" in printed and "1 kernels ran: good; 0 results wrong" in printed


def test_wrong_results_are_counted(listed, capsys):
    listed(good, forgetful)
    assert check_kernels.run("forget", "cpu") == len(list(check_kernels.products("cpu")))
    assert "ok" not in capsys.readouterr().out.replace("tokens", "")


def test_persistent_kernels_get_few_programs(monkeypatch):
    class Kernel:
        multiprocessors = None

    monkeypatch.setattr(check_kernels, "import_module", lambda name: Kernel)
    check_kernels.few_programs("kernel")
    assert Kernel.multiprocessors("cuda") == check_kernels.PROGRAMS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["check_kernels.py"])
    assert check_kernels.main() == 2
    assert "no CUDA GPU" in capsys.readouterr().err

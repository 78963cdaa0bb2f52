"""Measurements: kept in files that survive damage and company, and asked for what was never measured exactly."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsify.errors import OutputError
from sparsify.kernels import tuning, tuning_files
from sparsify.kernels.tuning_files import VERSION, Candidate, Entry, device_name, read, user_file, write

CPU = torch.device("cpu")
A, B = Candidate("triton_decode"), Candidate("hopper_linear", (("tile", 256),))


def entry(
    tokens=256, sparse=50.0, density=0.5, shape=(1024, 512), dense=100.0, dtype="bfloat16", op="dsd"
) -> Entry:
    times = sparse if isinstance(sparse, dict) else {A: sparse}
    return Entry(op, dtype, (64, 64), shape, density, tokens, dense, times)


def lookup(table, shape=(1024, 512), density: float | None = 0.5, tokens=256, dtype="bfloat16", op="dsd"):
    return table.lookup(op, dtype, (64, 64), shape, density, tokens)


def speedup(table, density=0.5, tokens=256, shape=(1024, 512), dtype="bfloat16"):
    return table.speedup("dsd", dtype, (64, 64), shape, density, tokens)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.forget()
    yield tmp_path / "sparsify" / "tuning"
    tuning.forget()


class TestLookup:
    def test_ranks_by_time(self):
        assert lookup(tuning.Table([entry(sparse={A: 30, B: 20})])) == [B, A]

    def test_nothing_near_is_nothing(self):
        table = tuning.Table([entry()])
        assert lookup(table)
        assert not lookup(table, shape=(4096, 512))
        assert not lookup(table, shape=(1024, 200))
        assert not lookup(table, density=0.1)
        assert not lookup(table, tokens=32)
        assert not lookup(table, tokens=2048)
        assert not lookup(table, dtype="float32")
        assert not lookup(table, op="dds")
        assert not table.lookup("dsd", "bfloat16", (64, 32), (1024, 512), 0.5, 256)

    def test_a_factor_of_two_is_near(self):
        table = tuning.Table([entry()])
        assert lookup(table, shape=(2048, 256), density=0.25, tokens=512)
        assert lookup(table, density=None)

    def test_the_nearest_weight_decides(self):
        table = tuning.Table(
            [entry(sparse={A: 9}, density=0.5), entry(sparse={B: 9}, density=0.25), entry(shape=(2000, 512))]
        )
        assert lookup(table, density=0.45) == [A]
        assert lookup(table, density=0.28) == [B]

    def test_two_token_counts_are_weighed(self):
        table = tuning.Table([entry(16, {A: 10, B: 18}), entry(64, {A: 25, B: 19})])
        assert [lookup(table, tokens=m)[0] for m in (8, 16, 24, 48, 64, 128)] == [A, A, A, B, B, B]

    def test_far_from_measured_token_counts_nothing_is_chosen(self):
        table = tuning.Table([entry(16, {A: 10, B: 18}), entry(256, {A: 40, B: 20})])
        assert [lookup(table, tokens=m)[:1] for m in (7, 16, 32, 64, 128, 513)] == [[], [A], [A], [], [B], []]

    def test_what_lost_by_far_counts_as_that(self):
        # At 64 tokens A is not listed: at least half as slow again as B.
        table = tuning.Table([entry(16, {A: 10, B: 11}), entry(64, {B: 20})])
        assert [lookup(table, tokens=m)[0] for m in (16, 17, 32, 64)] == [A, A, B, B]

    def test_half_precisions_share_measurements(self):
        assert lookup(tuning.Table([entry()]), dtype="float16") == [A]
        both = tuning.Table([entry(), entry(dtype="float16", sparse={B: 1})])
        assert lookup(both, dtype="float16") == [B]

    def test_many_tokens_are_like_the_most_measured(self):
        table = tuning.Table([entry(2048)])
        assert lookup(table, tokens=100_000) == [A]


class TestSpeedup:
    def test_is_dense_over_the_best(self):
        assert speedup(tuning.Table([entry(sparse={A: 50, B: 25})])) == pytest.approx(4)

    def test_between_densities_time_is_linear(self):
        table = tuning.Table([entry(density=0.5, sparse=60), entry(density=0.25, sparse=40)])
        assert speedup(table, 0.375) == pytest.approx(2)
        assert speedup(table, 0.75) == pytest.approx(100 / 80)
        assert speedup(table, 1.0) == pytest.approx(1)

    def test_below_the_least_density_time_falls_no_further(self):
        table = tuning.Table([entry(density=0.5, sparse=60), entry(density=0.1, sparse=20)])
        assert speedup(table, 0.01) == pytest.approx(5)

    def test_a_loss_far_away_predicts_nothing(self):
        table = tuning.Table([entry(density=0.5, sparse=150)])
        assert speedup(table, 0.3) == pytest.approx(100 / 150)
        assert speedup(table, 0.05) is None

    def test_one_density_alone_reaches_upwards_in_proportion(self):
        table = tuning.Table([entry(density=0.4, sparse=40)])
        assert speedup(table, 0.6) == pytest.approx(100 / 60)
        assert speedup(table, 0.9) is None

    def test_noise_between_close_densities_is_not_extrapolated(self):
        table = tuning.Table([entry(density=0.40, sparse=40), entry(density=0.42, sparse=60)])
        assert speedup(table, 0.5) == pytest.approx(100 / (60 * 0.5 / 0.42))

    def test_between_token_counts_time_is_geometric(self):
        table = tuning.Table([entry(16, 40, dense=40), entry(256, 40, dense=160)])
        assert speedup(table, tokens=64) == pytest.approx(2)
        assert speedup(table, tokens=1) is None

    def test_another_shape_serves_if_it_is_near(self):
        table = tuning.Table([entry(shape=(1024, 512), sparse=50), entry(shape=(2048, 512), sparse=25)])
        assert speedup(table, shape=(1100, 512)) == pytest.approx(2)
        assert speedup(table, shape=(1900, 512)) == pytest.approx(4)
        assert speedup(table, shape=(64, 64)) is None


class TestFiles:
    def test_round_trip(self, tmp_path):
        entries = [entry(tokens, {A: 3.25, B: 7.5}) for tokens in (1, 256)]
        write(tmp_path / "a" / "t.json", entries, {"device": "a machine"})
        assert read(tmp_path / "a" / "t.json") == entries
        document = json.loads((tmp_path / "a" / "t.json").read_text())
        assert (document["version"], document["device"]) == (VERSION, "a machine")
        assert document["entries"][0]["sparse_us"] == {"triton_decode": 3.25, "hopper_linear tile=256": 7.5}
        assert [file.name for file in (tmp_path / "a").iterdir()] == ["t.json"]

    def test_what_is_there_stays_unless_it_is_measured_anew(self, tmp_path):
        file = tmp_path / "t.json"
        write(file, [entry(1), entry(256)], {})
        write(file, [entry(256, 25.0), entry(512)], {})
        assert {e.tokens: e.times[A] for e in read(file)} == {1: 50.0, 256: 25.0, 512: 50.0}

    @pytest.mark.parametrize(
        "text",
        [
            "", "{", "[]", "null", "{}", '{"version": 99, "entries": []}', f'{{"version": {VERSION}}}',
            f'{{"version": {VERSION}, "entries": [{{"op": "dsd"}}]}}', f'{{"version": {VERSION}, "entries": [7]}}',
            "\x00\x01",
        ],
    )  # fmt: skip
    def test_a_damaged_file_is_none_and_says_so_once(self, text, tmp_path, caplog):
        (tmp_path / "t.json").write_text(text)
        with caplog.at_level(logging.WARNING, "sparsify.kernels"):
            assert read(tmp_path / "t.json") == []
        assert len(caplog.messages) == 1 and "are not used" in caplog.messages[0]
        write(tmp_path / "t.json", [entry()], {})
        assert read(tmp_path / "t.json") == [entry()]

    @pytest.mark.parametrize(
        "wrong", [{"dense": 0.0}, {"dense": float("nan")}, {"sparse": {}}, {"density": 1.5}, {"sparse": -1.0}]
    )
    def test_impossible_numbers_are_damage(self, wrong, tmp_path):
        write(tmp_path / "t.json", [entry(**wrong)], {})
        assert read(tmp_path / "t.json") == []

    def test_a_missing_file_is_none_in_silence(self, tmp_path, caplog):
        assert read(tmp_path / "t.json") == [] and not caplog.messages

    def test_an_unwritable_place_is_named(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match=r"cannot write .*file/t\.json"):
            write(tmp_path / "file" / "t.json", [entry()], {})

    def test_processes_at_once_lose_nothing(self, tmp_path):
        program = (
            "import sys\n"
            "from pathlib import Path\n"
            "from sparsify.kernels.tuning_files import Candidate, Entry, write\n"
            "who, file = int(sys.argv[1]), Path(sys.argv[2])\n"
            "for step in range(20):\n"
            "    times = {Candidate('reference'): 1.0}\n"
            "    write(file, [Entry('dsd', 'float32', (8, 8), (who, 8), 0.5, step + 1, 1.0, times)], {})\n"
        )
        root = Path(__file__).resolve().parents[2]
        environment = os.environ | {"PYTHONPATH": str(root)}
        command = [sys.executable, "-c", program]
        running = [
            subprocess.Popen([*command, str(who), str(tmp_path / "t.json")], env=environment)
            for who in (1, 2)
        ]
        assert [process.wait() for process in running] == [0, 0]
        assert len(read(tmp_path / "t.json")) == 40


class TestMachine:
    def test_the_cache_follows_the_environment(self, cache, monkeypatch):
        assert user_file("x") == cache / "x.json"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification tells to ignore
        monkeypatch.setenv("HOME", "/home/someone")
        assert user_file("x") == Path("/home/someone/.cache/sparsify/tuning/x.json")

    def test_a_cpu_is_named_with_its_threads(self, monkeypatch):
        monkeypatch.setattr(tuning_files, "cpu_name", lambda: "ACME(R) CPU @ 2.0 GHz")
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        assert device_name(CPU) == "acme-r-cpu-2-0-ghz-3-threads"

    def test_own_measurements_win_over_shipped_ones(self, cache, tmp_path, monkeypatch):
        monkeypatch.setattr(tuning, "shipped_file", lambda name: tmp_path / "shipped.json")
        write(tmp_path / "shipped.json", [entry(256, 50.0), entry(1, 50.0)], {})
        assert tuning.speedup(CPU, torch.bfloat16, (64, 64), (1024, 512), 0.5, 256) == pytest.approx(2)
        write(user_file(device_name(CPU)), [entry(256, 20.0)], {})
        tuning.forget()
        assert tuning.speedup(CPU, torch.bfloat16, (64, 64), (1024, 512), 0.5, 256) == pytest.approx(5)
        assert tuning.speedup(CPU, torch.bfloat16, (64, 64), (1024, 512), 0.5, 1) == pytest.approx(2)
        assert tuning.lookup("dsd", CPU, torch.bfloat16, (64, 64), (1024, 512), 0.5, 256) == [A]

    def test_a_machine_that_was_never_measured_knows_nothing(self, cache):
        assert tuning.speedup(CPU, torch.float32, (64, 64), (1024, 512), 0.5, 256) is None
        assert tuning.lookup("dsd", CPU, torch.float32, (64, 64), (1024, 512), None, 256) == []

    def test_shipped_tables_can_be_read(self, caplog):
        for file in tuning_files.shipped_file("x").parent.glob("*.json"):
            assert read(file) and not caplog.messages

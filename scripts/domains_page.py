"""The page `docs/benchmarks/domains.md`, from the rows that `scripts/bench_domains.py` measured."""

from __future__ import annotations

from statistics import mean, median
from typing import Any

COMMAND = """python scripts/bench_domains.py --nab path/to/nab --interactions path/to/Video.txt \\
    --keywords path/to/kwt1-and-digits --mnist path/to/mnist --out docs/benchmarks"""
TITLES = {
    "anomaly": "Anomaly detection: a forecasting MLP on the Numenta Anomaly Benchmark",
    "recommendation": "Recommendation: SASRec on Amazon video games, its item table in blocks",
    "keywords": "Speech: the keyword transformer KWT-1 on spoken digits",
    "speech": "Speech: a small Whisper-shaped classifier on spoken digits",
    "images": "Images: a small ViT on MNIST",
    "whisper-encoder": "Speed of a Whisper-shaped encoder",
}
ABOUT = {
    "anomaly": "Average precision x 100 of the second half of each series; the first half trains the network, without "
    "labels, and sets its threshold. F1 counts alarms and windows. Chance would score {positives:.1f}. Latency is of "
    "a thousand series.",
    "recommendation": "NDCG@10 x 100 of each user's last item among all items (leave-one-out), without those the user "
    "had. Latency is of 64 users.",
    "keywords": "Accuracy in % on speakers who are in no training data; a seed is another third of the speakers. "
    "Pretrained on other words. Latency is of one second of sound.",
    "speech": "Accuracy in % on speakers who are in no training data; a seed is another third of the speakers. Trained "
    "from random weights on the other speakers' recordings and three moved, noisy copies of each, pruned by the recipe "
    "`speech_classification`. Latency is of one "
    "second of sound.",
    "images": "Accuracy in % on the test pictures, by which nothing was chosen; trained from random weights, pruned by "
    "the recipe `vit_classification`. Latency is of one picture.",
    "whisper-encoder": "Random weights and blocks, half a minute of sound, every linear layer of the encoder sparse: "
    "Whisper tiny's sizes on a CPU, small's on a GPU. Bytes are of weights and buffers in memory.",
}

# A second metric, and what it is called.
ALSO = {"anomaly": ("f1", "F1 x 100"), "recommendation": ("hr@10", "HR@10 in %")}


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The whole page, from rows in their order."""
    lines = [
        "# Four domains",
        "",
        "Made by `scripts/bench_domains.py`; do not edit. Mean over the seeds, in brackets lowest and highest. Bytes "
        "are of the weight files, latencies medians of both networks in turns. *Trained as long* is the dense network "
        "after as much more training as the sparse one has had: the fair comparison. How long and how fast networks "
        "train was set without the reported parts.",
        "",
        "```bash",
        COMMAND,
        "```",
    ]
    for domain, title in TITLES.items():
        found = [row for row in rows if row["domain"] == domain]
        if found:
            chance = found[0]["quality"].get("dense", {}).get("positives", 0)
            lines += ["", f"## {title}", "", ABOUT[domain].format(positives=100 * chance)]
        for place in dict.fromkeys((row["device"], row["scale"]) for row in found):
            own = [row for row in found if (row["device"], row["scale"]) == place]
            lines += ["", _machine(own), "", *_table(own)]
    return "\n".join(lines) + "\n"


def _machine(rows: list[dict[str, Any]]) -> str:
    environment = rows[-1]["environment"]
    where = (environment.get("gpu") or [None])[0] if rows[-1]["device"].startswith("cuda") else None
    threads = f"{environment['cpu']}, {environment['threads']} thread{'s' * (environment['threads'] > 1)}"
    share = "" if rows[-1]["scale"] == 1 else f"; {rows[-1]['scale']:g} of the training"
    busy = "; other work ran beside it, so times are rough" if rows[-1]["busy"] else ""
    return f"Measured on {where or threads}, torch {environment['versions']['torch']}{share}{busy}."


def _table(rows: list[dict[str, Any]]) -> list[str]:
    measured = rows[0]["metric"] is not None
    longer = any("dense_longer" in row["quality"] for row in rows)
    quality = ["dense", *(["trained as long"] if longer else []), "sparse"] if measured else []
    second, name = ALSO.get(rows[0]["domain"], ("", ""))
    quality += [f"{label} {name}" for label in quality if second]
    head = ["block", "removed", *quality, "dense MB", "sparse MB", "dense ms", "sparse ms"]
    head += ["seeds"] if measured else []
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * 1}{'---:|' * (len(head) - 1)}"]
    for case in dict.fromkeys((row["block"], row["sparsity"]) for row in rows):
        own = [row for row in rows if (row["block"], row["sparsity"]) == case]
        cells = [case[0], f"{case[1]:.0%}"]
        labels = ["dense", *(["dense_longer"] if longer else []), "sparse"] if measured else []
        for metric in (rows[0]["metric"], second):
            cells += [
                _range([100 * row["quality"][label][metric] for row in own]) for label in labels if metric
            ]
        cells += [f"{own[0]['costs'][name]['bytes'] / 1e6:.2f}" for name in ("dense", "sparse")]
        cells += [
            f"{median(row['costs'][name]['latency_ms'] for row in own):.2f}" for name in ("dense", "sparse")
        ]
        cells += [str(len(own))] if measured else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _range(values: list[float]) -> str:
    spread = f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"

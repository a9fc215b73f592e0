"""Writes the figures of README.md and docs/cuda.md from the files in bench/results.

python bench/readme.py [--check]     --check: only say whether it would change anything
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from cases import CELLS
from figures import PEERS, Row, beside_torch, duration, ours, ratio

ROOT = Path(__file__).parent.parent

# Of the grid, what the table of speed shows.
SIZES = [64, 256, 1024]
BATCHES = [1, 16]
GROUPS = {
    "inference": "inference, one layer, T = 100",
    "training": "a training step of the same",
    "streaming": "one step a call, layers and cells",
    "small": "small training steps: T = 10, B = 64, I = 1, H = 64, two layers",
    "half": "bfloat16 and float16",
    "float64": "float64",
    "packed": "PackedSequence",
    "projection": "an LSTM with proj_size: H = 512, P = 128, B = 16",
    "recompute": "training steps with recompute=True",
    "load": "8 threads on the cores, or other processes that load them",
    "sample": "a random sample of sizes, layers, directions and threads",
}
PACKAGES = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino", "JAX": "jax"}
PACKAGES["TensorFlow"] = "tensorflow-cpu"


def memory(results: dict[str, Any]) -> str:
    """The table of bench/results/memory.json."""
    sizes = ", ".join(f"{name} = {size}" for name, size in results["sizes"].items())
    lines = [
        f"  | MB, {sizes} (torch {results['torch']}) | peak, torch | peak, fastrnn "
        "| kept for backward, torch | fastrnn |",
        "  |---|---|---|---|---|",
    ]
    for row in results["bytes"]:
        values = [row[m][kind] / 2**20 for kind in ["peak", "saved"] for m in ["torch", "fastrnn"]]
        cells = " | ".join(f"{value:.0f}" for value in values)
        lines.append(f"  | {row['cell']} {row['dtype']} | {cells} |")
    return "\n".join(lines)


def times(found: dict[str, float] | None) -> str:
    return f"{found['median']:.2f}" if found else ""


def grid(rows: list[Row]) -> list[str]:
    """The table of the sizes above: our time and share, the peers' ratios, torch's in training."""
    by_place = {(row["group"], row["cell"], row["B"], row["H"]): row for row in rows}
    lines = [
        f"| | B | H | fastrnn | share | {' | '.join(PEERS)} | training: torch |",
        f"|---|---|---|---|---|{'---|' * len(PEERS)}---|",
    ]
    for cell in CELLS:
        for B in BATCHES:
            for H in SIZES:
                row = by_place.get(("inference", cell, B, H), {})
                step = by_place.get(("training", cell, B, H), {})
                own = ours(row)
                if own is None:
                    continue
                ratios = [times(ratio(row, peer)) for peer in PEERS]
                cells = [cell, str(B), str(H), duration(own), f"{row['share']:.0%}", *ratios]
                lines.append(f"| {' | '.join([*cells, times(ratio(step, 'torch'))])} |")
    return lines


def groups(rows: list[Row]) -> list[str]:
    """The table of what was measured beside torch."""
    lines = ["| torch's time / fastrnn's | rows | median | lowest | slower than torch |"]
    lines.append("|---|---|---|---|---|")
    for group, name in GROUPS.items():
        found = beside_torch(row for row in rows if row["group"] == group)
        if found:
            ratios = [f"{found[which]:.2f}" for which in ("median", "lowest")]
            cells = [name, str(found["rows"]), *ratios, str(found["slower"])]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


# Runs of bench/cpu.py before that of the table (--only inference --only training), newest first,
# and what of each stands in README.md: the groups that none before it has.
OLDER = {"sample": "The random sample", "half": "Those of 16 bits", "cpu": "All others"}


def with_older(results: dict[str, Any]) -> dict[str, Any]:
    """Results, and the rows of other groups from OLDER."""
    rows, older = list(results["rows"]), []
    for run, name in OLDER.items():
        own = json.loads((ROOT / f"bench/results/{run}.json").read_text())
        known = {row["group"] for row in rows}
        rows += [row for row in own["rows"] if row["group"] not in known]
        older.append(
            f"{name}: of a run of {own['date']}, with the instruction set {own['machine']['isa']} "
            f"([{run}.json](bench/results/{run}.json))."
        )
    return {**results, "rows": rows, "older": older}


def speed(results: dict[str, Any]) -> str:
    """The section on speed, of bench/results/grid.json and others."""
    rows, machine, versions = results["rows"], results["machine"], results["versions"]
    peers = ", ".join(f"{p} {versions[key]}" for p, key in PACKAGES.items() if key in versions)
    lines = [
        "## How fast",
        "",
        "![The peers' times over fastrnn's, by hidden size](bench/results/cpu.png)",
        "",
        "How many times as long as fastrnn the others take: above 1, fastrnn is faster. T = 100, "
        "I = H, float32,",
        f"two threads of an {machine['cpu']} ({machine['isa']}) whose sgemm does "
        f"{results['peak']['median'] / 1e9:.0f} GFLOP/s, of which `share` is reached.",
        f"torch {versions['torch']}{', ' + peers if peers else ''}; {results['date']}.",
        "",
        *grid(rows),
        "",
        "Beside torch alone, over all that [bench/cpu.py](bench/cpu.py) measures:",
        "",
        *groups(rows),
        "",
    ]
    sample = beside_torch(row for row in rows if row["group"] == "sample")
    if sample:
        lines += [
            f"Of the {sample['rows']} rows drawn at random fastrnn is slower than torch in "
            f"{sample['slower']}, in {sample['beyond']} of them by more",
            f"than the noise; the median ratio is {sample['median']:.2f}, the lowest "
            f"{sample['lowest']:.2f}.",
            "",
        ]
    lines += [
        "How the time of a call grows with [T](bench/results/growth_T.png), "
        "[B](bench/results/growth_B.png), [H](bench/results/growth_H.png)",
        "and [threads](bench/results/growth_threads.png), beside the slope one would expect.",
        "",
        "`make bench` measures some of it on your machine in under three minutes.",
        "Every row of the table is in [grid.json](bench/results/grid.json).",
    ]
    return "\n".join(lines + results.get("older", []))


def on_a_gpu(results: dict[str, Any]) -> str:
    """The section on a GPU, of bench/results/gpu.json."""
    rows = {
        (row["group"], row["cell"], row["dtype"], row["H"], row["B"]): row
        for row in results["rows"]
    }
    table = [
        "| | dtype | H | B | fastrnn | torch | in graphs: torch | stepwise | persistent "
        "| training: torch |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in ["LSTM", "GRU"]:
        for dtype in ["float16", "float32"]:
            for H in [64, 128, 256, 512, 1024, 2048]:
                for B in [1, 32, 64, 256]:
                    row = rows["inference", cell, dtype, H, B]
                    trained = rows["training", cell, dtype, H, B]
                    graphs = [
                        ratio(row, name) for name in ("torch in a graph", "fastrnn in a graph")
                    ]
                    cells = [cell, dtype, str(H), str(B), duration(ours(row))]
                    cells += [times(ratio(row, "torch"))]
                    cells += [times({"median": graphs[0]["median"] / graphs[1]["median"]})]
                    cells += [times(ratio(row, f"fastrnn {p}")) for p in ("stepwise", "persistent")]
                    table.append(f"| {' | '.join([*cells, times(ratio(trained, 'torch'))])} |")
    machine = results["machine"]
    return "\n".join(
        [
            f"{machine['gpu']}, torch {results['versions']['torch']}, CUDA {machine['cuda']},",
            f"cuDNN {machine['cudnn']}, {results['date']}: inference, and how many times as long",
            "torch's layer (cuDNN) takes; the same where both are replayed from a CUDA graph, that",
            "is the GPU's time alone; how many times as long ours takes when forced onto another",
            "path; and torch's for a training step. T = 100, I = H, float32 in TF32.",
            "",
            *table,
            "",
            "All rows are in [gpu.json](../bench/results/gpu.json), which",
            "[bench/gpu.py](../bench/gpu.py) wrote:",
            "",
            "![Times of cuDNN over those of fastrnn](../bench/results/gpu.png)",
        ]
    )


def counters(results: dict[str, Any]) -> str:
    """The table of bench/results/cuda_counters.json: float32, beside haste."""
    rows = {}
    for row in results["rows"]:
        if row["dtype"] == "float32":
            key = row["cell"], row["pass"], row["H"], row["B"]
            rows.setdefault(key, {})[row["path"]] = row
    lines = [
        "| | pass | H | B | launches: persistent | stepwise | haste "
        "| MB: persistent | stepwise | haste |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (cell, name, H, B), found in sorted(rows.items()):
        three = [found[path] for path in ("persistent", "stepwise", "beside") if path in found]
        cells = [cell, name, str(H), str(B), *(str(row["all_launches"]) for row in three)]
        cells += [f"{row['all_bytes'] / 2**20:.2f}" for row in three]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# What stands in which file, of which file of results.
PARTS = [
    ("README.md", "memory", "memory.json", lambda text: memory(json.loads(text))),
    ("README.md", "cpu", "grid.json", lambda text: speed(with_older(json.loads(text)))),
    ("docs/cuda.md", "gpu", "gpu.json", lambda text: on_a_gpu(json.loads(text))),
    (
        "docs/cuda.md",
        "counters",
        "cuda_counters.json",
        lambda text: counters(json.loads(text)),
    ),
]


def written(page: str, name: str, text: str) -> str:
    """A page with the text of a part in its place."""
    pattern = rf"(?<=<!-- {name} -->\n).*?(?= *<!-- end of {name} -->)"
    page, count = re.subn(pattern, lambda _: f"{text}\n", page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"there is no place for the figures of {name}")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if one is not up to date")
    args = parser.parse_args()
    for file, name, results, make in PARTS:
        source, path = ROOT / "bench/results" / results, ROOT / file
        if not source.exists():
            continue
        old = path.read_text()
        new = written(old, name, make(source.read_text()))
        if args.check and new != old:
            raise SystemExit(f"{file} is not what bench/results say: run bench/readme.py")
        path.write_text(new)


if __name__ == "__main__":
    main()

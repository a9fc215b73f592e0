"""Writes the figures of the pages from the files in bench/results.

python bench/readme.py [--check]     --check: only say whether it would change anything

A speedup is the other's time divided by fastrnn's: below 1, fastrnn is slower.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from figures import PEERS, Row, duration, label, ours, ratio, speedups

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"

# The groups of rows, in the order of README.md's tables.
CPU_GROUPS = {
    "inference": "inference: one layer, T = 100",
    "training": "training step: one layer, T = 100",
    "streaming": "one step per call: layers and cells, B = 1",
    "small": "small training step: T = 10, B = 64, I = 1, H = 64, two layers",
    "half": "bfloat16 and float16",
    "float64": "float64",
    "packed": "PackedSequence",
    "projection": "LSTM with proj_size: H = 512, P = 128, B = 16",
    "recompute": "training step with recompute=True",
    "load": "8 threads on 2 cores, or 2 other busy processes",
    "growth": "T, B, H or the threads varied, one at a time",
    "lopsided": "large networks, and one size far from the others",
    "sample": "random sizes, layers, directions and threads",
}
GPU_GROUPS = {
    "inference": "inference: every dtype, float32 as TF32",
    "training": "training step: every dtype, float32 as TF32",
    "full float32": "float32 without TF32",
    "streaming": "one step per call: layers and cells, B = 1",
    "bidirectional": "two directions: B = 32",
    "packed": "PackedSequence",
    "compiled": "short sequences: LSTM, T = 20, B = 32",
}
# What README.md calls the contestants of bench/cpu.py that are not libraries.
VARIANTS = {
    "fastrnn keeping gates": "fastrnn, recompute=False",
    "fastrnn float32": "fastrnn in float32",
}
PACKAGES = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino", "JAX": "jax"}
PACKAGES["TensorFlow"] = "tensorflow-cpu"
# The CPU's results; each has groups of its own.
CPU_RUNS = ["grid", "cpu", "half", "sample"]
# With AVX2, on another machine; lopsided.json is of that machine with AVX-512.
AVX2_RUNS = ["avx2"]


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a Markdown table."""
    head = list(head)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def times(found: dict[str, float] | None) -> str:
    return f"{found['median']:.2f}" if found else ""


# --- memory ---------------------------------------------------------------------------------------


def memory(results: dict[str, Any]) -> str:
    """The table of memory.json."""
    sizes = ", ".join(f"{name} = {results['rows'][0][name]}" for name in "TBIH")
    torch = results["versions"]["torch"]
    head = [f"MB, {sizes} (torch {torch})", "peak, torch", "peak, fastrnn"]
    rows = []
    for row in results["rows"]:
        values = [row[m][kind] / 2**20 for kind in ["peak", "saved"] for m in ["torch", "fastrnn"]]
        rows.append([f"{row['cell']} {row['dtype']}", *(f"{value:.0f}" for value in values)])
    return "\n".join(table([*head, "saved for backward, torch", "fastrnn"], rows))


def lopsided_memory(results: dict[str, Any]) -> str:
    """The peaks of memory_lopsided.json: fastrnn's and torch's, by size, cell and mode."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row in results["rows"]:
        sizes = [str(row[name]) for name in ("T", "B", "I", "H", "layers")]
        cells = found.setdefault((row["cell"], *sizes), [""] * 4)
        for i, module in enumerate(["fastrnn", "torch"]):
            column = i + 2 * (row["mode"] == "training")
            cells[column] = f"{row[module]['peak'] / 2**20:.0f}"
    head = ["peak in MB", "T", "B", "I", "H", "layers", "inference", "torch", "training", "torch"]
    return "\n".join(table(head, ([*key, *cells] for key, cells in found.items())))


# --- speed ----------------------------------------------------------------------------------------


def groups(rows: list[Row], names: dict[str, str], peers: Iterable[str]) -> list[list[str]]:
    """A line for each group and contestant: how many rows, their speedups, how many are below 1."""
    lines = []
    for group, name in names.items():
        chosen = [row for row in rows if row["group"] == group]
        for peer in peers:
            found = speedups(chosen, peer)
            if found:
                values = [f"{found[which]:.2f}" for which in ("median", "lowest")]
                shown = VARIANTS.get(peer, peer)
                lines.append([name, shown, str(found["rows"]), *values, str(found["slower"])])
                name = ""
    return lines


def sizes(row: Row, name: str) -> str:
    """The sizes of a row of a group: what the group's name leaves open."""
    inputs = f", I = {row['I']}" if row["I"] != row["H"] else ""
    text = f"B = {row['B']}{inputs}, H = {row['H']}"
    if name not in (CPU_GROUPS["sample"], CPU_GROUPS["lopsided"]):
        return text
    counts = [(row[key], key) for key in ("layers", "directions", "threads")]
    words = [f"{n} {key if n > 1 else key.removesuffix('s')}" for n, key in counts]
    return ", ".join([f"T = {row['T']}", text, *words])


def slower(rows: list[Row], names: dict[str, str], peers: Iterable[str]) -> list[list[str]]:
    """Every row with a speedup below 1, in lines of one group, contestant, cell and dtype."""
    found: dict[tuple[str, ...], list[str]] = {}
    for group, name in names.items():
        for peer in peers:
            for row in rows:
                speedup = ratio(row, peer)
                if row["group"] != group or not speedup or speedup["median"] >= 1:
                    continue
                layer = f"{row['cell']}, {row['mode']}, {row['dtype']}"
                where = name.partition(":")[0], VARIANTS.get(peer, peer), layer
                text = f"{sizes(row, name)}: **{speedup['median']:.2f}**"
                found.setdefault(where, []).append(text)
    return [[*where, "; ".join(texts)] for where, texts in found.items()]


def section(rows: list[Row], names: dict[str, str], peers: Iterable[str]) -> list[str]:
    """Both tables of one device."""
    head = ["", "compared with", "rows", "median speedup", "lowest", "rows below 1"]
    lines = table(head, groups(rows, names, peers))
    below = slower(rows, names, peers)
    if below:
        lines += ["", "Every row below 1:", ""]
        lines += table(["group", "compared with", "layer", "speedup"], below)
    return lines


def cpu_speed(runs: list[dict[str, Any]]) -> str:
    """README.md's tables for a CPU, of results of one machine."""
    machine, versions, peak = runs[0]["machine"], runs[0]["versions"], runs[0]["peak"]["median"]
    dates = ", ".join(sorted({run["date"] for run in runs}))
    rows = [row for run in runs for row in run["rows"]]
    timed = {peer for row in rows for peer in row.get("ratio", {})}
    shown = {p: key for p, key in PACKAGES.items() if p in timed and key in versions}
    libraries = ", ".join(f"{p} {versions[key]}" for p, key in shown.items())
    limited = ""
    if machine["isa"] != machine.get("widest isa", machine["isa"]):
        limited = ", to which all are limited by environment variables"
    return "\n".join(
        [
            f"{machine['cpu']} ({machine['isa']}{limited}), two threads,",
            f"sgemm at {peak / 1e9:.0f} GFLOP/s.",
            "I = H and float32 unless said otherwise.",
            f"torch {versions['torch']}{', ' + libraries if libraries else ''}; {dates}.",
            "",
            *section(rows, CPU_GROUPS, [*PEERS, *VARIANTS]),
        ]
    )


def gpu_speed(results: dict[str, Any]) -> str:
    """README.md's tables for a GPU, of gpu.json."""
    machine = results["machine"]
    return "\n".join(
        [
            f"{machine['gpu']}, torch {results['versions']['torch']} (its layers run on cuDNN "
            f"{machine['cudnn']}), CUDA {machine['cuda']};",
            f"{results['date']}. T = 100 and I = H unless said otherwise.",
            "",
            *section(results["rows"], GPU_GROUPS, ["torch"]),
        ]
    )


def cpu_grid(results: dict[str, Any]) -> str:
    """The table of grid.json: fastrnn's time and share of the peak, and all speedups."""
    rows = results["rows"]
    by_place = {(row["group"], row["cell"], row["B"], row["H"]): row for row in rows}
    lines = []
    for group, cell, B, H in by_place:
        row = by_place[group, cell, B, H]
        own = ours(row)
        if group == "inference" and own is not None:
            step = by_place.get(("training", cell, B, H), {})
            values = [times(ratio(row, peer)) for peer in PEERS]
            line = [cell, str(B), str(H), duration(own), f"{row['share']:.0%}", *values]
            lines.append([*line, times(ratio(step, "torch"))])
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    lines.sort(key=lambda line: (cells.index(line[0]), int(line[1]), int(line[2])))
    head = ["", "B", "H", "fastrnn", "share", *PEERS, "training: torch"]
    # Without the peers that were not measured.
    kept = [i for i in range(len(head)) if any(line[i] for line in lines)]
    return "\n".join(table([head[i] for i in kept], [[line[i] for i in kept] for line in lines]))


def lopsided(wide: dict[str, Any], avx2: dict[str, Any]) -> str:
    """The rows of that group: speedups over torch with each instruction set."""
    runs = {run["machine"]["isa"]: run for run in (wide, avx2)}
    found: dict[tuple[str, ...], list[str]] = {}
    for i, run in enumerate(runs.values()):
        for row in run["rows"]:
            if row["group"] == "lopsided":
                sizes = [str(row[name]) for name in ("T", "B", "I", "H", "layers")]
                cells = found.setdefault((row["cell"], *sizes), [""] * 4)
                cells[2 * i + (row["mode"] == "training")] = times(ratio(row, "torch"))
    head = ["", "T", "B", "I", "H", "layers"]
    head += [f"{isa}: {mode}" for isa in runs for mode in ("inference", "training")]
    return "\n".join(table(head, ([*key, *cells] for key, cells in found.items())))


def busy(results: dict[str, Any]) -> str:
    """The median calls of busy.json."""
    head = ["", "other processes", "fastrnn", "fastrnn, one thread", "torch", "ONNX Runtime"]
    lines = []
    for row in results["rows"]:
        processes = f"{row['beside']} {row['program']}" if row["beside"] else "none"
        found = row["contestants"]
        medians = [duration(found[n]["median"]) if n in found else "" for n in head[2:]]
        lines.append([label(row | {"beside": 0}), processes, *medians])
    machine = results["machine"]
    first = f"{machine['cpu']} ({machine['isa']}), two threads, median calls:"
    return "\n".join([first, "", *table(head, lines)])


def own_cells(results: dict[str, Any]) -> str:
    """The speedups of cells.json."""
    names = ["built-in", "loop", "compiled loop", "jax", "xlstm"]
    lines = []
    for row in results["rows"]:
        sizes = [str(row[name]) for name in ("B", "H")]
        ratios = [times(row["ratio"].get(name)) for name in names]
        lines.append([row["cell"], row["mode"], *sizes, *ratios])
    machine = results["machine"]
    first = f"{machine['cpu']} ({machine['isa']}), two threads, T = 100, I = H, float32:"
    head = ["", "", "B", "H", "built-in", "Python loop", "compiled by inductor", "JAX", "xlstm"]
    return "\n".join([first, "", *table(head, lines)])


def resets(results: dict[str, Any]) -> str:
    """The speedups of resets.json."""
    lines = []
    for row in results["rows"]:
        sizes = [str(row[name]) for name in ("B", "H")]
        ratios = [times(row["ratio"].get(name)) for name in ("without", "loop", "parts", "packed")]
        lines.append([row["cut"], row["mode"], *sizes, *ratios])
    machine = results["machine"]
    first = f"{machine['cpu']} ({machine['isa']}), two threads, LSTM, T = 128, I = H, float32:"
    head = ["", "", "B", "H", "without", "loop", "padded parts", "packed by torch"]
    return "\n".join([first, "", *table(head, lines)])


def gpu_grid(results: dict[str, Any]) -> str:
    """docs/cuda.md's table, of gpu.json."""
    rows = {
        (row["group"], row["cell"], row["dtype"], row["H"], row["B"]): row
        for row in results["rows"]
    }
    head = ["", "dtype", "H", "B", "fastrnn", "torch", "in graphs: torch", "stepwise"]
    lines = []
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
                    lines.append([*cells, times(ratio(trained, "torch"))])
    machine = results["machine"]
    return "\n".join(
        [
            f"{machine['gpu']}, torch {results['versions']['torch']}, CUDA {machine['cuda']},",
            f"cuDNN {machine['cudnn']}, {results['date']}. T = 100, I = H, float32 in TF32.",
            "Columns: fastrnn's time for inference; its speedup over torch's layer (cuDNN); the",
            "same where both are replayed from a CUDA graph, which is the GPU's time alone; its",
            "speedup over itself when forced onto another path; and over torch in a training step.",
            "",
            *table([*head, "persistent", "training: torch"], lines),
            "",
            "All rows are in [gpu.json](../bench/results/gpu.json), written by",
            "[bench/gpu.py](../bench/gpu.py):",
            "",
            "![Speedup over cuDNN](../bench/results/gpu.png)",
        ]
    )


def counters(results: dict[str, Any]) -> str:
    """The table of cuda_counters.json: float32, compared with haste."""
    rows: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in results["rows"]:
        if row["dtype"] == "float32":
            key = row["cell"], row["pass"], row["H"], row["B"]
            rows.setdefault(key, {})[row["path"]] = row
    head = ["", "pass", "H", "B", "launches: persistent", "stepwise", "haste"]
    lines = []
    for (cell, name, H, B), found in sorted(rows.items()):
        three = [found[path] for path in ("persistent", "stepwise", "beside") if path in found]
        cells = [cell, name, str(H), str(B), *(str(row["all_launches"]) for row in three)]
        lines.append([*cells, *(f"{row['all_bytes'] / 2**20:.2f}" for row in three)])
    return "\n".join(table([*head, "MB: persistent", "stepwise", "haste"], lines))


def parts() -> list[tuple[str, str, str]]:
    """Every page that has figures, the name of their place in it, and the text."""
    runs, gpu = [load(name) for name in CPU_RUNS], load("gpu")
    avx2 = [load(name) for name in AVX2_RUNS]
    return [
        ("README.md", "cpu", cpu_speed(runs)),
        ("README.md", "avx2", cpu_speed(avx2)),
        ("README.md", "gpu", gpu_speed(gpu)),
        ("docs/benchmarks.md", "grid", cpu_grid(runs[0])),
        ("docs/benchmarks.md", "grid of avx2", cpu_grid(avx2[0])),
        ("docs/benchmarks.md", "lopsided", lopsided(load("lopsided"), avx2[0])),
        ("docs/cpu.md", "busy", busy(load("busy"))),
        ("docs/swapping.md", "resets", resets(load("resets"))),
        ("docs/swapping.md", "memory", memory(load("memory"))),
        ("docs/benchmarks.md", "lopsided memory", lopsided_memory(load("memory_lopsided"))),
        ("docs/cells.md", "own cells", own_cells(load("cells"))),
        ("docs/cuda.md", "gpu", gpu_grid(gpu)),
        ("docs/cuda.md", "counters", counters(load("cuda_counters"))),
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
    for file, name, text in parts():
        path = ROOT / file
        old = path.read_text()
        new = written(old, name, text)
        if args.check and new != old:
            raise SystemExit(f"{file} differs from bench/results: run bench/readme.py")
        path.write_text(new)


if __name__ == "__main__":
    main()

"""Trains a recurrent cell of one's own and an LSTM on the data of tag_sequence.py.

    f = sigmoid(x_f + r_f)    g = tanh(x_g + r_g)    h_t = f h_{t-1} + (1 - f) g

The update gate RNN (Collins, Sohl-Dickstein and Sussillo 2017, arXiv:1611.09913): two gates
instead of an LSTM's four, so half its weights in the layer. Both models tag every word of a
sentence, forwards and backwards, with the same number of units.

    python examples/own_cell.py                 # two minutes
    python examples/own_cell.py --both-times    # also times a step with a Python loop of the cell
"""

from __future__ import annotations

import argparse
import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

import fastrnn

if __package__:
    from . import common, tag_sequence
else:  # run as a script, which puts this folder, not the one above it, on the path
    import common
    import tag_sequence


@fastrnn.cell(gates=("f", "g"))
def update_gate(x: Any, r: Any, h: Tensor) -> Tensor:
    f = torch.sigmoid(x.f + r.f)
    g = torch.tanh(x.g + r.g)
    return f * h + (1 - f) * g


class Loop(nn.Module):
    """The bidirectional layer of that cell for a PackedSequence, as a loop in Python.

    Same parameters as `update_gate.layer`; torch's autograd differentiates it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.layer = update_gate.layer(*args, **kwargs)

    def forward(self, packed: nn.utils.rnn.PackedSequence) -> tuple[Any, Tensor]:
        x, sizes, order, back = packed
        layer = self.layer
        zeros = x.new_zeros(2, int(sizes[0]), layer.hidden_size)
        output, h_n, _ = fastrnn.reference.run(
            update_gate.key, x, zeros, None, list(layer.parameters()), sizes,
            has_biases=True, num_layers=1, bidirectional=True,
        )  # fmt: skip
        return nn.utils.rnn.PackedSequence(output, sizes, order, back), h_n


#: What tag_sequence.Tagger takes its layer from.
LAYERS = {
    "update_gate": types.SimpleNamespace(GRU=update_gate.layer),
    "LSTM": types.SimpleNamespace(GRU=fastrnn.LSTM),
}


def curve(
    model: tag_sequence.Tagger, data: dict[str, list[Any]], epochs: int, description: str
) -> list[tuple[float, float]]:
    """Validation loss, and the share of words that are tagged right, after every epoch."""
    from rich.console import Console
    from rich.progress import track

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    found = []
    for _ in track(range(epochs), description, console=Console(stderr=True)):
        model.train()
        for rows in torch.randperm(len(data["training"])).split(tag_sequence.BATCH):
            batch = tag_sequence.collate([data["training"][row] for row in rows])
            tag_sequence.step(model, optimizer, batch)
        for group in optimizer.param_groups:
            group["lr"] *= tag_sequence.DECAY
        model.eval()
        logits, tags = tag_sequence.predict(model, data["validation"])
        right = (logits.argmax(1) == tags).float().mean().item()
        found.append((nn.functional.cross_entropy(logits, tags).item(), right))
    return found


def draw(curves: dict[str, list[tuple[float, float]]], to: Any) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, points in curves.items():
        epochs = range(1, len(points) + 1)
        panels[0].plot(epochs, [loss for loss, _ in points], "o-", label=name)
        panels[1].plot(epochs, [100 * right for _, right in points], "o-", label=name)
    panels[0].set(xlabel="epoch", ylabel="validation loss")
    panels[1].set(xlabel="epoch", ylabel="told right in validation, %")
    panels[0].legend()
    common.save_picture(figure, to)
    plt.close(figure)


def parse(argv: list[str] | None) -> tuple[common.Parser, argparse.Namespace]:
    parser = common.Parser(prog="own_cell.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=common.whole(0), default=0)
    parser.add_argument("--out", type=common.Path, default=common.OUT / "own_cell.png")
    parser.add_argument("--epochs", type=common.whole(1), default=6)
    parser.add_argument("--hidden", type=common.whole(1), default=96, help="units each way (96)")
    parser.add_argument("--every", type=common.whole(1), default=1, help="n-th sentence alone (1)")
    parser.add_argument("--both-times", action="store_true", help="of a step, and with a loop")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    try:
        import rich
        from rich.table import Table

        sentences = tag_sequence.corpus()
    except ImportError as error:
        parser.error(f"{error}; pip install 'fastrnn[demo]' brings what this example needs")
    common.check_picture(parser, args.out)
    tags = sorted({tag for sentence in sentences for tag in sentence.tags if tag})
    parts = tag_sequence.split(sentences[:: args.every])
    if not all(parts.values()):
        parser.error(f"--every: {args.every} leaves too few sentences")
    numbers = tag_sequence.Numbers(parts["training"], tags)
    data = {name: [numbers.of(sentence) for sentence in part] for name, part in parts.items()}

    def make(library: Any) -> tag_sequence.Tagger:
        torch.manual_seed(args.seed)
        first = tag_sequence.UNKNOWN + 1
        counts = [first + len(numbers.words), first + len(numbers.characters), len(tags)]
        return tag_sequence.Tagger(library, *counts, args.hidden)

    curves = {}
    table = Table("cell", title="After the last epoch")
    for column in ["weights of the layer", "validation loss", "told right"]:
        table.add_column(column, justify="right")
    for name, library in LAYERS.items():
        model = make(library)
        curves[name] = curve(model, data, args.epochs, name)
        loss, right = curves[name][-1]
        weights = sum(p.numel() for p in model.gru.parameters())
        table.add_row(name, str(weights), f"{loss:.3f}", f"{100 * right:.1f} %")
    rich.print(table)
    if args.both_times:
        rows = torch.arange(min(tag_sequence.BATCH, len(data["training"])))
        batch = tag_sequence.collate([data["training"][row] for row in rows])
        steps = {}
        for name, library in {**LAYERS, "loop": types.SimpleNamespace(GRU=Loop)}.items():
            model = make(library)
            optimizer = torch.optim.Adam(model.parameters())
            steps[name] = functools.partial(tag_sequence.step, model, optimizer, batch)
        rich.print(f"A training step: {common.in_words(common.step_times(steps))}")
    draw(curves, args.out)
    rich.print(f"Picture: {args.out}")


if __name__ == "__main__":
    main()

"""Trains the model of classify_text.py in several processes, with DistributedDataParallel.

Each process has a share of every batch, and all use the mean of their gradients, so that their
weights stay equal. gloo sums the gradients between CPUs.

    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py    # a minute or two
    python examples/train_ddp.py                                      # the same in one process
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

if __package__:
    from . import classify_text, common
else:  # run as a script, which puts this folder, not the one above it, on the path
    import classify_text
    import common


@contextlib.contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """The rank of this process and the number of processes: torchrun's, or only this one."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def shares(rows: int, rank: int, count: int) -> tuple[torch.Tensor, ...]:
    """The batches of one process in an epoch, in a new order for each epoch.

    All `count` processes have the same number of batches of the same sizes, so that the mean of
    their mean gradients is that of all rows. The few remaining rows are left out of this epoch.
    """
    seed = torch.randint(2**62, ())
    dist.broadcast(seed, src=0)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(int(seed)))
    # Other dropout masks in each process, determined by the state that rank 0 saves.
    torch.manual_seed(int(seed) + rank)
    own = order[: rows - rows % count].view(-1, count)[:, rank]
    return own.split(max(1, classify_text.BATCH // count))


def main(argv: list[str] | None = None) -> None:
    parser, args = classify_text.parse(argv, __file__, __doc__)
    try:
        import rich

        data = classify_text.load(parser, args.words)
    except ImportError as error:
        parser.error(f"{error}; pip install 'fastrnn[demo]' brings what this example needs")
    common.check_picture(parser, args.out)
    words, rows = data.words, len(data.parts["training"])

    with processes() as (rank, count):
        if rows < count:
            parser.error(f"--words: {rows} words to train on are too few for {count} processes")
        torch.manual_seed(args.seed)  # the same first weights everywhere
        model, optimizer = classify_text.make(args.layer, data.letters, args.hidden)
        parallel = DistributedDataParallel(model)
        steps, seconds = 0, 0.0

        def epoch() -> None:
            nonlocal steps, seconds
            batches = shares(rows, rank, count)
            start = time.perf_counter()
            classify_text.train(parallel, optimizer, words["training"], batches)
            seconds += time.perf_counter() - start
            steps += len(batches)

        def judge() -> float:
            return classify_text.loss(model, words["validation"])

        options = {name: getattr(args, name) for name in ("layer", "hidden", "words", "seed")}
        options["processes"] = count
        state = common.fit(parser, args, options, model, optimizer, epoch, judge, rank)
        if args.both_times:
            batch = words["training"].batch(shares(rows, rank, count)[0])

            def a_step(layer: str) -> Callable[[], None]:
                other, its_optimizer = classify_text.make(layer, data.letters, args.hidden)
                replica = DistributedDataParallel(other)
                return functools.partial(classify_text.step, replica, its_optimizer, batch)

            times = common.step_times({layer: a_step(layer) for layer in common.LIBRARIES})

    if rank == 0:
        test = words["test"]
        predicted = classify_text.predict(model, test).argmax(1)
        name = f"LSTM, {args.layer}, {count} process{'es' if count > 1 else ''}"
        right = {name: (predicted == test.languages).tolist()}
        classify_text.report(data, state, predicted, right, args.out)
        if steps:
            rich.print(f"{steps / seconds:.1f} steps a second")
        if args.both_times:
            rich.print(f"A training step of all processes: {common.in_words(times)}")


if __name__ == "__main__":
    main()

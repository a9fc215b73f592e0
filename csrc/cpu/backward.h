// The backward pass of one layer. Every thread of the team runs `backward` with its rank, which
// goes through chunks of steps, the last chunk first:
//
//     for each chunk of steps:
//         1. the thread's share of the time loop (backward_loop.h), which leaves the gate gradients
//            of the chunk's rows
//         2. all threads together, one direction after the other (gradients.h): what these gate
//            gradients add to the gradients of the input and of the weights
//
// As in the forward pass, a thread itself packs the weights that it uses in the time loop.
#pragma once
#include "backward_loop.h"
#include "gradients.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class Cell, class T, class S>
size_t backward_workspace(const BackwardTask& layer) {
    return BackwardPlan<Cell, T, Products<T, S>>(layer).size;
}

template <class Cell, class T, class S>
cpu::TileShape backward_tile(const BackwardTask& layer) {
    using P = Products<T, S>;
    const BackwardPlan<Cell, T, P> plan(layer);
    return tile_shape<P>(plan.hh, plan.unpacked_step ? "unpacked weights" : P::name);
}

template <class Cell, class T, class S>
void backward(const BackwardTask& layer, int rank) {
    static_assert(has_x_grads_first<Cell>(), "x_grad must be an order of 0, ..., gates - 1");
    using P = Products<T, S>;
    const BackwardPlan<Cell, T, P> plan(layer);
    [[maybe_unused]] const typename P::Registers registers;
    const Dimensions& d = layer.size;
    const int64_t threads = layer.team->partition.threads();
    if (layer.grad_input) {
        if (!plan.at_once)
            for (int i = 0; i < d.directions; ++i)
                pack_columns<P>(plan.ih, Span{0, plan.ih.count()}.part(rank, threads),
                                input_weights<Cell, S>(layer, i, plan.units), plan.direction[i].ih);
        if (plan.starts_from_zeros(layer)) {
            const Span mine = Span{0, layer.sequence.rows() * d.input}.part(rank, threads);
            memset(static_cast<T*>(layer.grad_input) + mine.first, 0, mine.size() * sizeof(T));
        }
    }
    const Share share(*layer.team, rank, layer.sequence, d.directions);
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
        for (int64_t i = share.directions.first; i < share.directions.last; ++i)
            BackwardLoop<Cell, T, S, P>(layer, plan, share, rank, i, chunk).run();
        layer.team->all.wait();
        for (int i = 0; i < d.directions; ++i) {
            Gradients<Cell, T, S, P> gradients(layer, plan, rank, i, chunk);
            gradients.input();
            gradients.weights();
            // Then the other direction adds to the same rows, and the next chunk overwrites these.
            layer.team->all.wait();
        }
    }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn

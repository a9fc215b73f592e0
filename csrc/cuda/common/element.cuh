// One element, a hidden unit of a row, at one step, forward and backward: what the kernels of every
// path compute once they have both products.
#pragma once
#include <string.h>

#include <utility>

#include "layer_arguments.h"
#include "math.cuh"

namespace fastrnn::cuda {

// A struct of 16-bit values with two of them in a register, to be kept where registers are scarce.
template <class T>
class Packed {
public:
    Packed() = default;
    __device__ __forceinline__ explicit Packed(const T& value) {
        memcpy(words_, &value, sizeof value);
        // Without this the compiler unpacks them at once.
        for (uint32_t& word : words_) asm("" : "+r"(word));
    }
    __device__ __forceinline__ T value() const {
        T value;
        memcpy(&value, words_, sizeof value);
        return value;
    }

private:
    uint32_t words_[(sizeof(T) + 3) / 4];
};

// The results of an element's step, as they are stored.
template <class Cell, class S>
struct ForwardOutputs {
    S saved[Cell::saved > 0 ? Cell::saved : 1], c, h;

    // Stores what backward reads, where it is kept. at: the row in the data.
    __device__ __forceinline__ void store_saved(const ForwardArrays& d, const LayerSize& z,
                                                int64_t at, int64_t unit) const {
        if (d.saved)
            for (int i = 0; i < Cell::saved; ++i)
                static_cast<S*>(d.saved)[(at * Cell::saved + i) * z.hidden + unit] = saved[i];
        if constexpr (Cell::has_c)
            if (d.kept_c) static_cast<S*>(d.kept_c)[at * z.c_stride + unit] = c;
    }
    __device__ __forceinline__ void store_output(const ForwardArrays& d, int64_t output_stride,
                                                 int64_t at, int64_t unit) const {
        static_cast<S*>(d.output)[at * output_stride + unit] = h;
        if (d.again) static_cast<S*>(d.again)[at * output_stride + unit] = h;
    }
};

// Applies the cell. x, r [G]: both products with their biases; c: c_{t-1}, set to c_t.
template <class Cell, class S>
__device__ __forceinline__ ForwardOutputs<Cell, S> forward_element(const Arithmetic<S>* x,
                                                                   const Arithmetic<S>* r,
                                                                   Arithmetic<S> h_prev,
                                                                   Arithmetic<S>& c) {
    using A = Arithmetic<S>;
    A h{}, c_next{}, saved[Cell::saved + 1];
    Cell::forward(x, r, h_prev, c, h, c_next, saved);
    if constexpr (Cell::has_c) c = c_next;
    ForwardOutputs<Cell, S> out{};
    for (int i = 0; i < Cell::saved; ++i) out.saved[i] = narrow<S>(saved[i]);
    out.c = narrow<S>(c), out.h = narrow<S>(h);
    return out;
}

// Where a row of a step is, backward.
struct BackwardRow {
    int64_t b;     // in the batch
    int64_t at;    // in the data
    int64_t prev;  // its row in the data one step earlier in the forward pass; -1 if this is its
                   // first step, so that the state before is h0, c0
    bool from_zeros = false;  // whether the state before is zeros instead
};

// Whether events [B], if there are any, have this one for row b.
__device__ __forceinline__ bool has_event(const uint8_t* events, int64_t b, Event event) {
    return events && events[b] == event;
}

// The row that starts at value `first` of an array; null, for zeros, if there is no array.
template <class S>
__device__ __forceinline__ const S* row_at(const void* array, int64_t first) {
    return array ? static_cast<const S*>(array) + first : nullptr;
}

// The row of h_{t-1}.
template <class S>
__device__ __forceinline__ const S* previous_h(const BackwardArrays& d, const LayerSize& z,
                                               const BackwardRow& row) {
    if (row.from_zeros) return nullptr;
    return row.prev < 0 ? row_at<S>(d.h0, row.b * z.recurrent)
                        : row_at<S>(d.output, row.prev * z.output_stride);
}

// What all states that were returned add to dL/dc_t. at: the row in the data.
template <class S>
__device__ __forceinline__ Arithmetic<S> gradient_of_c(const BackwardArrays& d, const LayerSize& z,
                                                       int64_t at, int64_t unit) {
    return load<S>(d.grad_c, at * z.grad_output_stride + unit);
}

// What an element's gate gradients are computed from, besides dh and dc: one value of each kind.
// They have the storage type, so that a kernel can prefetch them unconverted.
template <class Cell, class S>
struct BackwardInputs {
    enum Kind { grad_output = Cell::saved, h_prev, h, c = h + Cell::needs_h, c_prev, end };
    static constexpr int kinds = Cell::has_c ? end : c;

    S value[end];

    // A row's values of a kind. The kinds before the named ones are the saved values.
    static __device__ __forceinline__ const S* source(const BackwardArrays& d, const LayerSize& z,
                                                      const BackwardRow& row, int kind) {
        if (kind < Cell::saved) return row_at<S>(d.saved, (row.at * Cell::saved + kind) * z.hidden);
        if (kind == grad_output) return row_at<S>(d.grad_output, row.at * z.grad_output_stride);
        if (kind == h_prev)
            return Cell::needs_h_prev || d.prev ? previous_h<S>(d, z, row) : nullptr;
        if (Cell::needs_h && kind == h) return row_at<S>(d.output, row.at * z.output_stride);
        if (kind == c) return row_at<S>(d.kept_c, row.at * z.hidden);
        if (row.from_zeros) return nullptr;
        return row.prev < 0 ? row_at<S>(d.c0, row.b * z.hidden)
                            : row_at<S>(d.kept_c, row.prev * z.hidden);
    }

    // read(kind)
    template <class Read>
    __device__ __forceinline__ explicit BackwardInputs(Read read) {
#pragma unroll
        for (int kind = 0; kind < end; ++kind)
            value[kind] = kind < kinds ? read(kind) : narrow<S>(0);
    }

    // The value of a kind that not all cells have; 0 if this one has not.
    __device__ __forceinline__ Arithmetic<S> of(int kind, bool has) const {
        return has ? widen(value[kind]) : Arithmetic<S>{};
    }
};

// The gate gradients of an element, each of them once.
template <class Cell, class S>
struct BackwardOutputs {
    S dgates[Cell::grads];

    // The gradient of a gate of W_hh h + b_hh.
    __device__ __forceinline__ S of_h(int gate) const {
        return dgates[Cell::grads - Cell::gates + gate];
    }
    // Calls f(i, grad) for each stored gradient: the i-th is dgates[grad].
    template <class F>
    static __device__ __forceinline__ void for_each_stored(F f) {
        [&]<int... g>(std::integer_sequence<int, g...>) {
            (f(g, std::integral_constant<int, Cell::x_grad[g]>::value), ...);
        }(std::make_integer_sequence<int, Cell::gates>{});
        for (int i = Cell::gates; i < stored_gradients<Cell>; ++i)
            f(i, Cell::grads - stored_gradients<Cell> + i);
    }
    __device__ __forceinline__ void store(const BackwardArrays& d, int64_t hidden, int64_t at,
                                          int64_t unit) const {
        S* to = static_cast<S*>(d.dgates) + at * stored_gradients<Cell> * hidden + unit;
        for_each_stored([&](int, int grad) { *to = dgates[grad], to += hidden; });
    }
};

// dc: dL/dc_t, set to dL/dc_{t-1}. dh: dL/dh_t, set to the part of dL/dh_{t-1} that does not pass
// through W_hh.
template <class Cell, class S>
__device__ __forceinline__ BackwardOutputs<Cell, S> backward_element(
    const BackwardInputs<Cell, S>& in, Arithmetic<S>& dh, Arithmetic<S>& dc) {
    using A = Arithmetic<S>;
    using In = BackwardInputs<Cell, S>;
    A saved[Cell::saved + 1], dgates[Cell::grads], dh_prev{}, dc_prev{};
    for (int i = 0; i < Cell::saved; ++i) saved[i] = widen(in.value[i]);
    Cell::backward(saved, widen(in.value[In::h_prev]), in.of(In::c_prev, Cell::has_c),
                   in.of(In::h, Cell::needs_h), in.of(In::c, Cell::has_c), dh, dc, dgates, dh_prev,
                   dc_prev);
    dh = dh_prev, dc = dc_prev;
    BackwardOutputs<Cell, S> out;
    for (int i = 0; i < Cell::grads; ++i) out.dgates[i] = narrow<S>(dgates[i]);
    return out;
}

}  // namespace fastrnn::cuda

// Long short-term memory, as torch.nn.LSTM defines it (Hochreiter and Schmidhuber 1997, with the
// forget gate of Gers et al. 2000):
//   i = sigmoid(x_i + r_i)   f = sigmoid(x_f + r_f)   g = tanh(x_g + r_g)   o = sigmoid(x_o + r_o)
//   c_t = f c_{t-1} + i g    h_t = o tanh(c_t)
#pragma once
#include "cell.h"

namespace fastrnn {

struct Lstm {
    static constexpr int gates = 4;  // i, f, g, o
    static constexpr bool has_c = true;
    static constexpr int saved = 4;  // i, f, g, o after their activations
    static constexpr int grads = 4;
    static constexpr int x_grad[gates] = {0, 1, 2, 3};
    static constexpr bool needs_h = false;
    static constexpr bool needs_h_prev = false;
    static constexpr bool passes_h = false;

    template <class V>
    static FASTRNN_FN void forward(const V* x, const V* r, V, V c_prev, V& h, V& c, V* saved) {
        using F = Math<V>;
        const V i = F::sigmoid(x[0] + r[0]);
        const V f = F::sigmoid(x[1] + r[1]);
        const V g = F::tanh(x[2] + r[2]);
        const V o = F::sigmoid(x[3] + r[3]);
        c = f * c_prev + i * g;
        h = o * F::tanh(c);
        saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
    }

    template <class V>
    static FASTRNN_FN void backward(const V* saved, V, V c_prev, V, V c, V dh, V dc, V* dgates,
                                    V& dh_prev, V& dc_prev) {
        const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
        const V tanh_c = Math<V>::tanh(c);
        const V dc_all = dc + dh * o * (1 - tanh_c * tanh_c);
        dgates[0] = dc_all * g * i * (1 - i);
        dgates[1] = dc_all * c_prev * f * (1 - f);
        dgates[2] = dc_all * i * (1 - g * g);
        dgates[3] = dh * tanh_c * o * (1 - o);
        dh_prev = V{};
        dc_prev = dc_all * f;
    }

    template <class V>
    static FASTRNN_FN V output(const V* saved, V c) {
        return saved[3] * Math<V>::tanh(c);
    }
};

}  // namespace fastrnn

// Minimal gated unit (Zhou et al. 2016), with the forget gate applied after the product:
//   f = sigmoid(x_f + r_f)   n = tanh(x_n + f * r_n)   h_t = (1 - f) h_{t-1} + f n
#pragma once
#include "cell.h"

namespace fastrnn {

struct Mgu {
    static constexpr int gates = 2;  // f, n
    static constexpr bool has_c = false;
    static constexpr int saved = 3;               // f, n after their activations, and r_n
    static constexpr int grads = 3;               // of x_n; then of r_f, r_n
    static constexpr int x_grad[gates] = {1, 0};  // f shares its with the recurrent product
    static constexpr bool needs_h = false;
    static constexpr bool needs_h_prev = true;
    static constexpr bool passes_h = true;

    template <class V>
    static FASTRNN_FN void forward(const V* x, const V* r, V h_prev, V, V& h, V&, V* saved) {
        using F = Math<V>;
        const V f = F::sigmoid(x[0] + r[0]);
        const V n = F::tanh(x[1] + f * r[1]);
        h = h_prev + f * (n - h_prev);
        saved[0] = f, saved[1] = n, saved[2] = r[1];
    }

    template <class V>
    static FASTRNN_FN void backward(const V* saved, V h_prev, V, V, V, V dh, V, V* dgates,
                                    V& dh_prev, V&) {
        const V f = saved[0], n = saved[1], r_n = saved[2];
        const V dx_n = dh * f * (1 - n * n);
        dgates[0] = dx_n;
        dgates[1] = (dh * (n - h_prev) + dx_n * r_n) * f * (1 - f);
        dgates[2] = dx_n * f;
        dh_prev = dh * (1 - f);
    }
};

}  // namespace fastrnn

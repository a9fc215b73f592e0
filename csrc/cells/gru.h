// Gated recurrent unit, as torch.nn.GRU defines it (Cho et al. 2014, with the reset gate applied
// after the product):
//   r = sigmoid(x_r + r_r)   z = sigmoid(x_z + r_z)   n = tanh(x_n + r * r_n)
//   h_t = (1 - z) n + z h_{t-1}
#pragma once
#include "cell.h"

namespace fastrnn {

struct Gru {
    static constexpr int gates = 3;  // r, z, n
    static constexpr bool has_c = false;
    static constexpr int saved = 4;  // r, z, n after their activations, and r_n (W_hn h + b_hn)
    static constexpr int grads = 4;  // of x_n; then of r_r, r_z, r_n
    static constexpr int x_grad[gates] = {1, 2, 0};  // r and z have one gradient for both products
    static constexpr bool needs_h = false;
    static constexpr bool needs_h_prev = true;
    static constexpr bool passes_h = true;

    template <class V>
    static FASTRNN_FN void forward(const V* x, const V* r, V h_prev, V, V& h, V&, V* saved) {
        using F = Math<V>;
        const V reset = F::sigmoid(x[0] + r[0]);
        const V z = F::sigmoid(x[1] + r[1]);
        const V n = F::tanh(x[2] + reset * r[2]);
        h = n + z * (h_prev - n);
        saved[0] = reset, saved[1] = z, saved[2] = n, saved[3] = r[2];
    }

    template <class V>
    static FASTRNN_FN void backward(const V* saved, V h_prev, V, V, V, V dh, V, V* dgates,
                                    V& dh_prev, V&) {
        const V reset = saved[0], z = saved[1], n = saved[2], r_n = saved[3];
        const V dx_n = dh * (1 - z) * (1 - n * n);
        dgates[0] = dx_n;
        dgates[1] = dx_n * r_n * reset * (1 - reset);
        dgates[2] = dh * (h_prev - n) * z * (1 - z);
        dgates[3] = dx_n * reset;
        dh_prev = dh * z;
    }
};

}  // namespace fastrnn

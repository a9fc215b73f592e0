// Elman's recurrent network (Elman 1990), as torch.nn.RNN defines it:
//   h_t = tanh(x + r), or relu(x + r)
#pragma once
#include "cell.h"

namespace fastrnn {

struct Tanh {
    template <class V>
    static FASTRNN_FN V value(V a) {
        return Math<V>::tanh(a);
    }
    template <class V>
    static FASTRNN_FN V gradient(V h, V dh) {
        return dh * (1 - h * h);
    }
};

struct Relu {
    template <class V>
    static FASTRNN_FN V value(V a) {
        return Math<V>::choose(a <= 0, V{}, a);  // in this order NaN passes through
    }
    template <class V>
    static FASTRNN_FN V gradient(V h, V dh) {
        return Math<V>::choose(h <= 0, V{}, dh);
    }
};

template <class Activation>
struct Rnn {
    static constexpr int gates = 1;
    static constexpr bool has_c = false;
    static constexpr int saved = 0;  // backward needs only h_t, which is the output
    static constexpr int grads = 1;
    static constexpr int x_grad[gates] = {0};
    static constexpr bool needs_h = true;
    static constexpr bool needs_h_prev = false;
    static constexpr bool passes_h = false;

    template <class V>
    static FASTRNN_FN void forward(const V* x, const V* r, V, V, V& h, V&, V*) {
        h = Activation::value(x[0] + r[0]);
    }

    template <class V>
    static FASTRNN_FN void backward(const V*, V, V, V h, V, V dh, V, V* dgates, V& dh_prev, V&) {
        dgates[0] = Activation::gradient(h, dh);
        dh_prev = V{};
    }
};

}  // namespace fastrnn

// Let J be the Jacobian of the network. `backward` computes J' v, for gradients v of its outputs.
// With gradients u of these results, the derivative of <u, J' v> with respect to v is J u, the
// tangent of the outputs in the direction u. Its derivative with respect to the network's tensors
// is the tangent of J' v in the direction u, because second derivatives commute. So one forward and
// one backward pass with dual numbers give all of it. The tangents of the tensors are u, those of v
// are zeros:
//
//     for each layer:            x = W_ih input                      of all rows
//         for each step:         r = W_hh h_{t-1}, the cell  ->  h_t, c_t, saved
//     for each layer, backward:
//         for each step:         the cell  ->  dx, dr;  dh_{t-1} += dr W_hh
//                                grad_input = dx W_ih,  grad_ih = dx' input, ...   of all rows
//
// Arrays are rows of values and then tangents (cpu/dual_kernel.h), [N, 2, width]. Their product
// with a weight is that of 2 N rows with its values, and that of N rows, the values, with its
// tangents.
#include "double_backward.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string_view>
#include <type_traits>

#include "../cpu/choices.h"
#include "../cpu/dual_kernel.h"
#include "../cpu/scratch.h"
#include "../cpu/subnormals.h"
#include "../cpu/workspace.h"

namespace fastrnn {
namespace {

using at::Tensor;
using cpu::DualKernel;
using cpu::DualRows;
using cpu::DualStep;

template <class T>
const T* data_of(const Tensor& t) {
    return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

// t.to(dtype), which calls the dispatcher even where it changes nothing.
Tensor in_dtype(const Tensor& t, at::ScalarType dtype) {
    return t.scalar_type() == dtype ? t : t.to(dtype);
}

// body(first, last) for parts of `count` rows or columns, each by a thread. Each one's results have
// the same bits in any part.
template <class Body>
void in_parallel(int64_t count, int64_t multiply_adds, const Body& body) {
    const int64_t of_one = std::max<int64_t>(1, multiply_adds);
    const int64_t least = (cpu::worth_a_thread + of_one - 1) / of_one;
    at::parallel_for(0, count, least, [&](int64_t first, int64_t last) {
        const cpu::SubnormalsAreZeros here;
        body(first, last);
    });
}

// Writes rows of values and tangents, which are contiguous; null: zeros.
template <class T>
void set_rows(const T* values, const T* tangents, int64_t count, DualRows<T> to) {
    for (int64_t row = 0; row < count; ++row)
        for (const auto& [from, part] :
             {std::pair(values, to.values(row)), std::pair(tangents, to.tangents(row))})
            if (from)
                std::memcpy(part, from + row * to.width, to.width * sizeof(T));
            else
                std::memset(part, 0, to.width * sizeof(T));
}

template <class T>
void copy_tangents(DualRows<T> from, int64_t count, T* to) {
    for (int64_t row = 0; row < count; ++row)
        std::memcpy(to + row * from.width, from.tangents(row), from.width * sizeof(T));
}

// Copies or adds rows of the width of the narrower of the two.
template <class T>
void copy(DualRows<T> from, int64_t count, DualRows<T> to) {
    const int64_t width = std::min(from.width, to.width);
    for (int64_t i = 0; i < 2 * count; ++i)
        std::memcpy(to.first + i * to.width, from.first + i * from.width, width * sizeof(T));
}

template <class T>
void add(DualRows<T> from, int64_t count, DualRows<T> to) {
    for (int64_t i = 0; i < 2 * count; ++i)
        for (int64_t k = 0; k < to.width; ++k)
            to.first[i * to.width + k] += from.first[i * from.width + k];
}

// A packed weight and its tangent, or no tangent: zeros.
template <class T>
struct DualMatrix {
    const DualKernel<T>* kernel;
    int64_t depth, columns;
    const T *value, *tangent;

    int64_t multiply_adds() const { return 3 * depth * columns; }

    // out (+)= a w. `constant`: a has no tangents.
    void multiply(DualRows<T> a, int64_t rows, DualRows<T> out, bool add, bool constant) const {
        if (constant) {
            times(value, a.values(0), 2 * a.width, rows, out.values(0), 2 * out.width, add);
            if (!tangent && !add)
                for (int64_t row = 0; row < rows; ++row)
                    std::memset(out.tangents(row), 0, columns * sizeof(T));
        } else {
            times(value, a.first, a.width, 2 * rows, out.first, out.width, add);
        }
        if (tangent)
            times(tangent, a.values(0), 2 * a.width, rows, out.tangents(0), 2 * out.width,
                  add || !constant);
    }

    // out (+)= the tangents of a w
    void multiply_tangents(DualRows<T> a, int64_t rows, T* out, bool add) const {
        times(value, a.tangents(0), 2 * a.width, rows, out, columns, add);
        if (tangent) times(tangent, a.values(0), 2 * a.width, rows, out, columns, true);
    }

private:
    void times(const T* w, const T* a, int64_t a_stride, int64_t rows, T* out, int64_t out_stride,
               bool add) const {
        kernel->multiply(w, depth, columns, a, a_stride, rows, out, out_stride, add);
    }
};

// The arrays of a network, and the memory that they take.
template <class T>
struct Plan {
    struct Direction {
        DualRows<T> x, h_prev, c_prev, h, c, saved, dx, dr, dh_total;  // of all rows
        DualRows<T> h_now, c_now, dh, dc;                              // of the batch
    };
    std::vector<Direction> directions;  // of all layers
    std::vector<DualRows<T>> inputs;    // of each layer, and the last one's output
    DualRows<T> grads[2];  // of the inputs of layers and of the last output, alternating
    DualRows<T> r, dm;     // of the batch
    DualRows<T> bias_x, bias_r;
    T* packed[3];  // W_ih, W_hh and W_hr
    T* outer;      // outer_scratch of each thread
    size_t size;

    Plan(const Problem& p, const DualKernel<T>& kernel, int threads, void* memory) {
        cpu::Workspace space(memory);
        const auto rows = [&](int64_t count, int64_t width) {
            return DualRows<T>{space.take<T>(2 * count * width), width};
        };
        const int64_t H = p.hidden, R = p.recurrent, C = p.cell.has_c ? H : 0, G = p.cell.gates * H,
                      N = p.rows, B = p.batch, out = p.directions * R;
        inputs.push_back(rows(N, p.input));
        for (int64_t layer = 0; layer < p.layers; ++layer) {
            inputs.push_back(rows(N, out));
            for (int64_t d = 0; d < p.directions; ++d) {
                Direction s{};
                s.x = rows(N, G), s.h_prev = rows(N, R), s.h = rows(N, H);
                s.c_prev = rows(N, C), s.c = rows(N, C), s.saved = rows(N, p.cell.saved * H);
                // x is not read any more when dx is written.
                s.dx = s.x, s.dr = kernel.same_gradients ? s.dx : rows(N, G);
                s.dh_total = rows(N, R);
                s.h_now = rows(B, R), s.dh = rows(B, R), s.c_now = rows(B, C), s.dc = rows(B, C);
                directions.push_back(s);
            }
        }
        for (DualRows<T>& grad : grads) grad = rows(N, out);
        r = rows(B, G), dm = rows(p.projected ? B : 0, H);
        bias_x = rows(1, G), bias_r = rows(1, G);
        const int64_t I = std::max(p.input, p.layers > 1 ? out : 0);
        const auto matrix = [&](int64_t a, int64_t b) {
            const size_t values = std::max(kernel.packed_size(a, b), kernel.packed_size(b, a));
            return space.take<T>(2 * static_cast<int64_t>(values));
        };
        packed[0] = matrix(I, G), packed[1] = matrix(R, G),
        packed[2] = matrix(p.projected ? R : 0, H);
        outer = space.take<T>(threads * outer_size(p, kernel));
        size = space.size();
    }

    static int64_t outer_size(const Problem& p, const DualKernel<T>& kernel) {
        const int64_t columns = std::max({p.input, p.directions * p.recurrent, p.hidden});
        return static_cast<int64_t>(kernel.outer_scratch(columns));
    }
};

// A network with dual numbers.
template <class T>
class DualNetwork {
public:
    // u: the tangents of input, h0, c0 and the weights.
    DualNetwork(const Arguments& a, const Problem& p, const Tensor& dropout_mask,
                const OutputGradients& gradients, at::TensorList u)
        : p_(p),
          dropout_(a.options.dropout),
          masks_(dropout_mask.contiguous()),
          kernel_(cpu::dual_kernel<T>(p.cell_index)),
          sequence_(a, p),
          options_(
              a.input.options().memory_format(std::nullopt).dtype(c10::CppTypeToScalarType<T>())),
          scratch_(Plan<T>(p, kernel_, cpu_threads(), nullptr).size),
          plan_(p, kernel_, cpu_threads(), scratch_.data()) {
        const auto typed = [&](const Tensor& t) {
            return t.defined() ? in_dtype(t, c10::CppTypeToScalarType<T>()).contiguous() : t;
        };
        for (const Tensor& t : {a.input, a.h0, a.c0.value_or(Tensor())})
            tensors_.push_back(typed(t));
        for (const Tensor& t : a.weights) tensors_.push_back(typed(t));
        for (const Tensor& t : u) tangents_.push_back(typed(t));
        for (const OptionalTensor* t : {&gradients.output, &gradients.h_n, &gradients.c_n})
            gradients_.push_back(typed(t->value_or(Tensor())));
    }

    // Tangents of output, h_n and c_n, of the shapes of `like`, where that is defined.
    std::vector<Tensor> forward(const std::array<Tensor, 3>& like) {
        set_rows(data_of<T>(tensors_[0]), data_of<T>(tangents_[0]), p_.rows, plan_.inputs[0]);
        for (int64_t layer = 0; layer < p_.layers; ++layer) {
            if (layer > 0) drop(plan_.inputs[layer], layer);
            for (int64_t d = 0; d < p_.directions; ++d) forward(layer, d);
        }
        std::vector<Tensor> result(like.size());
        const auto make = [&](size_t i) {
            if (like[i].defined()) result[i] = at::empty(like[i].sizes(), options_);
            return like[i].defined() ? result[i].mutable_data_ptr<T>() : nullptr;
        };
        if (T* output = make(0)) copy_tangents(plan_.inputs[p_.layers], p_.rows, output);
        copy_states(&Direction::h_now, make(1));
        copy_states(&Direction::c_now, make(2));
        return result;
    }

    // Tangents of the gradients of input, h0, c0 and the weights, where they are needed.
    void backward(const std::vector<bool>& needed, std::vector<Tensor>& result) {
        for (size_t i = 0; i < tensors_.size(); ++i)
            if (needed[3 + i] && tensors_[i].defined()) result[3 + i] = at::empty_like(tensors_[i]);
        grads_.clear();
        for (size_t i = 3; i < result.size(); ++i)
            grads_.push_back(result[i].defined() ? result[i].mutable_data_ptr<T>() : nullptr);
        set_rows(data_of<T>(gradients_[0]), static_cast<const T*>(nullptr), p_.rows,
                 plan_.grads[p_.layers % 2]);
        for (int64_t layer = p_.layers - 1; layer >= 0; --layer) {
            const DualRows<T> below = plan_.grads[layer % 2];
            for (int64_t d = 0; d < p_.directions; ++d) {
                backward(layer, d);
                input_gradient(layer, d, below);
            }
            if (layer > 0) drop(below, layer);
        }
        copy_states(&Direction::dh, grads_[1]);
        copy_states(&Direction::dc, grads_[2]);
    }

private:
    using Direction = typename Plan<T>::Direction;

    void copy_states(DualRows<T> Direction::* states, T* to) const {
        if (!to) return;
        for (const Direction& direction : plan_.directions) {
            copy_tangents(direction.*states, p_.batch, to);
            to += p_.batch * (direction.*states).width;
        }
    }

    // Dropout between layer - 1 and the layer, as `dropped` of network.cpp.
    void drop(DualRows<T> rows, int64_t layer) const {
        const Tensor mask = mask_of(masks_, layer);
        if (!mask.defined()) return;
        const uint8_t* keep = mask.const_data_ptr<uint8_t>();
        const T scale = dropout_ < 1 ? T(1 / (1 - dropout_)) : T(0);
        for (int64_t row = 0; row < p_.rows; ++row, keep += rows.width)
            for (T* part : {rows.values(row), rows.tangents(row)})
                for (int64_t i = 0; i < rows.width; ++i) part[i] = part[i] * T(keep[i]) * scale;
    }

    // The index in tensors_ of the i-th weight of a direction.
    int64_t weight_at(int64_t state, int64_t i) const {
        return 3 + state * p_.weights_per_layer + i;
    }
    int64_t hr_at(int64_t state) const { return weight_at(state, p_.weights_per_layer - 1); }

    // A weight, packed for products with its transpose or with itself.
    DualMatrix<T> packed(int64_t at, bool transposed, T* memory) const {
        const Tensor &w = tensors_[at], &tangent = tangents_[at];
        const int64_t depth = w.size(transposed ? 1 : 0), columns = w.size(transposed ? 0 : 1);
        const auto pack = [&](const Tensor& t, T* to) {
            kernel_.pack(t.const_data_ptr<T>(), w.size(1), transposed, depth, columns, to);
            return to;
        };
        const T* value = pack(w, memory);
        return {&kernel_, depth, columns, value,
                tangent.defined() ? pack(tangent, memory + kernel_.packed_size(depth, columns))
                                  : nullptr};
    }

    void set_bias(int64_t at, DualRows<T> to) const {
        set_rows(p_.has_biases ? data_of<T>(tensors_[at]) : nullptr,
                 p_.has_biases ? data_of<T>(tangents_[at]) : nullptr, 1, to);
    }

    void set_states(int64_t state, size_t i, DualRows<T> to) const {
        const auto own = [&](const Tensor& t) {
            return t.defined() ? data_of<T>(t) + state * p_.batch * to.width : nullptr;
        };
        set_rows(own(tensors_[i]), own(tangents_[i]), p_.batch, to);
    }

    // body(step, row of the data, row of the batch, count) for each step of a direction, in the
    // order of forward or of backward, and for the rows of the batch that each thread has.
    template <class Body>
    void for_each_step(int64_t direction, Pass pass, int64_t multiply_adds,
                       const Body& body) const {
        const Sequence& s = sequence_.sequence;
        const bool ascending = (pass == Pass::forward) == (direction == 0);
        in_parallel(p_.batch, p_.steps * multiply_adds, [&](int64_t first, int64_t last) {
            for (int64_t i = 0; i < s.steps; ++i) {
                const int64_t t = ascending ? i : s.steps - 1 - i;
                const int64_t count = std::min(last, s.batch_sizes[t]) - first;
                if (count > 0) body(t, s.offsets[t] + first, first, count);
            }
        });
    }

    // The columns of a direction in rows of all directions.
    DualRows<T> own_columns(DualRows<T> rows, int64_t direction) const {
        return {rows.first + direction * p_.recurrent, rows.width};
    }

    void forward(int64_t layer, int64_t direction) {
        const int64_t state = layer * p_.directions + direction;
        const Direction& own = plan_.directions[state];
        const DualRows<T> input = plan_.inputs[layer],
                          output = own_columns(plan_.inputs[layer + 1], direction);
        const bool constant_input = layer == 0 && !tangents_[0].defined(),
                   constant_h = p_.steps == 1 && !tangents_[1].defined();
        const auto ih = packed(weight_at(state, 0), /*transposed=*/true, plan_.packed[0]);
        in_parallel(p_.rows, ih.multiply_adds(), [&](int64_t first, int64_t last) {
            ih.multiply(input.from(first), last - first, own.x.from(first), false, constant_input);
        });
        const auto hh = packed(weight_at(state, 1), true, plan_.packed[1]);
        const auto hr =
            p_.projected ? packed(hr_at(state), true, plan_.packed[2]) : DualMatrix<T>();
        set_bias(weight_at(state, 2), plan_.bias_x);
        set_bias(weight_at(state, 3), plan_.bias_r);
        set_states(state, 1, own.h_now);
        if (p_.cell.has_c) set_states(state, 2, own.c_now);
        const int64_t multiply_adds = hh.multiply_adds() + hr.multiply_adds();
        for_each_step(direction, Pass::forward, multiply_adds,
                      [&](int64_t, int64_t row, int64_t b, int64_t count) {
                          DualStep<T> step = step_of(own, row, count);
                          const DualRows<T> h = own.h_now.from(b), c = own.c_now.from(b);
                          step.r = plan_.r.from(b);
                          copy(h, count, step.h_prev);
                          copy(c, count, step.c_prev);
                          hh.multiply(h, count, step.r, false, constant_h);
                          kernel_.forward(step);
                          if (p_.projected)
                              hr.multiply(step.h, count, h, false, false);
                          else
                              copy(step.h, count, h);
                          copy(h, count, output.from(row));
                          copy(step.c, count, c);
                      });
    }

    void backward(int64_t layer, int64_t direction) {
        const int64_t state = layer * p_.directions + direction, R = p_.recurrent;
        const Direction& own = plan_.directions[state];
        const DualRows<T> grad_output = own_columns(plan_.grads[(layer + 1) % 2], direction);
        // A single step has a product with W_hh only for the gradient of h0.
        const bool needs_hh = p_.steps > 1 || grads_[1];
        const auto hh = needs_hh
                            ? packed(weight_at(state, 1), /*transposed=*/false, plan_.packed[1])
                            : DualMatrix<T>();
        const auto hr =
            p_.projected ? packed(hr_at(state), false, plan_.packed[2]) : DualMatrix<T>();
        const auto start = [&](const Tensor& grad, DualRows<T> to) {
            set_rows(grad.defined() ? data_of<T>(grad) + state * p_.batch * to.width : nullptr,
                     static_cast<const T*>(nullptr), p_.batch, to);
        };
        start(gradients_[1], own.dh);
        if (p_.cell.has_c) start(gradients_[2], own.dc);
        const int64_t first_step = direction == 0 ? 0 : p_.steps - 1;
        const int64_t multiply_adds = hh.multiply_adds() + hr.multiply_adds();
        for_each_step(direction, Pass::backward, multiply_adds,
                      [&](int64_t t, int64_t row, int64_t b, int64_t count) {
                          DualStep<T> step = step_of(own, row, count);
                          const DualRows<T> dh = own.dh.from(b), total = own.dh_total.from(row);
                          step.dc = own.dc.from(b);
                          copy(dh, count, total);
                          add(grad_output.from(row), count, total);
                          if (p_.projected) {
                              step.dh = plan_.dm.from(b);
                              hr.multiply(total, count, step.dh, false, false);
                              std::memset(dh.first, 0, 2 * count * R * sizeof(T));
                          } else {
                              step.dh = total, step.dh_prev = dh;
                          }
                          kernel_.backward(step);
                          if (t != first_step || grads_[1])
                              hh.multiply(step.dr, count, dh, true, false);
                      });
        const bool constant_h = p_.steps == 1 && !tangents_[1].defined();
        outer(own.dx, plan_.inputs[layer], layer == 0 && !tangents_[0].defined(),
              weight_at(state, 0));
        outer(own.dr, own.h_prev, constant_h, weight_at(state, 1));
        if (p_.projected) outer(own.dh_total, own.h, false, hr_at(state));
        if (!p_.has_biases) return;
        sum(own.dx, weight_at(state, 2));
        sum(own.dr, weight_at(state, 3));
    }

    // The gradient of a layer's input, to which the second direction adds; of the network's input,
    // its tangents.
    void input_gradient(int64_t layer, int64_t direction, DualRows<T> below) const {
        if (layer == 0 && !grads_[0]) return;
        const int64_t state = layer * p_.directions + direction;
        const Direction& own = plan_.directions[state];
        const auto ih = packed(weight_at(state, 0), /*transposed=*/false, plan_.packed[0]);
        const bool add = direction == 1;
        in_parallel(p_.rows, ih.multiply_adds(), [&](int64_t first, int64_t last) {
            const DualRows<T> dx = own.dx.from(first);
            if (layer > 0)
                ih.multiply(dx, last - first, below.from(first), add, false);
            else
                ih.multiply_tangents(dx, last - first, grads_[0] + first * p_.input, add);
        });
    }

    // The tangents of the sum over rows of g' a, for the gradient of a weight.
    void outer(DualRows<T> g, DualRows<T> a, bool constant, int64_t weight) const {
        T* const out = grads_[weight];
        if (!out) return;
        in_parallel(g.width, 2 * p_.rows * a.width, [&](int64_t first, int64_t last) {
            T* scratch = plan_.outer + at::get_thread_num() * Plan<T>::outer_size(p_, kernel_);
            const auto add = [&](const T* left, const T* right, bool more) {
                kernel_.add_outer(left, 2 * g.width, first, last, right, 2 * a.width, a.width,
                                  p_.rows, out, more, scratch);
            };
            add(g.tangents(0), a.values(0), false);
            if (!constant) add(g.values(0), a.tangents(0), true);
        });
    }

    // The tangents of the sum over rows of g, for the gradient of a bias.
    void sum(DualRows<T> g, int64_t bias) const {
        if (T* const out = grads_[bias])
            in_parallel(g.width, p_.rows, [&](int64_t first, int64_t last) {
                kernel_.sum_rows(g.tangents(0), 2 * g.width, p_.rows, first, last, out);
            });
    }

    // `count` rows of a direction from `row` on, as both passes read and write them.
    DualStep<T> step_of(const Direction& own, int64_t row, int64_t count) const {
        DualStep<T> s{};
        s.rows = count, s.hidden = p_.hidden;
        s.h_prev = own.h_prev.from(row), s.c_prev = own.c_prev.from(row);
        s.h = own.h.from(row), s.c = own.c.from(row), s.saved = own.saved.from(row);
        s.x = own.x.from(row), s.bias_x = plan_.bias_x, s.bias_r = plan_.bias_r;
        s.dx = own.dx.from(row), s.dr = own.dr.from(row);
        return s;
    }

    const Problem& p_;
    const double dropout_;
    const Tensor masks_;
    const DualKernel<T>& kernel_;
    const Rows sequence_;
    const at::TensorOptions options_;  // of the arithmetic type
    // input, h0, c0 and the weights; their tangents; the gradients of output, h_n and c_n.
    std::vector<Tensor> tensors_, tangents_, gradients_;
    std::vector<T*> grads_;  // where the tangents of the gradients of tensors_ go, or null
    const cpu::Scratch scratch_;
    const Plan<T> plan_;
};

template <class T>
std::vector<Tensor> run(const Arguments& a, const Problem& p, const Tensor& dropout_mask,
                        const OutputGradients& gradients, const std::vector<Tensor>& directions,
                        const std::vector<bool>& needed) {
    DualNetwork<T> network(a, p, dropout_mask, gradients, directions);
    const auto wanted = [&](size_t i, const OptionalTensor& of) {
        return of && needed[i] ? *of : Tensor();
    };
    std::vector<Tensor> result = network.forward(
        {wanted(0, gradients.output), wanted(1, gradients.h_n), wanted(2, gradients.c_n)});
    result.resize(needed.size());
    if (std::find(needed.begin() + 3, needed.end(), true) != needed.end())
        network.backward(needed, result);
    for (Tensor& t : result)
        if (t.defined()) t = in_dtype(t, p.dtype);
    return result;
}

template <class T>
std::vector<Tensor> tangents(const Arguments& a, const Problem& p, const ForwardResult& results,
                             const std::vector<Tensor>& directions) {
    const OptionalTensor none;
    DualNetwork<T> network(a, p, results.dropout_mask, {none, none, none}, directions);
    std::vector<Tensor> found =
        network.forward({results.output, results.h_n, p.cell.has_c ? results.c_n : Tensor()});
    for (Tensor& t : found)
        if (t.defined()) t = in_dtype(t, p.dtype);
    return found;
}

}  // namespace

bool has_dual_kernels(const Options& options) {
    static constexpr std::string_view known[] = {"has_biases", "num_layers", "bidirectional",
                                                 "dropout"};
    const CellInfo* cell = find_info(options.cell);
    bool all = cell && cell->c_states <= 1 && cell->vectors == 0 && !cell->diagonal;
    for_each_option(options, [&](std::string_view name, const auto& value) {
        const bool is_known =
            std::find(std::begin(known), std::end(known), name) != std::end(known);
        all = all && (is_known || value == std::decay_t<decltype(value)>{});
    });
    return all;
}

std::vector<Tensor> double_backward(const Arguments& arguments, const Problem& problem,
                                    const Tensor& dropout_mask, const OutputGradients& gradients,
                                    const std::vector<Tensor>& directions,
                                    const std::vector<bool>& needed) {
    without_lost_threads();
    const auto of = problem.arithmetic == at::kDouble ? run<double> : run<float>;
    return of(arguments, problem, dropout_mask, gradients, directions, needed);
}

std::vector<Tensor> tangents(const Arguments& arguments, const Problem& problem,
                             const ForwardResult& results, const std::vector<Tensor>& directions) {
    without_lost_threads();
    const auto of = problem.arithmetic == at::kDouble ? tangents<double> : tangents<float>;
    return of(arguments, problem, results, directions);
}

}  // namespace fastrnn

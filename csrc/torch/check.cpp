// Every argument check of the operators. Where torch's own layer raises on the same misuse, its
// text is used.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/SymBool.h>
#include <c10/core/SymInt.h>

#include <type_traits>

#include "problem.h"

namespace fastrnn {
namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::SymBool;
using c10::SymInt;

// Sizes are numbers, or symbols while torch.compile or torch.export traces a call: a check of a
// symbol becomes a guard or a run-time assertion of the compiled code.
template <class Int>
constexpr bool is_symbolic = std::is_same_v<Int, SymInt>;

template <class Int>
Int size_of(const Tensor& t, int64_t dim) {
    if constexpr (is_symbolic<Int>)
        return t.sym_size(dim);
    else
        return t.size(dim);
}

SymBool equal(int64_t a, int64_t b) { return a == b; }
SymBool equal(const SymInt& a, const SymInt& b) { return a.sym_eq(b); }
SymBool less(int64_t a, int64_t b) { return a < b; }
SymBool less(const SymInt& a, const SymInt& b) { return a.sym_lt(b); }

// A storage can be freed or shrunk under its tensors, as sharded training does to parameters.
void check_storage(const char* kind, const Tensor& t) {
    if (!t.has_storage()) return;
    // The usual case, without a call.
    if (t.is_contiguous() &&
        (t.storage_offset() + t.numel()) * t.itemsize() <= t.storage().nbytes())
        return;
    const size_t needed =
        at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize(), t.storage_offset());
    TORCH_CHECK(needed <= t.storage().nbytes(), "fastrnn: the ", kind, " tensor of size ",
                t.sizes(), " needs a storage of ", needed, " bytes, but its storage has ",
                t.storage().nbytes());
}

template <class Int>
void check_place(const Arguments& a, const char* kind, const Tensor& t) {
    TORCH_CHECK(t.defined(), "fastrnn: a ", kind, " tensor is undefined, expected a tensor on ",
                a.input.device());
    TORCH_CHECK(t.device() == a.input.device(), "Input and ", kind,
                " tensors are not at the same device, found input tensor at ", a.input.device(),
                " and ", kind, " tensor at ", t.device());
    TORCH_CHECK(t.layout() == at::kStrided, "fastrnn: the ", kind, " tensor has layout ",
                t.layout(),
                ", expected a dense tensor (torch.strided); convert it with .to_dense()");
    if constexpr (!is_symbolic<Int>) check_storage(kind, t);
}

void check_dtype(const Tensor& t, at::ScalarType expected) {
    TORCH_CHECK(t.scalar_type() == expected, "mat1 and mat2 must have the same dtype, but got ",
                t.scalar_type(), " and ", expected);
}

template <class Int>
void check_shape(const char* name, const Tensor& t, const c10::SmallVector<Int, 5>& expected) {
    if constexpr (is_symbolic<Int>) {
        bool same = t.dim() == static_cast<int64_t>(expected.size());
        for (int64_t i = 0; same && i < t.dim(); ++i)
            same = equal(t.sym_size(i), expected[i]).expect_true(__FILE__, __LINE__);
        TORCH_CHECK(same, "Expected ", name, " size ", at::ArrayRef<Int>(expected), ", got ",
                    t.sym_sizes());
    } else {
        TORCH_CHECK(t.sizes() == IntArrayRef(expected), "Expected ", name, " size ",
                    IntArrayRef(expected), ", got ", t.sizes());
    }
}

template <class Int>
void check_tensor(const Arguments& a, const char* name, const Tensor& t,
                  const c10::SmallVector<Int, 5>& shape, at::ScalarType dtype) {
    check_place<Int>(a, name, t);
    TORCH_CHECK(t.scalar_type() == dtype, "Expected ", name, " of dtype ", dtype, ", got ",
                t.scalar_type());
    check_shape<Int>(name, t, shape);
}

// All that can be checked of batch_sizes without their values.
void check_form_of_batch_sizes(const Tensor& sizes) {
    TORCH_CHECK(sizes.defined() && sizes.device().is_cpu() && sizes.layout() == at::kStrided,
                "batch_sizes should always be on CPU, as a dense tensor");
    TORCH_CHECK(sizes.dim() == 1, "batch_sizes must have 1 dimension, got ", sizes.dim());
    TORCH_CHECK(sizes.scalar_type() == at::kLong, "expected scalar type Long but found ",
                sizes.scalar_type());
}

void check_batch_sizes(const Tensor& sizes, int64_t rows) {
    check_form_of_batch_sizes(sizes);
    check_storage("batch_sizes", sizes);
    TORCH_CHECK(sizes.numel() > 0, "batch_sizes can not be empty");
    const Tensor list = sizes.contiguous();
    const int64_t* size = list.const_data_ptr<int64_t>();
    int64_t sum = 0;
    for (int64_t t = 0; t < list.numel(); ++t) {
        TORCH_CHECK(size[t] >= 0, "narrow(): length must be non-negative.");
        TORCH_CHECK(t == 0 || size[t] <= size[t - 1],
                    "batch_sizes must not increase, but batch_sizes[", t, "] = ", size[t],
                    " follows ", size[t - 1], "; sort the sequences by length, longest first");
        TORCH_CHECK(size[t] <= rows - sum, "start (", sum, ") + length (", size[t],
                    ") exceeds dimension size (", rows, ").");
        sum += size[t];
    }
    TORCH_CHECK(sum == rows, "batch_sizes sum to ", sum, " but the packed data has ", rows,
                " rows");
}

Storage storage_of(at::ScalarType dtype) {
    switch (dtype) {
        case at::kFloat: return Storage::float32;
        case at::kDouble: return Storage::float64;
        case at::kBFloat16: return Storage::bfloat16;
        case at::kHalf: return Storage::float16;
        default: break;
    }
    TORCH_CHECK(false, "fastrnn: dtype ", dtype,
                " is not supported, expected Float, Double, BFloat16 or Half");
}

at::ScalarType dtype_of(const Arguments& a) {
    return a.weights.empty() ? a.input.scalar_type() : a.weights[0].scalar_type();
}

int find_cell(const std::string& name) {
    const int found = index_of(name);
    if (found >= 0) return found;
    std::string known;
    for (int i = 0; i < known_cells(); ++i) known += (i ? ", " : "") + std::string(info_of(i).name);
    TORCH_CHECK_VALUE(false, "fastrnn: no cell is called '", name, "', expected one of: ", known);
}

template <class Int>
void check_weights(const Arguments& a, const CellInfo& cell, const Sizes<Int>& p) {
    // Before the product, which a forged state of no rows and enormous width could overflow.
    TORCH_CHECK(a.weights[0].dim() > 0, "Expected weight_ih with 2 dimensions, got 0");
    const Int rows = size_of<Int>(a.weights[0], 0);
    TORCH_SYM_CHECK(less(p.hidden, rows + 1), "Expected weight_ih with ", cell.gates,
                    " * hidden_size rows for hidden_size ", p.hidden, ", got ", rows);
    const Int gate_rows = p.hidden * cell.gates;
    for (size_t i = 0; i < a.weights.size(); ++i) {
        const int64_t layer = i / p.weights_per_layer / p.directions;
        int kind = i % p.weights_per_layer;
        if (!p.has_biases && kind >= 2) kind += 2;
        const Tensor& w = a.weights[i];
        if (kind >= 4 && kind < 4 + cell.vectors) {
            check_shape<Int>("vector", w, {p.hidden});
            continue;
        }
        switch (kind) {
            case 0: check_shape<Int>("weight_ih", w, {gate_rows, p.layer_input(layer)}); break;
            case 1:
                if (cell.diagonal)
                    check_shape<Int>("weight_hh", w, {gate_rows});
                else
                    check_shape<Int>("weight_hh", w, {gate_rows, p.recurrent});
                break;
            case 2: check_shape<Int>("bias_ih", w, {gate_rows}); break;
            case 3: check_shape<Int>("bias_hh", w, {gate_rows}); break;
            default: check_shape<Int>("weight_hr", w, {p.recurrent, p.hidden});
        }
    }
}

// Devices, layouts, dtypes and options.
template <class Int>
void check_tensors(const Arguments& a, const CellInfo& cell) {
    TORCH_CHECK(a.input.defined(), "fastrnn: the input tensor is undefined");
    check_place<Int>(a, "input", a.input);
    const bool has_states = a.h0.defined();
    if (has_states) check_place<Int>(a, "hidden", a.h0);
    TORCH_CHECK(a.c0.has_value() == (has_states && cell.has_c), a.options.cell,
                cell.has_c ? " expects two hidden states" : " expects one hidden state");
    if (a.c0) check_place<Int>(a, "hidden", *a.c0);
    for (const Tensor& w : a.weights) check_place<Int>(a, "parameter", w);

    const at::ScalarType dtype = dtype_of(a);
    check_dtype(a.input, dtype);
    if (has_states) check_dtype(a.h0, dtype);
    if (a.c0) check_dtype(*a.c0, dtype);
    for (const Tensor& w : a.weights) check_dtype(w, dtype);
    storage_of(dtype);
    TORCH_CHECK_VALUE(a.options.dropout >= 0 && a.options.dropout <= 1,
                      "dropout probability has to be between 0 and 1, but got ", a.options.dropout);
}

template <class Int>
void check_sizes(const Arguments& a, const CellInfo& cell, Sizes<Int>& p) {
    p.has_biases = a.options.has_biases;
    p.layers = a.options.num_layers;
    p.directions = a.options.directions();
    const bool has_states = a.h0.defined();
    const int64_t expected_dim = a.packed() ? 2 : 3;
    TORCH_CHECK(a.input.dim() == expected_dim, "input must have ", expected_dim,
                " dimensions, got ", a.input.dim());
    p.input = size_of<Int>(a.input, -1);
    if (!a.packed()) {
        p.steps = size_of<Int>(a.input, 0);
        p.batch = size_of<Int>(a.input, 1);
        if (a.has_events())
            check_tensor<Int>(a, "events", *a.batch_sizes, {p.steps, p.batch}, at::kByte);
        p.rows = p.steps * p.batch;
        TORCH_SYM_CHECK(less(0, p.steps), "Expected sequence length to be larger than 0 in RNN");
    } else {
        p.rows = size_of<Int>(a.input, 0);
        if constexpr (is_symbolic<Int>) {
            check_form_of_batch_sizes(*a.batch_sizes);
            p.steps = a.batch_sizes->sym_numel();
            // The first value of batch_sizes, which is not known here. The states have to agree
            // with it.
            p.batch = a.h0.dim() == 3 ? a.h0.sym_size(1) : SymInt(0);
        } else {
            check_batch_sizes(*a.batch_sizes, p.rows);
            p.steps = a.batch_sizes->numel();
            p.batch = (*a.batch_sizes)[0].item<int64_t>();
        }
    }

    TORCH_CHECK(p.layers > 0, "num_layers must be greater than zero");
    if (has_states) {
        TORCH_CHECK(a.h0.dim() == 3, "Expected hidden to have 3 dimensions, got ", a.h0.dim());
        p.recurrent = size_of<Int>(a.h0, 2);
        p.hidden =
            cell.has_c && a.c0->dim() == 3 ? size_of<Int>(*a.c0, 2) / cell.c_states : p.recurrent;
    } else {
        TORCH_CHECK(a.weights.size() > 1 && a.weights[1].dim() == 2 - cell.diagonal,
                    "got an incorrect number of RNN parameters");
        p.hidden = size_of<Int>(a.weights[1], 0) / cell.gates;
        p.recurrent = cell.diagonal ? p.hidden : size_of<Int>(a.weights[1], 1);
    }
    p.projected = p.hidden != p.recurrent;
    p.width = p.directions * p.recurrent;
    if (a.options.return_states) p.width = p.width + p.directions * cell.c_states * p.hidden;
    p.weights_per_layer = 2 + 2 * p.has_biases + cell.vectors + p.projected;
    // The count before any product of sizes, which a forged num_layers could overflow.
    TORCH_CHECK(a.weights.size() % (p.weights_per_layer * p.directions) == 0 &&
                    static_cast<int64_t>(a.weights.size()) / (p.weights_per_layer * p.directions) ==
                        p.layers,
                "got an incorrect number of RNN parameters");
    if (p.projected) {
        TORCH_CHECK(cell.allows_projection, a.options.cell, " does not support projections");
        TORCH_SYM_CHECK(less(p.recurrent, p.hidden),
                        "proj_size has to be smaller than hidden_size");
    }
    TORCH_SYM_CHECK(less(0, p.input), "input_size must be greater than zero");
    TORCH_SYM_CHECK(less(0, p.hidden), "hidden_size must be greater than zero");
    TORCH_SYM_CHECK(less(0, p.recurrent), "hidden_size must be greater than zero");
    check_weights(a, cell, p);
    const char* h_name = cell.has_c ? "hidden[0]" : "hidden";
    const Int states = p.layers * p.directions;
    if (has_states) check_shape<Int>(h_name, a.h0, {states, p.batch, p.recurrent});
    if (a.c0) check_shape<Int>("hidden[1]", *a.c0, {states, p.batch, p.hidden * cell.c_states});
}

template <class Int>
void check_gradients_of(const Arguments& a, const CellInfo& cell, const Sizes<Int>& p,
                        const OutputGradients& g) {
    const at::ScalarType dtype = dtype_of(a);
    const Int states = p.layers * p.directions;
    if (g.output && a.packed())
        check_tensor<Int>(a, "grad_output", *g.output, {p.rows, p.width}, dtype);
    else if (g.output)
        check_tensor<Int>(a, "grad_output", *g.output, {p.steps, p.batch, p.width}, dtype);
    if (g.h_n) check_tensor<Int>(a, "grad_h_n", *g.h_n, {states, p.batch, p.recurrent}, dtype);
    TORCH_CHECK(!g.c_n || cell.has_c, a.options.cell, " has no c_n, but grad_c_n was given");
    if (g.c_n)
        check_tensor<Int>(a, "grad_c_n", *g.c_n, {states, p.batch, p.hidden * cell.c_states},
                          dtype);
}

}  // namespace

Problem check(const Arguments& a) {
    Problem p{};
    p.cell_index = find_cell(a.options.cell);
    p.cell = info_of(p.cell_index);
    check_tensors<int64_t>(a, p.cell);
    p.device = a.input.device();
    p.dtype = dtype_of(a);
    p.storage = storage_of(p.dtype);
    p.arithmetic = p.dtype == at::kDouble ? at::kDouble : at::kFloat;
    check_sizes<int64_t>(a, p.cell, p);
    return p;
}

Sizes<SymInt> check_fake(const Arguments& a) {
    const CellInfo& cell = info_of(find_cell(a.options.cell));
    check_tensors<SymInt>(a, cell);
    Sizes<SymInt> sizes{};
    check_sizes<SymInt>(a, cell, sizes);
    return sizes;
}

void check_gradients(const Arguments& a, const Problem& p, const OutputGradients& g) {
    check_gradients_of<int64_t>(a, p.cell, p, g);
}

void check_fake_gradients(const Arguments& a, const Sizes<SymInt>& sizes,
                          const OutputGradients& g) {
    check_gradients_of<SymInt>(a, info_of(find_cell(a.options.cell)), sizes, g);
}

void check_kept(const Arguments& a, const Problem& p, const Kept& k) {
    const int64_t width = p.directions * p.recurrent;
    check_tensor<int64_t>(a, "hidden", k.hidden, {p.layers, p.rows, width}, p.dtype);
    const auto each = [&](int64_t values) -> at::DimVector {
        // With recompute, forward leaves them empty.
        if (k.saved.defined() && k.saved.sizes() == IntArrayRef{0}) return {0};
        return {p.layers, p.directions, p.rows, values};
    };
    check_tensor<int64_t>(a, "saved", k.saved, each(p.cell.saved * p.hidden), p.dtype);
    check_tensor<int64_t>(a, "c", k.c, each(p.cell.c_states * p.hidden), p.dtype);
    TORCH_CHECK(k.dropout_mask.defined(),
                "fastrnn: dropout_mask is undefined, expected an empty tensor or a mask");
    if (k.dropout_mask.sizes() !=
        IntArrayRef{0})  // that is how forward says that nothing was dropped
        check_tensor<int64_t>(a, "dropout_mask", k.dropout_mask, {p.layers - 1, p.rows, width},
                              at::kByte);
}

}  // namespace fastrnn

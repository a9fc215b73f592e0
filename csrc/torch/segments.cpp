// The operator torch.ops.fastrnn.segments: how a batch of sequences with resets or lengths becomes
// packed data. No state crosses a reset, so each part of a row between two resets, a segment, is a
// row of its own:
//
//     resets at *              segments, the longest first      h before its first step
//     row 0   a  b  *c  d      row 1   x y z                     h0 of row 1
//     row 1   x  y  z  *w      row 0   a b                       h0 of row 0
//                              row 0   c d                       zeros
//                              row 1   w                         zeros
//
//     packed data: x a c w | y b d | z         batch_sizes: 4 3 1
//
// fastrnn/segments.py gathers the input in this order and calls the layer once.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/util/safe_numerics.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

namespace fastrnn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Segment {
    int64_t row, first, length;  // steps [first, first + length) of a row
    bool starts_reset, ends_row;
};

// [B]: the steps of each row.
std::vector<int64_t> lengths_of_rows(const OptionalTensor& lengths, int64_t steps, int64_t batch) {
    std::vector<int64_t> result(batch, steps);
    if (!lengths) return result;
    TORCH_CHECK_VALUE(
        lengths->scalar_type() == at::kLong && lengths->dim() == 1 && lengths->size(0) == batch,
        "lengths: expected an int64 tensor of size [", batch, "], got ", lengths->scalar_type(),
        " of size ", lengths->sizes());
    const Tensor values = lengths->to(at::kCPU).contiguous();
    std::copy_n(values.const_data_ptr<int64_t>(), batch, result.begin());
    for (int64_t b = 0; b < batch; ++b)
        TORCH_CHECK_VALUE(result[b] >= 1 && result[b] <= steps, "lengths: expected 1 to ", steps,
                          ", the number of steps, got lengths[", b, "] = ", result[b]);
    return result;
}

// The segments of all rows, row by row.
std::vector<Segment> segments_of_rows(const OptionalTensor& resets, int64_t steps,
                                      const std::vector<int64_t>& lengths, bool batch_first) {
    const auto batch = static_cast<int64_t>(lengths.size());
    Tensor values;
    const bool* reset = nullptr;
    if (resets) {
        const at::DimVector size =
            batch_first ? at::DimVector{batch, steps} : at::DimVector{steps, batch};
        TORCH_CHECK_VALUE(resets->scalar_type() == at::kBool && resets->sizes() == size,
                          "resets: expected a bool tensor of size ", at::IntArrayRef(size),
                          ", got ", resets->scalar_type(), " of size ", resets->sizes());
        values = resets->to(at::kCPU).contiguous();
        reset = values.const_data_ptr<bool>();
    }
    const int64_t row_stride = batch_first ? steps : 1, step_stride = batch_first ? 1 : batch;
    std::vector<Segment> result;
    result.reserve(batch);
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t t = 0; t < lengths[b]; ++t) {
            const bool is_reset = reset && reset[t * step_stride + b * row_stride];
            if (t == 0 || is_reset)
                result.push_back({.row = b, .first = t, .length = 0, .starts_reset = is_reset});
            ++result.back().length;
        }
        result.back().ends_row = true;
    }
    return result;
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// N rows of packed data, S segments and K steps of the longest.
//   order        [N] where in the padded data, as rows [T * B] (or [B * T]), a packed row is
//   inverse      [T * B] where in the packed data a padded row is, or -1
//   batch_sizes  [K] of the packed data
//   first, last  [S] the row whose initial state enters a segment's first step, or its last step
//                in the reverse direction; -1 for zeros
//   begin, end   [B] the first and the last segment of a row
Result segments(const OptionalTensor& resets, const OptionalTensor& lengths, int64_t steps,
                int64_t batch, bool batch_first) {
    int64_t rows = 0;
    TORCH_CHECK_VALUE(steps >= 1 && batch >= 1 && !__builtin_mul_overflow(steps, batch, &rows) &&
                          rows < INT64_MAX / 64,
                      "segments: expected at least one step and row, got ", steps, " steps of ",
                      batch, " rows");
    TORCH_CHECK_VALUE(resets || lengths, "segments: expected resets or lengths");
    // Before memory is allocated for so many rows.
    TORCH_CHECK_VALUE(!lengths || (lengths->dim() == 1 && lengths->size(0) == batch),
                      "lengths: expected an int64 tensor of size [", batch, "]");
    TORCH_CHECK_VALUE(!resets || resets->numel() == rows, "resets: expected a bool tensor of ",
                      steps, " steps of ", batch, " rows, got size ", resets->sizes());
    std::vector<Segment> found =
        segments_of_rows(resets, steps, lengths_of_rows(lengths, steps, batch), batch_first);
    std::stable_sort(found.begin(), found.end(),
                     [](const Segment& a, const Segment& b) { return a.length > b.length; });

    const auto count = static_cast<int64_t>(found.size());
    int64_t data_rows = 0;
    for (const Segment& segment : found) data_rows += segment.length;
    const auto options = at::TensorOptions(at::kLong);
    const Tensor order = at::empty({data_rows}, options), inverse = at::full({rows}, -1, options),
                 batch_sizes = at::empty({found.front().length}, options),
                 first = at::empty({count}, options), last = at::empty({count}, options),
                 begin = at::empty({batch}, options), end = at::empty({batch}, options);
    auto *of_order = order.mutable_data_ptr<int64_t>(),
         *of_inverse = inverse.mutable_data_ptr<int64_t>(),
         *of_sizes = batch_sizes.mutable_data_ptr<int64_t>();
    const int64_t row_stride = batch_first ? steps : 1, step_stride = batch_first ? 1 : batch;
    int64_t next = 0, active = count;
    for (int64_t k = 0; k < found.front().length; ++k) {
        while (found[active - 1].length <= k) --active;
        of_sizes[k] = active;
        for (int64_t s = 0; s < active; ++s, ++next) {
            const int64_t row = (found[s].first + k) * step_stride + found[s].row * row_stride;
            of_order[next] = row;
            of_inverse[row] = next;
        }
    }
    for (int64_t s = 0; s < count; ++s) {
        const Segment& segment = found[s];
        const bool enters = segment.first == 0 && !segment.starts_reset;
        first.mutable_data_ptr<int64_t>()[s] = enters ? segment.row : -1;
        last.mutable_data_ptr<int64_t>()[s] = segment.ends_row ? segment.row : -1;
        if (segment.first == 0) begin.mutable_data_ptr<int64_t>()[segment.row] = s;
        if (segment.ends_row) end.mutable_data_ptr<int64_t>()[segment.row] = s;
    }
    return {order, inverse, batch_sizes, first, last, begin, end};
}

TORCH_LIBRARY_FRAGMENT(fastrnn, m) {
    m.def(
        "segments(Tensor? resets, Tensor? lengths, SymInt steps, SymInt batch, "
        "bool batch_first) -> "
        "(Tensor order, Tensor inverse, Tensor batch_sizes, Tensor first, Tensor last, "
        "Tensor begin, Tensor end)",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fastrnn, CompositeExplicitAutograd, m) { m.impl("segments", &segments); }

}  // namespace
}  // namespace fastrnn

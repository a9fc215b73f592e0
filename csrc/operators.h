// The operators as C++ calls them, by way of the dispatcher.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <tuple>

#include "network.h"

namespace fastrnn {

using ForwardTensors =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using ForwardOperator = ForwardTensors(const std::string&, const at::Tensor&, const at::Tensor&,
                                       const OptionalTensor&, at::TensorList, const OptionalTensor&,
                                       bool, int64_t, bool, double, bool, bool, bool);
using BackwardOperator = BackwardResult(const std::string&, const OptionalTensor&,
                                        const OptionalTensor&, const OptionalTensor&,
                                        const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                        at::TensorList, const OptionalTensor&, bool, int64_t, bool,
                                        double, const at::Tensor&, const at::Tensor&,
                                        const at::Tensor&, const at::Tensor&, c10::List<bool>);

inline const c10::TypedOperatorHandle<ForwardOperator>& forward_operator() {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fastrnn::forward", "")
                               .typed<ForwardOperator>();
    return op;
}

inline const c10::TypedOperatorHandle<BackwardOperator>& backward_operator() {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fastrnn::backward", "")
                               .typed<BackwardOperator>();
    return op;
}

// None is an undefined tensor in lists.
inline OptionalTensor optional(const at::Tensor& t) {
    return t.defined() ? OptionalTensor(t) : std::nullopt;
}
inline at::Tensor tensor(const OptionalTensor& t) { return t ? *t : at::Tensor(); }

}  // namespace fastrnn

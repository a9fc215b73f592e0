#include "schema.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <string_view>
#include <type_traits>

namespace fastrnn {
namespace {

using at::Tensor;

// The names of C++'s types in a schema.
template <class T>
constexpr const char* schema_type = nullptr;
template <>
constexpr const char* schema_type<bool> = "bool";
template <>
constexpr const char* schema_type<int64_t> = "int";
template <>
constexpr const char* schema_type<double> = "float";
template <>
constexpr const char* schema_type<std::string> = "str";
template <>
constexpr const char* schema_type<Tensor> = "Tensor";
template <>
constexpr const char* schema_type<OptionalTensor> = "Tensor?";
template <>
constexpr const char* schema_type<std::vector<Tensor>> = "Tensor[]";
template <>
constexpr const char* schema_type<std::vector<bool>> = "bool[]";

template <class Call>
std::string arguments_schema() {
    std::string text;
    Call call{};
    Call::for_each_argument(call, [&](std::string_view name, const auto& value) {
        text += text.empty() ? "" : ", ";
        text += std::string(schema_type<std::decay_t<decltype(value)>>) + " " + std::string(name);
        if (name == "recompute") text += "=False";
    });
    return text;
}

template <class T>
T taken(c10::IValue&& value) {
    if constexpr (std::is_same_v<T, std::vector<Tensor>>) {
        return std::move(value).toTensorVector();
    } else if constexpr (std::is_same_v<T, std::vector<bool>>) {
        const c10::List<bool> list = std::move(value).toBoolList();
        return {list.begin(), list.end()};
    } else if constexpr (std::is_same_v<T, OptionalTensor>) {
        return std::move(value).toOptional<Tensor>();
    } else if constexpr (std::is_same_v<T, std::string>) {
        return value.toStringRef();
    } else {
        return std::move(value).to<T>();
    }
}

template <class Call>
Call popped(Stack& stack) {
    Call call{};
    size_t count = 0;
    Call::for_each_argument(call, [&](const char*, const auto&) { ++count; });
    size_t next = stack.size() - count;
    Call::for_each_argument(call, [&](const char*, auto& value) {
        value = taken<std::decay_t<decltype(value)>>(std::move(stack[next++]));
    });
    torch::jit::drop(stack, count);
    return call;
}

template <class Call>
Stack stack_of(const Call& call) {
    Stack stack;
    Call::for_each_argument(call, [&](const char*, const auto& value) {
        if constexpr (std::is_same_v<std::decay_t<decltype(value)>, std::vector<bool>>) {
            c10::List<bool> list;
            for (const bool yes : value) list.push_back(yes);
            stack.emplace_back(std::move(list));
        } else {
            stack.emplace_back(value);
        }
    });
    return stack;
}

ForwardResult forward_result(Stack stack) {
    const auto of = [&](size_t i) { return std::move(stack[i]).toTensor(); };
    return {of(0), of(1), of(2), of(3), of(4), of(5), of(6)};
}

BackwardResult backward_result(Stack stack) {
    const auto of = [&](size_t i) { return std::move(stack[i]).toTensor(); };
    return {of(0), of(1), of(2), std::move(stack[3]).toTensorVector()};
}

const c10::OperatorHandle& forward_operator() {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fastrnn::forward", "");
    return op;
}

const c10::OperatorHandle& backward_operator() {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fastrnn::backward", "");
    return op;
}

}  // namespace

std::string ForwardCall::schema() {
    return "forward(" + arguments_schema<ForwardCall>() +
           ") -> (Tensor output, Tensor h_n, Tensor c_n, Tensor hidden, Tensor saved, Tensor c, "
           "Tensor dropout_mask)";
}

std::string BackwardCall::schema() {
    return "backward(" + arguments_schema<BackwardCall>() +
           ") -> (Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor[] grad_weights)";
}

ForwardCall ForwardCall::pop(Stack& stack) { return popped<ForwardCall>(stack); }
BackwardCall BackwardCall::pop(Stack& stack) { return popped<BackwardCall>(stack); }

ForwardResult ForwardCall::operator()() const {
    Stack stack = stack_of(*this);
    forward_operator().callBoxed(&stack);
    return forward_result(std::move(stack));
}

ForwardResult ForwardCall::redispatch(c10::DispatchKeySet keys) const {
    Stack stack = stack_of(*this);
    forward_operator().redispatchBoxed(keys, &stack);
    return forward_result(std::move(stack));
}

BackwardResult BackwardCall::operator()() const {
    Stack stack = stack_of(*this);
    backward_operator().callBoxed(&stack);
    return backward_result(std::move(stack));
}

BackwardResult BackwardCall::redispatch(c10::DispatchKeySet keys) const {
    Stack stack = stack_of(*this);
    backward_operator().redispatchBoxed(keys, &stack);
    return backward_result(std::move(stack));
}

void push(Stack& stack, const ForwardResult& r) {
    for (const Tensor* t : {&r.output, &r.h_n, &r.c_n, &r.hidden, &r.saved, &r.c, &r.dropout_mask})
        stack.emplace_back(*t);
}

void push(Stack& stack, const BackwardResult& result) {
    const auto& [grad_input, grad_h0, grad_c0, grad_weights] = result;
    for (const Tensor* t : {&grad_input, &grad_h0, &grad_c0}) stack.emplace_back(*t);
    stack.emplace_back(grad_weights);
}

}  // namespace fastrnn

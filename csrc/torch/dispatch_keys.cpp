#include "dispatch_keys.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/PyInterpreter.h>

namespace fastrnn {
namespace {

namespace py = pybind11;

bool only(c10::DispatchKeySet keys, c10::DispatchKeySet usual) {
    return (keys.raw_repr() & ~usual.raw_repr()) == 0;
}

// Whether all active torch function modes are torch's device contexts (torch.set_default_device).
// These only change the device of new tensors, and ours are created on the device of the input.
bool only_device_contexts() {
    using at::impl::PythonTorchFunctionTLS;
    static const py::handle device_context =
        py::object(py::module_::import("torch.utils._device").attr("DeviceContext")).release();
    for (int64_t i = 0; i < PythonTorchFunctionTLS::stack_len(); ++i) {
        PyObject* mode = PythonTorchFunctionTLS::get_stack_at(i)->ptr(getPyInterpreter());
        if (reinterpret_cast<PyObject*>(Py_TYPE(mode)) != device_context.ptr()) return false;
    }
    return true;
}

}  // namespace

bool only_default_keys_active() {
    constexpr c10::DispatchKeySet usual(
        {c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
    const auto included = c10::impl::tls_local_dispatch_key_set().included_;
    return only(included, usual) &&
           (!at::impl::torch_function_mode_enabled() || only_device_contexts());
}

bool autocast_enabled() {
    return at::autocast::is_autocast_enabled(at::kCPU) ||
           at::autocast::is_autocast_enabled(at::kCUDA);
}

bool has_only_default_keys(const at::Tensor& t, bool tangent_allowed) {
    constexpr c10::DispatchKeySet usual =
        c10::DispatchKeySet({c10::DispatchKey::Dense, c10::DispatchKey::ADInplaceOrView,
                             c10::DispatchKey::AutogradFunctionality, c10::DispatchKey::AutocastCPU,
                             c10::DispatchKey::AutocastCUDA}) |
#ifdef FASTRNN_HAS_CUDA
        c10::DispatchKeySet(c10::BackendComponent::CUDABit) |
#endif
        c10::DispatchKeySet(c10::BackendComponent::CPUBit);
    return only(t.key_set(), usual) && (tangent_allowed || !t._fw_grad(/*level=*/0).defined());
}

at::Tensor as_step(const at::Tensor& t) {
    at::DimVector sizes(3 - t.dim(), 1), strides(3 - t.dim(), t.numel());
    sizes.append(t.sizes().begin(), t.sizes().end());
    strides.append(t.strides().begin(), t.strides().end());
    auto impl = t.unsafeGetTensorImpl()->shallow_copy_and_detach(c10::VariableVersion(), false);
    impl->set_sizes_and_strides(sizes, strides);
    return at::Tensor(std::move(impl));
}

}  // namespace fastrnn

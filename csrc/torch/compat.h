#pragma once

// What differs between the supported versions of torch, each with the version that brought it.
// TORCH_VERSION is tested only here.

#include <torch/version.h>

#define FASTRNN_TORCH_AT_LEAST(major, minor) \
    (TORCH_VERSION_MAJOR * 1000 + TORCH_VERSION_MINOR >= (major) * 1000 + (minor))

// 2.7: compiled autograd calls functions of packed arguments, and Node::compiled_args is const.
// Before, it traces `apply` with proxies in the place of the saved tensors.
#if FASTRNN_TORCH_AT_LEAST(2, 7)
#define FASTRNN_HAS_PACKED_ARGS
#define FASTRNN_COMPILED_ARGS_CONST const
#else
#define FASTRNN_COMPILED_ARGS_CONST
#endif

// 2.13: nodes of autograd's graph are held by c10::intrusive_ptr. Before, by std::shared_ptr.
#if FASTRNN_TORCH_AT_LEAST(2, 13)
#define FASTRNN_HAS_INTRUSIVE_NODES
#endif

// Scratch memory for the kernels.
#pragma once
#include <stddef.h>

#include "../api.h"

namespace fastrnn::cpu {

// Memory of at least so many bytes, 64-byte aligned, while this object lives. A thread keeps up to
// scratch_kept bytes (choices.h) for its next call: fresh memory costs a page fault every 4 KB,
// which for a layer of some hundred units takes longer than the layer. Throws std::runtime_error if
// there is no memory left.
class FASTRNN_API Scratch {
public:
    explicit Scratch(size_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    void* data() const { return data_; }

private:
    void* data_;
    bool kept_;
};

}  // namespace fastrnn::cpu

// The parts of a layer's scratch memory, laid out one after the other. Laid out from a null base it
// tells how many bytes are needed; from the real base it gives the pointers: one description serves
// both.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace fastrnn::cpu {

// The values from row to row of a matrix of T with so many columns: an odd number of cache lines, or
// rows some KB apart would share few places in the cache.
template <class T>
constexpr int64_t odd_lines(int64_t columns) {
    constexpr int64_t line = 64 / sizeof(T);
    return ((columns + line - 1) / line | 1) * line;
}

class Workspace {
public:
    explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

    template <class T>
    T* take(int64_t count) {
        T* part = reinterpret_cast<T*>(base_ + size_);
        // Whole cache lines, and one more, so that no two parts share a line or start at the same
        // offset of a page.
        size_ += (count * sizeof(T) + 63) / 64 * 64 + 64;
        return part;
    }

    size_t size() const { return size_; }

private:
    char* base_;
    size_t size_ = 0;
};

}  // namespace fastrnn::cpu

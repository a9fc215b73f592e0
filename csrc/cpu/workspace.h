// The layout of a layer's scratch memory: one piece after another. With a null base it gives the
// number of bytes, with the real base the pointers, so that one description serves both.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace fastrnn::cpu {

// The distance between rows of a matrix of T with so many columns: an odd number of cache lines.
// Rows a power of two apart would share few sets of the cache.
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
        T* piece = reinterpret_cast<T*>(base_ + size_);
        // Whole cache lines, and one more, so that no two pieces share a line or start at the same
        // offset in a page.
        size_ += (count * sizeof(T) + 63) / 64 * 64 + 64;
        return piece;
    }

    size_t size() const { return size_; }

private:
    char* base_;
    size_t size_ = 0;
};

}  // namespace fastrnn::cpu

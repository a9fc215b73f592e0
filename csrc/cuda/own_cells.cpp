// The kernels on a GPU of the user's own cells.
#include <array>
#include <atomic>

#include "../cells/known.h"
#include "own_cell.h"

namespace fastrnn::cuda {
namespace {

// By cell and storage. Readers take no lock: what a pointer points to is complete before it is set.
std::array<std::array<std::atomic<const OwnKernels*>, 4>, most_own_cells> added{};

std::atomic<const OwnKernels*>& place(int cell, Storage storage) {
    return added[cell - cell_count][static_cast<int>(storage)];
}

}  // namespace

void add_own_kernels(int cell, Storage storage, const OwnKernels& kernels) {
    place(cell, storage) = &kernels;
}

const OwnKernels* own_kernels(int cell, Storage storage) { return place(cell, storage); }

}  // namespace fastrnn::cuda

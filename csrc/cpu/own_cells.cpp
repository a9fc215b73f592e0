// The user's own cells that were added to this process.
#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>

#include "../cells/known.h"
#include "dispatch.h"

namespace fastrnn {
namespace {

// Readers take no lock: a cell is complete before the number of cells counts it, and stays where it
// is. A kernel may be added later.
struct OwnCell {
    std::string name;
    CellInfo info;
    std::array<std::atomic<const cpu::Kernel*>, 4> kernels{};  // in the order of Storage
    std::atomic<const cpu::DualKernel<float>*> of_float{};
    std::atomic<const cpu::DualKernel<double>*> of_double{};
};

std::array<std::unique_ptr<OwnCell>, most_own_cells> own_cells;
std::atomic<int> own_count{0};
std::mutex adding;

OwnCell& own(int cell) { return *own_cells[cell - cell_count]; }

}  // namespace

int known_cells() { return cell_count + own_count; }

const CellInfo& own_info_of(int cell) { return own(cell).info; }

int own_index_of(std::string_view name) {
    const int count = known_cells();
    for (int i = cell_count; i < count; ++i)
        if (name == own(i).name) return i;
    return -1;
}

int add_own_cell(const char* name, const CellInfo& info) {
    const std::lock_guard<std::mutex> lock(adding);
    const int known = index_of(name), count = own_count;
    if (known >= cell_count) return known;
    if (known >= 0 || count == most_own_cells) return -1;
    auto cell = std::make_unique<OwnCell>();
    cell->name = name;
    cell->info = info;
    cell->info.name = cell->name.c_str();
    own_cells[count] = std::move(cell);
    own_count = count + 1;
    return cell_count + count;
}

namespace cpu {
namespace {

template <class T>
const T& loaded(const std::atomic<const T*>& kernel) {
    const T* found = kernel;
    if (!found) throw std::logic_error("fastrnn: this cell was not compiled for this dtype");
    return *found;
}

// of_type: where the cell keeps the kernels of double backward.
template <class T>
bool add(const char* name, const CellInfo& info, Storage storage, const Kernel& kernel,
         const DualKernel<T>& dual, std::atomic<const DualKernel<T>*> OwnCell::* of_type) {
    const int index = add_own_cell(name, info);
    if (index < 0) return false;
    OwnCell& cell = own(index);
    cell.*of_type = &dual;
    cell.kernels[static_cast<int>(storage)] = &kernel;
    return true;
}

}  // namespace

bool add_cell(const char* name, const CellInfo& info, Storage storage, const Kernel& kernel,
              const DualKernel<float>& dual) {
    return add(name, info, storage, kernel, dual, &OwnCell::of_float);
}

bool add_cell(const char* name, const CellInfo& info, Storage storage, const Kernel& kernel,
              const DualKernel<double>& dual) {
    return add(name, info, storage, kernel, dual, &OwnCell::of_double);
}

bool has_own_kernel(int cell, Storage storage) {
    return own(cell).kernels[static_cast<int>(storage)].load();
}

const Kernel& own_kernel(int cell, Storage storage) {
    return loaded(own(cell).kernels[static_cast<int>(storage)]);
}

template <>
const DualKernel<float>& own_dual_kernel(int cell) {
    return loaded(own(cell).of_float);
}
template <>
const DualKernel<double>& own_dual_kernel(int cell) {
    return loaded(own(cell).of_double);
}

}  // namespace cpu
}  // namespace fastrnn

// The cells of a process: those of the registry, and after them the user's own, which are compiled
// and added while it runs (cpu/own_cell.h).
#pragma once
#include <string_view>

#include "../api.h"
#include "registry.h"

namespace fastrnn {

inline constexpr int most_own_cells = 4096;

// A cell's index is below this number, which only grows.
FASTRNN_API int known_cells();

// Of the user's own cells.
FASTRNN_API const CellInfo& own_info_of(int cell);
FASTRNN_API int own_index_of(std::string_view name);

// The index of the user's own cell of that name, which is added if it is not yet known: the same
// for all devices. -1 if there are already too many, or if one of the registry has the name.
FASTRNN_API int add_own_cell(const char* name, const CellInfo& info);

inline const CellInfo& info_of(int cell) {
    return cell < cell_count ? cells[cell] : own_info_of(cell);
}

// The index of the cell of that name, or -1. Each call of a layer looks its cell up.
inline int index_of(std::string_view name) {
    for (int i = 0; i < cell_count; ++i)
        if (name == cells[i].name) return i;
    return own_index_of(name);
}

// The cell of that name, or null.
inline const CellInfo* find_info(std::string_view name) {
    const int cell = index_of(name);
    return cell < 0 ? nullptr : &info_of(cell);
}

}  // namespace fastrnn

// The list of cells. A line here, a header beside it and a function of the same name in
// fastrnn/reference.py make a cell: its kernels on every device, its backward, its fake kernels and
// its tests follow.
#pragma once
#include <string_view>

#include "gru.h"
#include "lstm.h"
#include "rnn.h"

//   name, type
#define FASTRNN_FOR_EACH_CELL(X)                 \
    X(lstm, ::fastrnn::Lstm)                     \
    X(gru, ::fastrnn::Gru)                       \
    X(rnn_tanh, ::fastrnn::Rnn<::fastrnn::Tanh>) \
    X(rnn_relu, ::fastrnn::Rnn<::fastrnn::Relu>)

namespace fastrnn {

// What the code that is not templated on the cell must know of it.
struct CellInfo {
    const char* name;
    int gates;
    bool has_c;
    int saved;
    int grads;
    bool needs_h_prev;
    bool allows_projection;
};

#define FASTRNN_CELL_INFO(name, Cell) \
    {#name,                           \
     Cell::gates,                     \
     Cell::has_c,                     \
     Cell::saved,                     \
     Cell::grads,                     \
     Cell::needs_h_prev,              \
     ::fastrnn::allows_projection<Cell>},
inline constexpr CellInfo cells[] = {FASTRNN_FOR_EACH_CELL(FASTRNN_CELL_INFO)};
#undef FASTRNN_CELL_INFO

inline constexpr int cell_count = sizeof(cells) / sizeof(cells[0]);

// Null if there is none of that name.
inline const CellInfo* find_info(std::string_view name) {
    for (const CellInfo& info : cells)
        if (name == info.name) return &info;
    return nullptr;
}

}  // namespace fastrnn

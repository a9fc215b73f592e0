// The list of cells. A cell is a line here, a header next to this file and a function of the same
// name in fastrnn/reference.py. Its kernels on every device, its backward, its fake kernels and its
// tests follow from these.
#pragma once
#include "dependence.h"
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

// The constants of a cell, for code that is not templated on it.
struct CellInfo {
    const char* name;
    int gates;
    bool has_c;
    int c_states;
    int vectors;
    bool diagonal;
    int saved;
    int grads;
    bool needs_h_prev;
    bool allows_projection;
};

#define FASTRNN_CELL_INFO(cell_name, Cell)     \
    {.name = #cell_name,                       \
     .gates = Cell::gates,                     \
     .has_c = Cell::has_c,                     \
     .c_states = ::fastrnn::c_states<Cell>,    \
     .vectors = ::fastrnn::vectors<Cell>,      \
     .diagonal = ::fastrnn::is_diagonal<Cell>, \
     .saved = Cell::saved,                     \
     .grads = Cell::grads,                     \
     .needs_h_prev = Cell::needs_h_prev,       \
     .allows_projection = ::fastrnn::allows_projection<Cell>},
inline constexpr CellInfo cells[] = {FASTRNN_FOR_EACH_CELL(FASTRNN_CELL_INFO)};

inline constexpr int cell_count = sizeof(cells) / sizeof(cells[0]);

#define FASTRNN_IS_DECLARED(cell_name, Cell) &&::fastrnn::Declared<Cell>::ok
static_assert(true FASTRNN_FOR_EACH_CELL(FASTRNN_IS_DECLARED));
#undef FASTRNN_IS_DECLARED

}  // namespace fastrnn
